"""The executions in flight in this process, and the one place where an execution ends.

An execution is in flight from its acceptance until its end is written, in the process that owns it. The store is told
first, the agents afterwards; the first end written wins, whoever writes it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from fluxlib.control.agents.fleet import Reservation
from fluxlib.control.executions.execution import Execution, Reply, State, state_after
from fluxlib.errors import FluxError, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest
from fluxlib.store.base import Commit, ControlStore, ExecutionEntry

log = logging.getLogger(__name__)

# How long the store has to commit a write (seconds) before its execution is given up.
COMMIT_SECONDS = 10.0
_SMALL_OUTPUT = 4096

Write = Callable[[], Commit]


class ExecutionTracker:
    """The executions of one session. Every method may be called from any thread, none waits for the store but ``entry``
    and ``request_of``.

    ``release`` gives a slot back, ``keep_for`` is how long an ended execution can be asked for, in seconds. The
    dictionaries are changed by single operations, which are atomic also without a GIL.
    """

    def __init__(
        self, store: ControlStore, session: str, keep_for: float, release: Callable[[Reservation], None]
    ) -> None:
        self.store = store
        self.session = session
        self._keep_for = keep_for
        self._release = release
        self._in_flight: dict[str, Execution] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition()
        self._draining = False
        self._watchers: dict[str, list[Callable[[], None]]] = {}
        # Writes that failed, and are made again; by execution ID, whose first end is the one that counts.
        self._unwritten: dict[str, tuple[Write, Callable[[], None]]] = {}
        self._probing = False  # one of them is being written again
        self._forgetting: set[str] = set()  # rejected, and perhaps still in the store

    # -- in flight -----------------------------------------------------------------------

    def get(self, execution_id: str) -> Execution | None:
        return self._in_flight.get(execution_id)

    def all(self) -> list[Execution]:
        return list(self._in_flight.values())

    def __len__(self) -> int:
        return len(self._in_flight)

    def add(self, execution: Execution) -> None:
        with self._lock:
            self._in_flight[execution.execution_id] = execution

    def take(self, execution: Execution) -> bool:
        """Add one that was found in the store. False: it came into flight in another way, and must not start twice."""
        with self._lock:
            known = self._in_flight.get(execution.execution_id)
            if known is not None and known is not execution and not known.unclaimed:
                return False
            self._in_flight[execution.execution_id] = execution
            return True

    def drain(self, deadline: Deadline) -> int:
        """Wait until no caller waits for anything in flight; how many still do at the deadline."""

        def waited_for() -> int:
            return sum(1 for execution in self.all() if execution.on_reply is not None)

        with self._idle:
            self._draining = True
            self._idle.wait_for(lambda: not waited_for(), deadline.remaining())
        return waited_for()

    @property
    def draining(self) -> bool:
        return self._draining

    # -- the end -------------------------------------------------------------------------

    def end(self, execution: Execution, final: ExecutionRecord) -> bool:
        """Every end of an execution in flight: its slot is given back, the record written, whoever waits is told.

        False: it had ended already.
        """
        closed = self._close(execution, final)
        if closed is None:
            return False
        reservation, reply = closed
        if reservation is not None:
            self._release(reservation)
        if final.error_kind is ErrorKind.TIMEOUT:
            log.info("timeout of execution %s of %s: %s", execution.execution_id, execution.function_name, final.error)
        if reply is not None:
            reply(final)
        self.changed(execution.execution_id)
        return True

    def let_go(self, execution: Execution, reply: Reply | None = None) -> bool:
        """It is not this process's any more: nothing is written, ``reply`` goes to its caller. False: it had ended."""
        closed = self._close(execution, None)
        if closed is None:
            return False
        reservation, tell = closed
        if reservation is not None:
            self._release(reservation)
        if tell is not None and reply is not None:
            tell(reply)
        self.changed(execution.execution_id)
        return True

    def _close(
        self, execution: Execution, final: ExecutionRecord | None
    ) -> tuple[Reservation | None, Callable[[Reply], None] | None] | None:
        """Nothing happens to it from now on; its slot and its caller, None when it had ended before.

        The end is on its way to the store before anybody can see that it has ended.
        """
        with execution.lock:
            if execution.state is State.ENDED:
                return None
            stored = execution.state is not State.NEW
            execution.state = State.ENDED if final is None else state_after(final, execution.attempt)
            execution.final = final
            if final is not None and stored:
                execution.commit = self.write_end(final, execution.attempt)
            reservation, execution.reservation = execution.reservation, None
            reply, execution.on_reply = execution.on_reply, None
        with self._lock:
            # One that went into the store's backlog may have been claimed again before its submission is through.
            if self._in_flight.get(execution.execution_id) is execution:
                del self._in_flight[execution.execution_id]
        return reservation, reply

    def write_end(self, final: ExecutionRecord, attempt: int = 0) -> Commit | None:
        """Write an end, also of what is not in flight here; ``attempt`` 0 ends any. None: it is written later."""
        if final.output is not None and len(final.output) > _SMALL_OUTPUT:
            final = replace(final, output=None)  # it is kept here until the write holds
        return self._write(final.execution_id, partial(self.store.end_attempt, final, attempt, self._keep_for))

    def reject(self, execution: Execution, error: FluxError) -> None:
        """It was not accepted: its caller is told an error, and the store forgets it.

        After an error that says that nothing was written there is nothing to forget. A caller with an idempotency
        key is told once the key is free again, unless the store is away.
        """
        execution_id = execution.execution_id
        with execution.lock:
            if execution.state is State.ENDED:
                return
            stored = execution.state is not State.NEW
        if stored and not (isinstance(error, StoreUnavailable) and error.nothing_written):
            # Before it is out of flight: whoever uses its key finds it in one of the two until it is gone.
            self._forgetting.add(execution_id)
        closed = self._close(execution, None)
        if closed is None:
            return
        reservation, reply = closed
        if reservation is not None:
            self._release(reservation)
        if execution_id not in self._forgetting:
            self._told(execution_id, reply, error)
            return
        forget = partial(self.store.forget_execution, execution_id, self.session)
        forgotten = partial(self._forgotten, execution_id)
        if execution.idempotency_key:
            self._write(execution_id, forget, forgotten, lambda held: self._told(execution_id, reply, error))
        else:
            self._write(execution_id, forget, forgotten)
            self._told(execution_id, reply, error)

    def _told(self, execution_id: str, reply: Callable[[Reply], None] | None, error: FluxError) -> None:
        if reply is not None:
            reply(error)
        self.changed(execution_id)

    def _forgotten(self, execution_id: str) -> None:
        self._forgetting.discard(execution_id)
        self.changed(execution_id)

    def is_forgetting(self, execution_id: str) -> bool:
        """It was rejected, and the store is being told so."""
        return execution_id in self._forgetting

    # -- writes that nobody waits for ------------------------------------------------------

    def _write(
        self,
        execution_id: str,
        write: Write,
        then: Callable[[], None] = lambda: None,
        settled: Callable[[bool], None] = lambda held: None,
    ) -> Commit | None:
        """Make it now; one that fails is made again until it holds, which ``then`` is told.

        ``settled`` is told whether this first time held. Both may be called on the store's writer thread.
        """

        def committed(error: Exception | None) -> None:
            if error is None:
                then()
            else:
                if not isinstance(error, StoreUnavailable):
                    log.error("execution %s cannot be written, and is tried again: %s", execution_id, error)
                self._unwritten[execution_id] = write, then
            settled(error is None)

        try:
            commit = write()
        except StoreUnavailable as error:
            committed(error)
            return None
        commit.then(committed)
        return commit

    def write_again(self) -> None:
        """Make the writes that failed again: one, and as soon as that holds all others at once."""
        if self._unwritten and not self._probing:
            self._probing = True
            self._write_next(self._probed)

    def _write_next(self, settled: Callable[[bool], None] = lambda held: None) -> None:
        with suppress(KeyError):  # others take from it too
            execution_id, (write, then) = self._unwritten.popitem()
            self._write(execution_id, write, then, settled)

    def _probed(self, held: bool) -> None:
        self._probing = False
        if not held:
            log.warning("%d execution results not yet persisted: the store is unavailable", len(self._unwritten))
            return
        for _ in range(len(self._unwritten)):
            self._write_next()

    # -- the store -------------------------------------------------------------------------

    def entry(self, execution_id: str) -> ExecutionEntry | None:
        return self.store.execution(execution_id)

    def request_of(self, execution: Execution) -> ExecutionRequest | None:
        """What to send; read back from the store when it is not kept in memory. None: it is gone there."""
        if execution.request is not None:
            return execution.request
        return self.store.request(execution.execution_id)

    # -- watchers --------------------------------------------------------------------------

    def watch(self, execution_id: str, changed: Callable[[], None]) -> None:
        """``changed()`` when it was assigned, queued, accepted or ended by this process. Must not block."""
        with self._lock:
            self._watchers.setdefault(execution_id, []).append(changed)

    def unwatch(self, execution_id: str, changed: Callable[[], None]) -> None:
        with self._lock:
            watchers = self._watchers.get(execution_id, [])
            if changed in watchers:
                watchers.remove(changed)
            if not watchers:
                self._watchers.pop(execution_id, None)

    def watched(self) -> list[str]:
        with self._lock:
            return list(self._watchers)

    def changed(self, execution_id: str) -> None:
        """Tell those who watch it, and ``drain``."""
        if self._draining:
            with self._idle:
                self._idle.notify_all()
        if not self._watchers:
            return
        with self._lock:
            watchers = list(self._watchers.get(execution_id, ()))
        for watcher in watchers:
            watcher()
