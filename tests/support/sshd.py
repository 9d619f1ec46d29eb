"""A real sshd on a loopback port, for one user and one key.

    with Sshd(tmp_path, key.public) as sshd:
        Shell.connect("127.0.0.1", sshd.user, key.private, deadline, port=sshd.port)

``programs`` come first on the PATH of what it runs.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.need import need, need_root
from tests.support.programs import free_port, wait_until

_CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {home}/host_key
AuthorizedKeysFile {home}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
LogLevel ERROR
SetEnv PATH={path}
"""


class Sshd:
    def __init__(self, directory: Path, public_key: str, programs: Mapping[str, str] | None = None) -> None:
        need_root()
        need("sshd", "ssh-keygen")
        self.user = getpass.getuser()
        self.port = free_port()
        self.home = directory / "sshd"
        self._programs = self.home / "bin"
        self._programs.mkdir(parents=True)
        for name, text in (programs or {}).items():
            (self._programs / name).write_text(text)
            (self._programs / name).chmod(0o755)
        (self.home / "authorized_keys").write_text(f"{public_key}\n")
        self.new_host_key()
        self._process: subprocess.Popen[bytes] | None = None

    def new_host_key(self) -> None:
        """As if another machine answered; from the next start on."""
        key = self.home / "host_key"
        key.unlink(missing_ok=True)
        key.with_suffix(".pub").unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, stdin=subprocess.DEVNULL)

    def start(self) -> Self:
        # Its privilege separation wants this directory, which the package's unit makes.
        Path("/run/sshd").mkdir(exist_ok=True)
        path = f"{self._programs}:{os.environ['PATH']}"
        program = shutil.which("sshd")
        assert program is not None
        config = self.home / "sshd_config"
        config.write_text(_CONFIG.format(port=self.port, home=self.home, path=path))
        effective = subprocess.run([program, "-T", "-f", config], check=True, capture_output=True, text=True).stdout
        if "persourcepenalties" in effective:
            # OpenSSH 9.8 and newer answer an address whose logins failed only after a while; all tests share one.
            with config.open("a") as file:
                file.write("PerSourcePenalties no\n")
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self._listens, f"sshd to listen: {(self.home / 'log').read_text()}")
        return self

    def stop(self) -> None:
        """The listener and every session of it."""
        if self._process is None:
            return
        self.cut()
        self._process.terminate()
        self._process.wait(10)
        self._process = None

    def cut(self) -> None:
        """Every connection breaks; new ones are taken."""
        assert self._process is not None
        import psutil

        for child in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Connections stay open, and nothing on them is answered."""
        assert self._process is not None
        import psutil

        # A session that has just logged in may be about to fork; a stopped one forks no more.
        stopped: set[psutil.Process] = set()
        try:
            while new := set(psutil.Process(self._process.pid).children(recursive=True)) - stopped:
                for child in new:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.suspend()
                        wait_until(
                            lambda child=child: child.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE),
                            "it to stop",
                        )
                stopped |= new
            yield
        finally:
            for child in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.resume()

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()
