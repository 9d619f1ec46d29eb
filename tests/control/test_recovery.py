"""What crashes, deregistrations and an absent store leave open, and who ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fluxlib.errors import AgentLost, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus, ErrorKind, ExecutionRecord, ExecutionStatus, Phase
from fluxlib.store.base import ExecutionEntry
from tests.support.fake_agents import FakeConnection, accept, join
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import WAIT, Plane, until


class Store(MemoryControlStore):
    """``away`` makes the next so many reads of what a session owns fail; ``gate`` holds them up."""

    def __init__(self) -> None:
        super().__init__()
        self.away = 0
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Event()

    def executions_of(self, owner: str, after: int = 0, limit: int = 0) -> list[ExecutionEntry]:
        if owner == "old":  # adopting reads it too
            return super().executions_of(owner, after, limit)
        self.asked.set()
        assert self.gate.wait(10)
        if self.away:
            self.away -= 1
            raise StoreUnavailable("the store is away")
        return super().executions_of(owner, after, limit)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def planes(store: Store) -> Iterator[list[Plane]]:
    made: list[Plane] = []
    yield made
    for plane in made:
        plane.close()


def plane(planes: list[Plane], store: Store, session: str, **settings: object) -> Plane:
    made = Plane(store, session, **settings)
    made.functions.add("f")
    made.functions.add("w", **WAIT)
    planes.append(made)
    return made


def entry(store: Store, execution_id: str) -> ExecutionRecord:
    found = store.execution(execution_id)
    assert found is not None
    return found.record


class TestDeparted:
    """An agent that is in no roster any more runs nothing that anybody could ask for."""

    def test_a_flux_that_died_while_it_deregistered(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        agent = former.agent(script=accept)
        running = former.submit()
        agent.script = None
        former.soon()
        waited_for = agent.wait_asked(2).request.execution_id
        new = plane(planes, store, "new")
        new.service.start()
        new.service.tick(0.0)
        for execution_id in (running, waited_for):
            record = new.record(execution_id)
            assert (record.status, record.error_kind) == (ExecutionStatus.FAILED, ErrorKind.AGENT_LOST)
            assert "no longer registered" in record.error
        assert new.service.count_open("f") == 0
        assert not new.service._tracker.all()
        agent.end(agent.asked[1])

    def test_one_that_is_not_reached_yet_has_not_left(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        former.agent(script=accept)
        running = former.submit()
        store.save_agent(AgentRecord("a1", "a1:1"))
        new = plane(planes, store, "new")
        new.service.start()
        for _ in range(10):
            new.service.tick(0.0)
        assert entry(store, running).status is ExecutionStatus.RUNNING
        store.delete_agent("a1")
        assert new.record(running).error_kind is ErrorKind.AGENT_LOST

    def test_what_is_in_hand_at_an_agent_another_flux_took_out(self, planes: list[Plane], store: Store) -> None:
        here = plane(planes, store, "s1", shared=True)
        here.agent(script=accept)
        running = here.submit()
        here.fleet.remove("a1")
        assert here.record(running).error_kind is ErrorKind.AGENT_LOST
        assert not here.service._tracker.all()

    def test_a_call_in_flight_there_is_not_asked_for_for_ever(self, planes: list[Plane], store: Store) -> None:
        here = plane(planes, store, "s1")
        agent = here.agent()
        waiting = here.soon()
        asked = agent.wait_asked()
        here.fleet.remove("a1")
        here.service.agent_lost("a1", "it was deregistered")
        asked.answer(AgentLost("agent a1 was lost: it was deregistered"))
        with pytest.raises(AgentLost) as caught:
            waiting.result(10)
        here.service.tick(0.0)
        assert not here.service._tracker.all()
        assert here.record(caught.value.execution_id).error == "agent lost: it was deregistered"

    def test_one_accepted_after_its_end_was_written_is_let_go(self, planes: list[Plane], store: Store) -> None:
        here = plane(planes, store, "s1")
        agent = here.agent()
        submitting = here.pool.submit(here.submit)
        asked = agent.wait_asked()
        here.service.agent_lost("a1", "it was deregistered")
        asked.accept()
        submitting.result(10)
        here.fleet.remove("a1")
        here.service.tick(0.0)
        assert not here.service._tracker.all()


class TestTakingOver:
    def test_is_repeated_until_it_has_gone_through(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old", shared=True)
        queued = former.submit("w")
        leader = plane(planes, store, "new", shared=True)
        store.away = 2
        assert leader.service.adopt("old", None) == 1
        until(lambda: store.away < 2)
        assert leader.service.adopt("old", None) == 0, "the store has given them away already"
        until(lambda: leader.service.tick(0.0) or leader.service.waiting() == {"w": 1})
        agent = leader.agent(script=accept)
        assert agent.wait_asked().request.execution_id == queued

    def test_an_adoption_whose_answer_was_lost(self, planes: list[Plane], store: Store, monkeypatch: Any) -> None:
        former = plane(planes, store, "old", shared=True)
        former.submit("w")
        leader = plane(planes, store, "new", shared=True)
        adopt = store.adopt_session

        def lost(*arguments: Any) -> int:
            adopt(*arguments)
            raise StoreUnavailable("no answer")

        monkeypatch.setattr(store, "adopt_session", lost)
        with pytest.raises(StoreUnavailable):
            leader.service.adopt("old", None)
        leader.service.tick(0.0)
        until(lambda: leader.service.waiting() == {"w": 1})

    def test_a_store_that_goes_away_in_between(self, planes: list[Plane], store: Store, monkeypatch: Any) -> None:
        former = plane(planes, store, "old")
        former.submit("w", "1")
        former.submit("w", "2")
        new = plane(planes, store, "new")
        claim, fails = store.claim_executions, [True]

        def away_once(*arguments: Any) -> Any:
            entries = claim(*arguments)
            if fails:
                fails.pop()
                raise StoreUnavailable("the answer was lost")
            return entries

        monkeypatch.setattr(store, "claim_executions", away_once)
        new.service.start()
        until(lambda: not fails)
        assert not new.service._tracker.all(), "claimed, and unknown here"
        agent = new.agent(script=accept)
        new.service.tick(time.time() + 60)
        agent.wait_asked(2)
        assert {asked.request.args for asked in agent.asked} == {("1",), ("2",)}

    def test_does_not_hold_up_who_judges_the_agents(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old", shared=True)
        former.submit("w")
        leader = plane(planes, store, "new", shared=True)
        store.asked.clear()
        store.gate.clear()
        assert leader.service.adopt("old", None) == 1
        assert store.asked.wait(10)
        assert not leader.service.waiting()
        store.gate.set()
        until(lambda: leader.service.waiting() == {"w": 1})


class TestFrozen:
    """It wakes, and another Flux has taken over what it has in hand."""

    @pytest.fixture
    def frozen(self, planes: list[Plane], store: Store) -> Plane:
        made = plane(planes, store, "old", shared=True)
        made.functions.add("one", max_concurrency=1, **WAIT)
        return made

    @pytest.fixture
    def leader(self, planes: list[Plane], store: Store) -> Plane:
        made = plane(planes, store, "new", shared=True)
        made.functions.add("one", max_concurrency=1, **WAIT)
        return made

    def test_what_waited_is_not_started_twice(self, frozen: Plane, leader: Plane, store: Store) -> None:
        slow, quick = frozen.agent(script=accept), leader.agent("a2", script=accept)
        frozen.submit("one")
        queued = frozen.submit("one")
        leader.service.adopt("old", None)
        assert quick.wait_asked().request.execution_id == queued
        slow.end(slow.asked[0])
        until(lambda: frozen.service._tracker.get(queued) is None)
        assert len(slow.asked) == 1
        kept = store.execution(queued)
        assert kept is not None
        assert (kept.owner, kept.record.agent_id) == ("new", "a2")
        quick.end(quick.asked[0])
        assert leader.record(queued).status is ExecutionStatus.SUCCESS

    def test_what_waits_yet_is_no_longer_looked_after(self, frozen: Plane, leader: Plane, store: Store) -> None:
        queued = frozen.submit("w")
        waiting = frozen.soon("w")
        frozen.queued(2, "w")
        leader.service.adopt("old", None)
        leader.queued(1, "w")
        frozen.service.tick(time.time() + 60)
        assert not frozen.service.waiting()
        until(lambda: not frozen.service._tracker.all())
        assert waiting.result(10).error_kind is ErrorKind.STOPPING
        assert leader.record(queued).phase is Phase.QUEUED

    def test_who_waits_for_one_that_is_open_yet_is_given_its_id(
        self, frozen: Plane, store: Store, planes: list[Plane]
    ) -> None:
        waiting = frozen.soon("w")
        frozen.queued(1, "w")
        store.adopt_session("old", "new")
        frozen.agent()
        with pytest.raises(AgentLost, match="another one has taken the call over") as caught:
            waiting.result(10)
        assert entry(store, caught.value.execution_id).status is ExecutionStatus.RUNNING
        assert not frozen.service._tracker.all()

    def test_what_runs_goes_on(self, frozen: Plane, leader: Plane, store: Store) -> None:
        agent = frozen.agent(script=accept)
        running = frozen.submit()
        join(leader.fleet, "a1", agent)
        leader.service.adopt("old", None)
        frozen.service.tick(time.time() + 60)
        assert not frozen.service._tracker.all()
        assert frozen.fleet.get("a1").total == 0  # type: ignore[union-attr]
        frozen.service._reconciler.close(Deadline(5))
        assert not agent.cancels
        assert entry(store, running).status is ExecutionStatus.RUNNING


class Counting(FakeConnection):
    def __init__(self, agent_id: str, original: bool = False) -> None:
        super().__init__(agent_id, accept, original)
        self.looks: list[str] = []
        self.inventories = 0

    def record(self, execution_id: str, *, with_output: bool) -> ExecutionRecord | None:
        self.looks.append(execution_id)
        return super().record(execution_id, with_output=with_output)

    def inventory(self) -> Any:
        self.inventories += 1
        return super().inventory()


class TestFollowing:
    def test_a_streams_agent_is_asked_once_for_all_it_runs(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        agent = Counting("a1")
        join(former.fleet, "a1", agent)
        ids = [former.submit() for _ in range(4)]
        new = plane(planes, store, "new")
        join(new.fleet, "a1", agent)
        new.service.start()
        for count in range(1, 6):
            new.service.tick(0.0)
            until(lambda count=count: agent.inventories >= count)  # type: ignore[misc]
        assert agent.looks == []
        agent.records[ids[2]] = agent.asked[2].record.ended(ExecutionStatus.SUCCESS, at=9.0)
        until(lambda: new.record(ids[2]).status is ExecutionStatus.SUCCESS)
        assert set(agent.looks) == {ids[2]}

    def test_what_runs_for_long_is_asked_for_seldom(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        agent = Counting("a1")
        join(former.fleet, "a1", agent)
        running = former.submit()
        new = plane(planes, store, "new")
        join(new.fleet, "a1", agent)
        new.service.start()
        reconciler = new.service._reconciler
        for _ in range(300):
            new.service.tick(0.0)
            until(lambda: not reconciler._polls["a1"].asking)
        assert agent.inventories < 100
        agent.records[running] = agent.asked[0].record.ended(ExecutionStatus.SUCCESS, at=9.0)
        until(lambda: new.record(running).status is ExecutionStatus.SUCCESS)

    def test_being_asked_often_at_once_does_not_make_it_lost(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        agent = Counting("a1")
        join(former.fleet, "a1", agent)
        on_its_way = former.submit()
        record = agent.records.pop(on_its_way)
        new = plane(planes, store, "new")
        join(new.fleet, "a1", agent)
        new.service.start()
        for count in range(2, 7):
            until(lambda: not new.service._reconciler._polls["a1"].asking)
            new.service.reconcile("a1", [])
            until(lambda count=count: len(agent.looks) >= count)  # type: ignore[misc]
        assert entry(store, on_its_way).status is ExecutionStatus.RUNNING
        agent.records[on_its_way] = record
        for _ in range(5):
            new.service.tick(0.0)
        assert entry(store, on_its_way).status is ExecutionStatus.RUNNING

    def test_calls_of_a_dead_flux_are_ended_side_by_side(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        agent = Counting("a1")
        join(former.fleet, "a1", agent)
        agent.script = None
        for _ in range(3):
            former.soon()
        agent.wait_asked(3)
        agent.records = {asked.request.execution_id: asked.record for asked in agent.asked}
        agent.on_cancel = lambda execution_id: ExecutionStatus.RUNNING  # they are dying
        new = plane(planes, store, "new")
        join(new.fleet, "a1", agent)
        new.service.start()
        assert len({execution_id for execution_id, _ in agent.wait_cancelled(3)}) == 3
        for _ in range(3):
            new.service.tick(0.0)
        assert len(agent.cancels) == 3, "once each"
        for asked in agent.asked:
            agent.records[asked.request.execution_id] = asked.record.ended(
                ExecutionStatus.CANCELLED, at=9.0, kind=ErrorKind.CANCELLED
            )
        until(lambda: new.service.tick(0.0) or new.service.count_open("f") == 0)
        for asked in agent.asked:
            assert entry(store, asked.request.execution_id).status is ExecutionStatus.CANCELLED
            agent.end(asked)

    def test_an_agent_that_is_offline_is_left_alone(self, planes: list[Plane], store: Store) -> None:
        former = plane(planes, store, "old")
        former.agent(script=accept)
        running = former.submit()
        new = plane(planes, store, "new")
        agent = Counting("a1")
        join(new.fleet, "a1", agent, status=AgentStatus.OFFLINE)
        new.service.start()
        for _ in range(5):
            new.service.tick(0.0)
        assert (agent.inventories, agent.looks) == (0, [])
        assert entry(store, running).phase is Phase.STARTING


def test_none_ends_what_another_was_given(planes: list[Plane], store: Store) -> None:
    """An agent that was once offered an execution knows its ID; its word about it counts no more."""
    here = plane(planes, store, "s1")
    owner = here.agent("a1", script=accept)
    running = here.submit()
    other = here.agent("a2", script=accept)
    forged = owner.asked[0].record.ended(ExecutionStatus.SUCCESS, at=1.0)
    other.on_ended(forged)
    assert here.record(running).status is ExecutionStatus.RUNNING
    owner.on_ended(forged)
    assert here.record(running).status is ExecutionStatus.SUCCESS


def test_what_another_flux_ended_is_noticed_under_a_clock_that_was_set_back(planes: list[Plane], store: Store) -> None:
    here = plane(planes, store, "s1", shared=True)
    agent = here.agent(script=accept)
    execution_id = here.submit()
    here.service.tick(time.time() + 60)
    ended = entry(store, execution_id).ended(ExecutionStatus.CANCELLED, at=1.0, error="cancelled")
    store.end_attempt(ended, 0, 3600.0).wait()
    here.service.tick(time.time() - 3600)
    assert agent.wait_cancelled()[0][0] == execution_id
