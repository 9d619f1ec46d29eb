"""One execution in flight: its state, and how an agent's report becomes its record."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from fluxlib.control.agents.fleet import Reservation
from fluxlib.errors import AgentUnreachable, FluxError
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase, kind_of
from fluxlib.store.base import Commit, ExecutionEntry

# A queued execution's request is kept in memory when it is no larger than this, else read back from the store.
_SMALL_REQUEST = 16 * 1024
_IDS_AT_ONCE, _RANDOM_BYTES = 64, 10
_ATTEMPT_ID = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-([2-9]|[1-9][0-9]+)")

# What the caller of an execution is told, once: its record, or why there is none.
Reply = ExecutionRecord | FluxError
OnReply = Callable[[Reply], None]


class State(Enum):
    """Where an execution in flight is. Only the dispatcher and the tracker's ``end`` change it, under its lock."""

    NEW = "new"  # the store has not been told of it
    QUEUED = "queued"  # it waits for a slot; the store has no agent for it
    ASSIGNED = "assigned"  # it has a slot, and the store is being told; no agent knows it
    SENT = "sent"  # an agent may know it, and has not answered
    RUNNING = "running"  # an agent has accepted it, or may have: only that agent says its end
    ENDED = "ended"

    @property
    def at_agent(self) -> bool:
        return self is State.SENT or self is State.RUNNING


def state_after(record: ExecutionRecord, attempt: int) -> State:
    """What becomes of an execution whose attempt has ended so. Pure; every execution has one attempt."""
    del record, attempt
    return State.ENDED


class Watch:
    """What the reconciler notes of an execution whose end no event will tell."""

    __slots__ = ("agent_restarted", "cancelled", "misses", "since", "unreadable_since")

    def __init__(self) -> None:
        self.since = time.time()
        self.misses = 0  # how often in a row its agent did not know it
        self.cancelled = False  # nobody wants it any more, and its agent was told so
        self.agent_restarted = False  # since it was sent there: nothing runs it any more
        self.unreadable_since = 0.0  # since then (epoch seconds) its record does not fit into a message


class Execution:
    """One execution in flight.

    ``on_reply`` is the caller, called once and then dropped: with the final record of a synchronous execution, with
    the accepted or queued record of an asynchronous one, or with an error. An execution whose asynchronous caller has
    its reply is never forgotten again, only ended.

    Fields below the lock are read and written under it; what is only written before the execution is shared needs none.
    """

    __slots__ = (
        "accepted_at",
        "agent_id",
        "asynchronous",
        "attempt",
        "cancel_reason",
        "commit",
        "deadline",
        "execution_id",
        "final",
        "function_name",
        "idempotency_key",
        "lock",
        "on_reply",
        "request",
        "request_bytes",
        "reservation",
        "started",
        "state",
        "unclaimed",
        "waited_ms",
        "watch",
    )

    def __init__(
        self,
        function_name: str,
        request: ExecutionRequest | None,
        execution_id: str,
        accepted_at: float,
        on_reply: OnReply | None = None,
    ) -> None:
        self.execution_id = execution_id
        self.function_name = function_name
        self.request = request
        self.request_bytes = 0  # what it takes in the store's backlog
        if request is not None and request.asynchronous:
            self.request_bytes = len(request.stdin) + sum(map(len, request.args))
        self.asynchronous = request is None or request.asynchronous
        self.idempotency_key = ""
        self.accepted_at = accepted_at  # epoch seconds
        # Durations are counted by a clock that nobody sets.
        self.started = time.monotonic()
        self.lock = threading.Lock()
        self.state = State.NEW
        self.attempt = 1
        self.on_reply = on_reply
        self.agent_id = ""  # the agent it was assigned to last
        self.reservation: Reservation | None = None
        self.unclaimed = False  # it goes into the store's backlog and out of flight: whoever claims it has it
        self.cancel_reason = ""
        self.deadline = 0.0  # monotonic; by then the store has committed what moves it on
        self.waited_ms = 0  # from acceptance until an agent was sent it
        # No event will tell its end: an earlier process sent it, its answer was lost, or its agent is a legacy one.
        self.watch: Watch | None = None
        self.final: ExecutionRecord | None = None
        self.commit: Commit | None = None  # of its end

    @classmethod
    def stored(cls, entry: ExecutionEntry) -> Execution:
        """One that the store knows, and this process does not."""
        record = entry.record
        execution = cls(record.function_name, entry.request, record.execution_id, record.started_at)
        execution.asynchronous = record.asynchronous
        execution.request_bytes = entry.request_bytes
        execution.started -= max(0.0, time.time() - record.started_at)
        execution.attempt = record.attempt
        execution.agent_id = record.agent_id
        execution.state = State.RUNNING if record.agent_id else State.QUEUED
        return execution

    @property
    def accepted(self) -> bool:
        """Somebody was told its ID: whatever happens now is recorded."""
        return self.asynchronous and self.on_reply is None

    @property
    def attempt_id(self) -> str:
        """The ID under which agents know the current attempt: an agent runs an ID once."""
        return self.execution_id if self.attempt == 1 else f"{self.execution_id}-{self.attempt}"

    def age_ms(self) -> int:
        return int((time.monotonic() - self.started) * 1000)

    def record(self, phase: Phase) -> ExecutionRecord:
        """Its record while it has not ended."""
        return ExecutionRecord(
            self.execution_id,
            self.function_name,
            self.agent_id,
            phase=phase,
            asynchronous=self.asynchronous,
            started_at=self.accepted_at,
            attempt=self.attempt,
        )

    def failed(self, error: FluxError) -> ExecutionRecord:
        """Its record with an end that no agent had a part in."""
        if isinstance(error, Cancelled):
            status, kind = ExecutionStatus.CANCELLED, ErrorKind.CANCELLED
        else:
            status = ExecutionStatus.FAILED
            unreached = isinstance(error, AgentUnreachable)
            kind = kind_of(error, ErrorKind.CANNOT_START if unreached else ErrorKind.INTERNAL)
        record = self.record(Phase.ENDED).ended(status, at=time.time(), error=error.message, kind=kind)
        return replace(record, queue_ms=self.age_ms())

    def merged(self, report: ExecutionRecord) -> ExecutionRecord:
        """An agent's report as callers see it: accepted when Flux accepted it, the waiting here counted in."""
        return replace(
            report,
            execution_id=self.execution_id,
            function_name=self.function_name,  # not the agent's word for it: keys are checked by this name
            agent_id=self.agent_id or report.agent_id,
            asynchronous=self.asynchronous,
            started_at=self.accepted_at,
            queue_ms=_queue_ms(self.accepted_at, report, self.waited_ms, self.age_ms()),
            cpu_seconds=_microseconds(report.cpu_seconds),
            attempt=self.attempt,
        )


def merge_report(ours: ExecutionRecord, report: ExecutionRecord) -> ExecutionRecord:
    """The same for an execution that is not in flight here: ``ours`` is what the store knows of it."""
    execution = Execution.stored(ExecutionEntry(ours))
    # The two clocks are all there is to tell how long it waited before it was sent.
    known = bool(report.run_started_at or not report.started_at)
    execution.waited_ms = 0 if known else max(0, round((report.started_at - ours.started_at) * 1000))
    return execution.merged(report)


def _microseconds(seconds: float | None) -> float | None:
    return round(seconds, 6) if seconds is not None else None


def _queue_ms(accepted_at: float, report: ExecutionRecord, waited_ms: int, age_ms: int) -> int:
    """From acceptance until the program began, the time between Flux's sending and the agent's receiving included.

    Two clocks tell that, so it is kept between what each of them has counted by itself.
    """
    least = waited_ms + report.queue_ms
    if not report.run_started_at:
        return least
    most = age_ms - report.duration_ms
    return max(least, min(most, round((report.run_started_at - accepted_at) * 1000)))


class Cancelled(FluxError):
    """Cancelled before an agent accepted it. Recorded as a cancelled execution, never raised to a caller."""


class AlreadyKnown(Exception):
    """The idempotency key was used before, by the execution named here. Never leaves the executions' modules."""

    def __init__(self, execution_id: str) -> None:
        super().__init__(execution_id)
        self.execution_id = execution_id


def split_attempt_id(attempt_id: str) -> tuple[str, int]:
    """(execution ID, attempt) of an ID that an agent uses."""
    found = _ATTEMPT_ID.fullmatch(attempt_id)
    return (found[1], int(found[2])) if found is not None else (attempt_id, 1)


_randoms: list[int] = []


def new_execution_id() -> str:
    """A UUID of version 7 (RFC 9562): later ones are greater, so that stores append where they would scatter.

    Its random part is made in stock: each call to the system for randomness lets the GIL go.
    """
    while True:
        try:
            random = _randoms.pop()
            break
        except IndexError:
            data = os.urandom(_RANDOM_BYTES * _IDS_AT_ONCE)
            cuts = range(0, len(data), _RANDOM_BYTES)
            _randoms.extend(int.from_bytes(data[at : at + _RANDOM_BYTES], "big") for at in cuts)
    time_ms = time.time_ns() // 1_000_000
    head, node = f"{time_ms:012x}", f"{random & 0xFFFF_FFFF_FFFF:012x}"
    return f"{head[:8]}-{head[8:]}-7{random >> 68:03x}-{0x8000 | (random >> 48 & 0x3FFF):04x}-{node}"


def worth_keeping(request: ExecutionRequest) -> bool:
    """Whether a waiting execution's request may stay in memory."""
    return len(request.stdin) + sum(map(len, request.args)) <= _SMALL_REQUEST
