"""What systemd is told when a program has started (Type=notify of the units)."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.support.programs import Agent, Flux, Program

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="systemd's")


@pytest.mark.parametrize("name", ["flux", "flux-agent"])
def test_systemd_hears_that_it_serves(tmp_path: Path, name: str) -> None:
    flux = Flux(tmp_path)
    program: Program = flux if name == "flux" else Agent(tmp_path, flux, "worker-1")
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(path))
        notified.settimeout(30)
        program.environment = {**program.environment, "NOTIFY_SOCKET": str(path)}
        with program:
            # Beside it Flux hands its listening sockets to systemd, and an agent feeds the watchdog.
            said = b""
            while said != b"READY=1":
                said = notified.recv(1000)
                assert said == b"READY=1" or said.startswith((b"FDSTORE=1", b"WATCHDOG=1")), said
