"""The stream frame by frame: orders of events that a real agent brings about only now and then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from fluxlib.errors import AgentLost, AgentUnreachable
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus
from fluxlib.rpc.gen import flux_pb2 as pb
from tests.support.clients import Client, Side, Told
from tests.support.scripted_agent import Attachment, ScriptedAgent, accepted, ended, refused
from tests.support.threads import none_left


@contextmanager
def attached(agent: ScriptedAgent, timers: Timers) -> Iterator[tuple[Client, Attachment]]:
    side = Side(None, timers)
    told = Told()
    connection = side.connector.connect(side.connector.probe(agent.address), told.events())
    try:
        attachment = agent.attachment()
        told.attached()
        yield Client(connection, told), attachment
    finally:
        connection.close(Deadline(0))


def test_nothing_is_taken_before_the_greeting(agent: ScriptedAgent, timers: Timers) -> None:
    side = Side(None, timers)
    told = Told()
    connection = side.connector.connect(side.connector.probe(agent.address), told.events())
    client = Client(connection, told)
    try:
        assert isinstance(client.start("e-1").get(0), AgentUnreachable)
        attachment = agent.attachment()
        told.attached()
        client.start("e-2")
        assert attachment.executions(1) == ["e-2"]
        assert attachment.session == "session-of-the-test"
    finally:
        connection.close(Deadline(0))


def test_a_cancel_does_not_wait_for_the_greeting(agent: ScriptedAgent, timers: Timers) -> None:
    """What runs at an agent that comes back may have been given up: it is ended before the stream stands."""
    side = Side(None, timers)
    connection = side.connector.connect(side.connector.probe(agent.address), Told().events())
    try:
        assert connection.cancel("e-1", reason="given up", timeout=5) is ExecutionStatus.CANCELLED
        assert connection.cancel("e-2", reason="given up", timeout=0) is ExecutionStatus.RUNNING
        assert [(one.execution_id, one.no_wait) for one in agent.cancelled] == [("e-1", False), ("e-2", True)]
    finally:
        connection.close(Deadline(0))


def test_a_cancel_that_is_not_waited_for_travels_all_the_same(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        client.start("e-1")
        assert client.connection.cancel("e-1", reason="stopping", timeout=0) is ExecutionStatus.RUNNING
        assert attachment.cancels(1) == ["e-1"]


def test_requests_gather_into_frames_and_acks_ride_along(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        answers = [client.start(f"e-{number}") for number in range(600)]
        ids = attachment.executions(600)
        assert ids == [f"e-{number}" for number in range(600)]
        assert len(attachment.frames) < 300
        attachment.send(executed=[ended(execution_id) for execution_id in ids])
        assert all(answer.record().output == b"out" for answer in answers)
        attachment.acknowledged("e-599")
        received = [one for frame in attachment.frames for one in frame.received]
        assert sorted(received) == sorted(ids)


def test_a_lone_ack_arrives_without_company(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        client.start("e-1")
        attachment.executions(1)
        attachment.send(executed=[ended("e-1")])
        attachment.acknowledged("e-1")
        # One that nobody here knows is confirmed too, or the agent would keep it.
        attachment.send(executed=[ended("stranger")])
        attachment.acknowledged("stranger")


def test_a_second_answer_changes_nothing(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        answer = client.start("e-1")
        attachment.executions(1)
        attachment.send(executed=[ended("e-1", output=b"first"), ended("e-1", output=b"second")])
        attachment.acknowledged("e-1")
        assert answer.record().output == b"first"


def test_an_end_that_overtakes_its_acceptance(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        answer = client.start("e-1", asynchronous=True)
        attachment.executions(1)
        attachment.send(executed=[ended("e-1", asynchronous=True), accepted("e-1")])
        assert answer.record().status is ExecutionStatus.RUNNING
        assert client.told.ended("e-1").status is ExecutionStatus.SUCCESS
        names = [name for name, _ in client.told.said if name in ("answer", "ended")]
        assert names == ["answer", "ended"]


def test_a_refused_asynchronous_one_has_no_end(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        answer = client.start("e-1", asynchronous=True)
        attachment.executions(1)
        attachment.send(executed=[refused("e-1", ErrorKind.AT_CAPACITY)])
        assert answer.record().error_kind is ErrorKind.AT_CAPACITY
        attachment.acknowledged("e-1")
        assert [name for name, _ in client.told.said] == ["greeted", "attached", "full", "answer"]


def test_what_was_sent_waits_for_the_agents_word(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, first):
        sync, unknown = client.start("known"), client.start("unknown")
        later = client.start("accepting", asynchronous=True)
        first.executions(3)
        first.end()
        second = agent.attachment("known", "accepting")
        client.told.attached(2)
        assert isinstance(unknown.get(), AgentLost)
        # The acceptance was lost with the stream, but the agent has it.
        assert later.record().status is ExecutionStatus.RUNNING
        assert not sync.arrived
        second.send(executed=[ended("known"), ended("accepting", asynchronous=True)])
        assert sync.record().status is ExecutionStatus.SUCCESS
        assert client.told.ended("accepting").status is ExecutionStatus.SUCCESS
        # Nothing was sent twice.
        assert not any(frame.execute for frame in second.frames)


def test_another_life_of_the_agent_knows_nothing(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, first):
        sync = client.start("sync")
        kept, forgotten = (client.start(name, asynchronous=True) for name in ("kept", "forgotten"))
        first.executions(3)
        first.send(executed=[accepted("kept"), accepted("forgotten")])
        assert kept.record().status is forgotten.record().status is ExecutionStatus.RUNNING
        record = ExecutionRecord("kept", "f", "scripted", asynchronous=True, started_at=1.0)
        agent.records["kept"] = record.ended(
            ExecutionStatus.FAILED, at=2.0, error="agent restarted", kind=ErrorKind.AGENT_STOPPED
        )
        agent.instance_id = "second-life"
        first.end()
        # Even what it claims to know is from another execution of that ID.
        agent.attachment("sync")
        assert isinstance(sync.get(), AgentLost)
        client.told.attached(2)
        lives = [told for told in client.told.said if told[0] in ("greeted", "attached")]
        assert lives == [
            ("greeted", "first-life"),
            ("attached", True),
            ("attached", False),
            ("greeted", "second-life"),
            ("attached", True),
        ]
        for name in ("kept", "forgotten"):
            client.told.missing(name)  # what became of them is asked for, not told


def test_a_cancel_outlives_its_stream(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, first):
        client.start("e-1")
        first.executions(1)
        statuses: list[ExecutionStatus | None] = []

        def cancel() -> None:
            statuses.append(client.connection.cancel("e-1", reason="enough", timeout=10))

        canceller = threading.Thread(target=cancel, name="canceller")
        canceller.start()
        assert first.cancels(1) == ["e-1"]
        first.end()
        second = agent.attachment("e-1")
        assert second.cancels(1) == ["e-1"]
        assert second.frames[0].cancel[0].reason == "enough"
        response = pb.CancelExecutionResponse(success=True, status="cancelled")
        second.send(cancelled=[pb.CancelAnswer(execution_id="e-1", response=response)])
        canceller.join(10)
        assert statuses == [ExecutionStatus.CANCELLED]


def test_a_cancel_that_takes_too_long_says_that_it_still_runs(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        client.start("e-1")
        attachment.executions(1)
        assert client.connection.cancel("e-1", reason="enough", timeout=0.1) is ExecutionStatus.RUNNING


def test_an_unreadable_answer_is_the_end_of_that_execution_only(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        broken, sound = client.start("e-1"), client.start("e-2")
        attachment.executions(2)
        garbage = pb.ExecutionAnswer(execution_id="e-1", final=True, response=pb.ExecutionResponse(record=b"{}"))
        attachment.send(executed=[garbage, ended("e-2")])
        assert isinstance(broken.get(), AgentLost)
        assert sound.record().status is ExecutionStatus.SUCCESS


def test_a_listener_that_fails_harms_no_other(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):

        def fail(answer: object) -> None:
            raise RuntimeError("a fault of ours")

        client.connection.execute(ExecutionRequest("e-1", "f"), fail)
        sound = client.start("e-2")
        attachment.executions(2)
        attachment.send(executed=[ended("e-1"), ended("e-2")])
        assert sound.record().status is ExecutionStatus.SUCCESS
        assert ("attached", False) not in client.told.said


def test_an_event_that_fails_breaks_nothing(agent: ScriptedAgent, timers: Timers) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("a fault of ours")

    side, told = Side(None, timers), Told()
    events = replace(told.events(), full=fail, freed=fail)
    connection = side.connector.connect(side.connector.probe(agent.address), events)
    client = Client(connection, told)
    try:
        attachment = agent.attachment()
        told.attached()
        full, sound = client.start("e-1"), client.start("e-2")
        attachment.executions(2)
        attachment.send(freed=["f"], executed=[refused("e-1", ErrorKind.AT_CAPACITY), ended("e-2")])
        assert full.record().error_kind is ErrorKind.AT_CAPACITY
        assert sound.record().status is ExecutionStatus.SUCCESS
        assert ("attached", False) not in told.said
    finally:
        connection.close(Deadline(0))


def test_output_too_large_for_an_answer_is_fetched_beside_the_stream(agent: ScriptedAgent, timers: Timers) -> None:
    whole = ExecutionRecord("large", "f", "scripted", output=b"0123456789", output_bytes=10, started_at=1.0)
    agent.records["large"] = whole.ended(ExecutionStatus.SUCCESS, at=2.0)
    with attached(agent, timers) as (client, attachment):
        large, forgotten = client.start("large"), client.start("forgotten")
        attachment.executions(2)
        attachment.send(
            executed=[ended(name, output=b"0123", output_bytes=10) for name in ("large", "large", "forgotten")]
        )
        record = large.record()
        assert (record.output, record.truncated, record.warnings) == (b"0123456789", False, ())
        cut = forgotten.record()
        assert (cut.status, cut.output, cut.truncated) == (ExecutionStatus.SUCCESS, b"0123", True)
        assert "forgotten" in cut.warnings[0]


def test_output_that_no_thread_is_left_to_fetch_is_cut_off(
    agent: ScriptedAgent, timers: Timers, monkeypatch: pytest.MonkeyPatch
) -> None:
    none_left(monkeypatch, "output-")
    with attached(agent, timers) as (client, attachment):
        large, other = client.start("large"), client.start("other")
        attachment.executions(2)
        attachment.send(executed=[ended("large", output=b"0123", output_bytes=10), ended("other")])
        cut = large.record()
        assert (cut.status, cut.output, cut.truncated) == (ExecutionStatus.SUCCESS, b"0123", True)
        assert cut.warnings == ("the rest of the output was lost: can't start new thread",)
        assert other.record().status is ExecutionStatus.SUCCESS


def test_freed_and_stopping_are_passed_on(agent: ScriptedAgent, timers: Timers) -> None:
    with attached(agent, timers) as (client, attachment):
        attachment.send(freed=["f", ""], stopping=True)
        client.told.wait(lambda name, _: name == "stopping", "stopping")
        assert [value for name, value in client.told.said if name == "freed"] == ["f", ""]
