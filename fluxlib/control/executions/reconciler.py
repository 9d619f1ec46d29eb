"""Executions whose end no event will tell: agents are asked, and what they say is recorded.

Those are the executions that an earlier process sent, that were in flight when their connection broke, and all of a
legacy agent. Each agent that has some is asked once for what it still runs, then for the records of what is missing
there. An execution its agent does not know is asked for three times, a tick apart, before it is taken for lost: a
request may still be on its way when its sender has died.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

from fluxlib.control.agents.connection import AgentConnection
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.executions.dispatcher import Dispatcher
from fluxlib.control.executions.execution import Execution, State, Watch, merge_report, split_attempt_id
from fluxlib.control.executions.tracker import ExecutionTracker
from fluxlib.errors import AgentError, AgentRefused, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus, Phase
from fluxlib.pool import Pool
from fluxlib.rpc.status import AnswerTooLarge
from fluxlib.store.base import ExecutionEntry, ExecutionFilter, Lease

log = logging.getLogger(__name__)

_PAGE = 500
_THREADS = 16
_MISSES = 3
# After so many ticks without an end, an agent is asked every so many ticks only: some executions run for days.
_QUIET, _SELDOM = 30, 5
# Memory and store are compared this often, and only about executions that are older than these many seconds.
_AUDIT_SECONDS = 5.0
_AUDIT_AGE = 10.0
_GIVEN_UP = "given up while the agent was away"


class _Poll:
    """When one agent is asked next."""

    __slots__ = ("asking", "executions", "ticks")

    def __init__(self) -> None:
        self.asking = False
        self.ticks = 0  # since something came or went
        self.executions = 0


class Reconciler:
    """Every method may be called from any thread. Only ``start``, ``adopt``, ``reconcile`` and ``agent_lost`` wait."""

    def __init__(self, tracker: ExecutionTracker, fleet: Fleet, dispatcher: Dispatcher, *, shared: bool) -> None:
        self._tracker = tracker
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._shared = shared
        self._started_at = time.time()
        dispatcher.confirm = self.confirm
        self._pool = Pool("reconcile", _THREADS)
        self._lock = threading.Lock()
        self._polls: dict[str, _Poll] = {}
        self._adoptions = 0
        self._taken_over = 0  # how many of them what the store says is ours was compared with what is in flight for
        self._taking = threading.Lock()
        self._audited_at = float("-inf")

    # -- what an earlier process left ------------------------------------------------------

    def start(self) -> int:
        """Take over what earlier processes owned; how many. With a shared store only the leader says who is dead.

        Raises StoreUnavailable.
        """
        if self._shared:
            return 0
        store, session = self._tracker.store, self._tracker.session
        owners: set[str] = set()
        cursor = ""
        while True:
            page = store.executions(ExecutionFilter(status=ExecutionStatus.RUNNING), cursor, _PAGE)
            owners.update(entry.owner for entry in page.entries)
            cursor = page.next_cursor
            if not cursor:
                break
        count = sum(self._adopt(owner, None) for owner in sorted(owners - {session, ""}))
        self._take_over()
        return count

    def adopt(self, dead_session: str, lease: Lease | None) -> int:
        """What a dead Flux owned is ours from now on; how many. The rest of it is done in the background.

        Raises LeaseLost, StoreUnavailable.
        """
        count = self._adopt(dead_session, lease)
        self._pool.submit(self._try_to_take_over)
        return count

    def _adopt(self, dead_session: str, lease: Lease | None) -> int:
        try:
            count = self._tracker.store.adopt_session(dead_session, self._tracker.session, lease)
        finally:
            # Also when it failed: it may have been written all the same.
            with self._lock:
                self._adoptions += 1
        if count:
            log.info("adopted %d orphaned executions of a Flux that has ended (%s)", count, dead_session)
        return count

    def _try_to_take_over(self) -> None:
        try:
            self._take_over()
        except StoreUnavailable as error:
            log.warning("orphaned executions are taken over later: %s", error.message)

    def _take_over(self) -> None:
        """Everything the store says is ours and is not in flight. ``tick`` does it too until it has gone through."""
        agents: set[str] = set()
        with self._taking:
            adoptions = self._adoptions
            # Also before the store is read: what has ended since is neither open nor in flight.
            ours = {execution.execution_id for execution in self._tracker.all()}
            after = 0
            while page := self._tracker.store.executions_of(self._tracker.session, after, _PAGE):
                after = page[-1].sequence
                for entry in page:
                    if entry.execution_id not in ours and self._tracker.get(entry.execution_id) is None:
                        self._take(entry)
                        agents.add(entry.record.agent_id)
            self._taken_over = adoptions
        self._dispatcher.fill_windows()
        for agent_id in agents - {""}:
            self._ask_soon(agent_id, counts=False)

    def _take(self, entry: ExecutionEntry) -> None:
        """One that is ours and was not in flight. Raises StoreUnavailable."""
        execution = Execution.stored(entry)
        if execution.state is State.RUNNING:
            execution.watch = Watch()
            self._tracker.take(execution)
        elif execution.asynchronous:
            self._dispatcher.queue_again(execution)
        else:
            text = "the Flux it waited in has ended"
            self._tracker.write_end(
                entry.record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.STOPPING)
            )

    def confirm(self, executions: Sequence[Execution]) -> list[Execution]:
        """Those of these queued executions that no reachable agent knows; the end of the others is taken or awaited.

        The store says that nobody has had them, and may be older than what it says: restored from a backup, an
        append-only file that lost its tail, a replica that lagged behind when it took over.
        """
        doubtful = {one.attempt_id: one for one in executions if self._shared or one.accepted_at < self._started_at}
        if not doubtful:
            return list(executions)
        agents = [agent.agent_id for agent in self._fleet.agents()]
        known: set[str] = set()
        for agent_id, records in zip(agents, self._pool.map(partial(self._known_at, doubtful), agents), strict=True):
            for attempt_id, record in (records or {}).items():
                execution = doubtful.get(attempt_id)
                # What it refused to start it does not run.
                if execution is not None and attempt_id not in known and not record.error_kind.nothing_started:
                    known.add(attempt_id)
                    self._found_at(execution, agent_id, record)
        return [one for one in executions if one.attempt_id not in known]

    def _known_at(self, doubtful: Collection[str], agent_id: str) -> dict[str, ExecutionRecord]:
        connection = self._fleet.connection(agent_id)
        try:
            return connection.known_records(list(doubtful)) if connection is not None else {}
        except AgentError as error:
            log.warning("agent %s cannot say which queued executions it knows: %s", agent_id, error.message)
            return {}

    def _found_at(self, execution: Execution, agent_id: str, record: ExecutionRecord) -> None:
        """The store says that it is queued, and this agent has it."""
        log.warning("stale record of execution %s: agent %s has had it", execution.execution_id, agent_id)
        if not self._tracker.take(execution):
            return
        execution.agent_id = agent_id
        if record.status.ended:
            self._dispatcher.ended(execution, record)
            return
        execution.state = State.RUNNING
        execution.watch = Watch()
        store, session = self._tracker.store, self._tracker.session
        with suppress(StoreUnavailable):  # the audit finds it
            store.assign_attempt(execution.execution_id, execution.attempt, agent_id, session)

    # -- what membership says of an agent --------------------------------------------------

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None:
        """The agent is (back) here and runs these; None: a legacy agent, which has to be asked for each.

        Only those this Flux owns: another living Flux does the same for its own.
        """
        open_here = {entry.execution_id for entry in self._tracker.store.open_executions(agent_id)}
        for execution in self._at(agent_id):
            if execution.state is State.RUNNING and (running is None or execution.attempt_id not in running):
                self.watch(execution)
        for attempt_id in running or ():
            execution_id, _ = split_attempt_id(attempt_id)
            known = self._tracker.get(execution_id)
            if known is not None and self._dispatcher.backlog.remove(known):
                # An older store said that it is queued, and this agent comes too late to be asked with the others.
                self._found_at(known, agent_id, known.record(Phase.RUNNING))
            elif known is None and execution_id not in open_here:
                self._cancel_given_up(agent_id, attempt_id)
        self._ask_soon(agent_id, counts=False)

    def _at(self, agent_id: str) -> list[Execution]:
        return [one for one in self._tracker.all() if one.agent_id == agent_id and one.state.at_agent]

    def watch(self, execution: Execution) -> None:
        """No event will tell its end."""
        if execution.watch is None:
            execution.watch = Watch()
        poll = self._polls.get(execution.agent_id)
        if poll is not None:
            poll.ticks = 0

    def missing(self, agent_id: str, attempt_id: str) -> None:
        """The agent was attached again and neither runs this nor owes its end."""
        execution = self._tracker.get(split_attempt_id(attempt_id)[0])
        if execution is not None and execution.agent_id == agent_id and execution.state is State.RUNNING:
            self.watch(execution)
            self._ask_soon(agent_id, counts=False)

    def _cancel_given_up(self, agent_id: str, attempt_id: str) -> None:
        execution_id, _ = split_attempt_id(attempt_id)
        entry = self._tracker.entry(execution_id)
        if entry is None:
            log.warning("orphaned execution %s at agent %s: no record of it here, left alone", attempt_id, agent_id)
        elif entry.record.status is ExecutionStatus.CANCELLED or entry.record.error_kind is ErrorKind.AGENT_LOST:
            # Others with an end have come to it by themselves, after the agent had listed them.
            log.warning("agent %s still ran %s, which was given up: cancelling it", agent_id, attempt_id)
            connection = self._fleet.connection(agent_id)
            if connection is not None:
                connection.request_cancel(attempt_id, reason=_GIVEN_UP, on_answer=lambda answer: None)

    def agent_restarted(self, agent_id: str, began: float) -> None:
        """A legacy agent's process began then or a second later (epoch seconds): what it was sent before is lost.

        Whichever Flux owns it, as only the leader learns of the restart. What another Flux owns is watched until it is
        asked for; the audit lets go of what is left.
        """
        for entry in self._tracker.store.open_executions(agent_id):
            execution = self._tracker.get(entry.execution_id)
            waited = execution.waited_ms / 1000 if execution is not None else 0.0
            if entry.record.started_at + waited >= began:
                continue
            if execution is None:
                self._take(entry)
                execution = self._tracker.get(entry.execution_id)
            if execution is not None and execution.state is State.RUNNING:
                self.watch(execution)
                if execution.watch is not None:
                    execution.watch.agent_restarted = True
        self._ask_soon(agent_id, counts=False)

    def agent_lost(self, agent_id: str, reason: str) -> int:
        """Everything open there has failed for good; how many there were."""
        entries = self._tracker.store.open_executions(agent_id)
        now = time.time()
        text = f"agent lost: {reason}"
        for entry in entries:
            final = entry.record.ended(ExecutionStatus.FAILED, at=now, error=text, kind=ErrorKind.AGENT_LOST)
            execution = self._tracker.get(entry.execution_id)
            if execution is not None and execution.state is State.RUNNING and execution.agent_id == agent_id:
                self._tracker.end(execution, final)
                commit = execution.commit
            else:
                commit = self._tracker.write_end(final)
        if entries and commit is not None:
            commit.wait()
        return len(entries)

    def ended(self, agent_id: str, report: ExecutionRecord) -> None:
        """An agent tells the end of an attempt: it may end neither another agent's execution nor a later attempt."""
        execution_id, attempt = split_attempt_id(report.execution_id)
        execution = self._tracker.get(execution_id)
        if execution is None:
            # On a thread of its connection, which must not wait for the store.
            self._pool.submit(self._ended_elsewhere, agent_id, execution_id, attempt, report)
        elif execution.agent_id == agent_id and execution.attempt == attempt:
            self._dispatcher.ended(execution, report)
        else:
            log.warning("stale end of %s from agent %s: ignored", report.execution_id, agent_id)

    def _ended_elsewhere(self, agent_id: str, execution_id: str, attempt: int, report: ExecutionRecord) -> None:
        try:
            entry = self._tracker.entry(execution_id)
        except StoreUnavailable as error:
            log.warning("the end of %s at agent %s is asked for later: %s", execution_id, agent_id, error.message)
            return
        if entry is None or entry.record.status.ended:
            return
        if entry.record.agent_id != agent_id:
            log.warning("stale end of %s from agent %s: ignored", execution_id, agent_id)
            return
        self._tracker.write_end(merge_report(entry.record, report), attempt)

    # -- periodic ---------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """About every second; ``now`` is epoch seconds. Raises StoreUnavailable."""
        self._poll_agents()
        if self._taken_over != self._adoptions:
            self._try_to_take_over()
        self._give_up_departed()
        # Apart, in whichever direction: ``now`` is the wall clock's, and may have been set back.
        if abs(now - self._audited_at) >= _AUDIT_SECONDS:
            self._audited_at = now
            self._audit(now)

    def _unattended(self) -> Mapping[str, list[Execution]]:
        found: dict[str, list[Execution]] = defaultdict(list)
        for execution in self._tracker.all():
            if execution.watch is not None and execution.state is State.RUNNING:
                found[execution.agent_id].append(execution)
        return found

    def _poll_agents(self) -> None:
        unattended = self._unattended()
        with self._lock:
            for agent_id in list(self._polls):
                if agent_id not in unattended and not self._polls[agent_id].asking:
                    del self._polls[agent_id]
        for agent_id, executions in unattended.items():
            poll = self._poll(agent_id)
            if poll.executions != len(executions):
                poll.executions, poll.ticks = len(executions), 0
            poll.ticks += 1
            if poll.ticks <= _QUIET or poll.ticks % _SELDOM == 0:
                self._ask_soon(agent_id, counts=True)

    def _poll(self, agent_id: str) -> _Poll:
        with self._lock:
            return self._polls.setdefault(agent_id, _Poll())

    def _ask_soon(self, agent_id: str, *, counts: bool) -> None:
        """``counts=False``: not knowing an execution is not held against the agent yet."""
        poll = self._poll(agent_id)
        with self._lock:
            if poll.asking:
                return
            poll.asking = True
        if not self._pool.submit(self._ask, agent_id, poll, counts):
            poll.asking = False

    def _ask(self, agent_id: str, poll: _Poll, counts: bool) -> None:
        try:
            executions = [one for one in self._at(agent_id) if one.watch is not None and one.state is State.RUNNING]
            connection = self._fleet.connection(agent_id)
            if connection is None or not executions:
                return
            inventory = connection.inventory()
            running = inventory.open_executions if inventory is not None else None
            for execution in executions:
                try:
                    self._ask_for(execution, connection, running, counts)
                except AgentRefused as error:
                    # One that cannot be told must not hide the others.
                    log.info("agent %s cannot tell of %s: %s", agent_id, execution.execution_id, error.message)
        except AgentError as error:
            log.info("agent %s cannot be asked for its executions: %s", agent_id, error.message)
        except Exception:
            log.exception("the executions of agent %s cannot be reconciled", agent_id)
        finally:
            with self._lock:
                poll.asking = False

    def _ask_for(
        self, execution: Execution, connection: AgentConnection, running: Collection[str] | None, counts: bool
    ) -> None:
        watch = execution.watch
        if watch is None:
            return
        if running is not None and execution.attempt_id in running:
            self._runs(execution, watch, connection)
            return
        # A legacy agent's record may say for an hour after a restart that it runs. Read first: it may end meanwhile.
        idle = running is None and self._idle_since(execution.agent_id, watch.since)
        try:
            report = connection.record(execution.attempt_id, with_output=False)
        except AnswerTooLarge as error:
            watch.misses = 0
            watch.unreadable_since = watch.unreadable_since or time.time()
            if self._idle_since(execution.agent_id, watch.unreadable_since):
                self._lost(execution, f"it has ended, and how is lost: {error.message}")
            return
        if report is None:
            watch.misses += counts
            if watch.misses >= _MISSES:
                self._lost(execution, f"agent lost: {execution.agent_id} knows nothing of it (any more)")
        elif not report.status.ended and (watch.agent_restarted or idle):
            self._lost(execution, f"agent lost: {execution.agent_id} has restarted while it ran")
        elif report.status.ended:
            self._dispatcher.ended(execution, report)
        else:
            self._runs(execution, watch, connection)

    def _runs(self, execution: Execution, watch: Watch, connection: AgentConnection) -> None:
        """It runs there. A synchronous one is cancelled: its caller was told that it is lost."""
        watch.misses = 0
        if not execution.asynchronous and not watch.cancelled:
            watch.cancelled = True
            reason = "cancelled: its caller was told that it is lost"
            connection.request_cancel(execution.attempt_id, reason=reason, on_answer=lambda answer: None)

    def _lost(self, execution: Execution, reason: str) -> None:
        record = execution.record(Phase.RUNNING)
        final = record.ended(ExecutionStatus.FAILED, at=time.time(), error=reason, kind=ErrorKind.AGENT_LOST)
        self._tracker.end(execution, final)

    def _idle_since(self, agent_id: str, moment: float) -> bool:
        """Whether the agent has reported after ``moment`` (epoch seconds) that it runs nothing."""
        agent = self._fleet.get(agent_id)
        figures = agent.figures if agent is not None else None
        return figures is not None and figures.collected_at > moment and figures.active_tasks == 0

    def _give_up_departed(self) -> None:
        """What is at an agent that has left ends, even when whoever took it out of the fleet died at that.

        An agent has left when it is neither in the fleet, which may not have been read yet or know of one too late,
        nor in the store: an agent comes into the store first and goes from there first.
        """
        agents = {one.agent_id for one in self._tracker.all() if one.state is State.RUNNING}
        departed = {agent_id for agent_id in agents if self._fleet.get(agent_id) is None}
        if departed:
            departed.difference_update(record.agent_id for record in self._tracker.store.agents())
        for agent_id in departed:
            reason = "it is no longer registered"
            count = self.agent_lost(agent_id, reason)
            log.warning("agent %s is no longer registered: %d executions there have failed", agent_id, count)
            for execution in self._at(agent_id):
                # Accepted while the agent left: the store had its end before.
                if execution.state is State.RUNNING:
                    self._tracker.let_go(execution)

    def _audit(self, now: float) -> None:
        """Compare what is in flight here with what the store says is ours, in both directions."""
        # Before the store is read: what comes into flight after it is not open there yet.
        known = {execution.execution_id: execution for execution in self._tracker.all()}
        ours = self._tracker.store.open_ids(self._tracker.session)
        for execution_id, execution in known.items():
            settled = execution.state is State.RUNNING or execution in self._dispatcher.backlog
            if settled and execution_id not in ours and abs(now - execution.accepted_at) > _AUDIT_SECONDS:
                self._no_longer_ours(execution)
        for execution_id in ours - known.keys():
            entry = self._tracker.entry(execution_id)
            if entry is None or entry.record.status.ended or self._tracker.get(execution_id) is not None:
                continue
            if abs(now - entry.record.started_at) > _AUDIT_AGE:
                log.warning("orphaned execution %s found in the store: taking it over", execution_id)
                self._take(entry)

    def _no_longer_ours(self, execution: Execution) -> None:
        """Another Flux has ended it (a cancel that crossed our sending, a lost agent), or taken it over."""
        entry = self._tracker.entry(execution.execution_id)
        taken_over = entry is not None and not entry.record.status.ended
        if execution.state is State.QUEUED:
            if self._dispatcher.backlog.remove(execution):
                self._dispatcher.ended_elsewhere(execution)
        elif self._tracker.let_go(execution) and not taken_over:
            connection = self._fleet.connection(execution.agent_id)
            if connection is not None:
                connection.request_cancel(
                    execution.attempt_id, reason="ended by another Flux", on_answer=lambda answer: None
                )

    def close(self, deadline: Deadline) -> None:
        self._pool.stop(deadline)
