"""Brings each agent to what is desired of it: connected, its executions compared, its functions synchronized.

Level-triggered: whoever observes something of an agent says so to the fleet, and :meth:`AgentReconciler.reconcile`
compares what is desired with what is observed and takes the steps that are missing. Calling it once too often does
no harm. One job at a time for each agent, on a bounded pool.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from fluxlib.clock import steady_time
from fluxlib.control.agents.agent import Agent, SyncState
from fluxlib.control.agents.connection import ConnectionEvents, Connector, ProbeResult
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.legacy import FIRST_INSTANCE, LegacyAgent
from fluxlib.control.agents.pushes import FunctionPusher
from fluxlib.control.functions.deploy import FunctionService
from fluxlib.errors import AgentRefused, AgentUnreachable, Conflict, FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus, FunctionState, Inventory
from fluxlib.pool import KeyedPool
from fluxlib.store.base import ControlStore, Lease

log = logging.getLogger(__name__)

# A connection that was replaced is closed by itself once its last calls have ended.
_CLOSE_SECONDS = 5.0
ATTACH = "attach"


def shown_id_note(agent_id: str) -> str:
    return f"agent-shown-id/{agent_id}"


def revoked_at(store: ControlStore, agent_id: str) -> int:
    """Certificates of this agent enrolled at or before that time (epoch milliseconds) are refused; 0 = none."""
    return int(store.note(_revoked_note(agent_id)) or 0)


def _revoked_note(agent_id: str) -> str:
    return f"agent-revoked/{agent_id}"


class ExecutionsPart(Protocol):
    """What the agents' side needs of the executions."""

    def events(self, agent_id: str) -> ConnectionEvents: ...

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None: ...

    def agent_restarted(self, agent_id: str, began: float) -> None: ...

    def agent_lost(self, agent_id: str, reason: str) -> object: ...

    def adopt(self, dead_session: str, lease: Lease | None) -> object: ...


class AgentReconciler:
    """``reconcile`` may be called from any thread and returns at once."""

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        connector: Connector,
        executions: ExecutionsPart,
        functions: FunctionService,
        pusher: FunctionPusher,
        leadership: Leadership,
        *,
        tls: bool,
        lost_after: float,
        threads: int = 32,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._connector = connector
        self._executions = executions
        self._functions = functions
        self._pusher = pusher
        self._leadership = leadership
        self._tls = tls
        self._lost_after = lost_after
        self._clock = clock
        self._pool = KeyedPool("agent-reconciler", threads)
        self._attached = threading.Condition()  # notified when an agent's stream is attached or broken

    def reconcile(self, agent: Agent) -> None:
        """Soon; again after the job that runs for this agent now, if there is one."""
        self._pool.submit_after(agent.agent_id, lambda: self._reconcile(agent))

    def due(self, agent: Agent, now: float, *, answered: bool) -> bool:
        """Whether what is observed differs from what is desired, and it is time to act. From memory alone.

        ``answered``: it has just answered a health check.
        """
        if agent.record.status is AgentStatus.PROVISIONING or self._pool.busy(agent.agent_id):
            return False
        if self._overdue(agent, now):
            return True
        follows = self._leadership.term is None
        if agent.connection is None:
            # Nobody has been reached there: failures to connect stand for missed health checks.
            return not follows and now >= agent.retry_at
        if agent.state is SyncState.CONNECTING:
            return now >= agent.retry_at
        if agent.synced and agent.present and self._functions_differ(agent):
            return True
        differs = not agent.synced or agent.behind or not agent.executions_compared
        # A follower asks nobody: that an agent answers is what the leader says.
        return differs and now >= agent.retry_at and (answered or (follows and agent.present))

    def wait(self, agent: Agent, seconds: float) -> bool:
        """Until there is nothing to do for the agent, and executions can be sent; False when that takes longer."""
        deadline = Deadline(seconds)

        def attached() -> bool:
            return agent.reachable or not (agent.synced and agent.record.status.takes_work)

        while True:
            if not self._pool.wait([agent.agent_id], deadline.remaining()):
                return False
            with self._attached:
                if not self._attached.wait_for(attached, deadline.remaining()):
                    return False
            if not self._pool.busy(agent.agent_id) or self._pool.stopping.is_set():
                return True

    def stop(self, deadline: Deadline) -> None:
        """Begin with no further agent. One that takes its time, as a dropped host does, holds up nothing."""
        self._pool.stop(deadline)

    # -- identity ------------------------------------------------------------------

    def check_identity(self, probe: ProbeResult) -> ProbeResult:
        """Note that an agent has shown its ID. Raises Conflict when one that has shown it before does not.

        The note outlives the agent's registration: a stolen certificate without an ID must not do
        for an agent that has one.
        """
        if not self._tls:
            return replace(probe, legacy_certificate=False)
        note = shown_id_note(probe.agent_id)
        shown = self._store.note(note) is not None
        if probe.legacy_certificate and shown:
            raise Conflict(
                f"agent {probe.agent_id} has shown a certificate with its ID before: one without is not"
                f" accepted any more; enrol it again (flux enroll {probe.agent_id})"
            )
        if not probe.legacy_certificate and not shown:
            self._store.set_note(note, "yes")
        return probe

    def revoke_certificates(self, record: AgentRecord) -> None:
        """Refuse at every Flux the certificates the agent has, from its next connection on. Raises StoreUnavailable.

        A certificate without an ID is not the agent's own: it cannot be told from other agents' and stays good.
        """
        if self._tls and not record.legacy_certificate:
            self._store.set_note(_revoked_note(record.agent_id), str(time.time_ns() // 1_000_000))

    # -- one agent's steps -----------------------------------------------------------

    def _reconcile(self, agent: Agent) -> None:
        if agent.removed:
            return
        try:
            if self._overdue(agent, self._clock()):
                self._give_up(agent)
                return
            self._advance(agent)
        except FluxError as error:
            self._failed(agent, error.message)
        except Exception as error:
            log.exception("agent %s could not be synchronized", agent.agent_id)
            self._failed(agent, f"a fault of Flux: {type(error).__name__}: {error}")

    def _failed(self, agent: Agent, problem: str) -> None:
        if agent.problem != problem:
            # Once for each reason: a dead agent is tried again and again.
            log.warning("agent %s could not be synchronized: %s", agent.agent_id, problem)
        self._fleet.failed(agent, problem, self._clock())

    def _advance(self, agent: Agent) -> None:
        """Raises FluxError when the agent cannot take work."""
        connection = agent.connection if agent.state is not SyncState.CONNECTING else None
        inventory = connection.inventory() if connection is not None else None
        if inventory is None or inventory.features != agent.features:
            inventory = self._connect(agent)
        self._fleet.take_inventory(agent, inventory)
        # Not ready before it is present, or it would take work for a moment.
        self._fleet.syncing(agent, self._clock())
        compare = not agent.executions_compared
        if compare:
            # Before it gets work: what is sent to it from now on needs no comparison.
            self._fleet.compared(agent)
            try:
                if inventory.restarted_at:
                    self._executions.agent_restarted(agent.agent_id, inventory.restarted_at)
                self._executions.reconcile(agent.agent_id, inventory.open_executions)
            except Exception:
                self._fleet.must_compare(agent)
                raise
        # What it holds was read before: another Flux saved that before it pushed it, so it is in the store by now.
        self._functions.refresh()
        # The agent is present by now: what is saved after this read is pushed to it by whoever saves it.
        revision, functions = self._functions.all()
        self._pusher.sync(agent, functions, inventory.functions)
        self._fleet.synced(agent, revision, self._clock())
        if compare:
            log.info("agent %s (%s, %s) is synchronized", agent.agent_id, agent.record.address, agent.platform)

    def _taken_to_hold(self) -> Collection[FunctionState]:
        """What a legacy agent holds when it joins: nobody can ask it, so the leader brings it everything; once."""
        if self._leadership.leads:
            return ()
        return [FunctionState(one.spec.name, one.spec_digest, one.code_digest) for one in self._functions.all()[1]]

    def _functions_differ(self, agent: Agent) -> bool:
        """Changed through another process, or saved while a push could not be made."""
        revision, functions = self._functions.all()
        if agent.synced_revision == revision:
            return False
        if agent.behind or self._pusher.differs(agent, functions):
            return True
        self._fleet.in_sync(agent, revision)
        return False

    def _overdue(self, agent: Agent, now: float) -> bool:
        away = agent.record.status is AgentStatus.OFFLINE and not agent.given_up and self._leadership.leads
        return away and now - agent.record.offline_since >= self._lost_after

    def _give_up(self, agent: Agent) -> None:
        log.warning(
            "agent %s has been unreachable for more than %.0f s: its executions have failed",
            agent.agent_id,
            self._lost_after,
        )
        self._executions.agent_lost(agent.agent_id, f"it has been offline for {self._lost_after:.0f} s")
        self._fleet.gave_up(agent)

    # -- connections -------------------------------------------------------------------

    def _connect(self, agent: Agent) -> Inventory:
        record, probe = agent.record, agent.probe
        agent.probe = None
        if probe is None:
            expected = "" if record.legacy_certificate else record.agent_id
            probe = self._connector.probe(record.address, legacy=record.legacy_certificate, expected_id=expected)
            if probe.agent_id != record.agent_id:
                raise AgentRefused(f"another agent, {probe.agent_id}, answers at {record.address}")
            probe = self.check_identity(probe)
        former = agent.connection
        features = probe.inventory.features if probe.inventory is not None else ()
        number = self._fleet.connecting(agent, probe, features, reachable=ATTACH not in features)
        # Before connecting: the first event says which process it is.
        report, inventory = probe.report, probe.inventory
        instance_id = report.instance_id or FIRST_INSTANCE
        self._fleet.report(agent.agent_id, report.figures, at=self._clock(), instance_id=instance_id)
        connection = self._connector.connect(probe, self._events(agent, number))
        if inventory is None:
            connection = legacy = LegacyAgent(connection, report, self._taken_to_hold(), self._clock)
            inventory = legacy.inventory()
        if not self._fleet.connected(agent, connection):
            connection.close(Deadline(0))
            raise AgentUnreachable(f"agent {agent.agent_id} was removed meanwhile")
        if former is not None:
            former.fail_in_flight(f"agent {agent.agent_id} was replaced, upgraded or restarted")
            former.close(Deadline(_CLOSE_SECONDS))
        return inventory

    def _events(self, agent: Agent, number: int) -> ConnectionEvents:
        """Events of a connection that was replaced are ignored."""

        def greeted(instance_id: str) -> None:
            if agent.connection_number != number or agent.instance_id == instance_id:
                return
            # Before it gets work again, which it would until the next health check noticed.
            if self._fleet.greeted(agent, instance_id):
                self.reconcile(agent)

        def attached(yes: bool) -> None:
            if agent.connection_number == number:
                self._fleet.set_reachable(agent, yes)
                with self._attached:
                    self._attached.notify_all()

        def stopping() -> None:
            if agent.connection_number == number:
                self._fleet.set_reachable(agent, False, "is shutting down")

        return replace(self._executions.events(agent.agent_id), greeted=greeted, attached=attached, stopping=stopping)
