"""The poller: it alone judges whether an agent is there.

Every round asks every agent how it is, without a thread waiting for any of them.
Answers are collected from the connections' threads and judged on the poller's own,
so that nothing about an agent is decided in two places at once. Three misses in a
row make an agent offline; it comes back by being brought in step again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from fluxlib.clock import steady_time
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.member import STEP_IN, Member, Wanted
from fluxlib.control.agents.pushes import Pusher
from fluxlib.control.agents.reconciler import ExecutionsPart, Joiner
from fluxlib.control.agents.replication import Sharing
from fluxlib.control.agents.roster import Roster
from fluxlib.control.functions.deploy import FunctionService
from fluxlib.errors import FluxError, LeaseLost, StoreUnavailable
from fluxlib.lifecycle import Deadline, Loop
from fluxlib.model import AgentStatus, Function
from fluxlib.rpc.codec import NodeReport

log = logging.getLogger(__name__)

MISSES = 3
# The deadline of one question: younger than this, a question without an answer is not a miss.
_ANSWER_SECONDS = 5.0
_LONGEST_PAUSE = 1.0

Answer = tuple[str, int, NodeReport | FluxError]


class HealthPoller:
    """``start`` runs it; ``tick(now)`` is one step, cheap when there is nothing to do."""

    def __init__(
        self,
        fleet: Fleet,
        roster: Roster,
        joiner: Joiner,
        executions: ExecutionsPart,
        functions: FunctionService,
        pusher: Pusher,
        leadership: Leadership,
        sharing: Sharing,
        *,
        interval: float,
        lost_after: float,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._fleet = fleet
        self._roster = roster
        self._joiner = joiner
        self._executions = executions
        self._functions = functions
        self._pusher = pusher
        self._leadership = leadership
        self._sharing = sharing
        self._interval = interval
        self._lost_after = lost_after
        self._answers: deque[Answer] = deque()
        self._next_round = 0.0
        self._led: int | None = None  # the token of the lease it led under in its last round; None = it followed
        self._behind = False  # what the last leader wrote was not read yet
        self._adopted: frozenset[str] = frozenset()
        self.loop = Loop("health", self.tick, min(interval / 2, _LONGEST_PAUSE), clock)
        leadership.on_change(lambda leads: self.loop.wake())

    def start(self) -> None:
        self.loop.start()

    def stop(self, deadline: Deadline) -> None:
        self.loop.stop(deadline)

    def tick(self, now: float) -> None:
        """Judge the answers that came; begin a round when it is time. ``now`` is epoch seconds."""
        while self._answers:
            self._judge(*self._answers.popleft(), now)
        lease = self._leadership.lease
        # By the token: between two ticks the lease may have been lost, held by another and taken again.
        reign = lease.token if lease is not None else None
        if now >= self._next_round or reign != self._led:
            self._next_round = now + self._interval
            self._round(now, reign)
        else:
            self._take_news(now)
        if reign is not None:
            self._adopt()

    def _take_news(self, now: float) -> None:
        """Between two rounds: who joined or left through another process is asked for at this one, too."""
        try:
            if self._sharing.has_news():
                self._sharing.take_records(now)
        except StoreUnavailable as error:
            log.debug("the agents are not read anew: %s", error)

    # -- a round -------------------------------------------------------------------

    def _round(self, now: float, reign: int | None) -> None:
        leads = reign is not None
        if leads and reign != self._led:
            # What was counted by whoever led before, or by us long ago, says nothing about now.
            for member in self._roster.all():
                member.polled.begin_anew()
            self._behind = True
        self._led = reign
        # One that takes over reads what the last leader wrote at the end, even when nobody else is left.
        shared = not leads or self._behind or bool(self._leadership.others)
        try:
            if shared:
                self._sharing.take_records(now)
                self._behind = False
            if not leads:
                self._sharing.take_figures()
        except StoreUnavailable as error:
            log.warning("the other Flux processes' view of the agents cannot be read: %s", error)
        revision, functions = self._functions.all()
        for member in self._roster.all():
            try:
                self._visit(member, revision, functions, now, leads)
            except Exception:
                # A fault at one agent must not hide the deaths of all others.
                log.exception("looking after agent %s failed", member.agent_id)
        if leads and shared:
            try:
                self._sharing.publish()
            except StoreUnavailable as error:
                log.warning("the agents' figures cannot be shared: %s", error)

    def _visit(self, member: Member, revision: int, functions: Sequence[Function], now: float, leads: bool) -> None:
        state = self._fleet.get(member.agent_id)
        if state is None or state.record.status is AgentStatus.PROVISIONING:
            return
        if state.in_step and state.record.status.present and member.checked_revision != revision:
            # Changed through another process, or saved while a push could not be made.
            if self._pusher.differs(state, functions):
                self._joiner.want(member, Wanted.STEP)
            else:
                member.checked_revision = revision
        if leads:
            self._ask(member, state, now)
            self._look(member, state, now)

    def _ask(self, member: Member, state: Agent, now: float) -> None:
        connection = state.connection
        if connection is None:
            # Nobody has been reached there in this life: the worker's failures are the misses.
            if not member.working and now >= member.retry.at:
                self._joiner.want(member, STEP_IN)
            return
        if member.polled.asked_at:
            if now - member.polled.asked_at < max(self._interval, _ANSWER_SECONDS):
                return
            self._miss(member, state, "it did not answer", now)
        agent_id, question = member.agent_id, member.polled.ask(now)
        connection.report_async(lambda answer: self._answered((agent_id, question, answer)))

    def _answered(self, answer: Answer) -> None:
        """From the connections' threads."""
        self._answers.append(answer)
        self.loop.wake()

    def _look(self, member: Member, state: Agent, now: float) -> None:
        """What only time brings about."""
        self._roster.catch_up(member)
        record = state.record
        if state.connection is None and member.retry.failures >= MISSES and member.stored.status.present:
            # It was online when Flux stopped, and was never reached since.
            self._roster.observe(member, lambda mine: mine)
        overdue = record.status is AgentStatus.OFFLINE and now - record.offline_since >= self._lost_after
        if overdue and not member.given_up and self._leadership.leads:
            log.warning("agent %s has been offline for too long: what it ran is given up", member.agent_id)
            try:
                self._executions.agent_lost(member.agent_id, f"it has been offline for {self._lost_after:.0f} s")
            except FluxError as error:
                log.warning("what agent %s ran could not be given up yet: %s", member.agent_id, error)
            else:
                with member.condition:
                    member.given_up = True
                    member.reconciled = False

    def _adopt(self) -> None:
        """What dead Flux processes left open goes to this one, each of them once."""
        gone = self._leadership.gone
        self._adopted &= gone  # one that was only frozen may die again
        for session in sorted(gone - self._adopted):
            lease = self._leadership.lease
            if lease is None:
                return
            try:
                self._executions.adopt(session, lease)
            except LeaseLost as error:
                self._leadership.lost(error)
                return
            except StoreUnavailable as error:
                log.warning("what the ended Flux %s left open cannot be taken over yet: %s", session, error)
                return
            self._adopted |= {session}

    # -- answers -------------------------------------------------------------------

    def _judge(self, agent_id: str, question: int, answer: NodeReport | FluxError, now: float) -> None:
        member, state = self._roster.get(agent_id), self._fleet.get(agent_id)
        if member is None or state is None:
            return
        asked_at = member.polled.answered(question)
        if asked_at is None or not self._leadership.leads:
            return
        if isinstance(answer, FluxError):
            self._miss(member, state, answer.message, now)
        elif answer.agent_id != agent_id:
            self._miss(member, state, f"another agent, {answer.agent_id}, answers at {state.record.address}", now)
        else:
            self._met(member, state, answer, asked_at, now)

    def _miss(self, member: Member, state: Agent, reason: str, now: float) -> None:
        member.polled.misses += 1
        if member.polled.misses < MISSES or not state.record.status.present:
            if not state.record.status.present:
                self._fleet.update(member.agent_id, problem=f"is offline: {reason}")
            return
        log.warning("agent %s is offline: %s", member.agent_id, reason)
        self._roster.observe(
            member,
            lambda record: replace(
                record, status=AgentStatus.OFFLINE, offline_since=now, last_heartbeat=state.last_heartbeat
            ),
            in_step=False,
            problem=f"is offline: {reason}",
        )
        if state.connection is not None:
            # A vanished host closes nothing, and an original agent must not be pinged: no call may wait for it.
            state.connection.fail_in_flight(f"agent {member.agent_id} is offline: {reason}")

    def _met(self, member: Member, state: Agent, report: NodeReport, asked_at: float, now: float) -> None:
        member.polled.misses = 0
        ours = bool(report.instance_id)
        before = state.figures
        if ours:
            restarted = report.instance_id != state.instance_id
        else:
            # An original has no name for its life. One that began later than it can have begun by its last report has
            # lost its functions. It tells whole seconds: a restart takes longer than that.
            began = asked_at - report.figures.uptime_seconds - 1
            restarted = False
            if before is not None:
                member.polled.counts |= report.figures.uptime_seconds != before.uptime_seconds
                restarted = member.polled.counts and began > state.last_heartbeat - before.uptime_seconds
        self._fleet.report(member.agent_id, report.figures, at=now, instance_id=report.instance_id)
        if restarted and not ours:
            try:
                self._executions.agent_restarted(member.agent_id, began)
            except StoreUnavailable as error:
                log.warning("what agent %s ran before its restart cannot be looked up: %s", member.agent_id, error)
        if ours == state.record.original:
            self._joiner.want(member, STEP_IN | Wanted.RECONNECT)
        elif not state.record.status.present:
            self._joiner.want(member, STEP_IN)
        elif restarted:
            self._fleet.update(member.agent_id, in_step=False, problem="restarted: is being brought in step")
            self._joiner.want(member, STEP_IN)
        elif ours and report.inventory_revision != state.revision:
            self._joiner.want(member, Wanted.STEP)
        elif not member.reconciled:
            # Joined while another process led.
            self._joiner.want(member, STEP_IN)
        elif (member.retry.behind or not state.in_step) and now >= member.retry.at:
            self._joiner.want(member, Wanted.STEP)
