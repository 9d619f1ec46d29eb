"""Execution records as the first versions sent and stored them: a list whose meaning is its order. Frozen.

An agent still sends it beside the named fields, for a Flux that is upgraded after its agents; an agent that is not
upgraded yet sends nothing else; and stores are migrated from it once. It never grows: what is new has a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxlib.model.executions import ErrorKind, ExecutionRecord, ExecutionStatus, Phase

_FIELDS = 20


def to_list(record: ExecutionRecord) -> list[Any]:
    return [
        record.execution_id,
        record.function_name,
        record.agent_id,
        record.status.value,
        record.phase.value,
        record.asynchronous,
        record.output_bytes,
        record.truncated,
        record.error,
        _kind(record.error_kind),
        record.exit_code,
        record.signal,
        record.duration_ms,
        record.queue_ms,
        record.started_at,
        record.run_started_at,
        record.status_at,
        record.peak_memory_bytes,
        record.cpu_seconds,
        record.warnings,
    ]


def _kind(kind: ErrorKind) -> int:
    """A reader of the list knows these kinds only, and cannot read a record with another."""
    return int(kind) if ErrorKind.NONE <= kind <= ErrorKind.INTERNAL else int(ErrorKind.INTERNAL)


def from_list(row: Sequence[Any], output: bytes | None = None) -> ExecutionRecord:
    """Raises ValueError for what is none."""
    if len(row) < _FIELDS:
        raise ValueError(f"not an execution record: {len(row)} fields of {_FIELDS}")
    execution_id, function_name, agent_id, status, phase, asynchronous, size, truncated, error, kind = row[:10]
    exit_code, signal, duration_ms, queue_ms, started, run_started, at, memory, cpu, warnings = row[10:_FIELDS]
    return ExecutionRecord(
        execution_id,
        function_name,
        agent_id,
        ExecutionStatus(status),
        Phase(phase),
        asynchronous,
        output,
        size,
        truncated,
        error,
        ErrorKind(kind),
        exit_code,
        signal,
        duration_ms,
        queue_ms,
        started,
        run_started,
        at,
        memory,
        cpu,
        tuple(warnings),
    )
