"""Ends on their way to the store, executions that were not accepted, and what is told of times."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fluxlib.control.executions.execution import Execution, merge_report
from fluxlib.control.executions.tracker import ExecutionTracker
from fluxlib.errors import FluxError, InvalidInput, StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import Committed, ExecutionEntry
from tests.support.fake_agents import accept, refuse
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import Plane, until


class Store(MemoryControlStore):
    """Its next ``end`` or ``forget`` fails with ``error``, told when it is waited for."""

    error: Exception | None = None

    def _fails(self) -> Any:
        error, self.error = self.error, None
        if error is None:
            return None

        class Failed(Committed):
            def wait(self, timeout: float | None = None) -> None:
                raise error

            def then(self, call: Callable[[Exception | None], None]) -> None:
                call(error)

        return Failed()

    def end_attempt(self, *arguments: Any, **how: Any) -> Any:
        return self._fails() or super().end_attempt(*arguments, **how)

    def forget_execution(self, execution_id: str, owner: str) -> Any:
        return self._fails() or super().forget_execution(execution_id, owner)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def plane(store: Store) -> Iterator[Plane]:
    made = Plane(store, shared=True)  # a follower: it expires nothing
    made.functions.add("f")
    yield made
    made.close()


class TestEnds:
    @pytest.mark.parametrize("error", [StoreUnavailable("away"), ValueError("what nobody has thought of")])
    def test_are_written_again_whatever_went_wrong(self, plane: Plane, store: Store, error: Exception) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        store.error = error
        agent.end(agent.asked[0])
        plane.service.tick(0.0)
        entry = store.execution(execution_id)
        assert entry is not None
        assert entry.record.status is ExecutionStatus.SUCCESS

    def test_written_again_by_many_threads_at_once(self, store: Store) -> None:
        tracker = ExecutionTracker(store, "s1", 60.0, lambda reservation: None)
        troubles: list[BaseException] = []
        stop = threading.Event()

        def settle() -> None:
            try:
                while not stop.is_set():
                    tracker.write_again()
            except BaseException as trouble:
                troubles.append(trouble)

        threads = [threading.Thread(target=settle) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(3000):
            record = ExecutionRecord(f"e{number}", "f").ended(ExecutionStatus.SUCCESS, at=1.0)
            store.error = StoreUnavailable("away") if number % 3 else None
            tracker.write_end(record)
        stop.set()
        for thread in threads:
            thread.join()
        assert not troubles
        until(lambda: tracker.write_again() or not tracker._unwritten)


class TestNotAccepted:
    def test_a_follower_frees_the_key_and_keeps_nothing(self, plane: Plane, store: Store) -> None:
        agent = plane.agent(script=refuse(ErrorKind.INVALID, "no such argument"))
        with pytest.raises(InvalidInput, match="no such argument"):
            plane.submit(idempotency_key="k")
        assert store.execution_by_key("f", "k") is None
        assert store.execution(agent.asked[0].request.execution_id) is None
        agent.script = accept
        assert plane.submit(idempotency_key="k") == agent.asked[1].request.execution_id

    def test_a_store_that_goes_away_does_not_hide_the_reason(self, plane: Plane, store: Store) -> None:
        plane.agent(script=refuse(ErrorKind.INVALID, "no such argument"))
        store.error = StoreUnavailable("away")
        with pytest.raises(InvalidInput, match="no such argument"):
            plane.submit(idempotency_key="k")
        plane.service.tick(0.0)
        plane.service.tick(0.0)
        assert store.execution_by_key("f", "k") is None

    def test_behind_many_that_wait_to_be_forgotten(self, plane: Plane, store: Store) -> None:
        agent = plane.agent(script=accept)
        for number in range(1500):
            record = ExecutionRecord(f"old{number}", "f", asynchronous=True)
            store.create_execution(ExecutionEntry(record), durable=False)
            store.end_attempt(record.ended(ExecutionStatus.SUCCESS, at=1.0), 0, 0.0)
        agent.script = refuse(ErrorKind.INVALID)
        with pytest.raises(FluxError):
            plane.submit(idempotency_key="k")
        assert store.execution_by_key("f", "k") is None


def test_a_follower_of_the_output_begins_when_the_agent_accepts(plane: Plane) -> None:
    agent = plane.agent()
    submitting = plane.pool.submit(plane.submit)
    asked = agent.wait_asked()
    stream = plane.service.output(asked.request.execution_id, 0, follow=True)
    reading = plane.pool.submit(lambda: b"".join(stream))
    until(lambda: not reading.done())
    agent.outputs[asked.request.execution_id] = b"hello"
    asked.accept()
    submitting.result(10)
    try:
        assert reading.result(5) == b"hello"
    finally:
        stream.close()


def test_nothing_is_remembered_of_deleted_functions_and_removed_agents(plane: Plane) -> None:
    plane.functions.add("g")
    agent = plane.agent(script=accept)
    plane.submit("g")
    agent.end(agent.asked[0])
    placement = plane.service._dispatcher.placement
    need = placement.need("g")
    placement._no_fit_until["g"], placement._refusals["g"] = 1.0, (0.0, need, placement.refusal(need))
    del plane.functions.known["g"]
    plane.service.tick(0.0)
    for known in (placement._needs, placement._last_used, placement._no_fit_until, placement._refusals):
        assert "g" not in known
    assert placement.place_waiting("g", "") is None
    plane.submit("f")
    agent.end(agent.asked[1])
    state = plane.fleet.remove("a1")
    assert state is not None
    assert state not in placement._last_used.values()


class TestTimes:
    """``queue_ms`` is what lies between acceptance and the program's begin, as far as two clocks can tell."""

    def record(self, **values: Any) -> ExecutionRecord:
        return ExecutionRecord("e1", "f", "a1", **values).ended(ExecutionStatus.SUCCESS, at=time.time())

    @pytest.mark.parametrize(
        ("began", "queue_ms"),
        [
            (0.250, 250),  # 40 ms before it was sent, 5 in the agent, the rest between the two
            (0.010, 45),  # a clock that is behind takes nothing away
            (90.0, 900),  # one that is ahead adds no more than there was
        ],
    )
    def test_of_a_run(self, began: float, queue_ms: int, monkeypatch: Any) -> None:
        accepted = 1000.0
        monkeypatch.setattr("fluxlib.control.executions.execution.time.time", lambda: accepted + 1.0)
        record = self.record(run_started_at=accepted + began, queue_ms=5, duration_ms=100, cpu_seconds=0.1 + 0.2)
        execution = Execution.stored(ExecutionEntry(ExecutionRecord("e1", "f", "a1", started_at=accepted)))
        execution.waited_ms = 40
        final = execution.merged(record)
        assert (final.queue_ms, final.cpu_seconds) == (queue_ms, 0.3)
        ours = ExecutionRecord("e1", "f", "a1", started_at=accepted)
        theirs = self.record(started_at=accepted + 0.04, run_started_at=accepted + began, queue_ms=5, duration_ms=100)
        # How long it waited here before it was sent is not known any more.
        assert merge_report(ours, theirs).queue_ms == (queue_ms if began > 0.04 else 10)

    def test_of_an_original_agent_that_tells_none(self) -> None:
        execution = Execution("f", None, "e1", time.time())
        execution.waited_ms = 40
        assert execution.merged(self.record()).queue_ms == 40
