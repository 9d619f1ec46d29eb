"""Dispatching when things go wrong between two steps: a store that fails on purpose, stops at every moment."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from fluxlib.control.agents.connection import refusal
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.executions.placement import Placement
from fluxlib.errors import AgentLost, AgentUnreachable, FluxError, InvalidInput, NoAgentFits, StoreUnavailable
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import AgentStatus, ErrorKind, ExecutionStatus, NodeFigures
from fluxlib.store.base import ExecutionFilter
from tests.support.fake_agents import Asked, FakeConnection, FakeFunctions, accept, change, fail, join, refuse, succeed
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import WAIT, Client, Plane, until


class Failing:
    """A write whose fate is not told: the store went away."""

    def wait(self, timeout: float | None = None) -> None:
        raise StoreUnavailable("the store went away")

    def then(self, call: Callable[[Exception | None], None]) -> None:
        call(StoreUnavailable("the store went away"))


class TrickyStore(MemoryControlStore):
    """Fails the writes named in ``fails`` (``after``: done all the same); calls ``hooks`` before a write."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: list[str] = []
        self.after = False
        self.hooks: dict[str, Callable[[], None]] = {}

    def _write(self, name: str, write: Callable[[], Any]) -> Any:
        hook = self.hooks.pop(name, None)
        if hook is not None:
            hook()
        if name in self.fails:
            self.fails.remove(name)
            if self.after:
                write()
            return Failing()
        return write()

    def create_execution(self, entry: Any, *, durable: bool) -> Any:
        answer = self._write("create", lambda: super(TrickyStore, self).create_execution(entry, durable=durable))
        return (entry.execution_id, answer) if isinstance(answer, Failing) else answer

    def assign_attempt(self, *arguments: Any) -> Any:
        return self._write("assign", lambda: super(TrickyStore, self).assign_attempt(*arguments))

    def return_execution(self, *arguments: Any, **how: Any) -> Any:
        return self._write("requeue", lambda: super(TrickyStore, self).return_execution(*arguments, **how))

    def end_attempt(self, *arguments: Any, **how: Any) -> Any:
        return self._write("end", lambda: super(TrickyStore, self).end_attempt(*arguments, **how))

    def all_open(self) -> list[str]:
        where = ExecutionFilter(status=ExecutionStatus.RUNNING)
        return [entry.execution_id for entry in self.executions(where, "", 10_000).entries]


@pytest.fixture
def store() -> TrickyStore:
    return TrickyStore()


@pytest.fixture
def plane(store: TrickyStore) -> Iterator[Plane]:
    made = Plane(store)
    made.functions.add("f")
    made.functions.add("w", max_concurrency=1, **WAIT)
    yield made
    made.close()


def idle(plane: Plane) -> bool:
    return all(agent.total == 0 and not agent.in_flight for agent in plane.fleet.agents())


def test_a_refusal_names_each_agent_once(plane: Plane) -> None:
    plane.agent("a1", script=succeed)
    plane.agent("a2", script=succeed)
    plane.execute()
    for state in list(plane.fleet.agents()):
        change(plane.fleet, state.agent_id, record=replace(state.record, status=AgentStatus.DRAINING))
    with pytest.raises(NoAgentFits) as refused:
        plane.execute()
    assert refused.value.message.count("a1") == refused.value.message.count("a2") == 1


@pytest.mark.parametrize("after", [False, True])
class TestStore:
    def test_no_agent_is_asked_for_what_could_not_be_written(
        self, plane: Plane, store: TrickyStore, after: bool
    ) -> None:
        agent = plane.agent(script=succeed)
        for start in (plane.execute, plane.submit):
            store.fails, store.after = ["create"], after
            with pytest.raises(StoreUnavailable):
                start()
        assert not agent.asked
        assert idle(plane)
        plane.service.tick(0.0)
        assert not store.all_open()

    def test_an_answer_is_given_though_its_end_is_written_later(
        self, plane: Plane, store: TrickyStore, after: bool
    ) -> None:
        plane.agent(script=succeed)
        store.fails, store.after = ["end"], after
        record = plane.execute("f", "x")
        assert record.output == b"x"
        plane.service.tick(0.0)
        assert plane.record(record.execution_id).status is ExecutionStatus.SUCCESS

    def test_the_next_agent_is_not_asked_unwritten(self, plane: Plane, store: TrickyStore, after: bool) -> None:
        plane.agent("a1", refuse(ErrorKind.AT_CAPACITY), figures=NodeFigures(0, 0, 4096, 0, 0, 256))
        second = plane.agent("a2", succeed, figures=NodeFigures(90, 90, 4096, 3000, 0, 256))
        store.fails, store.after = ["assign"], after
        with pytest.raises(StoreUnavailable):
            plane.execute()
        assert not second.asked
        assert idle(plane)
        plane.service.tick(0.0)
        assert not store.all_open()

    @pytest.mark.parametrize("write", ["assign", "requeue"])
    def test_a_queued_one_goes_on_and_runs_once(
        self, plane: Plane, store: TrickyStore, write: str, after: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("fluxlib.control.executions.dispatcher._STORE_RETRY_SECONDS", 0.02)
        execution_id = plane.submit("w", "x")
        store.fails, store.after = [write], after
        refused = threading.Event()

        def once(connection: FakeConnection, asked: Asked) -> None:
            if write == "requeue" and not refused.is_set():
                refused.set()
                refuse(ErrorKind.AT_CAPACITY)(connection, asked)
            else:
                accept(connection, asked)

        agent = plane.agent(script=once)
        until(lambda: not store.fails)
        plane.fleet.freed("a1", "w")
        until(lambda: agent.records)
        assert len(agent.asked) == (2 if write == "requeue" else 1)
        agent.end(agent.asked[-1])
        assert plane.record(execution_id).status is ExecutionStatus.SUCCESS
        assert idle(plane)


class TestStops:
    """A client that goes away, or a cancel, at every step: it ends cancelled, and nothing goes on."""

    def test_a_client_that_was_gone_before_it_began(self, plane: Plane) -> None:
        agent = plane.agent()

        class Gone(Client):
            def on_gone(self, callback: Callable[[], None]) -> None:
                callback()

        assert plane.execute(client=Gone()).status is ExecutionStatus.CANCELLED
        assert not agent.asked
        assert idle(plane)

    def test_while_its_record_is_written(self, plane: Plane, store: TrickyStore) -> None:
        agent, client = plane.agent(), Client()
        store.hooks["create"] = client.leave
        record = plane.execute(client=client)
        assert record.status is ExecutionStatus.CANCELLED
        assert not agent.asked
        assert idle(plane)
        assert plane.record(record.execution_id).status is ExecutionStatus.CANCELLED

    def test_while_the_agent_is_being_asked(self, plane: Plane) -> None:
        client = Client()
        agent = plane.agent(script=lambda connection, asked: client.leave())
        assert plane.execute(client=client).status is ExecutionStatus.CANCELLED
        assert agent.cancels
        assert idle(plane)

    def test_after_the_agent_refused(self, plane: Plane) -> None:
        client = Client()

        def refuse_and_leave(connection: FakeConnection, asked: Asked) -> None:
            client.leave()
            refuse(ErrorKind.AT_CAPACITY)(connection, asked)

        first = plane.agent("a1", refuse_and_leave, figures=NodeFigures(0, 0, 4096, 0, 0, 256))
        first.on_cancel = lambda execution_id: None
        second = plane.agent("a2", succeed, figures=NodeFigures(90, 90, 4096, 3000, 0, 256))
        assert plane.execute(client=client).status is ExecutionStatus.CANCELLED
        assert not second.asked
        assert idle(plane)

    @pytest.mark.parametrize("write", ["create", "requeue"])
    def test_on_its_way_into_the_queue(self, plane: Plane, store: TrickyStore, write: str) -> None:
        client = Client()
        store.hooks[write] = client.leave
        agent = plane.agent(script=refuse(ErrorKind.AT_CAPACITY))
        if write == "create":
            plane.fleet.mark_full("a1", "w")
        assert plane.execute("w", client=client).status is ExecutionStatus.CANCELLED
        assert not plane.service.waiting()
        agent.script = succeed
        plane.fleet.freed("a1", "w")
        assert idle(plane)
        assert len(agent.asked) == (0 if write == "create" else 1)

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_cancel_while_a_queued_one_is_given_to_an_agent(
        self, plane: Plane, store: TrickyStore, asynchronous: bool
    ) -> None:
        if asynchronous:
            execution_id = plane.submit("w")
        else:
            waiting = plane.soon("w")
            plane.queued(1, "w")
            (execution_id,) = store.all_open()
        cancelled: list[Any] = []

        def cancel() -> None:
            cancelled.append(plane.pool.submit(plane.service.cancel, execution_id))
            held = plane.service._tracker.get(execution_id)
            until(lambda: held is not None and held.cancel_reason)

        store.hooks["assign"] = cancel
        agent = plane.agent(script=accept)
        until(lambda: cancelled)
        assert cancelled[0].result(10).status is ExecutionStatus.CANCELLED
        assert not agent.asked
        assert plane.record(execution_id).status is ExecutionStatus.CANCELLED
        if not asynchronous:
            assert waiting.result(10).status is ExecutionStatus.CANCELLED
        until(lambda: idle(plane))

    def test_one_ended_by_another_flux_is_not_sent(self, plane: Plane, store: TrickyStore) -> None:
        waiting = plane.soon("w")
        plane.queued(1, "w")
        (execution_id,) = store.all_open()
        entry = store.execution(execution_id)
        assert entry is not None
        store.end_attempt(entry.record.ended(ExecutionStatus.FAILED, at=1.0, error="by another"), 0, 1000.0)
        agent = plane.agent(script=accept)
        assert waiting.result(10).error == "by another"
        assert not agent.asked
        assert idle(plane)


def test_a_cancel_that_crossed_another_flux_sending_is_found(store: TrickyStore) -> None:
    plane = Plane(store, shared=True)
    plane.functions.add("f")
    agent = plane.agent(script=accept)
    execution_id = plane.submit()
    entry = store.execution(execution_id)
    assert entry is not None
    store.end_attempt(entry.record.ended(ExecutionStatus.CANCELLED, at=1.0), 0, 1000.0)
    plane.service.tick(entry.record.started_at + 60)
    assert agent.wait_cancelled()[0][0] == execution_id
    until(lambda: idle(plane))
    plane.close()


def test_a_refusal_of_the_arguments_is_the_callers_error(plane: Plane) -> None:
    plane.agent("a1", refuse(ErrorKind.INVALID, "an argument has a NUL"), figures=NodeFigures(0, 0, 4096, 0, 0, 9))
    second = plane.agent("a2", succeed, figures=NodeFigures(90, 90, 4096, 3000, 0, 9))
    with pytest.raises(InvalidInput, match="NUL"):
        plane.execute()
    assert not second.asked
    assert idle(plane)


def test_a_lost_queued_one_is_never_sent_again(plane: Plane, store: TrickyStore) -> None:
    execution_id = plane.submit("w")
    agent = plane.agent(script=fail(AgentLost("the host went dark")))
    agent.wait_asked()
    until(lambda: idle(plane))
    plane.fleet.freed("a1", "w")
    plane.service.agent_lost("a1", "offline for 300 s")
    record = plane.record(execution_id)
    assert (record.status, record.error_kind) == (ExecutionStatus.FAILED, ErrorKind.AGENT_LOST)
    assert len(agent.asked) == 1


class TestLargeFleets:
    @pytest.fixture
    def slots(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Placement, list[str]]]:
        """Slots whose every walk counts as a long one, and the walks."""
        monkeypatch.setattr("fluxlib.control.executions.placement._SLOW_SCAN", 0.0)
        monkeypatch.setattr("fluxlib.control.executions.placement._SCAN_BACKOFF", 1e6)
        fleet, functions, walks = Fleet(), FakeFunctions(), list[str]()
        functions.add("big", memory_mb=1000)
        functions.add("small")
        for number in range(20):
            join(fleet, f"a{number}", figures=NodeFigures(0, 90, 1000, 900, 0, 256))
        place = fleet.place

        def counted(name: str, *args: Any, **more: Any) -> Any:
            walks.append(name)
            return place(name, *args, **more)

        monkeypatch.setattr(fleet, "place", counted)
        timers = Timers("test-timers").start()
        yield Placement(fleet, functions, timers, lambda agent_id, name: None), walks
        timers.stop(Deadline(5))

    def test_a_flood_nobody_can_take_does_not_walk_the_fleet_each_time(
        self, slots: tuple[Placement, list[str]]
    ) -> None:
        mine, walks = slots
        need = mine.need("big")
        assert [mine.place(need) for _ in range(50)] == [None] * 50
        assert walks == ["big"]
        errors = [mine.refusal(need).error for _ in range(3)]
        assert len({id(error) for error in errors}) == 3
        assert {error.message for error in errors} == {errors[0].message}
        assert errors[0].retry_after == errors[2].retry_after
        assert mine.place(mine.need("small")) is not None

    def test_one_that_waits_overlooks_nothing(self, slots: tuple[Placement, list[str]]) -> None:
        mine, walks = slots
        assert mine.place(mine.need("big")) is None
        assert mine.place_waiting("big", "") is None
        assert mine.place_waiting("big", "a3") is None
        assert walks == ["big"] * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_leaves_nothing_open_and_runs_nothing_twice(
    store: TrickyStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agents that answer at random and late, clients that leave, cancels, a full room: every end is written once."""
    monkeypatch.setattr("fluxlib.control.executions.placement.EXCLUDE_SECONDS", 0.02)
    chance = random.Random(seed)
    plane = Plane(store, max_waiting=40)
    plane.functions.add("f", max_concurrency=2)
    plane.functions.add("w", max_concurrency=2, **WAIT)
    started = Counter[str]()
    lock = threading.Lock()

    def refuse_then_free(connection: FakeConnection, asked: Asked) -> None:
        refuse(ErrorKind.AT_CAPACITY)(connection, asked)
        plane.fleet.freed(connection.agent_id, asked.request.function_name)

    def behave(connection: FakeConnection, asked: Asked) -> None:
        roll = chance.random()
        if roll < 0.15:
            plane.pool.submit(refuse_then_free, connection, asked)
        elif roll < 0.2:
            asked.answer(AgentUnreachable("no route"))
        elif roll < 0.25:
            plane.pool.submit(asked.answer, refusal(asked.request, "a", ErrorKind.NO_CODE, "none", 1.0))
        else:
            with lock:
                started[asked.request.execution_id] += 1
            if roll < 0.3:
                plane.pool.submit(asked.answer, AgentLost("dark"))
            else:
                plane.pool.submit(succeed, connection, asked)

    agents = [plane.agent(f"a{number}", behave) for number in range(3)]
    for agent in agents:
        agent.on_cancel = lambda execution_id: None
    errors: list[BaseException] = []

    def client(number: int) -> None:
        mine = random.Random(seed * 100 + number)
        for _ in range(40):
            name = mine.choice("fw")
            caller = Client()
            try:
                if mine.random() < 0.5:
                    if mine.random() < 0.2:
                        plane.timers.after(mine.random() / 200, caller.leave)
                    plane.execute(name, "x", client=caller)
                else:
                    execution_id = plane.submit(name, "x")
                    if mine.random() < 0.3:
                        plane.service.cancel(execution_id)
            except FluxError:
                pass
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=client, args=(number,), name=f"client-{number}") for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not errors
    for agent in agents:
        agent.script = succeed
        plane.fleet.freed(agent.agent_id, "")
    until(lambda: not plane.service.waiting())
    # A lost one stays in flight without a slot, until its agent is given up.
    until(lambda: idle(plane) and all(one.watch for one in plane.service._tracker.all()))
    for agent in agents:
        plane.service.agent_lost(agent.agent_id, "the test is over")
    plane.service.tick(0.0)
    assert not store.all_open()
    assert not plane.service._tracker.all()
    assert all(count == 1 for count in started.values())
    plane.close()
