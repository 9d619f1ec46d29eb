"""Bringing one agent in: asked who it is, connected to, compared with what it should hold and run.

Workers of a bounded pool do it in the background, one at a time for each agent.
An agent gets work only after it was brought in step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from fluxlib.clock import steady_time
from fluxlib.control.agents.connection import AgentConnection, ConnectionEvents, Connector, Introduction
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.member import STEP_IN, Member, Wanted
from fluxlib.control.agents.pushes import Pusher
from fluxlib.control.agents.roster import Roster, present_status
from fluxlib.control.functions.deploy import FunctionService
from fluxlib.errors import AgentRefused, AgentUnreachable, Conflict, FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, FunctionState, Inventory
from fluxlib.pool import Pool
from fluxlib.store.base import ControlStore, Lease

log = logging.getLogger(__name__)

# A connection that was replaced is closed by itself once its last calls have ended.
_CLOSE_SECONDS = 5.0
ATTACH = "attach"


def shown_id_fact(agent_id: str) -> str:
    return f"agent-shown-id/{agent_id}"


class ExecutionsPart(Protocol):
    """What membership needs of the executions."""

    def events(self, agent_id: str) -> ConnectionEvents: ...

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None: ...

    def agent_restarted(self, agent_id: str, began: float) -> None: ...

    def agent_lost(self, agent_id: str, reason: str) -> object: ...

    def adopt(self, dead_session: str, lease: Lease | None) -> object: ...


class Joiner:
    """The workers. ``want`` may be called from any thread and returns at once."""

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        roster: Roster,
        connector: Connector,
        executions: ExecutionsPart,
        functions: FunctionService,
        pusher: Pusher,
        leadership: Leadership,
        *,
        tls: bool,
        at_a_time: int = 32,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._roster = roster
        self._connector = connector
        self._executions = executions
        self._functions = functions
        self._pusher = pusher
        self._leadership = leadership
        self.tls = tls
        self._clock = clock
        self._pool = Pool("join", at_a_time)

    def want(self, member: Member, wanted: Wanted) -> None:
        """Have it done soon; what is wanted while a worker is at it is done right after."""
        with member.condition:
            if member.removed:
                return
            member.wanted |= wanted
            if member.working:
                return
            member.working = True
        if not self._pool.submit(self._work, member):  # this process ends
            self._idle(member)

    def wait(self, member: Member, seconds: float) -> bool:
        """Until nothing is wanted of the agent any more, and executions can be sent; False when that takes longer."""

        def done() -> bool:
            state = self._fleet.get(member.agent_id)
            attaching = state is not None and state.in_step and not state.reachable and state.record.status.takes_work
            return not member.working and not attaching

        with member.condition:
            return member.condition.wait_for(done, seconds)

    def stop(self, deadline: Deadline) -> None:
        """Begin with no further agent. One that takes its time, as a dropped host does, holds up nothing."""
        for (member,) in self._pool.stop(deadline):
            self._idle(member)

    # -- identity ------------------------------------------------------------------

    def check_identity(self, introduction: Introduction) -> None:
        """Note that an agent has shown its ID. Raises Conflict when one that has shown it before does not.

        The note outlives the agent's registration: a stolen certificate without an ID must not do
        for an agent that has one.
        """
        if not self.tls:
            return
        fact = shown_id_fact(introduction.agent_id)
        shown = self._store.note(fact) is not None
        if introduction.legacy_certificate and shown:
            raise Conflict(
                f"agent {introduction.agent_id} has shown a certificate with its ID before: one without is not"
                f" accepted any more; enrol it again (flux enroll {introduction.agent_id})"
            )
        if not introduction.legacy_certificate and not shown:
            self._store.set_note(fact, "yes")

    # -- one agent's worker ----------------------------------------------------------

    def _work(self, member: Member) -> None:
        while True:
            with member.condition:
                wanted, member.wanted = member.wanted, Wanted.NOTHING
                if member.removed or wanted is Wanted.NOTHING:
                    self._idle(member)
                    return
            try:
                behind = self._bring_in(member, wanted)
            except FluxError as error:
                self._failed(member, wanted, error.message)
            except Exception as error:
                log.exception("bringing in agent %s failed", member.agent_id)
                self._failed(member, wanted, f"a fault of Flux: {type(error).__name__}: {error}")
            else:
                self._done(member, behind)

    def _idle(self, member: Member) -> None:
        with member.condition:
            member.working = False
            member.condition.notify_all()

    def _done(self, member: Member, behind: bool) -> None:
        with member.condition:
            if behind:
                member.retry.failed(self._clock())
            else:
                member.retry.succeeded()

    def _failed(self, member: Member, wanted: Wanted, problem: str) -> None:
        with member.condition:
            if Wanted.RECONCILE in wanted:
                member.reconciled = False
            member.retry.failed(self._clock())
        state = self._fleet.get(member.agent_id)
        if state is not None and state.problem != problem:
            # Once for each reason: a dead agent is tried again and again.
            log.warning("agent %s could not be brought in: %s", member.agent_id, problem)
            self._fleet.update(member.agent_id, problem=problem)

    def _bring_in(self, member: Member, wanted: Wanted) -> bool:
        """Whether something could not be brought to it. Raises FluxError when it cannot take work at all."""
        state = self._fleet.get(member.agent_id)
        if state is None:
            return False
        connection = None if Wanted.RECONNECT in wanted else state.connection
        inventory = connection.inventory() if connection is not None else None
        if connection is not None and self._is_another(member, state, inventory):
            connection = None
        fresh = connection is None or Wanted.RECONCILE in wanted or not member.reconciled
        if connection is None:
            connection, inventory = self._connect(member, state)
        if inventory is not None:
            self._take_inventory(member, inventory)
        if state.record.status.present:
            self._roster.observe(member, lambda record: record)
        else:
            # Not in step before it is present, or it would take work for a moment.
            self._fleet.update(member.agent_id, in_step=False, problem="is being brought in step")
            self._roster.observe(member, self._present)
        if fresh:
            # Before it gets work: what is sent to it from now on is nobody's to wonder about.
            self._executions.reconcile(member.agent_id, None if inventory is None else inventory.open_executions)
            with member.condition:
                member.reconciled, member.given_up = True, False
        behind = self._step(member, state, self._held(state, inventory, fresh))
        self._fleet.update(member.agent_id, in_step=True, problem="")
        if fresh:
            log.info("agent %s (%s, %s) is in step", member.agent_id, state.record.address, state.platform)
        return behind

    def _present(self, record: AgentRecord) -> AgentRecord:
        return replace(record, status=present_status(record), offline_since=0.0, last_heartbeat=self._clock())

    def _step(self, member: Member, state: Agent, held: Collection[FunctionState] | None) -> bool:
        # What it holds was read before: another Flux saved that before it pushed it, so it is in the store by now.
        self._functions.refresh()
        # The agent is present by now: what is saved after this read is pushed to it by whoever saves it.
        revision, functions = self._functions.all()
        failed = self._pusher.bring_in_step(state, functions, held)
        with member.condition:
            member.checked_revision = revision
        return failed > 0

    def _held(self, state: Agent, inventory: Inventory | None, fresh: bool) -> Collection[FunctionState] | None:
        """What it holds, as far as is known. None = unknown: it gets everything."""
        if inventory is not None:
            return inventory.functions
        if not self._leadership.leads:
            # The leader brings it everything when it joins; once is enough.
            return [FunctionState(one.spec.name, one.spec_digest, one.code_digest) for one in self._functions.all()[1]]
        return None if fresh else tuple(state.holds.values())

    # -- connections -------------------------------------------------------------------

    def _is_another(self, member: Member, state: Agent, inventory: Inventory | None) -> bool:
        """Whether what answers now is not what the connection was made for: upgraded or replaced."""
        if inventory is None:
            return not state.record.original
        return state.record.original or inventory.features != member.features

    def _connect(self, member: Member, state: Agent) -> tuple[AgentConnection, Inventory | None]:
        record = state.record
        expected = "" if record.legacy_certificate else record.agent_id
        introduction = self._connector.introduce(record.address, legacy=record.legacy_certificate, expected_id=expected)
        if introduction.agent_id != record.agent_id:
            raise AgentRefused(f"another agent, {introduction.agent_id}, answers at {record.address}")
        self.check_identity(introduction)
        inventory = introduction.inventory
        former = state.connection
        with member.condition:
            member.life += 1
            life = member.life
            member.reconciled = False
            member.features = inventory.features if inventory is not None else ()
        # Before connecting, whose events may overtake its return.
        legacy = introduction.legacy_certificate and self.tls
        self._roster.note(
            member,
            lambda record: replace(record, original=inventory is None, legacy_certificate=legacy),
            in_step=False,
            reachable=ATTACH not in member.features,
        )
        report = introduction.report
        self._fleet.report(member.agent_id, report.figures, at=self._clock(), instance_id=report.instance_id)
        connection = self._connector.connect(introduction, self._events(member, life))
        with member.condition:
            if member.removed:
                connection.close(Deadline(0))
                raise AgentUnreachable(f"agent {member.agent_id} was removed meanwhile")
            self._fleet.update(member.agent_id, connection=connection)
        if former is not None:
            former.fail_in_flight(f"agent {member.agent_id} was replaced, upgraded or restarted")
            former.close(Deadline(_CLOSE_SECONDS))
        return connection, inventory

    def _events(self, member: Member, life: int) -> ConnectionEvents:
        events = self._executions.events(member.agent_id)

        def greeted(instance_id: str) -> None:
            state = self._fleet.get(member.agent_id)
            if member.life != life or state is None or state.instance_id == instance_id:
                return
            if not state.record.status.present:
                # Whether it is back is the leader's to say.
                self._fleet.update(member.agent_id, instance_id=instance_id)
                return
            # Before it gets work again, which it would until the next round noticed.
            problem = "restarted: is being brought in step"
            self._fleet.update(member.agent_id, instance_id=instance_id, in_step=False, problem=problem)
            self.want(member, STEP_IN)

        def attached(yes: bool) -> None:
            if member.life == life:
                self._fleet.update(member.agent_id, reachable=yes)
                events.attached(yes)
                with member.condition:
                    member.condition.notify_all()

        def stopping() -> None:
            if member.life == life:
                self._fleet.update(member.agent_id, reachable=False, problem="is shutting down")
                events.stopping()

        return replace(events, greeted=greeted, attached=attached, stopping=stopping)

    def _take_inventory(self, member: Member, inventory: Inventory) -> None:
        self._roster.note(
            member,
            lambda record: replace(
                record,
                platform=inventory.platform,
                version=inventory.version,
                isolation=inventory.isolation,
                enforces=inventory.enforces,
                max_tasks=inventory.max_tasks,
            ),
            revision=inventory.revision,
            isolation_notes=inventory.isolation_notes,
            certificate_not_after=inventory.certificate_not_after,
        )
