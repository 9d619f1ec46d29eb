"""A fresh application for each test, with and without the fast path; its client checks answers by the document."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import pytest
from werkzeug.test import Client as WsgiClient

from fluxlib.control.http import Api
from fluxlib.control.http.auth import FailedAttempts
from fluxlib.control.server import WebServer
from fluxlib.control.server.loop import AskingPoller, best_poller
from fluxlib.lifecycle import Deadline
from tests.http.fakes import ADMIN, Fakes


@dataclass
class Reply:
    status: int
    body: bytes
    headers: Mapping[str, str]
    json: Any = None


class Document:
    """GET /openapi.json as a judge of what was answered."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._paths = [
            (re.compile(re.sub(r"\{[a-z_]+\}", "[^/]+", path)), operations)
            for path, operations in document["paths"].items()
        ]

    def check(self, method: str, path: str, reply: Reply) -> None:
        operations = next(
            (ops for pattern, ops in self._paths if pattern.fullmatch(path.partition("?")[0].removesuffix("/"))), None
        )
        if operations is None or method.lower() not in operations:
            # Only what no route answers.
            assert reply.status in (400, 404, 405, 204), (method, path, reply)
            return
        responses = operations[method.lower()]["responses"]
        assert str(reply.status) in responses, f"{method} {path} answered {reply.status}, which is not documented"
        content = responses[str(reply.status)]["content"]
        assert reply.headers["Content-Type"] in content
        schema = content.get("application/json", {}).get("schema")
        if schema is not None:
            whole = {**schema, "components": self.document["components"]}
            jsonschema.validate(reply.json, whole, cls=jsonschema.Draft202012Validator)


class Client:
    """Calls the application in this process. ``key`` None = a stranger."""

    def __init__(self, app: Api) -> None:
        self.app = app
        self._client = WsgiClient(app)
        self._document: Document | None = None

    @property
    def document(self) -> Document:
        if self._document is None:
            self._document = Document(self._client.get("/openapi.json").json)
        return self._document

    def __call__(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        *,
        key: str | None = ADMIN,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        address: str = "192.0.2.1",
        **environ: Any,
    ) -> Reply:
        sent = dict(headers or {})
        if key is not None:
            sent.setdefault("X-API-Key", key)
        response = self._client.open(
            path,
            method=method,
            data=data,
            json=json,
            headers=sent,
            environ_overrides={"REMOTE_ADDR": address, **environ},
            buffered=True,  # closes the body, as a server does
        )
        is_json = response.headers["Content-Type"] == "application/json" and method != "HEAD" and response.data
        reply = Reply(response.status_code, response.data, response.headers, response.json if is_json else None)
        if method not in ("HEAD", "OPTIONS"):
            self.document.check(method, path, reply)
        if reply.status >= 400 and is_json and "status" not in reply.json:
            assert reply.json["error"]
        return reply


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["fast", "flask"])
def fast(request: pytest.FixtureRequest) -> bool:
    """Both ways in: the fast path before Flask, or everything through it."""
    return bool(request.param == "fast")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def client(fakes: Fakes, fast: bool, clock: Clock) -> Client:
    return Client(Api(fakes.services(), fast=fast, attempts=FailedAttempts(clock)))


@pytest.fixture
def make_client(fast: bool, clock: Clock) -> Callable[[Fakes], Client]:
    return lambda fakes: Client(Api(fakes.services(), fast=fast, attempts=FailedAttempts(clock)))


@pytest.fixture(params=["epoll", "poll"])
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., WebServer]]:
    """Starts real servers on free ports and stops them; on the loop of Linux and on that of the other systems."""
    if request.param == "epoll" and sys.platform != "linux":
        pytest.skip("epoll is Linux's")
    poller = best_poller if request.param == "epoll" else AskingPoller
    servers: list[WebServer] = []

    def start(fakes: Fakes, *, fast: bool = True) -> WebServer:
        app = Api(fakes.services(), fast=fast)
        servers.append(WebServer(app, replace(fakes.config, port=0), poller).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop(Deadline(5))
