"""The original Go programs as processes, for those who have them: ``FLUX_ORIGINAL_DIR`` names their directory.

Each runs in mount and process namespaces of its own, which takes root: the agent looks up the user ``flux-runner``,
keeps its code in that user's home and its records beside its executable, and a kill of it ends its functions too.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from tests.support.programs import API_KEY, Api, free_port, wait_until

DIRECTORY = os.environ.get("FLUX_ORIGINAL_DIR", "")
# The port the original control plane listens on, whatever its configuration says.
FLUX_PORT = 7227
_RUNNER_ID = 64123
_NAMESPACES = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
_WITH_PASSWD = ["sh", "-c", 'mount --bind "$1" /etc/passwd && shift && exec "$@"', "sh"]


class OriginalProgram:
    """``start`` and ``kill`` as often as wanted: its directory stays until ``close``."""

    def __init__(self, name: str, variable: str, config: Mapping[str, Any]) -> None:
        # Not below pytest's directory, which only its own user may enter.
        self.home = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.home.chmod(0o755)
        self.name, self._variable = name, variable
        self._program = Path(shutil.copy2(Path(DIRECTORY) / name, self.home))
        self._passwd = self.home / "passwd"
        runner = f"flux-runner:x:{_RUNNER_ID}:{_RUNNER_ID}::{self.home / 'runner'}:/bin/sh\n"
        self._passwd.write_text(Path("/etc/passwd").read_text() + runner)
        (self.home / "runner").mkdir()
        self.config_file = self.home / "config.yaml"
        self.config_file.write_text(yaml.safe_dump(dict(config)))
        self.config_file.chmod(0o600)
        self.log = self.home / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_NAMESPACES, *_WITH_PASSWD, str(self._passwd), str(self._program)],
                cwd=self.home,
                env={**os.environ, self._variable: str(self.config_file)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._ready, f"{self.name} to be ready")
        except BaseException:
            self.kill()
            print(self.said())
            raise
        return self

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """As a crash would, and everything it runs with it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            # What it was in the namespace dies a moment later.
            wait_until(lambda: not self.answers(), f"{self.name} to be gone")
            self.process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def answers(self) -> bool:
        raise NotImplementedError

    def _ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}")
        return self.answers()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            print(f"---- {self.name}\n{self.said()[-6000:]}")
        self.close()


class OriginalAgent(OriginalProgram):
    """``tls``: the files (CA, certificate, key) it is to use."""

    def __init__(self, agent_id: str, tls: tuple[str, str, str] | None = None, *, port: int = 0) -> None:
        self.agent_id, self.port, self.tls = agent_id, port or free_port(), tls
        self.address = f"127.0.0.1:{self.port}"
        config: dict[str, Any] = {"agent_id": agent_id, "port": str(self.port)}
        # Otherwise it asks a service on the Internet for its address.
        config["network"] = {"node_private_ip": "127.0.0.1", "node_public_ip": "127.0.0.1"}
        if tls is not None:
            config["tls"] = {"enabled": True, **dict(zip(("ca_cert", "cert_file", "key_file"), tls, strict=True))}
        super().__init__("serverless-agent", "AGENT_CONFIG", config)

    def answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


class OriginalFlux(OriginalProgram):
    """A control plane over the Redis at ``redis_addr`` (host:port)."""

    def __init__(self, redis_addr: str, certs_dir: Path | None, **settings: Any) -> None:
        config: dict[str, Any] = {"api_key": API_KEY, "redis_addr": f"redis://{redis_addr}", **settings}
        config |= {"disable_grpc_tls": True} if certs_dir is None else {"certs_dir": str(certs_dir)}
        super().__init__("serverless-flux", "FLUX_CONFIG", config)
        self.api = Api(f"http://127.0.0.1:{FLUX_PORT}")

    def start(self) -> Self:
        with socket.socket() as probe:
            taken = probe.connect_ex(("127.0.0.1", FLUX_PORT)) == 0
            assert not taken, f"port {FLUX_PORT} is taken, and the original has no other"
        return super().start()

    def answers(self) -> bool:
        try:
            return self.api.request("GET", "/health", timeout=2)[0] == 200
        except OSError:
            return False
