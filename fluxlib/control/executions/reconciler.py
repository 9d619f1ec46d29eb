"""What a crash left open, ours or an agent's: who takes it over, and what becomes of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from dataclasses import replace

from fluxlib.control.agents.registry import Registry
from fluxlib.control.executions.agent_calls import AgentCalls
from fluxlib.control.executions.completion import Following
from fluxlib.control.executions.dispatcher import Dispatcher
from fluxlib.control.executions.execution import Execution, merged
from fluxlib.control.executions.tracker import Ledger
from fluxlib.errors import Conflict, NotFound, StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus, Phase
from fluxlib.store.base import ExecutionFilter, Lease

log = logging.getLogger(__name__)

_PAGE = 500
# An execution of ours that the store no longer has open was ended by another Flux; it is looked for this often.
_AUDIT_SECONDS = 5.0


class Recovery:
    """Every method may be called from any thread."""

    def __init__(
        self, ledger: Ledger, registry: Registry, dispatcher: Dispatcher, calls: AgentCalls, *, shared: bool
    ) -> None:
        self._ledger = ledger
        self._registry = registry
        self._dispatcher = dispatcher
        self._calls = calls
        self._shared = shared
        self._following = Following(calls, self._followed_ended)
        self._lock = threading.Lock()
        self._adoptions = 0
        self._taken = 0  # how many of them what the store says is ours was compared with what is in hand for
        self._taking = threading.Lock()
        self._audited_at = float("-inf")
        dispatcher.on_lost = self._following.add

    # -- what former lives left --------------------------------------------------------

    def start(self) -> int:
        """Take over what former lives owned; how many. With a shared store only the leader says who is dead.

        Raises StoreUnavailable.
        """
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
        count = sum(self._adopt(owner, None) for owner in sorted(owners - {session}))
        self._take_over()
        return count

    def adopt(self, dead_session: str, lease: Lease | None) -> int:
        """What a dead Flux owned is ours from now on; how many. The rest of it is done in the background.

        Raises LeaseLost, StoreUnavailable.
        """
        count = self._adopt(dead_session, lease)
        self._calls.soon("taking executions over", self._try_to_take_over)
        return count

    def _adopt(self, dead_session: str, lease: Lease | None) -> int:
        try:
            count = self._ledger.store.adopt_executions(dead_session, self._ledger.session, lease)
        finally:
            # Also when it failed: it may have been written all the same.
            with self._lock:
                self._adoptions += 1
        if count:
            log.info("took over %d executions of a Flux that has ended (%s)", count, dead_session)
        return count

    def _try_to_take_over(self) -> None:
        try:
            self._take_over()
        except StoreUnavailable as error:
            log.warning("what an ended Flux left open is taken over later: %s", error.message)

    def _take_over(self) -> None:
        """Everything the store says is ours and is not in hand. ``tick`` does it too until it has gone through."""
        agents: set[str] = set()
        with self._taking:
            adoptions = self._adoptions
            # Also before the store is read: what has ended since is neither open nor in hand.
            ours = {execution.execution_id for execution in self._ledger.all()}
            for entry in self._ledger.store.executions_of(self._ledger.session):
                record = entry.record
                if record.execution_id in ours or self._ledger.get(record.execution_id) is not None:
                    continue
                if record.agent_id:
                    self._following.add(record)
                    agents.add(record.agent_id)
                else:
                    self._queue_again(record)
            self._taken = adoptions
        for agent_id in agents:
            self._following.ask(agent_id)

    def _queue_again(self, record: ExecutionRecord) -> None:
        if not record.asynchronous:
            text = "the Flux it waited in has ended"
            self._ledger.end(record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.STOPPING))
            return
        # Its request stays in the store until a slot is found.
        execution = Execution(record.function_name, None, record.execution_id, record.started_at)
        execution.created = execution.detached = True
        try:
            # Before it is in hand: a store that is away leaves it to the next try.
            self._dispatcher.slots.need(record.function_name)
        except NotFound:
            self._dispatcher.give_up(execution, NotFound(f"function {record.function_name} was deleted"))
        else:
            self._ledger.hold(execution)
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
                self._following.add(entry.record)
        for execution_id in running or ():
            if execution_id not in open_here:
                self._end_given_up(agent_id, execution_id)
        self._following.ask(agent_id)

    def agent_restarted(self, agent_id: str, began: float) -> None:
        """An original agent's process began then or a second later (epoch seconds): what it was sent before is lost.

        Whichever Flux owns it, as only the leader learns of the restart.
        """
        for entry in self._ledger.store.open_executions(agent_id):
            held = self._ledger.get(entry.execution_id)
            waited = held.waited_ms / 1000 if held is not None else 0.0
            if entry.record.started_at + waited < began:
                self._following.add_lost(entry.record)
        self._following.ask(agent_id)

    def _end_given_up(self, agent_id: str, execution_id: str) -> None:
        entry = self._ledger.entry(execution_id)
        if entry is None:
            log.warning("agent %s runs %s, which this Flux knows nothing of; it is left alone", agent_id, execution_id)
        elif entry.record.status is ExecutionStatus.CANCELLED or entry.record.error_kind is ErrorKind.AGENT_LOST:
            # Others with an end have come to it by themselves, after the agent had listed them.
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
        self._following.forget(agent_id)
        return len(entries)

    def ended_at(self, agent_id: str, record: ExecutionRecord) -> None:
        """What an agent says of its own: none may end what another one was given after it."""
        held = self._ledger.get(record.execution_id)
        if held is not None:
            owner = held.agent_id
        else:
            entry = self._ledger.entry(record.execution_id)
            owner = entry.record.agent_id if entry is not None else ""
        if owner == agent_id:
            self.ended(record)
        else:
            log.warning("agent %s told the end of %s, which is not its own", agent_id, record.execution_id)

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

    # -- what nobody tells -----------------------------------------------------------------

    def tick(self, now: float) -> None:
        """About every second; ``now`` is epoch seconds. Raises StoreUnavailable."""
        for execution in self._ledger.all():
            reservation = execution.reservation
            if execution.accepted and reservation is not None:
                connection = reservation.agent.connection
                if connection is not None and connection.original:
                    self._following.add(execution.merged(execution.record(Phase.RUNNING)))
        self._following.tick()
        if self._taken != self._adoptions:
            self._try_to_take_over()
        self._give_up_departed()
        # Apart, in whichever direction: ``now`` is the wall clock's, and may have been set back.
        if self._shared and abs(now - self._audited_at) >= _AUDIT_SECONDS:
            self._audited_at = now
            self._audit(now)

    def _followed_ended(self, ours: ExecutionRecord, theirs: ExecutionRecord) -> None:
        self.ended(theirs if self._ledger.get(ours.execution_id) is not None else merged(ours, theirs))

    def _give_up_departed(self) -> None:
        """What is at an agent that has left ends, even when whoever took it out of the fleet died at that.

        Left is who is neither in the registry, which may not have been read yet or know of one too late, nor in the
        store: an agent comes into the store first and goes from there first.
        """
        held = [one for one in self._ledger.all() if one.accepted]
        departed = {*self._following.agents(), *(one.agent_id for one in held)}
        departed = {agent_id for agent_id in departed if not self._calls.known(agent_id)}
        if departed:
            departed.difference_update(record.agent_id for record in self._ledger.store.agents())
        for agent_id in departed:
            count = self.agent_lost(agent_id, "it is no longer registered")
            log.warning("agent %s is no longer registered: %d executions there are given up", agent_id, count)
            for execution in held:
                if execution.agent_id == agent_id:
                    # Accepted while the agent left: the store had its end before.
                    self._out_of_hand(execution.execution_id)

    def _audit(self, now: float) -> None:
        """What another Flux ended (a cancel that crossed our sending, an agent given up) runs and waits here no more.

        Nor does what one took over while we were frozen, but at its agent that goes on.
        """
        # Before the store is read: what comes into hand after it is not open there yet.
        known = [one for one in self._ledger.all() if one.accepted] + self._dispatcher.room.all()
        held = [one for one in known if abs(now - one.accepted_at) > _AUDIT_SECONDS]
        if not held:
            return
        still_ours = {entry.execution_id for entry in self._ledger.store.executions_of(self._ledger.session)}
        for execution in held:
            if execution.execution_id in still_ours:
                continue
            if not execution.accepted:
                self._send_away(execution)
                continue
            entry = self._ledger.entry(execution.execution_id)
            taken_over = entry is not None and not entry.record.status.ended
            if self._out_of_hand(execution.execution_id) and not taken_over:
                self._calls.cancel_soon(execution, "ended by another Flux")

    def _send_away(self, execution: Execution) -> None:
        if not self._dispatcher.room.leave(execution):
            return
        if execution.detached:
            self._ledger.drop(execution.execution_id)
        else:
            execution.deliver(Conflict(f"execution {execution.execution_id} is no longer this Flux's"))

    def _out_of_hand(self, execution_id: str) -> bool:
        execution = self._ledger.drop(execution_id)
        if execution is not None and execution.reservation is not None:
            self._registry.release(execution.reservation)
        return execution is not None
