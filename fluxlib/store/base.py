"""What Flux and an agent keep on disk, and which writes are atomic.

Two stores: :class:`ControlStore` for the control plane (memory, SQLite, Redis)
and :class:`RecordStore` for an agent's own execution records (memory, SQLite,
Redis). Every method raises StoreUnavailable when the backend is away, never
answers "not there" instead. Every method may be called from any thread.

Each write below is one atomic step: it happens wholly or not at all, and other
processes on the same store see it whole. A write has returned (or its Commit
has been waited for) only when a ``kill -9`` of this process cannot undo it;
with ``durable=True`` a power cut cannot either (SQLite: synced; Redis: as far
as its own persistence goes, see ``persistence``).

Nothing here costs more as executions pile up: lookups are by key, listings by
an index, a page at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fluxlib.model import AgentRecord, ExecutionRecord, ExecutionRequest, ExecutionStatus, Function

# Seconds a lease that ran out is still listed. One whose owner has open executions stays until they are adopted.
LEASE_MEMORY = 86400.0


class Commit(Protocol):
    """A write on its way. ``wait`` returns when it holds, or raises what went wrong."""

    def wait(self, timeout: float | None = None) -> None: ...

    def then(self, call: Callable[[Exception | None], None]) -> None:
        """Instead of waiting: ``call`` gets None when it holds, or what went wrong; perhaps at once. Must be quick."""


class Committed:
    """A write that already holds."""

    def wait(self, timeout: float | None = None) -> None:
        return

    def then(self, call: Callable[[Exception | None], None]) -> None:
        call(None)


@dataclass(frozen=True, slots=True)
class Lease:
    """Leadership of one task. ``token`` is larger than any given before it: it fences a stale holder.

    ``seconds_left`` is how long it lasts from when the store was asked, none or less when it has run out: no time of
    day, because the clocks of two machines differ.
    """

    name: str
    owner: str
    token: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class ExecutionEntry:
    """An execution as the control plane keeps it.

    ``record`` carries no output (the agent keeps that). ``request`` is kept
    until the execution has ended: a queued one is started from it after a restart.
    """

    record: ExecutionRecord
    request: ExecutionRequest | None = None
    owner: str = ""  # the Flux process (its session) that dispatches or waits for it
    sequence: int = 0  # order of acceptance, set by the store; grows
    idempotency_key: str = ""
    keep_until: float = 0.0  # epoch seconds; 0 while it runs

    @property
    def execution_id(self) -> str:
        return self.record.execution_id


@dataclass(frozen=True, slots=True)
class ExecutionFilter:
    function_name: str = ""
    status: ExecutionStatus | None = None
    queued: bool = False  # only those whose phase is queued


@dataclass(frozen=True, slots=True)
class Page:
    """Newest first, without their requests. ``next_cursor`` is opaque, empty on the last page."""

    entries: Sequence[ExecutionEntry] = field(default_factory=tuple)
    next_cursor: str = ""


class ControlStore(Protocol):
    """State of the control plane. Several Flux processes may share one (Redis)."""

    # -- functions and code ----------------------------------------------------

    def functions(self) -> list[Function]: ...

    def function(self, name: str) -> Function | None: ...

    def functions_revision(self) -> int:
        """Grows with every change of any function: another process's cache compares it."""

    def save_function(self, function: Function, archive: bytes | None = None) -> None:
        """The function and, when given, its code in one step. Durable.

        An archive no function refers to any more goes with the write that orphans it.
        """

    def delete_function(self, name: str) -> bool:
        """The function and its code. False when there was none."""

    def archive(self, code_digest: str) -> bytes | None:
        """The zip as it was deployed."""

    # -- agents ----------------------------------------------------------------

    def agents(self) -> list[AgentRecord]: ...

    def agent(self, agent_id: str) -> AgentRecord | None: ...

    def save_agent(self, agent: AgentRecord, lease: Lease | None = None) -> None:
        """Durable. With a lease, refused (LeaseLost) unless its token is still the current one."""

    def update_agent(self, agent: AgentRecord, lease: Lease | None = None) -> bool:
        """As ``save_agent`` for one that is known. False: it is not, and nothing was written."""

    def delete_agent(self, agent_id: str, lease: Lease | None = None) -> bool: ...

    # -- executions ------------------------------------------------------------

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        """Keep a new execution before anything is done about it.

        Answers the ID under which it is known: the entry's own, or, when its
        idempotency key was used before (for the same function), that earlier one's,
        and then nothing is written. Nor is it for an ID that is known already.
        """

    def assign_execution(self, execution_id: str, agent_id: str, owner: str) -> Commit:
        """Phase ``starting`` at this agent.

        Waiting raises Conflict when it ended meanwhile (a cancel), or is no longer this owner's: another Flux took
        it over while this one was frozen, and has perhaps sent it already.
        """

    def requeue_execution(self, execution_id: str, owner: str) -> Commit:
        """Back to phase ``queued`` at no agent (it was refused, nothing was started). Conflict as for assigning."""

    def end_execution(self, record: ExecutionRecord, keep_until: float) -> Commit:
        """The first end wins: a second one changes nothing and raises nothing. Drops the kept request."""

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        """Leave no trace of one that was written and then not accepted: its idempotency key is free again.

        One that nobody knows (any more), or that another owner has taken over, is no error, and left as it is.
        """

    def execution(self, execution_id: str) -> ExecutionEntry | None: ...

    def execution_by_key(self, function_name: str, idempotency_key: str) -> ExecutionEntry | None:
        """The one that this key stands for."""

    def executions(self, where: ExecutionFilter, cursor: str, limit: int) -> Page: ...

    def open_executions(self, agent_id: str) -> list[ExecutionEntry]:
        """Not ended and owned by this agent ("" = queued ones, in the order of acceptance)."""

    def executions_of(self, owner: str) -> list[ExecutionEntry]:
        """Not ended and owned by this Flux process."""

    def adopt_executions(self, from_owner: str, to_owner: str, lease: Lease | None = None) -> int:
        """What a dead Flux process owned goes to a living one; how many."""

    def expire_executions(self, now: float, limit: int = 1000) -> int:
        """Forget ended executions (and their idempotency keys) whose time is over; how many."""

    def count_open(self, function_name: str) -> int:
        """Running or queued executions of one function, from an index."""

    # -- leases and small facts --------------------------------------------------

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        """Take or prolong. None when another owner's has not run out.

        ``now`` is any clock of the caller's, always the same one. A store that several processes share goes by its
        own instead.
        """

    def lease(self, name: str, now: float) -> Lease | None: ...

    def leases(self, prefix: str, now: float) -> list[Lease]: ...

    def release_lease(self, lease: Lease) -> None: ...

    def get_fact(self, key: str) -> str | None:
        """A small string kept under a name (installation notes, autoscaler state)."""

    def set_fact(self, key: str, value: str, lease: Lease | None = None) -> None: ...

    def delete_fact(self, key: str, lease: Lease | None = None) -> None:
        """One that is not there is no error."""

    # -- the store itself --------------------------------------------------------

    def ping(self) -> None:
        """Raises StoreUnavailable unless a write would go through."""

    def persistence(self) -> tuple[str, ...]:
        """Warnings about what a crash of the backend could lose; empty when nothing."""

    def close(self, timeout: float = 30.0) -> None:
        """Commits what is on its way first, within ``timeout`` seconds."""


class RecordStore(Protocol):
    """An agent's own records. Records and their output live ``execution_ttl`` after their end."""

    def begin(self, record: ExecutionRecord) -> None:
        """Kept soon (batched): the answer to Flux does not wait for it."""

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        """``output`` None: it lies in the agent's output file of that execution. Batched, in order with ``begin``."""

    def flush(self, timeout: float | None = None) -> None:
        """Until everything said so far holds."""

    def record(self, execution_id: str) -> ExecutionRecord | None:
        """With the output that was given to ``end``; None in ``output`` when that was None."""

    def unfinished(self) -> list[ExecutionRecord]:
        """Begun, not ended: after a start, what a former life was running."""

    def expire(self, now: float, limit: int = 1000) -> list[str]:
        """Forget records whose time is over; their IDs, so that output files can go too."""

    def close(self, timeout: float = 30.0) -> None:
        """Keeps what is on its way first, within ``timeout`` seconds."""
