"""Flux stops: what is waited for, what is ended, and what the next life finds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from fluxlib.errors import AgentLost, Stopping, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionStatus, Phase
from tests.support.fake_agents import accept, join
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import WAIT, Plane, until


@pytest.fixture
def store() -> MemoryControlStore:
    return MemoryControlStore()


@pytest.fixture
def plane(store: MemoryControlStore) -> Iterator[Plane]:
    made = Plane(store)
    made.functions.add("f")
    made.functions.add("w", **WAIT)
    yield made
    made.close()


def elapsed(since: float) -> float:
    return time.monotonic() - since


class TestWaiting:
    def test_ends_when_the_agent_accepts_what_is_being_submitted(self, plane: Plane) -> None:
        agent = plane.agent()
        submitting = plane.pool.submit(plane.submit)
        asked = agent.wait_asked()
        began = time.monotonic()
        stopping = plane.pool.submit(plane.service.stop, Deadline(8))
        until(lambda: plane.service._tracker.draining)
        agent.records[asked.request.execution_id] = asked.record
        asked.accept()
        stopping.result(10)
        assert elapsed(began) < 4
        assert plane.record(submitting.result(10)).status is ExecutionStatus.RUNNING

    def test_ends_when_what_is_being_submitted_is_queued(self, plane: Plane, monkeypatch: Any) -> None:
        create, written, gate = plane.store.create_execution, threading.Event(), threading.Event()

        def slow(*arguments: Any, **more: Any) -> Any:
            written.set()
            assert gate.wait(10)
            return create(*arguments, **more)

        monkeypatch.setattr(plane.store, "create_execution", slow)
        submitting = plane.pool.submit(plane.submit, "w")
        assert written.wait(10)
        began = time.monotonic()
        stopping = plane.pool.submit(plane.service.stop, Deadline(8))
        until(lambda: plane.service._tracker.draining)
        gate.set()
        stopping.result(10)
        assert elapsed(began) < 4
        assert plane.record(submitting.result(10)).phase is Phase.QUEUED

    def test_is_told_to_a_call_that_comes_to_wait_after_all_others_were_told(
        self, plane: Plane, monkeypatch: Any
    ) -> None:
        create = plane.store.create_execution

        def stopped_meanwhile(*arguments: Any, **more: Any) -> Any:
            plane.service._dispatcher.stop()
            return create(*arguments, **more)

        monkeypatch.setattr(plane.store, "create_execution", stopped_meanwhile)
        with pytest.raises(Stopping):
            plane.soon("w").result(5)
        assert not plane.service.waiting()
        assert not plane.service._tracker.all()
        assert plane.service.count_open("w") == 0

    def test_never_outlasts_its_deadline_by_a_call_that_hangs(self, plane: Plane) -> None:
        begun, hangs = threading.Barrier(3), threading.Event()

        def hang() -> None:
            begun.wait(10)
            hangs.wait(20)

        plane.service._reconciler._pool.submit(hang)
        plane.service._dispatcher._pool.submit(hang)
        begun.wait(10)
        began = time.monotonic()
        plane.service.stop(Deadline(0.2))
        assert elapsed(began) < 4
        hangs.set()
        plane.service._reconciler.close(Deadline(5))
        plane.service._dispatcher.close(Deadline(5))


@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_follower_of_what_waits_is_let_go(plane: Plane, comes: str) -> None:
    execution_id = plane.submit("w")
    if comes == "after":
        plane.service.stop(Deadline(8))
    with closing(plane.service.output(execution_id, 0, follow=True)) as stream:
        following = plane.pool.submit(lambda: b"".join(stream))
        plane.service.stop(Deadline(8))
        with pytest.raises(Stopping):
            following.result(10)


class TestCallsInProgress:
    def test_are_ended_and_told_that_flux_stops(self, plane: Plane) -> None:
        agent = plane.agent()
        waiting = plane.soon()
        asked = agent.wait_asked()
        plane.service.stop(Deadline(0.05))
        with pytest.raises(Stopping, match="Flux is stopping; the call was ended") as caught:
            waiting.result(10)
        assert caught.value.execution_id == asked.request.execution_id
        assert agent.cancels == [(asked.request.execution_id, "cancelled: Flux is stopping")]
        record = plane.record(asked.request.execution_id)
        assert (record.status, record.error_kind) == (ExecutionStatus.CANCELLED, ErrorKind.CANCELLED)

    def test_that_do_not_die_in_time_are_ended_by_the_next_life(
        self, plane: Plane, store: MemoryControlStore, monkeypatch: Any
    ) -> None:
        monkeypatch.setattr("fluxlib.control.executions.service._SHUTDOWN_CANCEL_SECONDS", 0.05)
        agent = plane.agent()
        waiting = plane.soon()
        asked = agent.wait_asked()
        agent.records[asked.request.execution_id] = asked.record
        agent.on_cancel = lambda execution_id: ExecutionStatus.RUNNING
        plane.service.stop(Deadline(0.05))
        asked.answer(AgentLost("agent a1 was lost: Flux closed the connection"))
        with pytest.raises(Stopping) as caught:
            waiting.result(10)
        assert caught.value.execution_id == asked.request.execution_id
        new = Plane(store, "new")
        join(new.fleet, "a1", agent)
        new.service.start()
        agent.wait_cancelled(2)
        agent.records[asked.request.execution_id] = asked.record.ended(
            ExecutionStatus.CANCELLED, at=9.0, kind=ErrorKind.CANCELLED
        )
        until(lambda: new.record(asked.request.execution_id).status is ExecutionStatus.CANCELLED)
        new.close()

    def test_that_end_by_themselves_meanwhile_are_answered(self, plane: Plane) -> None:
        agent = plane.agent()
        waiting = plane.soon()
        asked = agent.wait_asked()
        agent.on_cancel = lambda execution_id: agent.end(asked).status
        plane.service.stop(Deadline(0.05))
        assert waiting.result(10).status is ExecutionStatus.SUCCESS

    def test_asynchronous_ones_go_on(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        running = plane.submit()
        plane.service.stop(Deadline(0.05))
        assert not agent.cancels
        assert plane.record(running).status is ExecutionStatus.RUNNING


class TestWhatWasRefused:
    """By an agent that the store still says has it: the next life must not take it for lost."""

    def refused(self, plane: Plane) -> tuple[str, Any]:
        agent = plane.agent()
        plane.store.save_agent(plane.fleet.get("a1").record)  # type: ignore[union-attr]
        plane.functions.add("one", max_concurrency=1, **WAIT)
        first = plane.soon("one")
        agent.wait_asked(1)
        execution_id = plane.submit("one")
        agent.end(agent.asked[0])
        first.result(10)
        return execution_id, agent.wait_asked(2)

    def is_queued(self, plane: Plane, execution_id: str) -> bool:
        entry = plane.store.execution(execution_id)
        assert entry is not None
        return (entry.record.phase, entry.record.agent_id) == (Phase.QUEUED, "")

    def test_and_not_driven_on_yet(self, plane: Plane) -> None:
        execution_id, asked = self.refused(plane)
        begun, end = threading.Barrier(9), threading.Event()

        def busy() -> None:
            begun.wait(10)
            end.wait(10)

        for _ in range(8):
            plane.service._dispatcher._pool.submit(busy)
        begun.wait(10)
        asked.answer(asked.record.ended(ExecutionStatus.FAILED, at=1.0, error="full", kind=ErrorKind.AT_CAPACITY))
        assert not self.is_queued(plane, execution_id)
        plane.service.stop(Deadline(0.05))
        assert self.is_queued(plane, execution_id)
        end.set()
        plane.service._dispatcher.close(Deadline(5))

    def test_while_the_store_was_away(self, plane: Plane, monkeypatch: Any) -> None:
        execution_id, asked = self.refused(plane)
        tried = threading.Event()

        def away(name: str) -> Any:
            tried.set()
            raise StoreUnavailable("away")

        monkeypatch.setattr(plane.functions, "lookup", away)
        asked.answer(asked.record.ended(ExecutionStatus.FAILED, at=1.0, error="full", kind=ErrorKind.AT_CAPACITY))
        assert tried.wait(10)
        plane.service.stop(Deadline(0.05))
        assert self.is_queued(plane, execution_id)
