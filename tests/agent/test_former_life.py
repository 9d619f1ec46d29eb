"""An agent that is killed and comes back: nothing of its former life is alive, everything is accounted for."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.agent.running import CODE
from tests.support.programs import Agent, Flux, is_alive, wait_until


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    flux = Flux(tmp_path, tls=False)  # never started: an agent's directory is made for one
    with Agent(tmp_path, flux, "worker-1", kill_grace_sec=0.3, shutdown_sec=0) as made:
        yield made


def ask(agent: Agent, call: str, request: Any) -> Any:
    with grpc.insecure_channel(agent.address) as channel:
        return getattr(flux_pb2_grpc.AgentServiceStub(channel), call)(request, timeout=20, wait_for_ready=True)


def record(agent: Agent, execution_id: str) -> Any:
    answer = ask(agent, "GetExecution", pb.GetExecutionRequest(execution_id=execution_id))
    return codec.record_from_json(answer.data) if answer.found else None


def on_disk(agent: Agent) -> set[str]:
    with closing(sqlite3.connect(f"file:{agent.home / 'state/agent.db'}?mode=ro", uri=True)) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM records")}


def execute(agent: Agent, execution_id: str, *args: str, asynchronous: bool = True) -> Any:
    request = pb.ExecutionRequest(function_name="hello", args=args, execution_id=execution_id)
    setattr(request, "async", asynchronous)
    return ask(agent, "ExecuteFunction", request)


@pytest.mark.parametrize("spawner_too", [False, True], ids=["agent killed", "agent and spawner killed"])
def test_kill_and_return(agent: Agent, spawner_too: bool) -> None:
    config = pb.FunctionConfig(name="hello", handler="main.sh", max_concurrency=5)
    package = pb.DeploymentPackage(function_name="hello", code_archive=CODE, config=config)
    assert ask(agent, "DeployFunction", package).success
    assert execute(agent, "done", "say", "x", asynchronous=False).output == b"x\n"
    execute(agent, "runs", "daemon", "300")
    pid = int(wait_until(lambda: record(agent, "runs").output, "the grandchild's number"))
    before = ask(agent, "GetInventory", pb.InventoryRequest())
    # Written within 20 ms, which a kill may outrun.
    wait_until(lambda: on_disk(agent) == {"done", "runs"}, "the records to be written")
    assert agent.process is not None
    spawners = psutil.Process(agent.process.pid).children()
    if spawner_too:
        for spawner in spawners:
            spawner.suspend()
    agent.kill()
    if spawner_too:
        for spawner in spawners:
            os.kill(spawner.pid, signal.SIGKILL)
    agent.start()
    assert not is_alive(pid)
    after = ask(agent, "GetInventory", pb.InventoryRequest())
    assert list(after.functions) == list(before.functions)
    assert after.instance_id != before.instance_id
    assert list(after.open_executions) == []
    ended = record(agent, "runs")
    assert (ended.status, ended.error) == ("failed", "the agent restarted while it ran")
    assert record(agent, "done").output == b"x\n"
    # Asked for again, neither runs again.
    assert execute(agent, "done", "say", "y", asynchronous=False).output == b"x\n"
    assert execute(agent, "runs", "say", "y", asynchronous=False).error == "the agent restarted while it ran"
    assert execute(agent, "new", "say", "z", asynchronous=False).output == b"z\n"


def test_a_stop_in_order_kills_what_runs_and_says_so(agent: Agent) -> None:
    config = pb.FunctionConfig(name="hello", handler="main.sh", max_concurrency=5)
    package = pb.DeploymentPackage(function_name="hello", code_archive=CODE, config=config)
    assert ask(agent, "DeployFunction", package).success
    execute(agent, "runs", "stubborn")
    wait_until(lambda: record(agent, "runs").output, "it to run")
    assert agent.stop() == 0
    agent.start()
    ended = record(agent, "runs")
    assert (ended.status, ended.error, ended.output) == ("failed", "agent stopped", b"started\n")


def test_a_taken_port_is_told_in_a_sentence(agent: Agent, tmp_path: Path) -> None:
    other = Agent(tmp_path, Flux(tmp_path, "flux-2", tls=False), "worker-2", port=agent.port)
    with pytest.raises(AssertionError, match="ended with 1"):
        # Its own test for being ready would find the first agent: only its end counts here.
        _until_it_ends(other)
    assert agent.process is not None
    assert f"(process {agent.process.pid})" in other.log.read_text()


def _until_it_ends(program: Agent) -> None:
    program.start()
    wait_until(lambda: not program.ready(), "it to end")
