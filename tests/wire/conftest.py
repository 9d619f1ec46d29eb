"""The original's two sides as processes of their own.

They have their own copy of the contract, and one process cannot hold two
definitions of the same messages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ORIGINAL = Path(__file__).parent / "original"


@pytest.fixture(scope="session")
def original_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the original's stubs can be imported."""
    made = tmp_path_factory.mktemp("original-stubs")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ORIGINAL}", f"--python_out={made}"]
    subprocess.run([*command, f"--grpc_python_out={made}", "original.proto"], check=True)
    return {**os.environ, "PYTHONPATH": str(made), "GRPC_ENABLE_FORK_SUPPORT": "0"}


@pytest.fixture(scope="session")
def original_agent(original_environment: dict[str, str]) -> Callable[..., Any]:
    """``with original_agent(id, tls=(ca, cert, key)) as (process, address)``.

    One that is started again with the same ``home`` and ``port`` is the same agent after a restart.
    """

    @contextmanager
    def start(
        agent_id: str, tls: tuple[str, str, str] | None = None, *, home: Path | None = None, port: int = 0
    ) -> Iterator[tuple[subprocess.Popen[str], str]]:
        command = [sys.executable, str(ORIGINAL / "agent.py"), agent_id, *(["--tls", *tls] if tls else [])]
        command += ["--port", str(port), *(["--home", str(home)] if home else [])]
        process = subprocess.Popen(
            command, env=original_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process, f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(10)

    return start


@pytest.fixture(scope="session")
def original_client(original_environment: dict[str, str]) -> Callable[..., list[Any]]:
    """``original_client(address, script, tls=…)`` makes the calls and gives their answers."""

    def run(address: str, script: list[list[Any]], tls: tuple[str, str, str] | None = None) -> list[Any]:
        command = [sys.executable, str(ORIGINAL / "client.py"), address, *(["--tls", *tls] if tls else [])]
        done = subprocess.run(
            command, env=original_environment, input=json.dumps(script), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
