"""An agent in this process, on a port of its own, and a plain client for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from fluxlib.agent.app import Agent
from fluxlib.config.agent import read_agent
from fluxlib.rpc import codec, tls
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.support.programs import make_zip

# What a test wants of a program, by its first argument.
SCRIPT = """#!/bin/sh
case "$1" in
  say) shift; echo "$*" ;;
  exit) exit "$2" ;;
  sleep) echo started; exec sleep "$2" ;;
  stubborn) trap '' TERM; echo started; while :; do sleep 0.1; done ;;
  polite) trap 'echo bye; exit 7' TERM; echo started; while :; do sleep 0.05; done ;;
  env) env | sort ;;
  cat) exec cat ;;
  pwd) pwd; echo "$HOME" ;;
  id) id -u; id -g ;;
  both) echo one; echo two >&2; echo three; echo four >&2 ;;
  spam) exec head -c "$2" /dev/zero ;;
  daemon) setsid sh -c 'trap "" TERM HUP; sleep 300' >/dev/null 2>&1 & echo $!; exec sleep "$2" ;;
  touch) echo no > "$2" ;;
esac
"""
CODE = make_zip({"main.sh": SCRIPT})


class Running:
    """One agent and a stub to call it by."""

    def __init__(self, directory: Path, channel: grpc.Channel, agent: Agent) -> None:
        self.directory, self.channel, self.agent = directory, channel, agent
        self.stub = flux_pb2_grpc.AgentServiceStub(channel)

    def deploy(self, name: str = "hello", archive: bytes = CODE, **fields: Any) -> Any:
        config = pb.FunctionConfig(name=name, handler="main.sh", **{"max_concurrency": 50, **fields})
        package = pb.DeploymentPackage(function_name=name, code_archive=archive, config=config)
        return self.stub.DeployFunction(package, timeout=30)

    def run(
        self, *args: str, name: str = "hello", execution_id: str = "", asynchronous: bool = False, **fields: Any
    ) -> Any:
        request = pb.ExecutionRequest(function_name=name, args=args, execution_id=execution_id, **fields)
        if asynchronous:
            setattr(request, "async", True)
        return self.stub.ExecuteFunction(request, timeout=60)

    def record(self, execution_id: str) -> Any:
        """The record, None when unknown."""
        answer = self.stub.GetExecution(pb.GetExecutionRequest(execution_id=execution_id), timeout=10)
        return codec.record_from_json(answer.data) if answer.found else None

    def cancel(self, execution_id: str, timeout: float = 10) -> Any:
        return self.stub.CancelExecution(pb.CancelExecutionRequest(execution_id=execution_id), timeout=timeout)

    def read(self, execution_id: str, offset: int = 0, *, follow: bool = False, max_bytes: int = 0) -> Any:
        request = pb.ReadOutputRequest(execution_id=execution_id, offset=offset, follow=follow, max_bytes=max_bytes)
        return self.stub.ReadOutput(request, timeout=30)


@contextmanager
def running(directory: Path, **settings: Any) -> Iterator[Running]:
    """An agent with ``isolation: off`` on a free port, without TLS."""
    lines: dict[str, Any] = {
        "agent_id": "worker-1",
        "isolation": "off",
        "tls": "{enabled: false}",
        "kill_grace_sec": 0.3,
        "shutdown_sec": 0,
        **settings,
    }
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    config = replace(read_agent(text, directory / "agent.yaml"), state_dir=directory / "state", port=0)
    agent = Agent(replace(config, listen_host="127.0.0.1"))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{agent.port}", tls.SIZE_OPTIONS) as channel:
            yield Running(directory, channel, agent)
    finally:
        agent.stop()
