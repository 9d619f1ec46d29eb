"""The fault table: each program killed or frozen at each step of an execution's life. See docs/reliability.md.

Whatever happens, afterwards every accepted execution has a final status with a
reason, none ran twice, and no process is left behind.
"""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.faults.rig import Marks, SyncCall, account, deploy, known, pass_time, settle
from tests.support.need import need
from tests.support.programs import Agent, Flux, free_port, wait_until

pytestmark = pytest.mark.faults

_FAST = {"health_interval_sec": 0.4, "agent_lost_after_sec": 3, "kill_grace_sec": 1, "shutdown_sec": 2}
# Longer than the health polls' patience, agent_lost_after_sec and detach_grace_sec.
_FROZEN = 8.0


class Redis:
    """A real server that keeps what it has acknowledged."""

    def __init__(self, directory: Path) -> None:
        need("redis-server")
        self.directory, self.port = directory, free_port()
        directory.mkdir(exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        with (self.directory / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers, "Redis to answer")

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.signal(signal.SIGCONT)
        self.kill()


class World:
    def __init__(self, flux: Flux, agent: Agent, redis: Redis | None, marks: Marks) -> None:
        self.flux, self.agent, self.redis, self.marks = flux, agent, redis, marks
        self.accepted: list[str] = []
        self.calls: list[SyncCall] = []

    def submit(self, *args: str) -> str:
        status, answer = self.flux.api.call("POST", "/execute/job/async", {"args": list(args)})
        assert status == 202, answer
        self.accepted.append(answer["execution_id"])
        return str(answer["execution_id"])

    def call(self, *args: str) -> None:
        self.calls.append(SyncCall(self.flux.api, "job", *args))

    def running(self, count: int) -> bool:
        return len(self.marks.starts()) >= count


def victim_of(world: World, name: str) -> Any:
    return {"agent": world.agent, "flux": world.flux, "redis": world.redis}[name]


@pytest.fixture(params=["sqlite", "redis"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    redis = Redis(tmp_path / "redis") if request.param == "redis" else None
    settings = {**_FAST, **({"redis_addr": redis.address} if redis else {})}
    if redis is not None:
        redis.start()
    try:
        flux = Flux(tmp_path, **settings)
        agent = Agent(tmp_path, flux, "worker-1", detach_grace_sec=2, kill_grace_sec=1, shutdown_sec=2)
        with Marks() as marks, flux, agent:
            flux.register(agent)
            deploy(flux, marks, "job", max_concurrency=2, max_concurrency_behavior="wait")
            yield World(flux, agent, redis, marks)
            for program in (flux, agent):
                program.signal(signal.SIGCONT)
    finally:
        if redis is not None:
            redis.signal(signal.SIGCONT)
            redis.kill()


# -- the steps at which it happens -----------------------------------------------------


def at_sync(world: World) -> None:
    """A synchronous call is running."""
    world.call("plain", "4")
    wait_until(lambda: world.running(1), "it to run")


def at_async(world: World) -> None:
    """An accepted execution is running."""
    world.submit("plain", "4")
    wait_until(lambda: world.running(1), "it to run")


def at_queued(world: World) -> None:
    """Two run, three more wait for a slot."""
    for _ in range(5):
        world.submit("plain", "3")
    wait_until(lambda: world.running(2), "two to run")


def at_cancel(world: World) -> None:
    """A cancel is under way: the function ignores TERM, so it takes the grace."""
    identifier = world.submit("stubborn", "30")
    wait_until(lambda: world.running(1), "it to run")
    world.calls.append(Cancel(world.flux, identifier))


def at_burst(world: World) -> None:
    """Submissions are arriving: any of them may be at any step."""
    world.calls += [Burst(world) for _ in range(3)]
    wait_until(lambda: len(world.accepted) > 10, "some to be accepted")


class Cancel(SyncCall):
    """DELETE in a thread of its own."""

    def __init__(self, flux: Flux, identifier: str) -> None:
        self._identifier = identifier
        super().__init__(flux.api, "")

    def _run(self, api: Any, name: str, args: tuple[str, ...]) -> None:
        try:
            self.answer = api.call("DELETE", f"/executions/{self._identifier}", timeout=60)
        except (OSError, ValueError) as error:
            self.answer = OSError(str(error))


class Burst(SyncCall):
    """Submissions one after the other until one is refused or the connection breaks."""

    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__(world.flux.api, "job")

    def _run(self, api: Any, name: str, args: tuple[str, ...]) -> None:
        for _ in range(60):
            try:
                status, answer = api.call("POST", "/execute/job/async", {"args": ["plain", "0"]}, timeout=60)
            except (OSError, ValueError):
                return
            if status == 202:
                self._world.accepted.append(answer["execution_id"])


STEPS = [at_sync, at_async, at_queued, at_cancel, at_burst]


def recovered(world: World) -> None:
    for call in world.calls:
        call.join()
    records = settle(world.flux.api, "job", 90)
    account(records, world.accepted, world.marks)
    # And it works as before.
    wait_until(lambda: world.flux.status_of("worker-1") == "online", "the agent to be online", 30)
    status, answer = world.flux.api.execute("job", "plain", "0")
    assert (status, answer["output"]) == (200, "started\ndone\n"), answer


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("victim", ["agent", "flux", "redis"])
def test_killed(world: World, victim: str, step: Callable[[World], None]) -> None:
    if victim == "redis" and world.redis is None:
        pytest.skip("no Redis in this world")
    step(world)
    program = victim_of(world, victim)
    program.kill()
    program.start()
    recovered(world)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("victim", ["agent", "flux", "redis"])
def test_frozen(world: World, victim: str, step: Callable[[World], None]) -> None:
    if victim == "redis" and world.redis is None:
        pytest.skip("no Redis in this world")
    step(world)
    program = victim_of(world, victim)
    program.signal(signal.SIGSTOP)
    pass_time(_FROZEN)
    program.signal(signal.SIGCONT)
    recovered(world)


def test_an_agent_that_never_returns(tmp_path: Path) -> None:
    """Given up after agent_lost_after_sec, and what it still ran is killed when it comes back after all."""
    with (
        Marks() as marks,
        Flux(tmp_path, **_FAST) as flux,
        Agent(tmp_path, flux, "worker-1", detach_grace_sec=2) as agent,
    ):
        flux.register(agent)
        deploy(flux, marks, "job")
        status, answer = flux.api.call("POST", "/execute/job/async", {"args": ["plain", "60"]})
        assert status == 202, answer
        identifier = answer["execution_id"]
        wait_until(lambda: marks.starts()[identifier], "it to run")
        agent.signal(signal.SIGSTOP)
        wait_until(lambda: flux.status_of("worker-1") == "offline", "it to be noticed")
        status, answer = flux.api.call("GET", f"/executions/{identifier}")
        assert status in (200, 503), answer
        if status == 503:
            assert answer["record"]["status"] == "running"
        record = wait_until(lambda: final_of(flux, identifier), "it to be given up", 20)
        assert record["status"] == "failed"
        assert "agent lost" in record["error"]
        agent.signal(signal.SIGCONT)
        account({identifier: record}, [identifier], marks)
        assert final_of(flux, identifier)["error"] == record["error"]


def final_of(flux: Flux, identifier: str) -> Any:
    status, record = flux.api.call("GET", f"/executions/{identifier}")
    return record if status == 200 and record["status"] != "running" else None


def test_a_frozen_leader_does_nothing_on_waking(tmp_path: Path) -> None:
    """Two Flux on one Redis; the leader sleeps past its lease, the other takes over, both serve the same executions."""
    with Marks() as marks, Redis(tmp_path / "redis") as redis:
        first = Flux(tmp_path, "first", redis_addr=redis.address, **_FAST)
        second = Flux(tmp_path, "second", redis_addr=redis.address, certs_dir=str(first.certs), **_FAST)
        with first, Agent(tmp_path, first, "worker-1", detach_grace_sec=2) as agent, second:
            first.register(agent)
            deploy(first, marks, "job", max_concurrency=4)
            wait_until(lambda: second.status_of("worker-1") == "online", "the second to see the agent")
            # Started on one, read and cancelled on the other.
            status, answer = first.api.call("POST", "/execute/job/async", {"args": ["plain", "60"]})
            assert status == 202, answer
            wait_until(lambda: marks.starts()[answer["execution_id"]], "it to run")
            status, record = second.api.call("GET", f"/executions/{answer['execution_id']}")
            assert (status, record["status"]) == (200, "running")
            assert second.api.call("DELETE", f"/executions/{answer['execution_id']}")[0] == 200
            assert final_of(first, answer["execution_id"])["status"] == "cancelled"

            leaders = [flux for flux in (first, second) if flux.api.call("GET", "/health")[1]["leader"]]
            assert len(leaders) == 1
            leader, other = leaders[0], second if leaders[0] is first else first
            status, answer = leader.api.call("POST", "/execute/job/async", {"args": ["plain", "3"]})
            assert status == 202, answer
            leader.signal(signal.SIGSTOP)
            wait_until(lambda: other.api.call("GET", "/health")[1]["leader"], "the other to lead", 25)
            # What the sleeper had accepted is looked after by the other.
            assert wait_until(lambda: final_of(other, answer["execution_id"]), "its end")["status"] == "success"
            pass_time(5)
            leader.signal(signal.SIGCONT)
            wait_until(lambda: not leader.api.call("GET", "/health")[1]["leader"], "the sleeper to notice", 15)
            assert other.api.call("GET", "/health")[1]["leader"]
            assert other.status_of("worker-1") == "online"
            for flux in (first, second):
                assert flux.api.execute("job", "plain", "0")[0] == 200
            account({record["execution_id"]: record for record in known(first.api, "job")}, [], marks)
