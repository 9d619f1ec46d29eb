"""What is answered for runs that never came about, and for those whose answer is too large."""

from __future__ import annotations

import time
from dataclasses import replace

from fluxlib.errors import CannotStart, Conflict, FluxError, StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase, kind_of

_MB = 1024 * 1024
# What an answer may carry beside its record: an original's limit is 50 MiB with everything around it.
_SENDABLE = 50 * _MB - 256 * 1024


def refusal_of(request: ExecutionRequest, agent_id: str, error: FluxError) -> ExecutionRecord:
    """An error met before anything was started, as the record of the refusal."""
    kind = kind_of(error, ErrorKind.CANNOT_START)
    if isinstance(error, Conflict):  # registered, and never deployed
        kind = ErrorKind.NO_CODE
    elif isinstance(error, (CannotStart, StoreUnavailable)):
        # Met before the program was tried, so another agent may well start it.
        kind = ErrorKind.MACHINE_FAULT
    now = time.time()
    return ExecutionRecord(
        request.execution_id,
        request.function_name,
        agent_id,
        status=ExecutionStatus.FAILED,
        phase=Phase.ENDED,
        asynchronous=request.asynchronous,
        error=error.message,
        error_kind=kind,
        started_at=now,
        status_at=now,
    )


def no_longer_known(record: ExecutionRecord) -> ExecutionRecord:
    """One that ran here and whose end could not be kept (a full disk)."""
    error = "how it ended could not be kept on the agent's disk"
    return record.ended(ExecutionStatus.FAILED, at=time.time(), error=error, kind=ErrorKind.INTERNAL)


def sendable(record: ExecutionRecord, limit: int = _SENDABLE) -> ExecutionRecord:
    """The record with as much of its output as fits into one message; the rest can be read piece by piece."""
    if record.output is None or len(record.output) <= limit:
        return record
    return replace(record, output=record.output[:limit], truncated=True)
