"""An agent that cannot listen says why, though gRPC does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fluxlib.agent.app import Agent
from fluxlib.config.agent import read_agent
from fluxlib.errors import FluxError
from tests.support.need import need_root


def refusal(directory: Path, host: str, port: int) -> str:
    config = read_agent("agent_id: worker-1\nisolation: off\ntls: {enabled: false}\n", directory / "agent.yaml")
    with pytest.raises(FluxError) as refused:
        Agent(replace(config, state_dir=directory / "state", listen_host=host, port=port))
    return refused.value.message


def test_an_address_that_is_not_this_machines(tmp_path: Path) -> None:
    said = refusal(tmp_path, "192.0.2.1", 50052)
    assert "does not have that address. Set `listen_host`" in said


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refusal(tmp_path, "127.0.0.1", taken.getsockname()[1])
        holder = f"the port is in use by {psutil.Process().name()} (process {os.getpid()})"
    assert holder in said
    assert "set another `port` in agent.yaml" in said


def test_a_port_that_another_user_has_says_how_to_find_the_program(top: Path) -> None:
    need_root()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        script = (
            "import errno, os, psutil; from fluxlib.listening import listen_problem; os.setresuid(65534, 65534, 65534);"
            f"print(listen_problem('Flux', '127.0.0.1', {port}, OSError(errno.EADDRINUSE, ''), 'flux.yaml'))"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=top, capture_output=True, text=True, check=True)
    assert f"in use by another program; `sudo ss -ltnp sport = :{port}` shows which" in done.stdout
