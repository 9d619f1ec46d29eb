"""Agents without a wire: connections that answer, refuse, lose and hang when a test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fluxlib.control.agents.connection import OnAnswer, refusal
from fluxlib.control.agents.fleet import Agent, Fleet, SyncState
from fluxlib.errors import FluxError, NotFound
from fluxlib.model import (
    AgentRecord,
    AgentStatus,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    Function,
    FunctionSpec,
    Inventory,
    NodeFigures,
    Phase,
    Platform,
)

PATIENCE = 10.0


@dataclass
class Asked:
    """One execution an agent was asked for."""

    request: ExecutionRequest
    on_answer: OnAnswer
    record: ExecutionRecord

    def accept(self) -> None:
        self.on_answer(replace(self.record, status=ExecutionStatus.RUNNING, phase=Phase.RUNNING))

    def answer(self, answer: ExecutionRecord | FluxError) -> None:
        self.on_answer(answer)


class FakeConnection:
    """Keeps what it is asked until the test answers, or answers by ``script`` at once.

    ``script(connection, asked)`` may answer, or leave that to the test. ``down`` is raised by every blocking call.
    """

    def __init__(
        self, agent_id: str, script: Callable[[FakeConnection, Asked], None] | None = None, original: bool = False
    ) -> None:
        self.agent_id = agent_id
        self.original = original
        self.script = script
        self.down: FluxError | None = None
        self.asked: list[Asked] = []
        self.cancels: list[tuple[str, str]] = []
        self.records: dict[str, ExecutionRecord] = {}
        self.outputs: dict[str, bytes] = {}
        self.on_cancel: Callable[[str], ExecutionStatus | None] = self._die
        self.on_ended: Callable[[ExecutionRecord], None] = lambda record: None
        self._condition = threading.Condition()

    # -- what tests use ------------------------------------------------------------

    def wait_asked(self, count: int = 1) -> Asked:
        """The latest request, once there were so many."""
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.asked) >= count, PATIENCE), f"asked {len(self.asked)}"
            return self.asked[count - 1]

    def wait_cancelled(self, count: int = 1) -> list[tuple[str, str]]:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.cancels) >= count, PATIENCE), "no cancel came"
            return list(self.cancels)

    def end(self, asked: Asked, output: bytes = b"", **changes: object) -> ExecutionRecord:
        """The program of ``asked`` ends."""
        values: dict[str, object] = {
            "status": ExecutionStatus.SUCCESS,
            "phase": Phase.ENDED,
            "exit_code": 0,
            "output": output,
            "output_bytes": len(output),
            "status_at": 2.0,
            **changes,
        }
        record = replace(asked.record, **values)  # type: ignore[arg-type]
        self.records[record.execution_id] = record
        self.outputs[record.execution_id] = output
        if asked.request.asynchronous:
            self.on_ended(replace(record, output=None))
        else:
            asked.answer(record)
        return record

    def _die(self, execution_id: str) -> ExecutionStatus | None:
        asked = next((one for one in self.asked if one.request.execution_id == execution_id), None)
        known = self.records.get(execution_id)
        if known is not None and known.status.ended:
            return known.status
        if asked is None:
            return None
        self.end(asked, status=ExecutionStatus.CANCELLED, error="cancelled", error_kind=ErrorKind.CANCELLED)
        return ExecutionStatus.CANCELLED

    # -- AgentConnection -------------------------------------------------------------

    def execute(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        record = ExecutionRecord(
            request.execution_id,
            request.function_name,
            self.agent_id,
            asynchronous=request.asynchronous,
            started_at=1.0,
            run_started_at=1.0,
        )
        asked = Asked(request, on_answer, record)
        with self._condition:
            self.asked.append(asked)
            self._condition.notify_all()
        if self.script is not None:
            self.script(self, asked)

    def cancel(self, execution_id: str, *, reason: str, timeout: float) -> ExecutionStatus | None:
        if self.down is not None:
            raise self.down
        with self._condition:
            self.cancels.append((execution_id, reason))
            self._condition.notify_all()
        return self.on_cancel(execution_id)

    def request_cancel(
        self, execution_id: str, *, reason: str, on_answer: Callable[[ExecutionStatus | FluxError | None], None]
    ) -> None:
        try:
            status = self.cancel(execution_id, reason=reason, timeout=0)
        except FluxError as error:
            on_answer(error)
        else:
            on_answer(status)

    def record(self, execution_id: str, *, with_output: bool) -> ExecutionRecord | None:
        if self.down is not None:
            raise self.down
        return self.records.get(execution_id)

    def known_records(self, execution_ids: Sequence[str]) -> dict[str, ExecutionRecord]:
        found = ((one, self.record(one, with_output=False)) for one in execution_ids)
        return {execution_id: record for execution_id, record in found if record is not None}

    def inventory(self) -> Inventory | None:
        if self.down is not None:
            raise self.down
        running = tuple(one for one, record in self.records.items() if not record.status.ended)
        return None if self.original else Inventory(self.agent_id, "first life", open_executions=running)

    def output(self, execution_id: str, offset: int, *, follow: bool) -> FakeStream:
        if self.down is not None:
            raise self.down
        if execution_id not in self.outputs:
            raise NotFound(f"{execution_id} is not known here")
        return FakeStream(self.outputs[execution_id][offset:])


@dataclass
class FakeStream:
    data: bytes
    closed: bool = False

    def __iter__(self) -> Iterator[bytes]:
        if self.data:
            yield self.data

    def close(self) -> None:
        self.closed = True


def refuse(kind: ErrorKind, error: str = "refused") -> Callable[[FakeConnection, Asked], None]:
    """A script: every request is refused."""
    return lambda connection, asked: asked.answer(refusal(asked.request, connection.agent_id, kind, error, 1.0))


def fail(error: FluxError) -> Callable[[FakeConnection, Asked], None]:
    """A script: every request fails on its way."""
    return lambda connection, asked: asked.answer(error)


def accept(connection: FakeConnection, asked: Asked) -> None:
    """A script: asynchronous ones are accepted and run until the test ends them."""
    connection.records[asked.request.execution_id] = asked.record
    connection.outputs.setdefault(asked.request.execution_id, b"")
    asked.accept()


def succeed(connection: FakeConnection, asked: Asked) -> None:
    """A script: every program ends at once, and prints its arguments."""
    if asked.request.asynchronous:
        accept(connection, asked)
    connection.end(asked, " ".join(asked.request.args).encode())


@dataclass
class FakeFunctions:
    """The functions, from a dictionary."""

    known: dict[str, Function] = field(default_factory=dict)

    def add(self, name: str, *, detected: tuple[Platform, ...] = (), **spec: object) -> Function:
        declared = FunctionSpec(name, "run.sh", **spec)  # type: ignore[arg-type]
        self.known[name] = Function(declared, declared.digest(), "code", 1, detected)
        return self.known[name]

    def cached(self, name: str) -> Function | None:
        return self.known.get(name)

    def lookup(self, name: str) -> Function:
        if name not in self.known:
            raise NotFound(f"there is no function {name}")
        return self.known[name]


def join(
    fleet: Fleet,
    agent_id: str,
    connection: FakeConnection | None = None,
    *,
    figures: NodeFigures | None = None,
    **record: object,
) -> Agent:
    """An agent that takes work."""
    values: dict[str, object] = {"status": AgentStatus.ONLINE, "platform": Platform("linux", "amd64"), **record}
    state = Agent(AgentRecord(agent_id, f"{agent_id}:50052", **values), connection or FakeConnection(agent_id))  # type: ignore[arg-type]
    state.state = SyncState.READY
    state.figures = figures or NodeFigures(10.0, 20.0, 4096, 1024, 0, 256)
    fleet.add(state)
    return state


def change(fleet: Fleet, agent_id: str, **fields: object) -> None:
    """Make an agent look as a test needs it, and rank it anew."""
    agent = fleet.get(agent_id)
    assert agent is not None
    for name, value in fields.items():
        setattr(agent, name, value)
    fleet.add(agent)
