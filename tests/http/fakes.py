"""Services that keep everything in memory and do what a test tells them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxlib.config.control import ControlConfig
from fluxlib.control.services import AgentResult, AgentView, Call, Caller, PushResult, Services, no_such_execution
from fluxlib.errors import Conflict, InvalidInput, NotFound, StoreUnavailable
from fluxlib.lifecycle import LoopReport
from fluxlib.model import (
    AgentRecord,
    AgentStatus,
    ExecutionRecord,
    ExecutionStatus,
    Function,
    FunctionSpec,
    NodeFigures,
    Phase,
)
from fluxlib.store.base import ExecutionEntry, ExecutionFilter, Page

ADMIN = "the-administrators-key"
FIGURES = NodeFigures(12.5, 40.0, 8000, 3200, 1, 256, 3600, 1_700_000_000.0, 5000)


def config(**settings: Any) -> ControlConfig:
    return replace(
        ControlConfig(
            api_key=ADMIN,
            path=Path("flux.yaml"),
            listen_host="127.0.0.1",
            state_dir=Path("/nowhere"),
            certs_dir=Path("/nowhere"),
        ),
        **settings,
    )


def ended(call: Call, number: int, **fields: Any) -> ExecutionRecord:
    """A successful end that echoes its arguments and input."""
    output = " ".join(call.args).encode() + call.stdin
    values: dict[str, Any] = {
        "agent_id": "worker-1",
        "status": ExecutionStatus.SUCCESS,
        "phase": Phase.ENDED,
        "output": output,
        "output_bytes": len(output),
        "exit_code": 0,
        "duration_ms": 7,
        "started_at": 1_700_000_000.0,
        "status_at": 1_700_000_001.0,
        **fields,
    }
    return ExecutionRecord(f"execution-{number}", call.function_name, **values)


class FakeFunctions:
    def __init__(self) -> None:
        self.kept: dict[str, Function] = {}
        self.archives: dict[str, bytes] = {}
        self.problem = ""

    def get(self, name: str) -> Function:
        if name not in self.kept:
            raise NotFound(f"there is no function {name}")
        return self.kept[name]

    def list(self) -> list[Function]:
        return [self.kept[name] for name in sorted(self.kept)]

    def put(self, spec: FunctionSpec) -> PushResult:
        self.kept[spec.name] = Function(spec, spec.digest())
        return self._pushed(spec.name)

    def deploy(self, name: str, archive: bytes) -> PushResult:
        self.kept[name] = replace(self.get(name), code_digest="d" * 64, code_bytes=len(archive))
        self.archives[name] = archive
        return self._pushed(name)

    def delete(self, name: str, *, force: bool) -> PushResult:
        result = self._pushed(name)
        if not force and name == "busy":
            raise Conflict("executions of busy run")
        del self.kept[name]
        return result

    def _pushed(self, name: str) -> PushResult:
        return PushResult(self.get(name), (AgentResult("worker-1", "success"),), 1, problem=self.problem)


class FakeOutput:
    """Chunks a test feeds; ``close`` ends it from any thread."""

    def __init__(self, first: bytes = b"", *, complete: bool = True) -> None:
        self._condition = threading.Condition()
        self._chunks = [first] if first else []
        self._complete = complete
        self.closed = threading.Event()
        self.error: Exception | None = None

    def feed(self, chunk: bytes) -> None:
        with self._condition:
            self._chunks.append(chunk)
            self._condition.notify()

    def finish(self, error: Exception | None = None) -> None:
        with self._condition:
            self.error, self._complete = error, True
            self._condition.notify()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._chunks or self._complete or self.closed.is_set())
                if self.closed.is_set():
                    return
                if not self._chunks:
                    if self.error:
                        raise self.error
                    return
                chunk = self._chunks.pop(0)
            yield chunk

    def close(self) -> None:
        with self._condition:
            self.closed.set()
            self._condition.notify()


class FakeExecutions:
    """``run`` decides what a call comes to; by default it succeeds at once."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.records: dict[str, ExecutionRecord] = {}
        self.outputs: dict[str, FakeOutput] = {}
        self.lists: list[tuple[ExecutionFilter, str, int]] = []
        self.run: Callable[[Call, Caller, int], ExecutionRecord] = lambda call, caller, number: ended(call, number)
        self._numbers = itertools.count(1)

    def execute(self, call: Call, caller: Caller) -> ExecutionRecord:
        self.calls.append(call)
        record = self.run(call, caller, next(self._numbers))
        self.records[record.execution_id] = record
        return record

    def submit(self, call: Call) -> str:
        self.calls.append(call)
        record = ended(call, next(self._numbers), asynchronous=True)
        self.records[record.execution_id] = record
        return record.execution_id

    def get(self, execution_id: str) -> ExecutionRecord:
        if execution_id not in self.records:
            raise no_such_execution(execution_id)
        return self.records[execution_id]

    def function_of(self, execution_id: str) -> str:
        if execution_id not in self.records:
            raise no_such_execution(execution_id)
        return self.records[execution_id].function_name

    def list(self, where: ExecutionFilter, cursor: str, limit: int) -> Page:
        self.lists.append((where, cursor, limit))
        entries = [ExecutionEntry(record) for record in self.records.values()]
        return Page(entries[:limit], "more" if len(entries) > limit else "")

    def output(self, execution_id: str, offset: int, *, follow: bool) -> FakeOutput:
        record = self.get(execution_id)
        if offset > record.output_bytes and not follow:
            raise InvalidInput(f"there are only {record.output_bytes} bytes")
        if follow:
            return self.outputs.setdefault(execution_id, FakeOutput(complete=False))
        return FakeOutput((record.output or b"")[offset:])

    def cancel(self, execution_id: str) -> ExecutionRecord:
        record = self.get(execution_id)
        if record.status.ended:
            error = Conflict(f"{execution_id} has ended already")
            error.status = record.status.value
            raise error
        self.records[execution_id] = record.ended(ExecutionStatus.CANCELLED, at=time.time())
        return self.records[execution_id]


class FakeAgents:
    def __init__(self) -> None:
        self.kept = {
            "worker-1": AgentView(AgentRecord("worker-1", "10.0.0.5:50052", status=AgentStatus.ONLINE), 1, FIGURES)
        }

    def views(self) -> list[AgentView]:
        return list(self.kept.values())

    def register(self, address: str, *, legacy: bool) -> AgentView:
        record = AgentRecord("worker-2", address, status=AgentStatus.ONLINE, legacy_certificate=legacy)
        self.kept["worker-2"] = AgentView(record, 0, FIGURES)
        return self.kept["worker-2"]

    def deregister(self, agent_id: str) -> None:
        self._view(agent_id)
        del self.kept[agent_id]

    def drain(self, agent_id: str) -> AgentView:
        return self._become(agent_id, AgentStatus.DRAINING)

    def undrain(self, agent_id: str) -> AgentView:
        return self._become(agent_id, AgentStatus.ONLINE)

    def _become(self, agent_id: str, status: AgentStatus) -> AgentView:
        view = self._view(agent_id)
        self.kept[agent_id] = replace(view, record=replace(view.record, status=status))
        return self.kept[agent_id]

    def _view(self, agent_id: str) -> AgentView:
        if agent_id not in self.kept:
            raise NotFound(f"there is no agent {agent_id}")
        return self.kept[agent_id]


class FakeNodes:
    def __init__(self) -> None:
        self.terminated: list[str] = []

    def initialize(self) -> dict[str, Any]:
        return {"nodes": {"spawned": 2, "failed": 0}}

    def remove_all(self) -> dict[str, Any]:
        return {"status": "removed", "removed": 2}

    def terminate(self, agent_id: str) -> None:
        self.terminated.append(agent_id)

    def autoscaling(self) -> dict[str, Any]:
        return {"aws": {"enabled": True}}


class FakeStatus:
    def __init__(self) -> None:
        self.store_error = ""
        self.is_stopping = False
        self.connecting_to: list[str] = []

    def check_store(self) -> None:
        if self.store_error:
            raise StoreUnavailable(self.store_error)

    def loops(self) -> list[LoopReport]:
        return [LoopReport("health", True, 2, "ValueError: a secret path", 1_700_000_000.0)]

    def warnings(self) -> list[str]:
        return ["the agents' certificates expire soon"]

    def figures(self) -> NodeFigures:
        return FIGURES

    def connecting(self) -> list[str]:
        return self.connecting_to

    def leads(self) -> bool:
        return True

    def stopping(self) -> bool:
        return self.is_stopping


class FakeEnrolment:
    def bundle(self, agent_id: str) -> bytes:
        if agent_id in ("flux", "flux-agent"):
            raise InvalidInput(f"{agent_id} is reserved")
        return b"PK\x05\x06" + b"\0" * 18


class Fakes:
    """Everything a test may want to reach, and the Services made of it."""

    def __init__(self, *, clouds: bool = True, tls: bool = True, **settings: Any) -> None:
        self.config = config(**settings)
        self.functions, self.executions = FakeFunctions(), FakeExecutions()
        self.agents, self.status = FakeAgents(), FakeStatus()
        self.nodes = FakeNodes() if clouds else None
        self.enrolment = FakeEnrolment() if tls else None
        self.functions.put(FunctionSpec("hello", "hello.sh", env={"TOKEN": "secret"}))

    def services(self) -> Services:
        return Services(
            self.config, self.functions, self.executions, self.agents, self.status, self.nodes, self.enrolment
        )
