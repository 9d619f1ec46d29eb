"""Executions and functions as stores keep them, with only what a test cares about spelled out."""

from __future__ import annotations

from typing import Any

from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, Function, FunctionSpec, Phase
from fluxlib.store.base import ControlStore, ExecutionEntry


def function(name: str = "f", **fields: Any) -> Function:
    spec = FunctionSpec(name, "main.sh", env={"KEY": "värde"})
    return Function(spec, spec.digest(), **fields)


def entry(
    execution_id: str,
    name: str = "f",
    agent: str = "",
    phase: Phase = Phase.QUEUED,
    *,
    attempt: int = 1,
    **fields: Any,
) -> ExecutionEntry:
    record = ExecutionRecord(
        execution_id, name, agent, phase=phase, asynchronous=True, started_at=1000.125, attempt=attempt
    )
    request = ExecutionRequest(execution_id, name, ("a", "ö"), b"\x00\xffin\n", 2.5, asynchronous=True)
    return ExecutionEntry(record, request, **fields)


def keep(store: ControlStore, *args: Any, **fields: Any) -> ExecutionEntry:
    """Create an entry and wait until it is committed."""
    made = entry(*args, **fields)
    _, commit = store.create_execution(made, durable=True)
    commit.wait()
    return made


def end(store: ControlStore, made: ExecutionEntry, keep_for: float = 1000.0, *, ok: bool = True, **fields: Any) -> None:
    status = ExecutionStatus.SUCCESS if ok else ExecutionStatus.FAILED
    kind = ErrorKind.NONE if ok else ErrorKind.EXIT_CODE
    record = made.record.ended(status, at=1001.5, kind=kind)
    store.end_attempt(record, record.attempt, keep_for, **fields).wait()
