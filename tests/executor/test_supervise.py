"""A job's limits of time, with invented times: nothing is started and nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fluxlib.agent.executor import supervise
from fluxlib.agent.executor.base import Executor, Exit, Job
from fluxlib.agent.executor.supervise import Supervised, Verdict
from fluxlib.lifecycle import Timers
from fluxlib.model import ErrorKind, ExecutionStatus


class Clock:
    """A clock, its timers, and an executor whose one job starts and ends when the test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.signals: list[str] = []
        self.verdicts: list[Verdict] = []
        self.started: Callable[[int], None]
        self.exited: Callable[[Exit], None]
        self.supervised: Supervised

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=clock.monotonic))
    job = Job("e-1", ("/bin/true",), {}, Path("/"))
    supervised = Supervised(
        cast(Executor, clock), cast(Timers, clock), job, 10.0, 2.0, lambda verdict: clock.verdicts.append(verdict)
    )
    clock.supervised = supervised
    supervised.start(lambda data: None, lambda pid, ago: None)
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
    verdict = clock.verdicts[0]
    assert (verdict.status, verdict.kind) == (ExecutionStatus.FAILED, ErrorKind.TIMEOUT)
    assert verdict.error == "execution timed out after 10s"


def test_a_start_that_never_comes_ends_too(clock: Clock) -> None:
    clock.fire()
    assert (clock.now, clock.signals) == (1010.0, ["TERM"])


def test_a_stop_before_its_start_returns_keeps_its_grace(clock: Clock) -> None:
    job = Job("e-2", ("/bin/true",), {}, Path("/"))
    clock.signals.clear()

    class Slow(Clock):
        def start(self, *arguments: Any) -> Clock:
            supervised.stop(ErrorKind.AGENT_STOPPED, "the agent ends now", grace=0)
            return clock

    supervised = Supervised(cast(Executor, Slow()), cast(Timers, clock), job, 0, 2.0, lambda verdict: None)
    supervised.start(lambda data: None, lambda pid, ago: None)
    assert clock.signals == ["KILL"]


def test_a_second_stop_with_less_grace_kills_sooner(clock: Clock) -> None:
    """The agent ends while a function that is deaf to TERM is being cancelled."""
    clock.started(7, 0.0)
    stop = clock.supervised.stop
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
    assert (clock.verdicts[0].kind, clock.verdicts[0].error) == (ErrorKind.CANCELLED, "enough")


def test_one_that_has_ended_is_left_alone(clock: Clock) -> None:
    clock.started(7, 0.0)
    clock.exited(Exit(exit_code=0))
    clock.fire()
    assert clock.signals == []
    assert clock.verdicts[0].status is ExecutionStatus.SUCCESS
