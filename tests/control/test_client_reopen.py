"""A new channel, planned by Flux itself: no execution and no cancel fails, is lost or goes twice for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fluxlib.control.agents.client.channels import Line, Lines
from fluxlib.control.agents.client.output import AgentOutput
from fluxlib.errors import AgentUnreachable
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ExecutionRecord, ExecutionStatus
from tests.support.clients import Client, Side, Told
from tests.support.scripted_agent import ScriptedAgent, ended


@pytest.fixture
def client(agent: ScriptedAgent, timers: Timers) -> Iterator[Client]:
    """Its first stream is there, and not greeted yet."""
    side, told = Side(None, timers), Told()
    connection = side.connector.connect(side.connector.probe(agent.address), told.events())
    yield Client(connection, told)
    connection.close(Deadline(0))


def test_a_second_change_comes_before_the_first_is_through(agent: ScriptedAgent, client: Client) -> None:
    first = agent.attachment()
    client.told.attached()
    sent = client.start("sent")
    first.executions(1)
    client.connection.reopen()
    second = agent.silent_attachment()
    waits = client.start("waits")
    assert client.connection.cancel("sent", reason="enough", timeout=0) is ExecutionStatus.RUNNING
    client.connection.reopen()
    third = agent.attachment("sent")
    assert third.executions(1) == ["waits"]
    assert third.cancels(1) == ["sent"]
    third.send(executed=[ended("sent"), ended("waits")])
    assert sent.record().status is waits.record().status is ExecutionStatus.SUCCESS
    assert not second.frames
    assert ("attached", False) not in client.told.said


def test_a_change_while_the_stream_looks_for_its_channel(
    agent: ScriptedAgent, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = agent.attachment()
    client.told.attached()
    begin, changed = Lines.begin, threading.Event()

    def begin_late(lines: Lines) -> Line:
        line = begin(lines)
        if threading.current_thread().name.startswith("attach-") and not changed.is_set():
            changed.set()
            client.connection.reopen()
        return line

    monkeypatch.setattr(Lines, "begin", begin_late)
    client.connection.reopen()
    agent.attachment()  # over the channel that was found, and retired since
    second = agent.attachment()
    assert changed.is_set()
    client.start("e-1")
    assert second.executions(1) == ["e-1"]
    assert not first.frames
    assert ("attached", False) not in client.told.said


def test_no_change_comes_between_finding_the_channel_and_counting_the_call(
    agent: ScriptedAgent, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, held = Line.begin, []

    def begin_watched(line: Line) -> None:
        held.append(client.connection._lines._lock.locked())
        begin(line)

    monkeypatch.setattr(Line, "begin", begin_watched)
    reports = threading.Event()
    client.connection.inventory()
    client.connection.report_async(lambda report: reports.set())
    assert reports.wait(10)
    assert len(held) >= 2
    assert all(held)


def test_output_that_is_being_fetched_is_not_lost_with_the_stream(agent: ScriptedAgent, client: Client) -> None:
    whole = ExecutionRecord("large", "f", "scripted", output=b"0123456789", output_bytes=10, started_at=1.0)
    asked, go_on = threading.Event(), threading.Event()

    class Records(dict[str, ExecutionRecord]):
        def get(self, execution_id: str, default: Any = None) -> Any:
            asked.set()
            assert go_on.wait(10)
            return super().get(execution_id, default)

    agent.records = Records(large=whole.ended(ExecutionStatus.SUCCESS, at=2.0))
    first = agent.attachment()
    client.told.attached()
    large = client.start("large")
    first.executions(1)
    first.send(executed=[ended("large", output=b"0123", output_bytes=10)])
    assert asked.wait(10)
    client.connection.reopen()
    # Its end was confirmed: the agent owes nothing more.
    second = agent.attachment()
    client.start("after")
    second.executions(1)
    go_on.set()
    assert large.record().output == b"0123456789"
    assert len(large.answers) == 1


def test_an_output_asked_for_as_the_channel_closes(timers: Timers) -> None:
    class Closing(Lines):
        def begin(self) -> Line:
            line = super().begin()
            line.close()
            return line

    line = Line("127.0.0.1:1", None, "agent.invalid", timers, agent_id="a1")
    with pytest.raises(AgentUnreachable, match="agent a1 is closed"):
        AgentOutput(Closing(lambda: line), "sent", 0, follow=False, timeout=None)
    assert line._calls == 0
