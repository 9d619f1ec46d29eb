"""What is in force for a run, and what a run that never came about is called."""

from __future__ import annotations

import time

from fluxlib.agent.executor.base import Limits
from fluxlib.errors import FluxError, InvalidInput, Stopping, Unenforceable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, FunctionSpec, Phase

_MB = 1024 * 1024
_KINDS: tuple[tuple[type[FluxError], ErrorKind], ...] = (
    (InvalidInput, ErrorKind.INVALID),
    (Unenforceable, ErrorKind.UNENFORCEABLE),
    (Stopping, ErrorKind.STOPPING),
)


def limits_of(spec: FunctionSpec, defaults: Limits) -> Limits:
    """What is in force for one run: the function's figures, the agent's where it says nothing.

    A function may ask for less than the agent's default or for more: both are its operator's files.
    """
    return Limits(
        memory_bytes=spec.memory_mb * _MB or defaults.memory_bytes,
        cpu_millicores=spec.cpu_millicores or defaults.cpu_millicores,
        processes=spec.max_processes or defaults.processes,
        open_files=spec.max_open_files or defaults.open_files,
        file_size_bytes=spec.max_file_size_mb * _MB or defaults.file_size_bytes,
        tmp_bytes=spec.tmp_size_mb * _MB or defaults.tmp_bytes,
    )


def refused(request: ExecutionRequest, agent_id: str, kind: ErrorKind, error: str) -> ExecutionRecord:
    now = time.time()
    return ExecutionRecord(
        request.execution_id,
        request.function_name,
        agent_id,
        status=ExecutionStatus.FAILED,
        phase=Phase.ENDED,
        asynchronous=request.asynchronous,
        error=error,
        error_kind=kind,
        started_at=now,
        status_at=now,
    )


def refusal_of(request: ExecutionRequest, agent_id: str, error: FluxError) -> ExecutionRecord:
    """An error met before anything was started, as the record of the refusal."""
    kind = next((kind for error_type, kind in _KINDS if isinstance(error, error_type)), ErrorKind.CANNOT_START)
    return refused(request, agent_id, kind, error.message)
