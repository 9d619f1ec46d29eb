"""The HTTP server's loop survives errors, or the process ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxlib.control.http import Api
from fluxlib.control.server import WebServer
from fluxlib.control.server.listener import Listener
from fluxlib.lifecycle import Deadline
from tests.http.fakes import Fakes, config
from tests.http.sockets import Wire
from tests.support.programs import TOP, free_port, wait_until

Serve = Callable[..., WebServer]


def _health(port: int) -> int:
    with Wire(port) as wire:
        return wire.send("GET", "/health").answer()[0]


def test_an_error_while_a_connection_is_taken_closes_that_connection_only(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(Fakes())
    assert _health(server.port) == 200
    failing = [True]
    real = Listener.set_socket_options

    def once(self: Listener, connection: Any) -> None:
        if failing.pop() if failing else False:
            raise OSError(errno.ENOSPC, "fs.epoll.max_user_watches reached")
        real(self, connection)

    monkeypatch.setattr(Listener, "set_socket_options", once)
    with Wire(server.port) as wire:
        assert wire.socket.recv(1) == b""
    assert _health(server.port) == 200
    report = server.report()
    assert (report.alive, report.crashes) == (True, 1)
    assert "max_user_watches" in report.last_error


def test_an_error_in_the_loop_is_counted_and_the_loop_goes_on(serve: Serve) -> None:
    server = serve(Fakes())
    listener = server._listeners[0]
    real = listener.tidy
    once = threading.Event()

    def tidy(now: float) -> None:
        if not once.is_set():
            once.set()
            raise ValueError("boom")
        real(now)

    listener.tidy = tidy
    listener.untidy = True
    listener.wake()
    wait_until(once.is_set, "the error")
    assert _health(server.port) == 200
    assert server.report().last_error == "ValueError: boom"


def test_a_loop_that_cannot_go_on_says_so_once() -> None:
    reasons: list[str] = []
    server = WebServer(Api(Fakes().services()), config(port=0), on_failure=reasons.append)

    def turn() -> None:
        raise ValueError("boom")

    server._turn = turn  # type: ignore[method-assign]
    server.start()
    wait_until(lambda: not server.report().alive, "the loop to end")
    server.stop(Deadline(1))
    assert reasons == ["the HTTP server failed 10 times in a row: ValueError: boom"]


_BROKEN = """
import sys
from pathlib import Path
from fluxlib.config.control import load_control
from fluxlib.control import app
from fluxlib.control.server import WebServer
from fluxlib.lifecycle import StopSignal

def turn(self):
    raise ValueError("boom")

WebServer._turn = turn
sys.exit(app.serve(load_control(Path(sys.argv[1])), StopSignal()))
"""


def test_a_flux_that_cannot_serve_any_more_ends_with_an_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "flux.yaml"
    file.write_text(
        f"api_key: {'k' * 32}\nlisten_host: 127.0.0.1\nport: {free_port()}\ndisable_grpc_tls: true\n"
        f"state_dir: {tmp_path / 'state'}\ncerts_dir: {tmp_path / 'certs'}\n"
    )
    file.chmod(0o600)
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    run = subprocess.run(
        [sys.executable, "-c", _BROKEN, file], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1, run.stderr
