"""flux.exe built here, and started as a double click starts it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO, Any

import yaml

from tests.support.need import lacking
from tests.support.programs import Api, Program
from tests.support.wine import spawn_under_wine
from windows.lab import TOP, Lab, windows_path

# Starts a program in a console window of its own, as Explorer does; its words go where the launcher's go.
LAUNCHER = """
import subprocess, sys
program = subprocess.Popen(sys.argv[1:], creationflags=subprocess.CREATE_NEW_CONSOLE,
                           stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
sys.exit(program.wait())
"""
_SOURCES = ("fluxlib/**/*.py", "flux.py", "flux_agent.py", "flux.spec", "requirements/build.txt", "windows/*")


PORT = 7227


def need_port() -> None:
    """The port of a first start must be free."""
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            lacking(f"port {PORT} is taken: a first start has no other")


def built(lab: Lab) -> Path:
    """The directory with flux.exe and flux-agent.exe of this tree; built when something changed, in a minute or two.

    ``FLUX_WINDOWS_PROGRAMS`` names another one, with programs that are to be tested as they are.
    """
    if os.environ.get("FLUX_WINDOWS_PROGRAMS"):
        return Path(os.environ["FLUX_WINDOWS_PROGRAMS"])
    directory = TOP / "dist" / "windows"
    stamp = directory / ".sources"
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(TOP.glob(pattern)):
            if path.is_file():
                digest.update(str(path).encode() + path.read_bytes())
    if not stamp.is_file() or stamp.read_text() != digest.hexdigest():
        shutil.rmtree(directory, ignore_errors=True)
        made = subprocess.run([TOP / "windows" / "build-wine.sh"], capture_output=True, text=True, timeout=420)
        assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
        stamp.write_text(digest.hexdigest())
    return directory


class DoubleClicked(Program):
    """flux.exe in ``directory``, started without arguments in a window of its own."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        super().__init__(directory, "flux", [], {})
        self.lab = lab
        self.exe = directory / "flux.exe"

    @property
    def config(self) -> dict[str, Any]:
        return dict(yaml.safe_load((self.directory / "flux.yaml").read_text()))

    @property
    def api(self) -> Api:
        return Api(f"http://127.0.0.1:{self.config.get('port', 7227)}", self.config["api_key"])

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace").replace("\r\n", "\n")

    def spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [str(self.lab.python), "-c", LAUNCHER, windows_path(self.exe)]
        return spawn_under_wine(self.lab, command, self.directory, log, {})

    def ready(self) -> bool:
        super().ready()
        try:
            status, agents = self.api.call("GET", "/agents", timeout=2)
        except (OSError, FileNotFoundError):
            return False
        return status == 200 and any(agent["status"] == "online" for agent in agents)

    def crash(self) -> None:
        """As the Task Manager ends it: the program, not its agent, which has to notice."""
        for pid in self.processes():
            if b"agent" not in _command_line(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert self.process is not None
        self.process.wait(20)

    def processes(self) -> list[int]:
        """Every process of this flux.exe: a Windows program under Wine is one here too."""
        name = windows_path(self.exe).encode()
        return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _command_line(pid).startswith(name)]


def _command_line(pid: int | str) -> bytes:
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes()
    except OSError:
        return b""
