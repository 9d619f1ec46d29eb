"""Who holds connections for nothing, and who would write into the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from fluxlib import log
from fluxlib.control.http import Api
from fluxlib.control.server import WebServer
from fluxlib.control.server.loop import AskingPoller, best_poller
from fluxlib.lifecycle import Deadline
from tests.http.fakes import Fakes, config
from tests.http.sockets import Wire, head


@pytest.fixture(params=[best_poller, AskingPoller])
def server(request: pytest.FixtureRequest) -> Iterator[WebServer]:
    server = WebServer(Api(Fakes().services()), config(listen_host="127.0.0.1", port=0), request.param).start()
    yield server
    server.stop(Deadline(5))


def is_open(wire: Wire) -> bool:
    """Asked by the rest of a request."""
    try:
        return bool(wire.socket.recv(1))
    except ConnectionError:
        return False


@pytest.mark.parametrize(
    "begun",
    [
        b"GET / HT",
        head("POST", "/execute/hello", 50) + b'{"args"',
        # Without a size, to a route that needs no key.
        head("GET", "/health", Transfer_Encoding="chunked") + b"1\r\nx\r\n",
    ],
)
def test_a_request_that_drips_is_ended(server: WebServer, begun: bytes) -> None:
    with Wire(server.port) as slow, Wire(server.port) as good:
        slow.raw(begun)
        assert good.send("GET", "/health").answer()[0] == 200
        for after, left in ((30, 2), (61, 1)):
            maintain(server, time.time() + after)
            assert len(server._channels()) == left
        assert good.send("GET", "/health").answer()[0] == 200
        assert not is_open(slow)


def test_a_large_body_with_a_key_may_take_its_time(server: WebServer) -> None:
    size = 1024 * 1024
    with Wire(server.port) as wire:
        wire.raw(head("PUT", "/deploy/hello", size) + b"x")
        wire.raw(bytes(1000))
        with Wire(server.port) as good:
            assert good.send("GET", "/health").answer()[0] == 200
        maintain(server, time.time() + 61)
        wire.raw(bytes(size - 1001))
        assert wire.answer()[0] in (201, 400, 404)


def maintain(server: WebServer, now: float) -> None:
    """What the loop does every half minute."""
    for listener in server._listeners:
        listener.tidy(now)


def test_no_line_of_the_log_can_be_made_up(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        log.set_up("INFO")
        forged = "is away\n2026-01-01 00:00:00,000 INFO fluxlib.audit: api_key from 10.0.0.1: DELETE /nodes: 200\x1b[2J"
        logging.getLogger("fluxlib.x").warning("agent w: %s", forged)
        try:
            raise ValueError(f"a fault\n{forged}")
        except ValueError:
            logging.getLogger("fluxlib.x").exception("it broke")
    finally:
        root.handlers[:], root.level = before
    first, *rest = capsys.readouterr().err.splitlines()
    assert r"is away\x0a2026-01-01" in first
    assert r"\x1b[2J" in first
    assert rest[0].endswith("it broke")
    assert rest[1] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") and line.isprintable() for line in rest[1:])
