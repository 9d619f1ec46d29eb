"""One execution's states, deadline and kill timer, with invented times: nothing is started and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluxlib.agent import executions
from fluxlib.agent.executions import Execution, State
from fluxlib.agent.executor.base import Executor, Exit, Job
from fluxlib.agent.records import new_record
from fluxlib.lifecycle import Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus


class Clock:
    """A clock, its timers, and an executor whose one job starts and ends when the test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.signals: list[str] = []
        self.ends: list[ExecutionRecord] = []
        self.started: Callable[[int], None]
        self.exited: Callable[[Exit], None]
        self.execution: Execution

    def monotonic(self) -> float:
        return self.now

    def after(self, seconds: float, call: Callable[[], None]) -> Clock:
        self.timers.append((self.now + seconds, call))
        return self

    def cancel(self) -> None:
        """Every timer is its own clock here; a cancelled one is simply never fired."""

    def start(
        self, job: Job, on_output: Any, on_exit: Callable[[Exit], None], on_started: Callable[[int, float], None]
    ) -> Clock:
        self.started, self.exited = on_started, on_exit
        return self

    def terminate(self) -> None:
        self.signals.append("TERM")

    def kill(self) -> None:
        self.signals.append("KILL")

    def fire(self) -> None:
        """The next timer, at its time."""
        self.now, call = self.timers.pop(0)
        call()


def execution_of(executor: Clock, timers: Clock) -> Execution:
    record = new_record("e-1", "hello", "worker-1", False, ())
    return Execution(
        record,
        cast(Executor, executor),
        cast(Timers, timers),
        2.0,
        lambda execution: None,
        lambda execution, ended: timers.ends.append(ended),
    )


JOB = Job("e-1", ("/bin/true",), {}, Path("/"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(executions, "time", SimpleNamespace(monotonic=clock.monotonic, time=clock.monotonic))
    clock.execution = execution_of(clock, clock)
    clock.execution.launch(JOB, 10.0, lambda data: None)
    return clock


def test_a_start_may_be_told_late(clock: Clock) -> None:
    clock.now += 4
    clock.started(7, 1.0)
    clock.fire()
    clock.fire()
    assert (clock.now, clock.signals) == (1013.0, ["TERM"])


def test_the_timeout_counts_from_its_own_start(clock: Clock) -> None:
    clock.now += 4
    clock.started(7, 0.0)
    clock.fire()
    assert (clock.now, clock.signals) == (1010.0, []), "it has run for six seconds only"
    clock.fire()
    assert (clock.now, clock.signals) == (1014.0, ["TERM"])
    clock.fire()
    assert (clock.now, clock.signals) == (1016.0, ["TERM", "KILL"])
    clock.exited(Exit(signal=9))
    ended = clock.ends[0]
    assert (ended.status, ended.error_kind) == (ExecutionStatus.FAILED, ErrorKind.TIMEOUT)
    assert ended.error == "execution timed out after 10s"


def test_a_start_that_never_comes_ends_too(clock: Clock) -> None:
    clock.fire()
    assert (clock.now, clock.signals) == (1010.0, ["TERM"])


def test_a_stop_before_its_start_returns_keeps_its_grace(clock: Clock) -> None:
    class Slow(Clock):
        def start(self, *arguments: Any) -> Clock:
            execution.stop(ErrorKind.AGENT_STOPPED, "the agent ends now", grace=0)
            return clock

    execution = execution_of(Slow(), clock)
    execution.launch(JOB, 0, lambda data: None)
    assert clock.signals == ["KILL"]


def test_a_stop_before_the_launch_is_the_state_that_the_launch_finds(clock: Clock) -> None:
    execution = execution_of(clock, clock)
    execution.stop(ErrorKind.CANCELLED, "changed my mind")
    execution.launch(JOB, 0, lambda data: None)
    clock.started(7, 0.0)
    assert (execution.state, clock.signals) == (State.STOPPING, ["TERM"])
    clock.exited(Exit(exit_code=0))
    assert (execution.state, clock.ends[0].status) == (State.ENDED, ExecutionStatus.CANCELLED)


def test_the_states_of_an_execution_in_order(clock: Clock) -> None:
    execution = execution_of(clock, clock)
    assert execution.state is State.ACCEPTED
    execution.launch(JOB, 0, lambda data: None)
    assert execution.state is State.STARTING
    clock.started(7, 0.0)
    assert execution.state is State.RUNNING
    execution.stop(ErrorKind.CANCELLED, "enough")
    assert execution.state is State.STOPPING
    clock.exited(Exit(signal=15))
    execution.stop(ErrorKind.CANCELLED, "again")
    assert (execution.state, clock.signals) == (State.ENDED, ["TERM"])


def test_a_second_stop_with_less_grace_kills_sooner(clock: Clock) -> None:
    """The agent ends while a function that is deaf to TERM is being cancelled."""
    clock.started(7, 0.0)
    stop = clock.execution.stop
    stop(ErrorKind.CANCELLED, "enough", grace=60)
    stop(ErrorKind.TIMEOUT, "later than its own", grace=61)
    stop(ErrorKind.CANCELLED, "as it says itself")
    assert [at for at, _ in clock.timers] == [1010, 1060]
    clock.now += 50
    stop(ErrorKind.AGENT_STOPPED, "no less is left", grace=10)
    stop(ErrorKind.AGENT_STOPPED, "less", grace=5)
    assert [at for at, _ in clock.timers] == [1010, 1060, 1055]
    assert clock.signals == ["TERM"], "a second one means haste to many programs"
    stop(ErrorKind.AGENT_STOPPED, "at once", grace=0)
    assert clock.signals == ["TERM", "KILL"]
    clock.exited(Exit(signal=9))
    assert (clock.ends[0].error_kind, clock.ends[0].error) == (ErrorKind.CANCELLED, "enough")


def test_one_that_has_ended_is_left_alone(clock: Clock) -> None:
    clock.started(7, 0.0)
    clock.exited(Exit(exit_code=0))
    clock.fire()
    assert clock.signals == []
    assert clock.ends[0].status is ExecutionStatus.SUCCESS
