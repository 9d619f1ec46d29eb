"""Submissions repeated under their idempotency key while the first one may still be turned down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from fluxlib.control.agents.connection import refusal
from fluxlib.errors import AgentLost, InvalidInput, StoreUnavailable, Unavailable
from fluxlib.model import ErrorKind, ExecutionStatus
from fluxlib.store.base import Committed
from tests.support.fake_agents import Asked, FakeConnection, accept, join
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import WAIT, Plane, until


class Failed(Committed):
    def wait(self, timeout: float | None = None) -> None:
        raise StoreUnavailable("away")

    def then(self, call: Callable[[Exception | None], None]) -> None:
        call(StoreUnavailable("away"))


class Store(MemoryControlStore):
    """``away`` fails what is to be forgotten; ``on_create`` is called once, before the next is created."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.on_create: list[Callable[[], object]] = []

    def forget_execution(self, execution_id: str, owner: str) -> Any:
        return Failed() if self.away else super().forget_execution(execution_id, owner)

    def create_execution(self, entry: Any, *, durable: bool) -> Any:
        if self.on_create:
            self.on_create.pop()()
        return super().create_execution(entry, durable=durable)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def planes(store: Store) -> Iterator[list[Plane]]:
    """Two Flux on one store."""
    made = [Plane(store, session, shared=True, max_waiting=1) for session in ("here", "there")]
    for plane in made:
        plane.functions.add("f")
        plane.functions.add("w", **WAIT)
    yield made
    for plane in made:
        plane.close()


@pytest.fixture
def plane(planes: list[Plane]) -> Plane:
    return planes[0]


def soon(plane: Plane) -> Future[str]:
    return plane.pool.submit(plane.submit, idempotency_key="k")


def repeated(plane: Plane, first: Asked) -> Future[str]:
    """Submitted again, and waiting for the first."""
    again = soon(plane)
    until(lambda: first.request.execution_id in plane.service._tracker.watched())
    return again


def turn_down(asked: Asked) -> None:
    # Not for want of room: the next may be taken.
    asked.answer(refusal(asked.request, "a1", ErrorKind.INVALID, "no such argument", 1.0))


def takes_its_place(agent: FakeConnection, first: Future[str], asked: Asked, again: Future[str]) -> str:
    """The first is turned down, and what was submitted again runs under an ID of its own."""
    turn_down(asked)
    with pytest.raises(InvalidInput):
        first.result(10)
    own = agent.wait_asked(2)
    own.accept()
    assert again.result(10) == own.request.execution_id
    return again.result()


class TestHere:
    def test_it_is_the_first_once_that_is_accepted(self, plane: Plane) -> None:
        agent = plane.agent()
        first = soon(plane)
        asked = agent.wait_asked()
        again = repeated(plane, asked)
        asked.accept()
        assert first.result(10) == again.result(10) == asked.request.execution_id
        assert len(agent.asked) == 1

    def test_it_takes_the_place_of_a_first_that_is_turned_down(self, plane: Plane, store: Store) -> None:
        agent = plane.agent()
        first = soon(plane)
        asked = agent.wait_asked()
        own = takes_its_place(agent, first, asked, repeated(plane, asked))
        assert plane.record(own).status is ExecutionStatus.RUNNING
        assert store.execution(asked.request.execution_id) is None

    def test_it_is_the_first_when_that_may_run(self, plane: Plane) -> None:
        agent = plane.agent()
        first = soon(plane)
        asked = agent.wait_asked()
        again = repeated(plane, asked)
        asked.answer(AgentLost("agent a1 was lost"))
        with pytest.raises(AgentLost):
            first.result(10)
        assert again.result(10) == asked.request.execution_id

    def test_nobody_is_given_an_id_while_the_store_is_yet_to_forget_it(self, plane: Plane, store: Store) -> None:
        agent = plane.agent()
        first = soon(plane)
        asked = agent.wait_asked()
        store.away = True
        turn_down(asked)
        with pytest.raises(InvalidInput):
            first.result(10)
        assert store.execution(asked.request.execution_id) is not None
        again = repeated(plane, asked)
        store.away = False
        for _ in range(2):  # the write that failed, and the next one
            plane.service.tick(0.0)
        own = agent.wait_asked(2)
        own.accept()
        assert again.result(10) == own.request.execution_id

    def test_it_waits_no_longer_than_for_a_write(self, plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fluxlib.control.executions.service.COMMIT_SECONDS", 0.05)
        agent = plane.agent()
        first = soon(plane)
        asked = agent.wait_asked()
        with pytest.raises(Unavailable, match="has not been accepted yet") as caught:
            plane.submit(idempotency_key="k")
        assert caught.value.retry_after
        asked.accept()
        assert first.result(10) == asked.request.execution_id

    def test_one_that_is_written_as_queued_finds_room(self, plane: Plane, store: Store) -> None:
        others: list[str] = []
        store.on_create.append(lambda: others.append(plane.submit("w")))
        queued = plane.submit("w", idempotency_key="k")
        assert plane.submit("w", idempotency_key="k") == queued
        until(lambda: plane.service.waiting() == {"w": 2})
        with pytest.raises(Unavailable):
            plane.submit("w")


class TestAtAnotherFlux:
    def first(self, planes: list[Plane]) -> tuple[FakeConnection, Future[str], Asked]:
        here, there = planes
        agent = here.agent()
        join(there.fleet, "a1", agent)
        first = soon(here)
        return agent, first, agent.wait_asked()

    def test_the_agent_says_whether_it_has_accepted_the_first(self, planes: list[Plane]) -> None:
        agent, first, asked = self.first(planes)
        again = repeated(planes[1], asked)
        assert not again.done()
        accept(agent, asked)
        assert again.result(10) == first.result(10)

    def test_it_takes_the_place_of_a_first_that_is_turned_down(self, planes: list[Plane]) -> None:
        agent, first, asked = self.first(planes)
        takes_its_place(agent, first, asked, repeated(planes[1], asked))

    def test_one_that_is_queued_or_has_ended_is_known(self, planes: list[Plane], store: Store) -> None:
        queued = planes[0].submit("w", idempotency_key="k")
        assert planes[1].submit("w", idempotency_key="k") == queued
        planes[0].service.cancel(queued)
        assert planes[1].submit("w", idempotency_key="k") == queued
