"""Which addresses Flux takes, and that nobody else gets its port over a restart."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fluxlib.control.http import Api
from fluxlib.control.server import WebServer
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline
from tests.http.fakes import Fakes, config
from tests.http.sockets import Wire
from tests.support.programs import TOP, free_port


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")


@contextmanager
def _serving(host: str, port: int) -> Iterator[WebServer]:
    fakes = Fakes()
    server = WebServer(Api(fakes.services()), replace(fakes.config, listen_host=host, port=port)).start()
    try:
        yield server
    finally:
        server.stop(Deadline(5))


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_both_loopback_addresses_are_flux(host: str) -> None:
    """`localhost` is ::1 for some clients and 127.0.0.1 for others."""
    with _serving(host, free_port()) as server:
        for loopback in ("127.0.0.1", "::1"):
            with socket.create_connection((loopback, server.port), 10) as client:
                client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                assert client.recv(100).startswith(b"HTTP/1.0 200")


@needs_ipv6
def test_a_stranger_on_the_other_loopback_address_is_named() -> None:
    with socket.socket(socket.AF_INET6) as stranger:
        stranger.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        stranger.bind(("::1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        with pytest.raises(FluxError) as refused:
            WebServer(Api(Fakes().services()), config(port=port, listen_host="127.0.0.1"))
    assert f"process {os.getpid()}" in str(refused.value)
    assert "API keys" in str(refused.value)


class Systemd:
    """The two things systemd does for a service: it takes descriptors to keep, and hands them on at the next start."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(10)
        self.kept: dict[str, int] = {}
        self.removed: list[str] = []

    def take(self, until: str) -> None:
        """What the service says until it says ``until``."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self.socket, 4096, 16)
            words = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            if "FDSTORE" in words:
                (self.kept[words["FDNAME"]],) = descriptors
            if "FDSTOREREMOVE" in words:
                self.removed.append(words["FDNAME"])
            if until in words:
                return

    def close(self) -> None:
        self.socket.close()
        for number in self.kept.values():
            os.close(number)

    def run(self, port: int) -> subprocess.Popen[str]:
        """A server with what was kept, which answers until its standard input ends."""
        numbers = list(self.kept.values())
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(self.path),
            "PYTHONPATH": str(TOP),
            "LISTEN_FDNAMES": ":".join(self.kept),
            "NUMBERS": ",".join(map(str, numbers)),
        }
        return subprocess.Popen(
            [sys.executable, "-c", _SERVICE, str(port)],
            env=environment,
            cwd=TOP,
            pass_fds=numbers,
            stdin=subprocess.PIPE,
            text=True,
        )


_SERVICE = """
import os, sys
numbers = [int(word) for word in os.environ.pop("NUMBERS").split(",") if word]
high = [os.dup2(number, 100 + at) for at, number in enumerate(numbers)]
for at, number in enumerate(high):
    os.dup2(number, 3 + at)
    os.close(number)
if numbers:
    os.environ.update(LISTEN_FDS=str(len(numbers)), LISTEN_PID=str(os.getpid()))
from dataclasses import replace
from fluxlib.config.environment import report_ready
from fluxlib.control.http import Api
from fluxlib.control.server import WebServer
from fluxlib.lifecycle import Deadline
from tests.http.fakes import Fakes
fakes = Fakes()
server = WebServer(Api(fakes.services()), replace(fakes.config, listen_host="127.0.0.1", port=int(sys.argv[1]))).start()
report_ready()
sys.stdin.read()
server.stop(Deadline(5))
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path)
    yield systemd
    systemd.close()


def _stop(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="systemd")
def test_the_port_is_held_while_flux_restarts(systemd: Systemd) -> None:
    port = free_port()
    first = systemd.run(port)
    systemd.take("READY")
    assert f"http-127.0.0.1-{port}" in systemd.kept
    _stop(first)
    # Nobody serves now, and nobody else can: a client waits in the queue for the next process.
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
    with Wire(port) as early:
        early.send("GET", "/health")
        kept = dict(systemd.kept)
        second = systemd.run(port)
        systemd.take("READY")
        assert early.answer()[0] == 200
    _stop(second)
    assert systemd.kept == kept, "it was kept already"
    assert systemd.removed == []


@pytest.mark.skipif(sys.platform == "win32", reason="systemd")
def test_a_port_that_is_not_wanted_any_more_is_let_go(systemd: Systemd) -> None:
    port, other = free_port(), free_port()
    first = systemd.run(port)
    systemd.take("READY")
    _stop(first)
    second = systemd.run(other)
    systemd.take("READY")
    assert f"http-127.0.0.1-{port}" in systemd.removed
    assert f"http-127.0.0.1-{other}" in systemd.kept
    _stop(second)
