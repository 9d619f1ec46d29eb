"""Flux and its agents as real processes on loopback, and a small HTTP client for them.

    with Flux(tmp_path) as flux, Agent(tmp_path, flux, "worker-1") as agent:
        flux.register(agent)
        flux.api.call("POST", "/execute/hello", {"args": ["you"]})

Their logs stay in the directory they were given, and are printed when they end badly.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil
import yaml

TOP = Path(__file__).resolve().parents[2]
API_KEY = "test-key-of-the-programs"
# Two seconds on a quiet machine; twenty have been seen with thirty processes to a core.
_START_SECONDS = 90


def free_port() -> int:
    """A port nobody listens on now. Another process may take it first: only where a program must be told one."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 40) -> Any:
    """The first true answer of ``condition``; for what another process does, where nothing can be waited on.

    ``seconds`` is for a machine that is very busy; where the time itself is a promise, measure it.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        pause.wait(0.02)


def is_alive(pid: int) -> bool:
    """Whether the process still runs. A zombie does not: where process 1 never reaps, an orphan stays one for ever."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def make_zip(files: Mapping[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Api:
    """The HTTP API by hand: what `curl` would send."""

    def __init__(self, url: str, key: str | None = API_KEY) -> None:
        self.url, self.key = url, key

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """(status, body, headers) of any answer, errors included."""
        request = urllib.request.Request(self.url + path, data=body, method=method, headers=dict(headers or {}))
        if self.key is not None:
            request.add_header("X-API-Key", self.key)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers

    def call(self, method: str, path: str, data: Any = None, timeout: float = 60) -> tuple[int, Any]:
        """(status, JSON) with ``data`` sent as JSON, or as it is when bytes."""
        if isinstance(data, bytes):
            body, headers = data, {"Content-Type": "application/octet-stream"}
        elif data is None:
            body, headers = None, {}
        else:
            body, headers = json.dumps(data).encode(), {"Content-Type": "application/json"}
        status, answer, _ = self.request(method, path, body, headers, timeout)
        return status, json.loads(answer) if answer else None

    def deploy(self, spec: Mapping[str, Any], files: Mapping[str, bytes | str]) -> None:
        """Register a function and its code; both must be accepted."""
        status, answer = self.call("PUT", "/functions", yaml.safe_dump(dict(spec)).encode())
        assert status == 201, answer
        status, answer = self.call("PUT", f"/deploy/{spec['name']}", make_zip(files))
        assert status == 201, answer

    def execute(self, name: str, *args: str, timeout: float = 60, **fields: Any) -> tuple[int, Any]:
        return self.call("POST", f"/execute/{name}", {"args": list(args), **fields}, timeout)

    def ended(self, execution_id: str, seconds: float = 20) -> dict[str, Any]:
        """The record once its status has left ``running``."""

        def look() -> dict[str, Any] | None:
            status, record = self.call("GET", f"/executions/{execution_id}")
            return record if status == 200 and record["status"] != "running" else None

        return dict(wait_until(look, f"{execution_id} to end", seconds))


class Program:
    """One process of ours with its own directory, log and configuration file.

    ``prefix`` is put before its command (to start it in a network namespace, say).
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory, self.name = directory, name
        self.log = directory / f"{name}.log"
        self.command, self.environment, self.prefix = command, environment, prefix
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self.process = self.spawn(log)
        try:
            wait_until(self.ready, f"{self.name} to be ready", _START_SECONDS)
        except BaseException:
            self.kill()
            print(self.log.read_text(errors="replace")[-4000:])
            raise
        return self

    def spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Its process, saying everything to ``log``."""
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "flux", *self.command],
            cwd=self.directory,
            env={**os.environ, **self.environment, "PYTHONPATH": str(TOP)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def ready(self) -> bool:
        """Whether it answers; raises when it has ended."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} ended with {self.process.returncode}")
        return True

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a crash would: no chance to clean up."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM and its exit code; killed when that takes too long."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self.name} did not stop within {seconds} s") from None
        return self.process.returncode

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            print(f"---- {self.name}\n{self.log.read_text(errors='replace')[-6000:]}")
            self.kill()
            return
        if self.process is not None and self.process.returncode is None:
            self.stop()


class Flux(Program):
    """A control plane. ``settings`` go into its flux.yaml."""

    def __init__(self, directory: Path, name: str = "flux", *, tls: bool = True, **settings: Any) -> None:
        self.home = directory / name
        self.home.mkdir(exist_ok=True)
        self.port = int(settings.pop("port", 0)) or free_port()
        self.tls = tls
        self.certs = Path(settings.get("certs_dir", self.home / "certs"))
        config = {
            "api_key": API_KEY,
            "listen_host": "127.0.0.1",
            "port": self.port,
            "state_dir": str(self.home / "state"),
            "certs_dir": str(self.certs),
            "disable_grpc_tls": not tls,
            **settings,
        }
        self.config_file = self.home / "flux.yaml"
        self.config_file.write_text(yaml.safe_dump(config))
        self.config_file.chmod(0o600)
        super().__init__(self.home, name, [], {"FLUX_CONFIG": str(self.config_file)})
        self.api = Api(f"http://127.0.0.1:{self.port}")

    def ready(self) -> bool:
        super().ready()
        try:
            return self.api.request("GET", "/health", timeout=2)[0] == 200
        except OSError:
            return False

    def register(self, agent: Agent, **fields: Any) -> dict[str, Any]:
        return self.register_at(agent.address, **fields)

    def register_at(self, address: str, **fields: Any) -> dict[str, Any]:
        status, answer = self.api.call("POST", "/agents/register", {"address": address, **fields})
        assert status == 201, answer
        return dict(answer)

    def status_of(self, agent_id: str) -> str:
        """What GET /agents says of one agent, empty when it is not listed."""
        _, agents = self.api.call("GET", "/agents")
        return next((agent["status"] for agent in agents if agent["id"] == agent_id), "")


class Agent(Program):
    """A worker with certificates from ``flux`` (none when that runs without TLS)."""

    def __init__(
        self,
        directory: Path,
        flux: Flux,
        agent_id: str,
        *,
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.home = directory / agent_id
        self.home.mkdir(exist_ok=True)
        self.agent_id = agent_id
        self.port = int(settings.pop("port", 0)) or free_port()
        self.address = f"{host}:{self.port}"
        self._host = host
        config: dict[str, Any] = {
            "agent_id": agent_id,
            "port": self.port,
            "listen_host": host,
            "state_dir": str(self.home / "state"),
            "isolation": "off",
            "tls": {"enabled": False},
            "insecure": True,
            **settings,
        }
        if flux.tls and "tls" not in settings:
            config["tls"] = {"enabled": True, **enrolled(flux.certs, agent_id, self.home / "certs")}
        self.config_file = self.home / "agent.yaml"
        self.config_file.write_text(yaml.safe_dump(config))
        self.config_file.chmod(0o600)
        super().__init__(self.home, agent_id, ["agent"], {"AGENT_CONFIG": str(self.config_file)}, prefix)

    def ready(self) -> bool:
        super().ready()
        try:
            socket.create_connection((self._host, self.port), 1).close()
        except OSError:
            return False
        return True


def enrolled(certs_dir: Path, agent_id: str, into: Path) -> dict[str, str]:
    """The ``tls`` files of an agent, signed by the CA in ``certs_dir``."""
    from fluxlib.pki import Authority

    identity = Authority.open(certs_dir).issue_agent(agent_id)
    into.mkdir(mode=0o700, exist_ok=True)
    files = {"ca_cert": identity.ca_pem, "cert_file": identity.cert_pem, "key_file": identity.key_pem}
    for name, pem in files.items():
        (into / f"{name}.pem").write_bytes(pem)
        (into / f"{name}.pem").chmod(0o600)
    return {name: str(into / f"{name}.pem") for name in files}
