"""What Flux and an agent keep on disk, and which writes are atomic.

Two stores: :class:`ControlStore` for the control plane and :class:`RecordStore` for an agent's own execution records,
each in SQLite and in Redis, under one test suite. Every method raises StoreUnavailable when the backend is away, never
answers "not there" instead. Every method may be called from any thread, and none waits for longer than COMMIT_TIMEOUT.

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
from typing import Any, Protocol

from fluxlib.model import AgentRecord, ExecutionRecord, ExecutionRequest, ExecutionStatus, Function

# Seconds a lease that ran out is still listed. One whose owner has open executions stays until they are adopted.
LEASE_MEMORY = 86400.0
# Seconds that a write may take before its caller gives up.
COMMIT_TIMEOUT = 10.0
# A claim brings along requests up to this size (bytes); larger ones are read one at a time when they are sent.
SMALL_REQUEST = 16 * 1024


class Commit(Protocol):
    """A write on its way to the store. Every wait for it has a deadline, in seconds."""

    def wait(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Returns when the write is committed, raises what went wrong.

        StoreUnavailable when it was not committed in time; it may be committed later all the same.
        """

    def value(self, timeout: float = COMMIT_TIMEOUT) -> Any:
        """As ``wait``, then what the write answered."""

    def then(self, call: Callable[[Exception | None], None]) -> None:
        """Instead of waiting: ``call`` gets None once the write is committed, or what went wrong; perhaps at once.

        It runs on the store's writer thread, so it must only enqueue.
        """


class Committed:
    """A write that is committed already."""

    def __init__(self, value: Any = None) -> None:
        self._value = value

    def wait(self, timeout: float = COMMIT_TIMEOUT) -> None:
        return

    def value(self, timeout: float = COMMIT_TIMEOUT) -> Any:
        return self._value

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

    ``record`` carries no output (the agent keeps that). ``request`` is given to ``create_execution``, which keeps it
    until the execution has ended; of what the store answers only ``claim_executions`` carries it, and only a small one.
    """

    record: ExecutionRecord
    request: ExecutionRequest | None = None
    owner: str = ""  # the Flux process (its session) that dispatches or waits for it; "" = in the backlog
    sequence: int = 0  # order of acceptance, set by the store; grows
    idempotency_key: str = ""
    keep_until: float = 0.0  # epoch seconds by the store's clock; 0 while it runs
    rank: float = 0.0  # the lowest is claimed first; 0 = in the order of acceptance
    request_bytes: int = 0  # size of the kept request, 0 = none is kept; set by the store

    @property
    def execution_id(self) -> str:
        return self.record.execution_id


@dataclass(frozen=True, slots=True)
class QueuedExecutions:
    """How many executions of one function are queued, whoever owns them."""

    waiting: int = 0  # all of them
    ready: int = 0  # those nobody owns: any Flux may claim them
    request_bytes: int = 0  # what the requests kept for them take in the store


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

    def function_and_revision(self, name: str) -> tuple[Function | None, int]:
        """The function and its revision, which each change makes another; 0 when there is none."""

    def save_function(self, function: Function, archive: bytes | None = None, *, revision: int | None = None) -> None:
        """The function and, when given, its code in one step. Durable.

        With a revision, refused (Conflict) unless the function still has it: a change made of what was read is written
        only over that. An archive no function refers to any more goes with the write that orphans it.
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
    #
    # Phases: queued (nobody's, or claimed by a Flux) -> starting/running/ending (at an agent) -> ended. Every step
    # from CLAIM on names the owner and the attempt it speaks of, and is refused when either is no longer current: a
    # Flux that was frozen, or an agent's late word about attempt 1, changes nothing of attempt 2.

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        """CREATE: keep a new execution before anything is done about it.

        A queued entry with an empty owner goes into the backlog: any Flux may claim it, so it should carry its
        request. A queued entry with an owner is waited for by that Flux (a synchronous call) and is never claimed by
        another. One that has an agent already (phase starting) needs an owner.

        Answers the ID under which it is known: the entry's own, or, when its idempotency key was used before (for
        the same function), that earlier one's, and then nothing is written. Nor is it for an ID that is known already.
        """

    def claim_executions(self, owner: str, function_name: str, limit: int) -> list[ExecutionEntry]:
        """CLAIM: make ``owner`` the owner of at most ``limit`` entries of this function's backlog, best rank first.

        They stay queued. Each carries its request when that is at most SMALL_REQUEST bytes; a larger one is read with
        ``request``. When this raises, entries may have been claimed all the same: they are queued ones among
        ``executions_of(owner)`` that the process does not know, and are to be taken or returned.
        """

    def assign_attempt(self, execution_id: str, attempt: int, agent_id: str, owner: str) -> Commit:
        """ASSIGN: phase ``starting`` at this agent, whether it was queued or at another agent. To be committed before
        anything is sent to the agent.

        Waiting raises Conflict when the execution has ended, is not this owner's (any more), or is at another attempt.
        The same again is no error.
        """

    def return_execution(self, execution_id: str, attempt: int, owner: str, *, claimed: bool = False) -> Commit:
        """RETURN: back to phase ``queued`` at no agent, with its old rank (nothing was started).

        It goes back into the backlog, for any Flux; with ``claimed`` it stays this owner's, as it must when a caller
        waits for it. Waiting raises Conflict as for ``assign_attempt``.
        """

    def end_attempt(
        self, record: ExecutionRecord, attempt: int, keep_for: float, *, keep_request: bool = False
    ) -> Commit:
        """END: the final record of an execution, forgotten ``keep_for`` seconds after now by the store's clock.

        ``attempt`` 0 ends whatever attempt it is at (a cancel, a lost agent). The first end wins: one of an execution
        that has ended, of another attempt or of an unknown ID changes nothing and raises nothing; ``value()`` is True
        for the one that was written. The request is dropped unless ``keep_request``. Nobody needs to wait.
        """

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        """Leave no trace of one that was written and then not accepted: its idempotency key is free again.

        One that nobody knows (any more), or that another owner has taken over, is no error, and left as it is.
        """

    def adopt_session(self, dead_owner: str, owner: str, lease: Lease | None = None) -> int:
        """ADOPT: what a dead Flux process owned; how many executions.

        Its queued asynchronous ones go back into the backlog. Those at agents become ``owner``'s, and so do its
        queued synchronous ones, whose callers are gone: they are to be ended.
        """

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        """Without its request."""

    def request(self, execution_id: str) -> ExecutionRequest | None:
        """The request that is kept of it. None: none is kept (any more)."""

    def execution_by_key(self, function_name: str, idempotency_key: str) -> ExecutionEntry | None:
        """The one that this key stands for, without its request."""

    def executions(self, where: ExecutionFilter, cursor: str, limit: int) -> Page: ...

    def open_executions(self, agent_id: str) -> list[ExecutionEntry]:
        """Not ended and at this agent ("" = every queued one), in the order of acceptance, without requests."""

    def executions_of(self, owner: str, after: int = 0, limit: int = 0) -> list[ExecutionEntry]:
        """Not ended and owned by this Flux process, in the order of acceptance, without requests.

        Only those whose sequence is larger than ``after``, at most ``limit`` (0 = all): a page at a time.
        """

    def open_ids(self, owner: str) -> set[str]:
        """The IDs of what has not ended and is owned by this Flux process."""

    def queued(self) -> dict[str, QueuedExecutions]:
        """Function -> what is queued of it; only functions of which something is. Costs one step a function, however
        many executions wait.
        """

    def expire_executions(self, max_records: int = 0, limit: int = 1000) -> int:
        """Forget ended executions (and their idempotency keys): at most ``limit`` at once; how many.

        Those whose time is over by the store's clock, and then, while more than ``max_records`` (0 = any number) are
        kept, the oldest successes, and the oldest others when no success is left.
        """

    def count_open(self, function_name: str) -> int:
        """Running or queued executions of one function, from an index."""

    # -- leases and notes --------------------------------------------------

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        """Take or prolong. None when another owner's has not run out.

        ``now`` is any clock of the caller's, always the same one. A store that several processes share goes by its
        own instead.
        """

    def lease(self, name: str, now: float) -> Lease | None: ...

    def leases(self, prefix: str, now: float) -> list[Lease]: ...

    def release_lease(self, lease: Lease) -> None: ...

    def note(self, key: str) -> str | None:
        """A small text kept under a name (figures a leader shares, the autoscaler's state)."""

    def set_note(self, key: str, text: str, lease: Lease | None = None) -> None: ...

    def delete_note(self, key: str, lease: Lease | None = None) -> None:
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

    def flush(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Until everything said so far is committed. Raises StoreUnavailable when it is not in time."""

    def record(self, execution_id: str) -> ExecutionRecord | None:
        """With the output that was given to ``end``; None in ``output`` when that was None."""

    def check(self, timeout: float) -> None:
        """Raises StoreUnavailable unless a write holds now."""

    def unfinished(self) -> list[ExecutionRecord]:
        """Begun and not ended: after a start, what the previous run of the agent was running."""

    def expire(self, now: float, limit: int = 1000) -> list[str]:
        """Forget records whose time is over; their IDs, so that output files can go too."""

    def close(self, timeout: float = 30.0) -> None:
        """Keeps what is on its way first, within ``timeout`` seconds."""
