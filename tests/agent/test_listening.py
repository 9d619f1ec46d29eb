"""An agent that cannot listen says why, though gRPC does not."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from fluxlib.agent.app import Agent
from fluxlib.config.agent import read_agent
from fluxlib.errors import FluxError


def refusal(directory: Path, host: str, port: int) -> str:
    config = read_agent("agent_id: worker-1\nisolation: off\n", directory / "agent.yaml")
    with pytest.raises(FluxError) as refused:
        Agent(replace(config, state_dir=directory / "state", listen_host=host, port=port))
    return refused.value.message


def test_an_address_that_is_not_this_machines(tmp_path: Path) -> None:
    said = refusal(tmp_path, "192.0.2.1", 50052)
    assert "does not have that address. Set `listen_host`" in said


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refusal(tmp_path, "127.0.0.1", taken.getsockname()[1])
    assert "another program does" in said
    assert "set `port`" in said
