"""One execution: its request, its record and every way it can end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from json.encoder import encode_basestring_ascii
from typing import Any

from fluxlib.errors import AtCapacity, FluxError, Internal, InvalidInput, NotFound, Stopping, Unenforceable
from fluxlib.model.times import epoch, rfc3339

EXECUTION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")


class ExecutionStatus(str, Enum):
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"  # an end that only a newer version knows

    @classmethod
    def _missing_(cls, value: object) -> ExecutionStatus:
        return cls.UNKNOWN

    @property
    def ended(self) -> bool:
        return self is not ExecutionStatus.RUNNING


class Phase(str, Enum):
    """Where a running execution is; the status stays ``running`` until ``ended``."""

    QUEUED = "queued"
    STARTING = "starting"  # an agent owns it
    RUNNING = "running"
    ENDING = "ending"  # told to stop, its processes are being killed
    ENDED = "ended"
    UNKNOWN = "unknown"  # one that only a newer version knows

    @classmethod
    def _missing_(cls, value: object) -> Phase:
        return cls.UNKNOWN


class ErrorKind(IntEnum):
    """Why an execution did not succeed; the numbers are those of flux.proto."""

    NONE = 0
    EXIT_CODE = 1
    SIGNAL = 2
    TIMEOUT = 3
    OUT_OF_MEMORY = 4
    CANCELLED = 5
    AT_CAPACITY = 6
    NOT_FOUND = 7
    NO_CODE = 8
    UNENFORCEABLE = 9
    INVALID = 10
    CANNOT_START = 11
    AGENT_STOPPED = 12
    AGENT_LOST = 13
    STOPPING = 14
    INTERNAL = 15
    MACHINE_FAULT = 16
    UNKNOWN = -1  # one that only a newer version knows; whether anything was started is not known either

    @classmethod
    def _missing_(cls, value: object) -> ErrorKind:
        return cls.UNKNOWN

    @classmethod
    def named(cls, name: str | None) -> ErrorKind:
        """The inverse of ``label``."""
        return cls.__members__.get(name.upper(), cls.UNKNOWN) if name else cls.NONE

    @property
    def label(self) -> str:
        """Its name as it is stored and shown; empty for NONE."""
        return self.name.lower() if self else ""

    @property
    def nothing_started(self) -> bool:
        """The agent refused: the work may be offered to another one."""
        return self in _REFUSALS


_REFUSALS = frozenset(
    {
        ErrorKind.AT_CAPACITY,
        ErrorKind.NOT_FOUND,
        ErrorKind.NO_CODE,
        ErrorKind.UNENFORCEABLE,
        ErrorKind.INVALID,
        ErrorKind.STOPPING,
        ErrorKind.MACHINE_FAULT,
    }
)


_KINDS_OF_ERRORS: tuple[tuple[type[FluxError], ErrorKind], ...] = (
    (AtCapacity, ErrorKind.AT_CAPACITY),
    (NotFound, ErrorKind.NOT_FOUND),
    (InvalidInput, ErrorKind.INVALID),
    (Unenforceable, ErrorKind.UNENFORCEABLE),
    (Stopping, ErrorKind.STOPPING),
    (Internal, ErrorKind.INTERNAL),
)


def kind_of(error: FluxError, otherwise: ErrorKind) -> ErrorKind:
    """What an error is called in a record and on the wire; ``otherwise`` where only the place it came from says."""
    return next((kind for cls, kind in _KINDS_OF_ERRORS if isinstance(error, cls)), otherwise)


_json_text = encode_basestring_ascii
_JSON_BOOLEANS = ("false", "true")


def _json_number(number: float | None) -> str:
    return "null" if number is None else repr(number)


@dataclass(frozen=True, slots=True)
class ExecutionRequest:
    execution_id: str
    function_name: str
    args: tuple[str, ...] = ()
    stdin: bytes = b""
    timeout_seconds: float = 0.0  # 0 = the function's
    asynchronous: bool = False


@dataclass(frozen=True, slots=True)
class ExecutionRecord:
    """One execution, from being accepted to its end.

    ``output`` is bytes here and text (with replacement characters) in JSON;
    None means "kept elsewhere" (at the agent). Times are epoch seconds, 0 = not yet.
    """

    execution_id: str
    function_name: str
    agent_id: str = ""
    status: ExecutionStatus = ExecutionStatus.RUNNING
    phase: Phase = Phase.RUNNING
    asynchronous: bool = False
    output: bytes | None = None
    output_bytes: int = 0  # how much is kept, after truncation
    truncated: bool = False
    error: str = ""
    error_kind: ErrorKind = ErrorKind.NONE
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: int = 0  # of the run itself
    queue_ms: int = 0  # accepted until an agent started it
    started_at: float = 0.0  # accepted
    run_started_at: float = 0.0
    status_at: float = 0.0  # ended
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    warnings: tuple[str, ...] = ()
    attempt: int = 1  # which start of it this is about

    def ended(
        self, status: ExecutionStatus, *, at: float, error: str = "", kind: ErrorKind = ErrorKind.NONE
    ) -> ExecutionRecord:
        """This record with an end put to it; an ended record stays as it is."""
        if self.status.ended:
            return self
        return replace(self, status=status, phase=Phase.ENDED, error=error, error_kind=kind, status_at=at)

    def to_json(self, *, with_output: bool = True) -> dict[str, Any]:
        """The record of wire.md (``status_at`` absent while running) and what ours adds to it."""
        data: dict[str, Any] = {
            "execution_id": self.execution_id,
            "agent_id": self.agent_id,
            "function_name": self.function_name,
            "status": self.status.value,
            "phase": self.phase.value,
            "async": self.asynchronous,
            "error": self.error,
            "error_kind": self.error_kind.label or None,
            "duration_ms": self.duration_ms,
            "queue_ms": self.queue_ms,
            "started_at": rfc3339(self.started_at),
            "run_started_at": rfc3339(self.run_started_at) if self.run_started_at else None,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "timed_out": self.error_kind is ErrorKind.TIMEOUT,
            "out_of_memory": self.error_kind is ErrorKind.OUT_OF_MEMORY,
            "truncated": self.truncated,
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "cpu_seconds": self.cpu_seconds,
            "warnings": list(self.warnings),
        }
        if self.status_at:
            data["status_at"] = rfc3339(self.status_at)
        if with_output:
            data["output"] = (self.output or b"").decode("utf-8", "replace")
        return data

    def to_text(self) -> str:
        """Everything but its output as a JSON object, as stores keep it. Written out: an encoder takes five times as
        long, for each execution.
        """
        warnings = ",".join(map(_json_text, self.warnings))
        return (
            f'{{"execution_id":{_json_text(self.execution_id)}'
            f',"function_name":{_json_text(self.function_name)}'
            f',"agent_id":{_json_text(self.agent_id)}'
            f',"status":"{self.status.value}"'
            f',"phase":"{self.phase.value}"'
            f',"asynchronous":{_JSON_BOOLEANS[self.asynchronous]}'
            f',"output_bytes":{self.output_bytes}'
            f',"truncated":{_JSON_BOOLEANS[self.truncated]}'
            f',"error":{_json_text(self.error)}'
            f',"error_kind":"{self.error_kind.label}"'
            f',"exit_code":{_json_number(self.exit_code)}'
            f',"signal":{_json_number(self.signal)}'
            f',"duration_ms":{self.duration_ms}'
            f',"queue_ms":{self.queue_ms}'
            f',"started_at":{self.started_at!r}'
            f',"run_started_at":{self.run_started_at!r}'
            f',"status_at":{self.status_at!r}'
            f',"peak_memory_bytes":{_json_number(self.peak_memory_bytes)}'
            f',"cpu_seconds":{_json_number(self.cpu_seconds)}'
            f',"warnings":[{warnings}]'
            f',"attempt":{self.attempt}'
            "}"
        )

    @classmethod
    def from_fields(cls, data: Mapping[str, Any]) -> ExecutionRecord:
        """The object that ``to_text`` of this or another version made.

        What is missing has its default, what is unknown is ignored.
        """
        get = data.get
        return cls(
            data["execution_id"],
            get("function_name", ""),
            get("agent_id", ""),
            ExecutionStatus(get("status", "running")),
            Phase(get("phase", "running")),
            get("asynchronous", False),
            None,
            get("output_bytes", 0),
            get("truncated", False),
            get("error", ""),
            ErrorKind.named(get("error_kind")),
            get("exit_code"),
            get("signal"),
            get("duration_ms", 0),
            get("queue_ms", 0),
            get("started_at", 0.0),
            get("run_started_at", 0.0),
            get("status_at", 0.0),
            get("peak_memory_bytes"),
            get("cpu_seconds"),
            tuple(get("warnings", ())),
            get("attempt", 1),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExecutionRecord:
        """A record from an agent, ours or the original's (which lacks most fields)."""
        status = ExecutionStatus(data["status"])
        output = data.get("output")
        return cls(
            execution_id=data["execution_id"],
            function_name=data.get("function_name", ""),
            agent_id=data.get("agent_id", ""),
            status=status,
            phase=Phase(data.get("phase") or ("ended" if status.ended else "running")),
            asynchronous=bool(data.get("async", True)),
            output=output.encode() if isinstance(output, str) else None,
            output_bytes=data.get("output_bytes") or 0,
            truncated=bool(data.get("truncated")),
            error=data.get("error") or "",
            error_kind=ErrorKind.named(data.get("error_kind")),
            exit_code=data.get("exit_code"),
            signal=data.get("signal"),
            duration_ms=data.get("duration_ms") or 0,
            queue_ms=data.get("queue_ms") or 0,
            started_at=epoch(data.get("started_at")),
            run_started_at=epoch(data.get("run_started_at")),
            status_at=epoch(data.get("status_at")),
            peak_memory_bytes=data.get("peak_memory_bytes"),
            cpu_seconds=data.get("cpu_seconds"),
            warnings=tuple(data.get("warnings") or ()),
            attempt=data.get("attempt") or 1,
        )
