"""A real Redis of a test's own: on a port and in a directory that are nobody else's."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from tests.support.need import need
from tests.support.programs import free_port, wait_until


class RedisServer:
    """``with RedisServer(directory, "--appendonly", "yes") as server``. Skips (fails in CI) without redis-server."""

    def __init__(self, directory: Path, *options: str) -> None:
        need("redis-server")
        self._directory = directory
        self._options = options
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", str(self._directory), "--daemonize", "no", "--loglevel", "warning", *self._options]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_until(self.answers, "Redis to answer")
        return self

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (redis.AuthenticationError, redis.ResponseError):
            return True  # it does, and wants a password
        except redis.RedisError:
            return False

    def client(self) -> redis.Redis:
        return redis.Redis("127.0.0.1", self.port, socket_timeout=5, retry=None)

    def empty(self) -> None:
        with self.client() as client:
            client.flushall()

    def calls(self) -> dict[str, int]:
        """How often each command was called since the server started."""
        with self.client() as client:
            stats = client.info("commandstats")
        return {name.removeprefix("cmdstat_"): figures["calls"] for name, figures in stats.items()}  # type: ignore[union-attr]

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
