"""What this process has in hand, and what the store knows of it.

An execution is in hand from its acceptance until its end has been written, in
the process that owns it. The store is told first, the agents afterwards; the
first end written wins, whoever writes it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from fluxlib.control.executions.execution import AlreadyKnown, Execution
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import ExecutionRecord, ExecutionRequest, Phase
from fluxlib.store.base import Commit, ControlStore, ExecutionEntry

log = logging.getLogger(__name__)

# How long a write may take (seconds) before its execution is given up.
COMMIT_PATIENCE = 10.0
_SMALL_OUTPUT = 4096


class Ledger:
    """The executions of one session. Every method may be called from any thread.

    ``keep_for`` is how long an ended execution can be asked for, in seconds.
    """

    def __init__(self, store: ControlStore, session: str, keep_for: float) -> None:
        self.store = store
        self.session = session
        self._keep_for = keep_for
        self._in_hand: dict[str, Execution] = {}
        self._lock = threading.Lock()
        self._idle = threading.Condition()
        self._draining = False
        self._watchers: dict[str, list[Callable[[], None]]] = {}
        # Ends on their way to the store: a write that fails is made again.
        self._ends: deque[tuple[Commit | None, Callable[[], Commit], Callable[[], None]]] = deque()
        self._forgotten: set[str] = set()  # though the store may know them yet
        self._settling = threading.Lock()

    # -- in hand -------------------------------------------------------------------

    def get(self, execution_id: str) -> Execution | None:
        return self._in_hand.get(execution_id)

    def hold(self, execution: Execution) -> None:
        self._in_hand[execution.execution_id] = execution

    def drop(self, execution_id: str) -> Execution | None:
        """Out of hand; whoever gets it back (once) gives its slot back, if an agent had accepted it."""
        execution = self._in_hand.pop(execution_id, None)
        if execution is not None:
            execution.over = True
        self._moved()
        return execution

    def _moved(self) -> None:
        if self._draining:
            with self._idle:
                self._idle.notify_all()

    def drain(self, deadline: Deadline) -> int:
        """Wait until no caller waits for anything in hand; how many still do at the deadline."""

        def waited_for() -> int:
            return sum(1 for execution in self.all() if not execution.detached and not execution.accepted)

        with self._idle:
            self._draining = True
            self._idle.wait_for(lambda: not waited_for(), deadline.remaining())
        return waited_for()

    def all(self) -> list[Execution]:
        return list(self._in_hand.values())

    # -- the store -------------------------------------------------------------------

    def create(self, execution: Execution, *, queued: bool, keep_request: bool) -> Commit:
        """Write a new execution, assigned already unless it is queued; nothing may be done about it before that holds.

        Raises AlreadyKnown: nothing was written, its idempotency key was used before.
        """
        execution_id = execution.execution_id
        self._in_hand[execution_id] = execution
        entry = ExecutionEntry(
            execution.record(Phase.QUEUED if queued else Phase.STARTING),
            execution.request if keep_request else None,
            self.session,
            idempotency_key=execution.idempotency_key,
        )
        # Before the write: what fails on the way may have been written all the same.
        execution.created = True
        known, commit = self.store.create_execution(entry, durable=execution.asynchronous)
        if known != execution_id:
            del self._in_hand[execution_id]
            execution.created = False
            raise AlreadyKnown(known)
        return commit

    def assign(self, execution: Execution) -> None:
        """Write who gets it. Raises Conflict when it has ended meanwhile, or another Flux has taken it over."""
        self.store.assign_execution(execution.execution_id, execution.agent_id, self.session).wait(COMMIT_PATIENCE)
        self.changed(execution.execution_id)

    def requeue(self, execution: Execution) -> None:
        """Write that nobody has it. Raises Conflict as ``assign`` does."""
        self.store.requeue_execution(execution.execution_id, self.session).wait(COMMIT_PATIENCE)

    def put_back(self, execution: Execution) -> None:
        """Back into the queue that the next life finds; nobody waits for the write."""
        try:
            self.store.requeue_execution(execution.execution_id, self.session)
        except StoreUnavailable as error:
            log.warning("execution %s cannot be put back: %s", execution.execution_id, error.message)

    def end(self, record: ExecutionRecord) -> Commit | None:
        """Write an end. Nobody has to wait: a write that fails is made again by ``settle``."""
        if record.output is not None and len(record.output) > _SMALL_OUTPUT:
            record = replace(record, output=None)  # it is kept here until the write holds
        commit = self._write(partial(self.store.end_execution, record, time.time() + self._keep_for))
        if self._watchers:
            self.changed(record.execution_id)
        return commit

    def forget(self, execution: Execution) -> None:
        """It was not accepted: its caller knows an error and no ID. Once this returns its idempotency key is free
        again, unless the store is away; then it is so as soon as the store is back.
        """
        execution_id = execution.execution_id
        # Before it is out of hand: whoever uses its key finds it in one of the two until it is gone.
        self._forgotten.add(execution_id)
        self.drop(execution_id)
        gone = partial(self._gone, execution_id)
        commit = self._write(partial(self.store.forget_execution, execution_id, self.session), gone)
        if execution.idempotency_key and commit is not None:
            with suppress(StoreUnavailable):
                commit.wait(COMMIT_PATIENCE)
                gone()
        self.changed(execution_id)

    def _gone(self, execution_id: str) -> None:
        self._forgotten.discard(execution_id)
        self.changed(execution_id)

    def forgets(self, execution_id: str) -> bool:
        """It was not accepted, and the store is being told so."""
        return execution_id in self._forgotten

    def _write(self, write: Callable[[], Commit], then: Callable[[], None] = lambda: None) -> Commit | None:
        commit: Commit | None = None
        with suppress(StoreUnavailable):
            commit = write()
        self._ends.append((commit, write, then))
        return commit

    def entry(self, execution_id: str) -> ExecutionEntry | None:
        return self.store.execution(execution_id)

    def request_of(self, execution: Execution) -> ExecutionRequest | None:
        """What to send; read back from the store when it is not kept in memory. None: it is gone there."""
        if execution.request is not None:
            return execution.request
        return self.store.request(execution.execution_id)

    def settle(self, patience: float = COMMIT_PATIENCE) -> None:
        """See that the ends written since the last time hold. ``patience`` is in seconds, for each step."""
        # One thread at a time: another would find fewer ends than there were when it counted them.
        if not self._settling.acquire(timeout=patience):
            return
        try:
            for _ in range(len(self._ends)):
                commit, write, then = self._ends.popleft()
                try:
                    (commit if commit is not None else write()).wait(patience)
                    then()
                except StoreUnavailable as error:
                    self._ends.append((None, write, then))
                    # Once is enough: the store is away, and the rest would wait as long each.
                    log.warning("%d ends cannot be written yet: %s", len(self._ends), error.message)
                    return
                except Exception:
                    self._ends.append((None, write, then))
                    log.exception("an end cannot be written, and is tried again")
        finally:
            self._settling.release()

    # -- watchers --------------------------------------------------------------------

    def watch(self, execution_id: str, changed: Callable[[], None]) -> None:
        """``changed()`` when it was assigned, accepted or ended by this process. Must not block."""
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
        """It was assigned, accepted, queued or ended: for those who watch it, and for ``drain``."""
        self._moved()
        if not self._watchers:
            return
        with self._lock:
            watchers = list(self._watchers.get(execution_id, ()))
        for watcher in watchers:
            watcher()
