"""One execution in hand: what its driver and those who stop it share, and the ends no agent reported."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from enum import Enum, auto

from fluxlib.control.agents.registry import Reservation
from fluxlib.errors import AgentUnreachable, FluxError, Internal
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase, kind_of

# A queued execution's request is kept in memory when it is no larger than this, else read back from the store.
_SMALL_REQUEST = 16 * 1024
_IDS_AT_ONCE, _RANDOM_BYTES = 64, 10

Outcome = Reservation | ExecutionRecord | FluxError


class Stage(Enum):
    """How far an execution in hand has come. It goes back to HERE, and on to another agent, when one turns it down."""

    HERE = auto()  # new, waiting for room, or turned down
    ASKED = auto()  # an agent may know it, and has not answered yet
    ANSWERED = auto()  # the agent has accepted it, or has told its end


class Execution:
    """One execution in hand. One thread at a time drives it; others only set ``stop_reason`` or deliver.

    ``deliver`` hands the driver what it waits for: a slot, an agent's answer, or the reason to give up.
    Whoever delivers has won the right to do so (took it off a queue, or is the answer of the one request).

    Where it is, by its ``stage`` and two facts (a synchronous one is never ``detached``)::

                                 stage     created  detached
        new                      HERE      no       no
        waits for room           HERE      yes      async     (in the waiting room, ``agent_id`` is empty)
        asked of an agent        ASKED     yes      as before
        accepted (async)         ANSWERED  yes      as before (its end comes by itself)
        turned down by an agent  HERE      yes      as before (``agent_id`` in the store until it moves on)

    ``over`` is set by whoever takes it out of hand, whatever its stage is then.
    """

    __slots__ = (
        "_decision",
        "_wake",
        "accepted_at",
        "agent_id",
        "asynchronous",
        "created",
        "detached",
        "execution_id",
        "function_name",
        "idempotency_key",
        "outcome",
        "over",
        "pressed",
        "request",
        "reservation",
        "sequence",
        "stage",
        "stop_reason",
        "waited_ms",
    )

    def __init__(self, function_name: str, request: ExecutionRequest | None, execution_id: str, accepted_at: float):
        self.execution_id = execution_id
        self.function_name = function_name
        self.request = request
        self.asynchronous = request is None or request.asynchronous
        self.idempotency_key = ""
        self.accepted_at = accepted_at  # epoch seconds
        self.agent_id = ""  # who it was assigned to
        self.stage = Stage.HERE
        self.created = False  # the store knows it
        self.detached = False  # nobody waits for it: it was accepted, and queued or adopted
        self.pressed = False  # it waits for resources, not for a slot
        self.sequence = 0  # its place in the queue
        self.over = False  # ended, or no longer ours
        self.stop_reason = ""  # cancelled, or its caller gone
        self.reservation: Reservation | None = None
        self.outcome: Outcome | None = None
        self.waited_ms = 0  # from acceptance until an agent was asked
        self._wake = threading.Lock()
        self._wake.acquire()
        self._decision = threading.Lock()

    @property
    def sent(self) -> bool:
        """An agent may know it."""
        return self.stage is not Stage.HERE

    @property
    def accepted(self) -> bool:
        """An agent has accepted it; its end comes by itself (asynchronous only)."""
        return self.asynchronous and self.stage is Stage.ANSWERED

    def deliver(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._wake.release()

    def wait(self) -> Outcome:
        outcome = self.wait_for(None)
        assert outcome is not None
        return outcome

    def wait_for(self, seconds: float | None) -> Outcome | None:
        """None when nothing was delivered in that time."""
        if not self._wake.acquire(timeout=-1 if seconds is None else seconds):
            return None
        outcome, self.outcome = self.outcome, None
        return outcome

    def decide(self) -> bool:
        """Whether the caller is the first to say if it is sent: the store's writer, or who waited too long for that."""
        return self._decision.acquire(blocking=False)

    def record(self, phase: Phase) -> ExecutionRecord:
        """Its record while it has not ended."""
        return ExecutionRecord(
            self.execution_id,
            self.function_name,
            self.agent_id,
            phase=phase,
            asynchronous=self.asynchronous,
            started_at=self.accepted_at,
        )

    def given_up(self, error: FluxError) -> ExecutionRecord:
        """Its record with an end that no agent had a part in."""
        now = time.time()
        if isinstance(error, Withdrawn):
            status, kind = ExecutionStatus.CANCELLED, ErrorKind.CANCELLED
        else:
            status = ExecutionStatus.FAILED
            unreached = isinstance(error, AgentUnreachable)
            kind = kind_of(error, ErrorKind.CANNOT_START if unreached else ErrorKind.INTERNAL)
        record = self.record(Phase.ENDED).ended(status, at=now, error=error.message, kind=kind)
        return replace(record, queue_ms=int((now - self.accepted_at) * 1000))

    def merged(self, record: ExecutionRecord) -> ExecutionRecord:
        """An agent's record as callers see it: accepted when Flux accepted it, our waiting counted in."""
        return replace(
            record,
            execution_id=self.execution_id,
            agent_id=record.agent_id or self.agent_id,
            started_at=self.accepted_at,
            queue_ms=_queue_ms(self.accepted_at, record, self.waited_ms),
            asynchronous=self.asynchronous,
            cpu_seconds=_microseconds(record.cpu_seconds),
        )


def merged(ours: ExecutionRecord, theirs: ExecutionRecord) -> ExecutionRecord:
    """An agent's record as callers see it, when we remember no more of it than the store does."""
    # The two clocks are all there is to tell how long it waited here.
    known = bool(theirs.run_started_at or not theirs.started_at)
    waited = 0 if known else max(0, round((theirs.started_at - ours.started_at) * 1000))
    return replace(
        theirs,
        execution_id=ours.execution_id,
        function_name=ours.function_name,
        agent_id=ours.agent_id,
        asynchronous=ours.asynchronous,
        started_at=ours.started_at,
        queue_ms=_queue_ms(ours.started_at, theirs, waited),
        cpu_seconds=_microseconds(theirs.cpu_seconds),
    )


def _queue_ms(accepted_at: float, record: ExecutionRecord, waited_ms: int) -> int:
    """From acceptance until the program began, what lies between Flux's sending and the agent's taking included.

    That is told by two clocks, so it is kept between what each of them has counted by itself.
    """
    least = waited_ms + record.queue_ms
    if not record.run_started_at:
        return least
    most = round((time.time() - accepted_at) * 1000) - record.duration_ms
    return max(least, min(most, round((record.run_started_at - accepted_at) * 1000)))


def _microseconds(seconds: float | None) -> float | None:
    return round(seconds, 6) if seconds is not None else None


class Withdrawn(FluxError):
    """Nobody wants it any more, and no agent has it. Becomes a cancelled record, never an answer."""


class NotWritten(FluxError):
    """The store did not take it, so nobody was asked. ``error`` is why."""

    def __init__(self, error: Exception) -> None:
        self.error = error if isinstance(error, FluxError) else Internal(f"{type(error).__name__}: {error}")
        super().__init__(self.error.message)


class AlreadyKnown(Exception):
    """The idempotency key was used before, by the execution named here. Never leaves the executions' modules."""

    def __init__(self, execution_id: str) -> None:
        super().__init__(execution_id)
        self.execution_id = execution_id


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
