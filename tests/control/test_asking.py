"""Written first, sent when that holds, and never sent when it did not hold in time."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from fluxlib.control.executions.execution import new_execution_id
from fluxlib.errors import StoreUnavailable
from fluxlib.model import ExecutionStatus
from fluxlib.store.base import Commit, ExecutionEntry
from tests.support.fake_agents import succeed
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import Plane, until


class Later:
    """A write that is told to hold, or not, when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Callable[[Exception | None], None]] = []

    def wait(self, timeout: float | None = None) -> None:
        return

    def then(self, call: Callable[[Exception | None], None]) -> None:
        self.calls.append(call)


class SlowStore(MemoryControlStore):
    def __init__(self) -> None:
        super().__init__()
        self.later = Later()

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        return super().create_execution(entry, durable=durable)[0], self.later


@pytest.fixture
def store() -> SlowStore:
    return SlowStore()


@pytest.fixture
def plane(store: SlowStore) -> Iterator[Plane]:
    plane = Plane(store)
    plane.functions.add("f")
    yield plane
    plane.close()


def test_nobody_is_asked_before_it_is_written(plane: Plane, store: SlowStore) -> None:
    agent = plane.agent(script=succeed)
    running = plane.pool.submit(plane.execute, "f", "x")
    until(lambda: store.later.calls)
    assert agent.asked == []
    store.later.calls[0](None)
    assert running.result(5).status is ExecutionStatus.SUCCESS
    assert len(agent.asked) == 1


def test_what_is_written_too_late_is_not_sent(plane: Plane, store: SlowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxlib.control.executions.dispatcher.COMMIT_SECONDS", 0.05)
    agent = plane.agent(script=succeed)
    running = plane.pool.submit(plane.execute, "f", "x")
    until(lambda: store.later.calls)
    until(lambda: plane.service.tick(0.0) or running.done())
    with pytest.raises(StoreUnavailable, match="did not commit the write within"):
        running.result(5)
    store.later.calls[0](None)
    assert agent.asked == []
    assert plane.fleet.agents()[0].total == 0


def test_what_was_not_written_is_the_callers_error_and_frees_its_slot(plane: Plane, store: SlowStore) -> None:
    agent = plane.agent(script=succeed)
    running = plane.pool.submit(plane.execute, "f", "x")
    until(lambda: store.later.calls)
    store.later.calls[0](StoreUnavailable("the disk is full"))
    with pytest.raises(StoreUnavailable, match="the disk is full"):
        running.result(5)
    assert agent.asked == []
    assert plane.fleet.agents()[0].total == 0


def test_ids_are_uuids_that_rise_with_time() -> None:
    ids = [new_execution_id() for _ in range(1000)]
    assert len(set(ids)) == len(ids)
    parsed = [uuid.UUID(one) for one in ids]
    assert {(one.version, one.variant) for one in parsed} == {(7, uuid.RFC_4122)}
    assert [str(one) for one in parsed] == ids
    assert [one.int >> 80 for one in parsed] == sorted(one.int >> 80 for one in parsed)
