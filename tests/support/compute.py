"""A Compute Engine endpoint over HTTP, as the v1 REST reference describes it: instances and zone operations.

There is no emulator of it. This one keeps machines in memory, makes every change an
operation, answers an insert's repeated ``requestId`` with its first operation, and
refuses or breaks what a test tells it to.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

_ROOT = "https://www.googleapis.com/compute/v1"
_FILTER = re.compile(r"labels\.([a-z0-9_-]+)=([a-z0-9_-]+)")


@dataclass
class _Fault:
    what: str
    status: int
    reason: str
    message: str
    times: int
    after: bool


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    body: dict[str, Any] = field(default_factory=dict)


class Compute:
    """One project's zone. ``asked`` holds every request; ``instances`` what there is."""

    def __init__(self, project: str = "proj", zone: str = "europe-west3-a", page: int = 500) -> None:
        self.project, self.zone, self.page = project, zone, page
        self.asked: list[Request] = []
        self.instances: dict[str, dict[str, Any]] = {}
        self.public = True
        self.status = "RUNNING"  # of a machine whose insert is done
        self.slow_waits = 0  # that many waits are answered before the operation is done
        self._operations: dict[str, dict[str, Any]] = {}
        self._by_request: dict[str, str] = {}
        self._faults: list[_Fault] = []
        self._operation_faults: dict[str, list[tuple[str, str]]] = {}
        self._lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fault(
        self,
        what: str,
        status: int,
        reason: str = "backendError",
        message: str = "",
        *,
        times: int = 1,
        after: bool = False,
    ) -> None:
        """``what``: insert, get, list, delete or wait; refused so the next ``times`` times."""
        self._faults.append(_Fault(what, status, reason, message or reason, times, after))

    def operation_fault(self, what: str, code: str, message: str) -> None:
        """The next insert or delete is accepted, and its operation fails."""
        self._operation_faults.setdefault(what, []).append((code, message))

    def count(self, what: str) -> int:
        return sum(1 for request in self.asked if self._what(request) == what)

    def __enter__(self) -> Self:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # one thread for each request, gone with its answer

            def log_message(self, format: str, *args: Any) -> None:
                return

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                text = self.rfile.read(length)
                url = urlsplit(self.path)
                request = Request(
                    self.command, unquote(url.path), parse_qs(url.query), json.loads(text) if text.strip() else {}
                )
                status, body = outer._answer(request)
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json; charset=UTF-8")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _serve  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="Thread-compute", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    # -- the API -----------------------------------------------------------------------

    def _what(self, request: Request) -> str:
        if request.path.endswith("/wait"):
            return "wait"
        if request.path.endswith("/instances"):
            return "insert" if request.method == "POST" else "list"
        if "/operations/" in request.path:
            return "operation"
        return "delete" if request.method == "DELETE" else "get"

    def _answer(self, request: Request) -> tuple[int, Mapping[str, Any]]:
        with self._lock:
            self.asked.append(request)
            prefix = f"/compute/v1/projects/{self.project}/zones/{self.zone}/"
            if not request.path.startswith(prefix):
                return _error(404, "notFound", f"no such resource: {request.path}")
            what, rest = self._what(request), request.path.removeprefix(prefix)
            fault = next((one for one in self._faults if one.what == what and one.times), None)
            if fault is not None:
                fault.times -= 1
                if fault.after:
                    self._do(what, rest, request)
                return _error(fault.status, fault.reason, fault.message)
            return self._do(what, rest, request)

    def _do(self, what: str, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        handlers: dict[str, Callable[[str, Request], tuple[int, Mapping[str, Any]]]] = {
            "insert": self._insert,
            "get": self._get,
            "list": self._list,
            "delete": self._delete,
            "operation": self._operation,
            "wait": self._wait,
        }
        return handlers[what](rest, request)

    def _insert(self, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        token = request.query.get("requestId", [""])[0]
        if token in self._by_request:
            return 200, self._operations[self._by_request[token]]
        body = request.body
        name = body["name"]
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            return _error(400, "invalid", f"Invalid value for field 'resource.name': '{name}'")
        for key, value in body.get("labels", {}).items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
                return _error(400, "invalid", f"Invalid value for field 'resource.labels': '{key}={value}'")
        if name in self.instances:
            return _error(409, "alreadyExists", f"The resource 'projects/…/instances/{name}' already exists")
        operation = self._new("insert", name)
        if token:
            self._by_request[token] = operation["name"]
        if "error" not in operation:
            interfaces = [dict(one) for one in body.get("networkInterfaces", [{}])]
            interfaces[0]["networkIP"] = f"10.156.0.{len(self.instances) + 2}"
            if interfaces[0].get("accessConfigs") and self.public:
                interfaces[0]["accessConfigs"][0]["natIP"] = f"192.0.2.{len(self.instances) + 2}"
            self.instances[name] = {
                **body,
                "kind": "compute#instance",
                "id": str(1000 + len(self.instances)),
                "status": self.status,
                "creationTimestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "machineType": f"{_ROOT}/projects/{self.project}/{body['machineType']}",
                "networkInterfaces": interfaces,
            }
        return 200, operation

    def _get(self, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        name = rest.removeprefix("instances/")
        if name not in self.instances:
            return _error(404, "notFound", f"The resource '{rest}' was not found")
        return 200, self.instances[name]

    def _list(self, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        found = sorted(self.instances.values(), key=lambda one: str(one["name"]))
        for text in request.query.get("filter", []):
            match = _FILTER.fullmatch(text)
            assert match, text
            found = [one for one in found if one.get("labels", {}).get(match.group(1)) == match.group(2)]
        start = int(request.query.get("pageToken", ["0"])[0])
        answer: dict[str, Any] = {"kind": "compute#instanceList", "items": found[start : start + self.page]}
        if start + self.page < len(found):
            answer["nextPageToken"] = str(start + self.page)
        return 200, answer

    def _delete(self, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        name = rest.removeprefix("instances/")
        if name not in self.instances:
            return _error(404, "notFound", f"The resource '{rest}' was not found")
        operation = self._new("delete", name)
        if "error" not in operation:
            del self.instances[name]
        return 200, operation

    def _operation(self, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        return 200, self._operations[rest.split("/")[1]]

    def _wait(self, rest: str, request: Request) -> tuple[int, Mapping[str, Any]]:
        operation = self._operations[rest.split("/")[1]]
        if self.slow_waits > 0:
            self.slow_waits -= 1
            return 200, operation
        operation |= {"status": "DONE", "progress": 100}
        return 200, operation

    def _new(self, kind: str, name: str) -> dict[str, Any]:
        number = len(self._operations) + 1
        operation: dict[str, Any] = {
            "kind": "compute#operation",
            "id": str(number),
            "name": f"operation-{number}",
            "operationType": kind,
            "status": "RUNNING",
            "progress": 0,
            "zone": f"{_ROOT}/projects/{self.project}/zones/{self.zone}",
            "targetLink": f"{_ROOT}/projects/{self.project}/zones/{self.zone}/instances/{name}",
        }
        faults = self._operation_faults.get(kind)
        if faults:
            code, message = faults.pop(0)
            operation |= {
                "error": {"errors": [{"code": code, "message": message}]},
                "httpErrorStatusCode": 403,
                "httpErrorMessage": "FORBIDDEN",
            }
        self._operations[operation["name"]] = operation
        return operation


def _error(status: int, reason: str, message: str) -> tuple[int, Mapping[str, Any]]:
    detail = {"message": message, "domain": "global", "reason": reason}
    return status, {"error": {"code": status, "message": message, "errors": [detail]}}
