"""Executions nobody tells us the end of: a former life's, an original agent's, those of an agent that came back.

They are *followed*: their agents are asked, and what an agent says is written.
An execution its agent does not know is asked for three times before it is taken
for lost, because a request may still be on its way when its sender has died.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace

from fluxlib.control.agent_calls import AgentCalls
from fluxlib.control.dispatch import Dispatcher
from fluxlib.control.execution import Execution
from fluxlib.control.ledger import Ledger
from fluxlib.control.registry import Registry
from fluxlib.errors import AgentError, NotFound, StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus, Phase
from fluxlib.store.base import ExecutionEntry, ExecutionFilter, Lease

log = logging.getLogger(__name__)

_MISSES = 3
_PAGE = 500
# An execution of ours that the store no longer has open was ended by another Flux; it is looked for this often.
_AUDIT_SECONDS = 5.0


@dataclass(slots=True)
class Followed:
    """An execution at an agent whose end has to be asked for."""

    record: ExecutionRecord
    misses: int = 0


class Recovery:
    """What a crash, ours or an agent's, left open. Every method may be called from any thread."""

    def __init__(
        self, ledger: Ledger, registry: Registry, dispatcher: Dispatcher, calls: AgentCalls, *, shared: bool
    ) -> None:
        self._ledger = ledger
        self._registry = registry
        self._dispatcher = dispatcher
        self._calls = calls
        self._shared = shared
        self._lock = threading.Lock()
        self._followed: dict[str, dict[str, Followed]] = {}  # by agent, by execution
        self._asking: set[str] = set()
        self._audit_at = 0.0
        dispatcher.on_lost = self._follow

    # -- what former lives left --------------------------------------------------------

    def start(self) -> int:
        """Take over what former lives owned; how many. With a shared store only the leader says who is dead."""
        if self._shared:
            return 0
        store, session = self._ledger.store, self._ledger.session
        owners: set[str] = set()
        cursor = ""
        while True:
            page = store.executions(ExecutionFilter(status=ExecutionStatus.RUNNING), cursor, _PAGE)
            owners.update(entry.owner for entry in page.entries)
            cursor = page.next_cursor
            if not cursor:
                break
        return sum(self.adopt(owner, None) for owner in sorted(owners - {session}))

    def adopt(self, dead_session: str, lease: Lease | None) -> int:
        """What a dead Flux owned is ours from now on. Raises LeaseLost."""
        count = self._ledger.store.adopt_executions(dead_session, self._ledger.session, lease)
        if count:
            log.info("took over %d executions of a Flux that has ended (%s)", count, dead_session)
            for entry in self._ledger.store.executions_of(self._ledger.session):
                if self._ledger.get(entry.execution_id) is None:
                    self._take_over(entry)
        return count

    def _take_over(self, entry: ExecutionEntry) -> None:
        record = entry.record
        if record.agent_id:
            self._follow(record)
            self.ask(record.agent_id)
            return
        if not record.asynchronous:
            text = "the Flux it waited in has ended"
            self._ledger.end(record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.STOPPING))
            return
        # Its request stays in the store until a slot is found.
        execution = Execution(record.function_name, None, record.execution_id, record.started_at)
        execution.created = execution.detached = True
        self._ledger.hold(execution)
        try:
            self._dispatcher.slots.need(record.function_name)
        except NotFound:
            self._dispatcher.give_up(execution, NotFound(f"function {record.function_name} was deleted"))
        else:
            self._dispatcher.room.join(execution, pressed=True, invited=True)

    # -- what membership says of an agent ------------------------------------------------

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None:
        """The agent is (back) here and runs these; None: an original agent, which has to be asked for each.

        Only those this Flux owns: another living Flux does the same for its own.
        """
        open_here = {entry.execution_id: entry for entry in self._ledger.store.open_executions(agent_id)}
        for execution_id, entry in open_here.items():
            held = self._ledger.get(execution_id)
            if entry.owner != self._ledger.session or (held is not None and not held.accepted):
                continue
            if held is None or running is None or execution_id not in running:
                self._follow(entry.record)
        for execution_id in running or ():
            if execution_id not in open_here:
                self._end_given_up(agent_id, execution_id)
        self.ask(agent_id)

    def _end_given_up(self, agent_id: str, execution_id: str) -> None:
        entry = self._ledger.entry(execution_id)
        if entry is None:
            log.warning("agent %s runs %s, which this Flux knows nothing of; it is left alone", agent_id, execution_id)
        elif entry.record.status.ended:
            log.warning("agent %s still ran %s, which was given up: it is ended", agent_id, execution_id)
            record = replace(entry.record, agent_id=agent_id)
            self._calls.soon(
                f"ending {execution_id} at {agent_id}",
                lambda: self._calls.cancel(record, "given up while the agent was away"),
            )

    def agent_lost(self, agent_id: str, reason: str) -> int:
        """Everything open there has failed for good; how many there were."""
        entries = self._ledger.store.open_executions(agent_id)
        now = time.time()
        for entry in entries:
            text = f"agent lost: {reason}"
            commit = self._ledger.end(
                entry.record.ended(ExecutionStatus.FAILED, at=now, error=text, kind=ErrorKind.AGENT_LOST)
            )
            held = self._ledger.get(entry.execution_id)
            if held is not None and held.accepted:
                self._out_of_hand(entry.execution_id)
        if entries and commit is not None:
            commit.wait()
        with self._lock:
            self._followed.pop(agent_id, None)
        return len(entries)

    def ended(self, record: ExecutionRecord) -> None:
        """An agent says that an asynchronous one has ended. First end wins."""
        held = self._ledger.get(record.execution_id)
        if held is None:
            self._ledger.end(record)
            return
        if held.asynchronous:
            if held.reservation is not None:
                self._registry.release(held.reservation)
            self._dispatcher.finish(held, record)

    # -- following -----------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Ask for the ends nobody tells. ``now`` is epoch seconds."""
        for execution in self._ledger.all():
            reservation = execution.reservation
            if execution.accepted and reservation is not None:
                connection = reservation.agent.connection
                if connection is not None and connection.original:
                    self._follow(execution.merged(execution.record(Phase.RUNNING)))
        with self._lock:
            agents = list(self._followed)
        for agent_id in agents:
            self.ask(agent_id)
        if self._shared and now >= self._audit_at:
            self._audit_at = now + _AUDIT_SECONDS
            self._audit(now)

    def ask(self, agent_id: str) -> None:
        """Ask this agent for everything followed there, unless it is being asked already."""
        with self._lock:
            if agent_id in self._asking or not self._followed.get(agent_id):
                return
            self._asking.add(agent_id)
        self._calls.soon(f"asking {agent_id} for its executions", lambda: self._ask(agent_id))

    def _ask(self, agent_id: str) -> None:
        try:
            with self._lock:
                followed = list(self._followed.get(agent_id, {}).values())
            for one in followed:
                self._ask_for(one)
        except AgentError as error:
            log.info("agent %s cannot be asked for its executions: %s", agent_id, error.message)
        except StoreUnavailable as error:
            log.warning("what %s says cannot be kept: %s", agent_id, error.message)
        finally:
            with self._lock:
                self._asking.discard(agent_id)

    def _ask_for(self, followed: Followed) -> None:
        record = followed.record
        execution_id = record.execution_id
        connection = self._calls.connection(record.agent_id)
        if connection is None:
            return
        found = connection.record(execution_id, with_output=False)
        if found is not None and not found.status.ended and not record.asynchronous:
            # Whoever waited for it is gone.
            self._calls.cancel(record, "cancelled: the Flux that waited for it has ended")
            found = connection.record(execution_id, with_output=False)
        if found is None:
            followed.misses += 1
            if followed.misses < _MISSES:
                return
            text = f"agent lost: {record.agent_id} knows nothing of it (any more)"
            found = record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.AGENT_LOST)
        if not found.status.ended:
            followed.misses = 0
            return
        self._unfollow(record)
        if self._ledger.get(execution_id) is not None:
            self.ended(found)
        else:
            self._ledger.end(merged(record, found))

    def _follow(self, record: ExecutionRecord) -> None:
        with self._lock:
            self._followed.setdefault(record.agent_id, {}).setdefault(record.execution_id, Followed(record))

    def _unfollow(self, record: ExecutionRecord) -> None:
        with self._lock:
            theirs = self._followed.get(record.agent_id, {})
            theirs.pop(record.execution_id, None)
            if not theirs:
                self._followed.pop(record.agent_id, None)

    def _audit(self, now: float) -> None:
        """What another Flux ended (a cancel that crossed our sending, an agent given up) runs here no more."""
        held = [one for one in self._ledger.all() if one.accepted and one.accepted_at < now - _AUDIT_SECONDS]
        if not held:
            return
        still_open = {entry.execution_id for entry in self._ledger.store.executions_of(self._ledger.session)}
        for execution in held:
            if execution.execution_id not in still_open and self._out_of_hand(execution.execution_id):
                self._calls.cancel_soon(execution, "ended by another Flux")

    def _out_of_hand(self, execution_id: str) -> bool:
        execution = self._ledger.drop(execution_id)
        if execution is not None and execution.reservation is not None:
            self._registry.release(execution.reservation)
        return execution is not None


def merged(ours: ExecutionRecord, theirs: ExecutionRecord) -> ExecutionRecord:
    """An agent's record as callers see it, when we remember no more of it than the store does."""
    waited = max(0, int((theirs.started_at - ours.started_at) * 1000)) if theirs.started_at else 0
    return replace(
        theirs,
        execution_id=ours.execution_id,
        function_name=ours.function_name,
        agent_id=ours.agent_id,
        asynchronous=ours.asynchronous,
        started_at=ours.started_at,
        queue_ms=waited + theirs.queue_ms,
    )
