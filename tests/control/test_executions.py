"""Executions from acceptance to end, over both embedded stores, with agents that answer, refuse, lose and hang."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxlib.control.executions.outputs import LiveOutput
from fluxlib.control.services import AgentAway
from fluxlib.errors import (
    AgentLost,
    AgentUnreachable,
    AtCapacity,
    Conflict,
    InvalidInput,
    NoAgentFits,
    NotFound,
    Stopping,
)
from fluxlib.lifecycle import Deadline
from fluxlib.model import (
    AgentStatus,
    ErrorKind,
    ExecutionRecord,
    ExecutionStatus,
    NodeFigures,
    Phase,
    Platform,
)
from fluxlib.store.base import ControlStore, ExecutionFilter
from fluxlib.store.sqlite import SqliteControlStore
from tests.support.fake_agents import FakeConnection, accept, change, fail, join, refuse, succeed
from tests.support.memory_store import MemoryControlStore
from tests.support.plane import WAIT, Client, Plane, until


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ControlStore]:
    made: ControlStore = MemoryControlStore() if request.param == "memory" else SqliteControlStore(tmp_path / "f.db")
    yield made
    made.close()


@pytest.fixture
def plane(store: ControlStore) -> Iterator[Plane]:
    made = Plane(store)
    made.functions.add("f")
    yield made
    made.close()


class TestSync:
    def test_the_record_comes_with_output_and_the_store_keeps_its_end(self, plane: Plane) -> None:
        plane.agent(script=succeed)
        record = plane.execute("f", "hello", "you")
        assert (record.status, record.output, record.agent_id) == (ExecutionStatus.SUCCESS, b"hello you", "a1")
        kept = plane.record(record.execution_id)
        assert (kept.status, kept.output, kept.exit_code) == (ExecutionStatus.SUCCESS, None, 0)
        assert plane.service.get(record.execution_id).output == b"hello you"
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]

    def test_ownership_is_in_the_store_before_the_agent_is_asked(self, plane: Plane) -> None:
        seen: list[ExecutionRecord] = []

        def look(connection: FakeConnection, asked: object) -> None:
            (entry,) = plane.store.open_executions("a1")
            seen.append(entry.record)
            assert entry.owner == "s1"
            succeed(connection, asked)  # type: ignore[arg-type]

        plane.agent(script=look)
        plane.execute()
        assert seen[0].phase is Phase.STARTING
        assert not plane.store.open_executions("a1") or plane.record(seen[0].execution_id).status.ended

    def test_unknown_functions_and_long_timeouts_are_refused_before_anything_happens(self, plane: Plane) -> None:
        plane.functions.add("short", timeout_seconds=5)
        agent = plane.agent()
        with pytest.raises(NotFound):
            plane.execute("nobody")
        with pytest.raises(InvalidInput, match="timeout"):
            plane.execute("short", timeout_seconds=6.0)
        assert not agent.asked
        assert not plane.store.executions(ExecutionFilter(), "", 10).entries

    @pytest.mark.parametrize(
        "script",
        [
            fail(AgentUnreachable("refused")),
            refuse(ErrorKind.AT_CAPACITY),
            refuse(ErrorKind.NO_CODE),
            refuse(ErrorKind.STOPPING),
            refuse(ErrorKind.UNENFORCEABLE),
        ],
    )
    def test_an_agent_that_started_nothing_is_skipped_for_the_next(self, plane: Plane, script: object) -> None:
        first = plane.agent("a1", script, figures=NodeFigures(0.0, 0.0, 4096, 0, 0, 256))
        plane.agent("a2", succeed, figures=NodeFigures(80.0, 80.0, 4096, 3000, 0, 256))
        record = plane.execute("f", "x")
        assert (record.agent_id, record.output, len(first.asked)) == ("a2", b"x", 1)
        assert plane.record(record.execution_id).agent_id == "a2"

    def test_an_agent_lost_on_the_way_is_never_replaced(self, plane: Plane) -> None:
        plane.agent("a1", fail(AgentLost("gone")), figures=NodeFigures(0.0, 0.0, 4096, 0, 0, 256))
        second = plane.agent("a2", succeed, figures=NodeFigures(80.0, 80.0, 4096, 3000, 0, 256))
        with pytest.raises(AgentLost) as caught:
            plane.execute()
        assert not second.asked
        assert plane.record(caught.value.execution_id).status is ExecutionStatus.RUNNING
        plane.service.agent_lost("a1", "offline for 300 s")
        record = plane.record(caught.value.execution_id)
        assert (record.status, record.error_kind) == (ExecutionStatus.FAILED, ErrorKind.AGENT_LOST)
        assert "agent lost" in plane.service.get(caught.value.execution_id).error

    def test_each_caller_of_a_lost_agent_is_told_its_own_id(self, plane: Plane) -> None:
        agent = plane.agent()
        calls = [plane.soon("f", word) for word in ("one", "two", "three")]
        agent.wait_asked(3)
        error = AgentLost("agent a1 was lost: reset")  # a broken stream says one of all it took down
        for asked in agent.asked:
            asked.answer(error)
        told = [call.exception(10) for call in calls]
        assert all(isinstance(one, AgentLost) for one in told)
        ids = [one.execution_id for one in told if isinstance(one, AgentLost)]
        assert sorted(ids) == sorted(asked.request.execution_id for asked in agent.asked)

    def test_a_client_that_goes_away_cancels_its_run(self, plane: Plane) -> None:
        agent, client = plane.agent(), Client()
        running = plane.soon(client=client)
        agent.wait_asked()
        client.leave()
        assert running.result(10).status is ExecutionStatus.CANCELLED
        assert "gone away" in agent.cancels[0][1]

    def test_a_client_that_leaves_after_its_answer_cancels_nothing(self, plane: Plane) -> None:
        agent, client = plane.agent(script=succeed), Client()
        plane.execute(client=client)
        client.leave()
        assert not agent.cancels

    def test_full_means_503_and_a_retry_after(self, plane: Plane) -> None:
        plane.functions.add("one", max_concurrency=1)
        agent = plane.agent()
        running = plane.soon("one")
        asked = agent.wait_asked()
        with pytest.raises(AtCapacity) as caught:
            plane.execute("one")
        assert caught.value.retry_after
        agent.end(asked)
        running.result(10)
        agent.script = succeed
        plane.execute("one")

    def test_no_agent_of_the_platform_names_both(self, plane: Plane) -> None:
        plane.functions.add("exe", detected=(Platform("windows", "amd64"),), **WAIT)
        plane.agent()
        with pytest.raises(NoAgentFits, match=r"windows/amd64.*linux/amd64"):
            plane.execute("exe")

    def test_every_agent_unreachable_is_told_as_that(self, plane: Plane) -> None:
        plane.agent(script=fail(AgentUnreachable("connection refused")))
        for _ in range(2):
            with pytest.raises(AgentUnreachable, match="connection refused"):
                plane.execute()
        # Nobody knows their IDs: nothing is kept of them.
        plane.service.tick(1e12)
        assert not plane.store.executions(ExecutionFilter(), "", 10).entries


class TestAsync:
    def test_accepted_runs_and_ends_by_the_agents_word(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit("f", "x", stdin=b"in")
        assert agent.asked[0].request.stdin == b"in"
        assert plane.service.get(execution_id).status is ExecutionStatus.RUNNING
        assert plane.fleet.get("a1").total == 1  # type: ignore[union-attr]
        agent.end(agent.asked[0], b"done")
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]
        assert plane.record(execution_id).status is ExecutionStatus.SUCCESS
        assert plane.service.get(execution_id).output == b"done"
        assert b"".join(plane.service.output(execution_id, 1, follow=True)) == b"one"

    def test_at_capacity_is_never_accepted(self, plane: Plane) -> None:
        plane.agent(script=refuse(ErrorKind.AT_CAPACITY, "function f at capacity"))
        with pytest.raises(AtCapacity):
            plane.submit()

    def test_a_lost_answer_is_told_with_the_id_and_asked_for_later(self, plane: Plane) -> None:
        agent = plane.agent(script=fail(AgentLost("the stream broke")))
        with pytest.raises(AgentLost) as caught:
            plane.submit()
        execution_id = caught.value.execution_id
        agent.records[execution_id] = agent.asked[0].record
        plane.service.reconcile("a1", [execution_id])
        agent.records[execution_id] = agent.asked[0].record.ended(ExecutionStatus.SUCCESS, at=5.0)
        until(lambda: plane.record(execution_id).status is ExecutionStatus.SUCCESS)
        assert len(agent.asked) == 1

    def test_an_original_agent_is_asked_for_the_end(self, plane: Plane) -> None:
        agent = plane.agent(script=accept, original=True)
        execution_id = plane.submit()
        agent.on_ended = lambda record: None
        agent.end(agent.asked[0], b"x", status=ExecutionStatus.FAILED, error="exit code 3")
        until(lambda: plane.record(execution_id).status is ExecutionStatus.FAILED)
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]

    def test_a_repeated_key_is_the_first_submission(self, plane: Plane) -> None:
        plane.functions.add("one", max_concurrency=1)
        agent = plane.agent(script=accept)
        first = plane.submit("one", idempotency_key="k")
        # Also while nothing more can be accepted.
        assert plane.submit("one", idempotency_key="k") == first
        agent.end(agent.asked[0])
        assert plane.submit("one", idempotency_key="k") == first
        assert len(agent.asked) == 1
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]

    def test_a_repeated_key_is_known_to_the_next_life_before_it_has_an_agent(self, store: ControlStore) -> None:
        with_agent = Plane(store)
        with_agent.functions.add("f")
        with_agent.agent(script=accept)
        first = with_agent.submit(idempotency_key="k")
        with_agent.close()
        plane = Plane(store, session="s2")
        plane.functions.add("f")
        plane.service.start()
        assert plane.submit(idempotency_key="k") == first
        with pytest.raises(NoAgentFits):
            plane.submit(idempotency_key="another")
        plane.close()

    def test_a_key_that_was_turned_away_can_try_again(self, plane: Plane) -> None:
        agent = plane.agent(script=refuse(ErrorKind.AT_CAPACITY))
        with pytest.raises(AtCapacity):
            plane.submit(idempotency_key="k")
        agent.script = accept
        plane.fleet.freed("a1", "f")
        execution_id = plane.submit(idempotency_key="k")
        assert plane.record(execution_id).status is ExecutionStatus.RUNNING


class TestWaiting:
    def test_sync_and_async_wait_and_start_in_the_order_they_came(self, plane: Plane) -> None:
        plane.functions.add("one", max_concurrency=1, **WAIT)
        agent = plane.agent()
        first = plane.soon("one", "1")
        agent.wait_asked()
        second = plane.soon("one", "2")
        plane.queued(1, "one")
        third = plane.submit("one", "3")
        plane.queued(2, "one")
        assert plane.service.get(third).phase is Phase.QUEUED
        queued = plane.store.executions(ExecutionFilter(queued=True), "", 10).entries
        assert {entry.record.asynchronous for entry in queued} == {True, False}
        agent.end(agent.wait_asked(1))
        assert first.result(10).status is ExecutionStatus.SUCCESS
        agent.end(agent.wait_asked(2))
        assert second.result(10).status is ExecutionStatus.SUCCESS
        asked = agent.wait_asked(3)
        asked.accept()
        agent.end(asked)
        assert [one.request.args for one in agent.asked] == [("1",), ("2",), ("3",)]
        assert plane.record(third).status is ExecutionStatus.SUCCESS

    def test_a_newcomer_does_not_overtake(self, plane: Plane) -> None:
        plane.functions.add("one", max_concurrency=1, **WAIT)
        agent = plane.agent(script=accept)
        plane.submit("one", "1")
        plane.submit("one", "2")
        plane.submit("one", "3")
        agent.end(agent.asked[0])
        agent.end(agent.wait_asked(2))
        agent.wait_asked(3)
        assert [one.request.args for one in agent.asked] == [("1",), ("2",), ("3",)]

    def test_a_waiting_client_that_leaves_gives_its_place_up(self, plane: Plane) -> None:
        plane.functions.add("one", max_concurrency=1, **WAIT)
        agent, client = plane.agent(), Client()
        first = plane.soon("one")
        agent.wait_asked()
        waiting = plane.soon("one", client=client)
        plane.queued(1, "one")
        client.leave()
        assert waiting.result(10).status is ExecutionStatus.CANCELLED
        assert not plane.service.waiting()
        agent.end(agent.wait_asked())
        first.result(10)
        assert len(agent.asked) == 1

    def test_too_many_waiting_are_turned_away(self, store: ControlStore) -> None:
        plane = Plane(store, max_waiting=1)
        plane.functions.add("one", max_concurrency=1, **WAIT)
        plane.agent(script=accept)
        plane.submit("one")
        plane.submit("one")
        with pytest.raises(AtCapacity, match="max_waiting"):
            plane.submit("one")
        plane.close()

    def test_resources_are_waited_for_until_a_report_shows_them(self, plane: Plane) -> None:
        plane.functions.add("big", memory_mb=3000, **WAIT)
        agent = plane.agent(script=accept, figures=NodeFigures(10.0, 90.0, 4096, 3600, 0, 256))
        execution_id = plane.submit("big")
        assert plane.service.get(execution_id).phase is Phase.QUEUED
        plane.fleet.report("a1", NodeFigures(10.0, 10.0, 4096, 400, 0, 256), at=1.0)
        agent.wait_asked()

    def test_resources_lacking_are_429_with_exit(self, plane: Plane) -> None:
        plane.functions.add("big", memory_mb=3000)
        plane.agent(figures=NodeFigures(10.0, 90.0, 4096, 3600, 0, 256))
        with pytest.raises(NoAgentFits, match=r"3000 MB.*496 MB"):
            plane.execute("big")

    def test_an_unreachable_agent_is_tried_again_by_itself(self, plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fluxlib.control.executions.placement.EXCLUDE_SECONDS", 0.02)
        plane.functions.add("w", **WAIT)
        agent = plane.agent(script=fail(AgentUnreachable("restarting")))
        plane.submit("w", "x")
        agent.wait_asked(1)
        agent.script = accept
        until(lambda: agent.records)

    def test_an_original_that_refused_is_asked_again_by_itself(
        self, plane: Plane, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Others fill it, and it has no way to say that they have finished."""
        monkeypatch.setattr("fluxlib.control.executions.placement.EXCLUDE_SECONDS", 0.02)
        plane.functions.add("w", **WAIT)
        agent = plane.agent(script=refuse(ErrorKind.AT_CAPACITY), original=True)
        plane.submit("w", "x")
        agent.wait_asked(2)
        agent.script = accept
        until(lambda: agent.records)

    def test_a_queued_one_survives_a_restart(self, store: ControlStore) -> None:
        old = Plane(store, "old")
        old.functions.add("w", **WAIT)
        large = b"x" * 100_000
        first, second = old.submit("w", "1", stdin=large), old.submit("w", "2")
        old.close()
        new = Plane(store, "new")
        new.functions.add("w", **WAIT)
        new.service.start()
        assert new.service.waiting() == {"w": 2}
        agent = new.agent(script=accept)
        agent.wait_asked(2)
        by_id = {one.request.execution_id: one.request for one in agent.asked}
        assert by_id[first].stdin == large
        assert by_id[second].args == ("2",)
        for asked in agent.asked:
            agent.end(asked)
        assert new.record(first).status is ExecutionStatus.SUCCESS
        new.close()

    def test_what_waits_for_a_deleted_function_fails(self, plane: Plane) -> None:
        plane.functions.add("w", **WAIT)
        execution_id = plane.submit("w")
        del plane.functions.known["w"]
        plane.service.tick(0.0)
        record = plane.record(execution_id)
        assert (record.status, record.error_kind) == (ExecutionStatus.FAILED, ErrorKind.NOT_FOUND)


class TestCancel:
    def test_a_running_sync_one_is_cancelled_from_outside(self, plane: Plane) -> None:
        agent = plane.agent()
        running = plane.soon()
        execution_id = agent.wait_asked().request.execution_id
        assert plane.service.cancel(execution_id).status is ExecutionStatus.CANCELLED
        assert running.result(10).status is ExecutionStatus.CANCELLED
        with pytest.raises(Conflict, match="cancelled") as caught:
            plane.service.cancel(execution_id)
        assert caught.value.status == "cancelled"

    def test_a_running_async_one(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        assert plane.service.cancel(execution_id).status is ExecutionStatus.CANCELLED
        assert plane.record(execution_id).status is ExecutionStatus.CANCELLED
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]
        assert len(agent.cancels) == 1

    def test_a_queued_one_never_starts(self, plane: Plane) -> None:
        plane.functions.add("w", **WAIT)
        execution_id = plane.submit("w")
        assert plane.service.cancel(execution_id).status is ExecutionStatus.CANCELLED
        agent = plane.agent(script=accept)
        assert not agent.asked
        assert plane.record(execution_id).status is ExecutionStatus.CANCELLED

    def test_a_queued_sync_one_answers_its_caller(self, plane: Plane) -> None:
        plane.functions.add("w", **WAIT)
        waiting = plane.soon("w")
        plane.queued(1, "w")
        (entry,) = plane.store.open_executions("")
        assert plane.service.cancel(entry.execution_id).status is ExecutionStatus.CANCELLED
        assert waiting.result(10).status is ExecutionStatus.CANCELLED

    def test_one_queued_at_another_flux(self, store: ControlStore) -> None:
        ours, theirs = Plane(store, "s1", shared=True), Plane(store, "s2", shared=True)
        theirs.functions.add("w", **WAIT)
        execution_id = theirs.submit("w")
        assert ours.service.cancel(execution_id).status is ExecutionStatus.CANCELLED
        agent = theirs.agent(script=accept)
        until(lambda: not theirs.service.waiting())
        theirs.close()
        ours.close()
        assert not agent.asked

    def test_one_running_for_another_flux(self, store: ControlStore) -> None:
        ours, theirs = Plane(store, "s1", shared=True), Plane(store, "s2", shared=True)
        theirs.functions.add("f")
        agent = theirs.agent(script=accept)
        join(ours.fleet, "a1", agent)
        execution_id = theirs.submit("f")
        assert ours.service.cancel(execution_id).status is ExecutionStatus.CANCELLED
        assert theirs.record(execution_id).status is ExecutionStatus.CANCELLED
        assert ours.service.get(execution_id).status is ExecutionStatus.CANCELLED
        theirs.close()
        ours.close()

    def test_one_that_ended_is_a_conflict_with_its_status(self, plane: Plane) -> None:
        plane.agent(script=succeed)
        record = plane.execute()
        with pytest.raises(Conflict) as caught:
            plane.service.cancel(record.execution_id)
        assert caught.value.status == "success"
        with pytest.raises(NotFound):
            plane.service.cancel("nobody")

    def test_one_that_will_not_die_in_time_is_not_called_dead(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        agent.on_cancel = lambda execution_id: ExecutionStatus.RUNNING
        with pytest.raises(AgentAway, match="not dead"):
            plane.service.cancel(execution_id)
        assert plane.record(execution_id).status is ExecutionStatus.RUNNING

    def test_one_at_an_agent_that_is_away(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        agent.down = AgentUnreachable("no route")
        assert plane.service.function_of(execution_id) == "f"
        with pytest.raises(AgentAway, match="no route") as caught:
            plane.service.cancel(execution_id)
        assert (caught.value.http_status, caught.value.record.execution_id) == (503, execution_id)


class TestReading:
    def test_an_agent_that_is_away_gives_the_last_record(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        agent.down = AgentUnreachable("no route")
        with pytest.raises(AgentAway) as caught:
            plane.service.get(execution_id)
        assert caught.value.record.agent_id == "a1"
        state = plane.fleet.get("a1")
        assert state is not None
        agent.down = None
        change(plane.fleet, "a1", record=type(state.record)("a1", "x", status=AgentStatus.OFFLINE))
        with pytest.raises(AgentAway):
            plane.service.get(execution_id)
        with pytest.raises(AgentAway):
            plane.service.output(execution_id, 0, follow=True)

    def test_an_ended_one_whose_agent_is_gone_keeps_its_end(self, plane: Plane) -> None:
        plane.agent(script=succeed)
        record = plane.execute("f", "x")
        plane.record(record.execution_id)
        plane.fleet.remove("a1")
        kept = plane.service.get(record.execution_id)
        assert kept.status is ExecutionStatus.SUCCESS
        assert "output is lost" in kept.warnings[0]

    def test_offsets_beyond_the_end_are_refused(self, plane: Plane) -> None:
        plane.agent(script=succeed)
        record = plane.execute("f", "abc")
        plane.record(record.execution_id)
        assert b"".join(plane.service.output(record.execution_id, 3, follow=False)) == b""
        with pytest.raises(InvalidInput, match="beyond"):
            plane.service.output(record.execution_id, 4, follow=False)
        with pytest.raises(NotFound):
            plane.service.output("nobody", 0, follow=False)

    def test_a_follower_of_an_ended_one_may_read_as_slowly_as_of_a_running_one(
        self, plane: Plane, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        agent = plane.agent(script=succeed)
        record = plane.execute("f", "abc")
        plane.record(record.execution_id)
        output, asked = agent.output, []

        def asked_for(execution_id: str, offset: int, *, follow: bool) -> Any:
            asked.append(follow)
            return output(execution_id, offset, follow=follow)

        monkeypatch.setattr(agent, "output", asked_for)
        for follow in (False, True):
            assert b"".join(plane.service.output(record.execution_id, 0, follow=follow)) == b"abc"
        assert asked == [False, True]  # only what follows may take its time

    def test_a_follower_of_a_queued_one_begins_when_it_begins(self, plane: Plane) -> None:
        plane.functions.add("w", **WAIT)
        execution_id = plane.submit("w")
        stream = plane.service.output(execution_id, 0, follow=True)
        reading = plane.pool.submit(lambda: b"".join(stream))
        agent = FakeConnection("a1", accept)
        agent.outputs[execution_id] = b"hello"
        join(plane.fleet, "a1", agent)
        assert reading.result(10) == b"hello"

    def test_a_follower_who_looks_before_the_agent_is_asked_looks_again(
        self, plane: Plane, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plane.functions.add("w", **WAIT)
        calling = plane.soon("w")
        plane.queued(1, "w")
        (entry,) = plane.store.executions(ExecutionFilter(), "", 10).entries
        stream = plane.service.output(entry.execution_id, 0, follow=True)
        assert isinstance(stream, LiveOutput)
        send, wait, looked = plane.service._dispatcher._send, stream._changed.wait, threading.Event()

        def sent_late(*arguments: Any) -> None:
            assert looked.wait(10)
            send(*arguments)

        def wait_again(timeout: float | None = None) -> bool:
            written = plane.store.execution(entry.execution_id)
            if written is not None and written.record.agent_id:
                looked.set()
            return wait(timeout)

        monkeypatch.setattr(plane.service._dispatcher, "_send", sent_late)
        monkeypatch.setattr(stream._changed, "wait", wait_again)
        reading = plane.pool.submit(lambda: next(iter(stream)))
        agent = plane.agent()
        asked = agent.wait_asked()
        agent.outputs[entry.execution_id] = b"live"
        try:
            assert reading.result(5) == b"live"
        finally:
            agent.end(asked, b"live")
            calling.result(10)

    def test_a_follower_that_goes_away_waits_no_longer(self, plane: Plane) -> None:
        plane.functions.add("w", **WAIT)
        stream = plane.service.output(plane.submit("w"), 0, follow=True)
        reading = plane.pool.submit(lambda: b"".join(stream))
        stream.close()
        assert reading.result(10) == b""


class TestRecovery:
    def test_what_a_former_life_had_at_an_agent_is_asked_for(self, store: ControlStore) -> None:
        old = Plane(store, "old")
        old.functions.add("f")
        agent = old.agent(script=accept)
        ended, running, lost = old.submit(), old.submit(), old.submit()
        agent.on_ended = lambda record: None
        old.soon()
        agent.wait_asked(4)
        sync_id = agent.asked[3].request.execution_id
        agent.records[ended] = agent.asked[0].record.ended(ExecutionStatus.SUCCESS, at=9.0)
        del agent.records[lost]
        new = Plane(store, "new")
        new.service.start()
        agent.on_ended = new.service.events("a1").ended
        join(new.fleet, "a1", agent)
        new.service.reconcile("a1", [running, sync_id])
        until(lambda: new.record(ended).status is ExecutionStatus.SUCCESS)
        until(lambda: new.record(sync_id).status is ExecutionStatus.CANCELLED)
        until(lambda: new.record(lost).error_kind is ErrorKind.AGENT_LOST)
        assert new.record(running).status is ExecutionStatus.RUNNING
        agent.records[running] = agent.asked[1].record.ended(ExecutionStatus.SUCCESS, at=9.0)
        until(lambda: new.record(running).status is ExecutionStatus.SUCCESS)
        assert len(agent.asked) == 4
        new.close()
        old.close()

    def test_an_agent_that_returns_is_told_to_end_what_was_given_up(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        plane.service.agent_lost("a1", "deregistered")
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]
        plane.service.reconcile("a1", [execution_id, "of-somebody-else"])
        assert agent.wait_cancelled()[0][0] == execution_id
        record = plane.record(execution_id)
        assert (record.status, record.error_kind) == (ExecutionStatus.FAILED, ErrorKind.AGENT_LOST)
        assert len(agent.cancels) == 1

    def test_one_that_ended_after_the_agent_listed_it_is_not_called_given_up(
        self, plane: Plane, caplog: pytest.LogCaptureFixture
    ) -> None:
        agent = plane.agent(script=accept)
        ended, cancelled = plane.submit(), plane.submit()
        plane.service.events("a1").ended(agent.asked[0].record.ended(ExecutionStatus.SUCCESS, at=9.0))
        plane.service.events("a1").ended(agent.asked[1].record.ended(ExecutionStatus.CANCELLED, at=9.0))
        until(lambda: plane.record(ended).status.ended and plane.record(cancelled).status.ended)
        plane.service.reconcile("a1", [ended, cancelled])
        assert agent.wait_cancelled()[0][0] == cancelled
        assert not any(ended in message for message in caplog.messages)

    def test_an_agent_that_restarted_gives_the_end_of_what_it_ran(self, plane: Plane) -> None:
        agent = plane.agent(script=accept)
        execution_id = plane.submit()
        agent.records[execution_id] = agent.asked[0].record.ended(
            ExecutionStatus.FAILED, at=5.0, error="agent stopped", kind=ErrorKind.AGENT_STOPPED
        )
        plane.service.reconcile("a1", [])
        until(lambda: plane.record(execution_id).error_kind is ErrorKind.AGENT_STOPPED)
        assert plane.fleet.get("a1").total == 0  # type: ignore[union-attr]

    def test_stopping_refuses_tells_those_that_wait_and_keeps_the_queue(self, store: ControlStore) -> None:
        plane = Plane(store)
        plane.functions.add("w", **WAIT)
        queued = plane.submit("w")
        waiting = plane.soon("w")
        plane.queued(2, "w")
        plane.close()
        with pytest.raises(Stopping):
            waiting.result(10)
        with pytest.raises(Stopping):
            plane.submit("w")
        entry = store.execution(queued)
        assert entry is not None
        assert entry.record.phase is Phase.QUEUED

    def test_stopping_waits_for_what_runs(self, store: ControlStore) -> None:
        plane = Plane(store)
        plane.functions.add("f")
        agent = plane.agent()
        running = plane.soon()
        asked = agent.wait_asked()
        stopping = plane.pool.submit(plane.service.stop, Deadline(10))
        with pytest.raises(TimeoutError):
            stopping.result(0.05)
        agent.end(asked)
        assert running.result(10).status is ExecutionStatus.SUCCESS
        stopping.result(10)
        plane.close()
