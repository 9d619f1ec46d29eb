"""An EC2 endpoint over HTTP: moto, with a hand on what it answers.

    with Ec2() as ec2:
        ec2.fault("RunInstances", "RequestLimitExceeded", 503, times=2)
        ec2.url, ec2.client()

``addresses`` are handed out as public IPs instead of moto's invented ones, one per
instance that has not ended: machines that really listen there (tests/vm).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs
from xml.etree import ElementTree

REGION = "eu-central-1"
_ERROR = (
    "<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
    "<RequestID>1</RequestID></Response>"
)


@dataclass
class _Fault:
    action: str
    code: str
    status: int
    times: int
    after: bool  # the work is done all the same
    when: Callable[[dict[str, list[str]]], bool] = field(default=lambda asked: True)


class Ec2:
    """A real server on a loopback port; everything it was asked is in ``asked``."""

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.on_terminate: Callable[[str], None] = lambda address: None
        self.addresses = list(addresses)
        self._given: dict[str, str] = {}  # instance ID → address
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()
        self._image = ""
        self._held: dict[str, threading.Event] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def client(self) -> Any:
        """boto3 as the account's owner uses it."""
        import boto3

        keys = {"aws_access_key_id": "owner", "aws_secret_access_key": "secret"}
        return boto3.client("ec2", region_name=REGION, endpoint_url=self.url, **keys)

    def image(self) -> str:
        """Some image; the list of all of them is long."""
        if not self._image:
            self._image = str(self.client().describe_images()["Images"][0]["ImageId"])
        return self._image

    def fault(
        self,
        action: str,
        code: str,
        status: int = 400,
        *,
        times: int = 1,
        after: bool = False,
        when: Callable[[dict[str, list[str]]], bool] = lambda asked: True,
    ) -> None:
        """Answer so the next ``times`` times; ``after``: it is done, and only the answer is lost."""
        self._faults.append(_Fault(action, code, status, times, after, when))

    def hold(self, action: str) -> threading.Event:
        """Its next call is done, and not answered before the event is set."""
        self._held[action] = threading.Event()
        return self._held[action]

    def actions(self, name: str) -> list[dict[str, list[str]]]:
        return [asked for action, asked in self.asked if action == name]

    def given(self) -> list[str]:
        """The addresses of instances that have not ended."""
        with self._lock:
            return list(self._given.values())

    def __enter__(self) -> Self:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            protocol_version = "HTTP/1.0"  # one thread for each request, gone with its answer

            def log(self, type: str, message: str, *args: Any) -> None:
                return

        self._moto: Any = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="Thread-ec2", daemon=True)
        self._thread.start()
        self.reset()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    def reset(self) -> None:
        """An empty account."""
        import urllib.request

        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST"), timeout=30).close()
        self.asked.clear()
        self._faults.clear()
        self._given.clear()

    # -- between the client and moto -------------------------------------------------------

    def _app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        asked = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
        action = asked.get("Action", [""])[0]
        with self._lock:
            if action:
                self.asked.append((action, asked))
            fault = next((one for one in self._faults if one.action == action and one.times and one.when(asked)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and not fault.after:
            return self._refuse(fault, start_response)
        import io

        answer: list[Any] = []
        inner = {**environ, "wsgi.input": io.BytesIO(body)}
        chunks = b"".join(self._moto(inner, lambda status, headers, exc=None: answer.extend((status, headers))))
        if fault is not None:
            return self._refuse(fault, start_response)
        held = self._held.pop(action, None)
        if held is not None:
            held.wait(60)
        if action in ("RunInstances", "DescribeInstances") and self.addresses:
            chunks = self._with_addresses(chunks)
        if action == "TerminateInstances":
            self._take_back(asked)
        headers = [(name, value) for name, value in answer[1] if name.lower() != "content-length"]
        start_response(answer[0], [*headers, ("Content-Length", str(len(chunks)))])
        return [chunks]

    def _refuse(self, fault: _Fault, start_response: Any) -> Iterable[bytes]:
        text = _ERROR.format(code=fault.code, message=f"{fault.code} on purpose").encode()
        start_response(f"{fault.status} X", [("Content-Type", "text/xml"), ("Content-Length", str(len(text)))])
        return [text]

    def _with_addresses(self, xml: bytes) -> bytes:
        """Each instance's invented public IP replaced by one of ours."""
        root = ElementTree.fromstring(xml)
        space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
        for item in root.iter(f"{space}item"):
            instance, invented = item.find(f"{space}instanceId"), item.find(f"{space}ipAddress")
            if instance is None or invented is None or not instance.text or not invented.text:
                continue
            with self._lock:
                free = [one for one in self.addresses if one not in self._given.values()]
                address = self._given.get(instance.text) or (free[0] if free else "")
                if address:
                    self._given[instance.text] = address
            xml = xml.replace(f">{invented.text}<".encode(), f">{address}<".encode())
        return xml

    def _take_back(self, asked: dict[str, list[str]]) -> None:
        for key, (instance, *_) in asked.items():
            if key.startswith("InstanceId") and instance in self._given:
                # Not given to the next one before it is as good as new.
                self.on_terminate(self._given[instance])
                with self._lock:
                    del self._given[instance]
