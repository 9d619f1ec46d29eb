"""Who belongs to the fleet: joining, leaving, draining, and nodes that are being made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from fluxlib.clock import steady_time
from fluxlib.control.agents.agent import Agent
from fluxlib.control.agents.connection import AgentConnection, Connector, ProbeResult
from fluxlib.control.agents.fleet import DRAINING, Change, Fleet, present_status
from fluxlib.control.agents.reconciler import AgentReconciler, ExecutionsPart
from fluxlib.control.services import AgentView
from fluxlib.errors import AgentError, Conflict, FluxError, NotFound, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus
from fluxlib.pki.identity import check_agent_id

log = logging.getLogger(__name__)

# A registration answers when the agent is synchronized, or after this: large code may take longer.
_REGISTER_SECONDS = 25.0
_CANCEL_SECONDS = 2.0
_CLOSE_SECONDS = 3.0
_CLOSE_AT_A_TIME = 64


class Membership:
    """services.Agents, and what nodes and the autoscaler need of it.

    ``start`` loads the agents of the store and connects to them in the background.
    """

    def __init__(
        self,
        fleet: Fleet,
        reconciler: AgentReconciler,
        connector: Connector,
        executions: ExecutionsPart,
        *,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._fleet = fleet
        self._reconciler = reconciler
        self._connector = connector
        self._executions = executions
        self._clock = clock
        self._lock = threading.Lock()  # one registration at a time decides who is new

    def start(self) -> None:
        """Load everybody in the store and connect. Raises StoreUnavailable."""
        for agent in self._fleet.load(self._clock()):
            if agent.stored.address and agent.stored.status is not AgentStatus.PROVISIONING:
                self._reconciler.reconcile(agent)

    def stop(self, deadline: Deadline) -> None:
        """Close every connection; calls in flight are waited for until the deadline."""
        # Workers and calls in flight end at the same agents: those that do not answer take half of the time each.
        self._reconciler.stop(Deadline(deadline.remaining() / 2))
        connections = [agent.connection for agent in self._fleet.agents() if agent.connection is not None]
        with ThreadPoolExecutor(_CLOSE_AT_A_TIME, thread_name_prefix="close") as pool:
            for connection in connections:
                pool.submit(connection.close, deadline)

    # -- services.Agents ---------------------------------------------------------------

    def views(self) -> Sequence[AgentView]:
        return [_view(agent) for agent in self._fleet.agents()]

    def register(self, address: str, *, legacy: bool) -> AgentView:
        """Also raises AgentRefused (an ID that is none), StoreUnavailable (nothing was changed then)."""
        probe = self._connector.probe(address, legacy=legacy)
        agent_id = probe.agent_id
        moved = self._moved(probe)
        with self._lock:
            probe = self._reconciler.check_identity(probe)
            now = self._clock()
            agent, recertified = self._fleet.get(agent_id), False
            if agent is None:
                record = AgentRecord(
                    agent_id,
                    probe.address,
                    registered_at=now,
                    last_heartbeat=now,
                    status=AgentStatus.ONLINE,
                    original=probe.inventory is None,
                    legacy_certificate=probe.legacy_certificate,
                )
                agent = self._fleet.enlist(record, now)
                log.info("agent %s registered at %s", agent_id, probe.address)
            else:
                recertified = agent.record.legacy_certificate != probe.legacy_certificate
                self._fleet.save(
                    agent,
                    lambda record: replace(
                        record,
                        address=probe.address,
                        registered_at=record.registered_at or now,
                        status=record.status if record.status.present else AgentStatus.OFFLINE,
                        legacy_certificate=probe.legacy_certificate,
                    ),
                )
        if moved:
            log.info("agent %s has moved to %s", agent_id, probe.address)
        anew = moved or recertified or agent.connection is None or not agent.present
        anew = anew or (probe.inventory is not None and agent.instance_id != probe.report.instance_id)
        if anew:
            self._fleet.must_connect(agent, probe)
        else:
            self._fleet.must_compare(agent)
        return self._reconciled(agent)

    def _moved(self, probe: ProbeResult) -> bool:
        """Whether a known agent answers at another address now. Raises Conflict while it answers at the former, too."""
        agent = self._fleet.get(probe.agent_id)
        if agent is None or agent.record.address in ("", probe.address):
            return False
        legacy = agent.record.legacy_certificate
        try:
            expected = "" if legacy else agent.agent_id
            former = self._connector.probe(agent.record.address, legacy=legacy, expected_id=expected)
        except AgentError:
            return True
        if former.agent_id != agent.agent_id:
            return True
        raise Conflict(
            f"agent {agent.agent_id} is registered at {agent.record.address} and answers there: deregister it first"
            f" (DELETE /agents/{agent.agent_id}), or give this agent another agent_id"
        )

    def deregister(self, agent_id: str) -> None:
        # First: an agent that is gone while its certificate is still taken could not be deregistered again.
        self._reconciler.revoke_certificates(self._agent(agent_id).record)
        self.remove(agent_id)

    def remove(self, agent_id: str) -> None:
        """As :meth:`deregister`, for a node whose machine ends with its key: nothing is revoked."""
        agent = self._agent(agent_id)
        self._fleet.delete(agent)
        log.info("agent %s deregistered", agent_id)
        try:
            self._executions.agent_lost(agent_id, "it was deregistered")
        except StoreUnavailable as error:
            # A second try would not find it here. Recovery gives up what is at an agent that has left.
            log.warning("what agent %s ran is given up once the store is back: %s", agent_id, error.message)
        finally:
            self.let_go(agent, kill=True)

    def drain(self, agent_id: str) -> AgentView:
        return self._change(agent_id, _draining(True))

    def undrain(self, agent_id: str) -> AgentView:
        """Takes work again; no change when it was not draining. Raises NotFound, Conflict."""
        return self._change(agent_id, _draining(False))

    # -- for nodes and the autoscaler ------------------------------------------------------

    def adopt_node(self, record: AgentRecord) -> None:
        """A node that is being made (status provisioning): durable when this returns. Raises Conflict, LeaseLost."""
        check_agent_id(record.agent_id)
        with self._lock:
            if self._fleet.get(record.agent_id) is not None:
                raise Conflict(f"there is an agent {record.agent_id} already")
            self._fleet.enlist(replace(record, status=AgentStatus.PROVISIONING), self._clock(), by_leader=True)

    def node_ready(self, agent_id: str, address: str) -> AgentView:
        """The node's agent should answer at ``address`` now: join it. Raises AgentError with the reason."""
        agent = self._agent(agent_id)
        probe = self._connector.probe(address, expected_id=agent_id)
        probe = self._reconciler.check_identity(probe)
        now = self._clock()
        self._fleet.save(
            agent,
            lambda record: replace(
                record,
                address=probe.address,
                registered_at=record.registered_at or now,
                status=AgentStatus.OFFLINE,
                offline_since=now,
            ),
            by_leader=True,
        )
        self._fleet.must_connect(agent, probe)
        return self._reconciled(agent)

    def save(self, agent_id: str, change: Change) -> None:
        """Change the provider's part of a record, durably, as the leader. Raises NotFound, StoreUnavailable, LeaseLost.

        A job that outlives our term must not undo what the next leader has made of its node.
        """
        self._fleet.save(self._agent(agent_id), change, by_leader=True)

    # -- shared with the replication ---------------------------------------------------------

    def let_go(self, agent: Agent, *, kill: bool) -> None:
        """End the connection of an agent that left. ``kill``: what runs there is nobody's any more."""
        connection = agent.connection
        if connection is None:
            return
        connection.fail_in_flight(f"agent {agent.agent_id} was deregistered")
        if kill and agent.present:
            _kill_everything(connection)
        connection.close(Deadline(_CLOSE_SECONDS))

    def _reconciled(self, agent: Agent) -> AgentView:
        self._reconciler.reconcile(agent)
        self._reconciler.wait(agent, _REGISTER_SECONDS)
        with suppress(StoreUnavailable):  # the replication tries again
            self._fleet.write_changes()
        return _view(self._agent(agent.agent_id))

    def _change(self, agent_id: str, change: Change) -> AgentView:
        agent = self._agent(agent_id)
        self._fleet.save(agent, change)
        return _view(agent)

    def _agent(self, agent_id: str) -> Agent:
        agent = self._fleet.get(agent_id)
        if agent is None:
            raise NotFound(f"there is no agent {agent_id[:80]}")
        return agent


def _draining(yes: bool) -> Change:
    def change(record: AgentRecord) -> AgentRecord:
        if record.status is AgentStatus.PROVISIONING:
            raise Conflict(f"node {record.agent_id} is still being set up: it has no agent to drain yet")
        extra = {key: value for key, value in record.extra.items() if key != DRAINING}
        record = replace(record, extra={**extra, DRAINING: True} if yes else extra)
        return replace(record, status=present_status(record)) if record.status.present else record

    return change


def _kill_everything(connection: AgentConnection) -> None:
    """Best effort: an agent that cannot be asked is told to when it comes back."""
    try:
        inventory = connection.inventory()
        running = (inventory.open_executions if inventory is not None else None) or ()
        for execution_id in running:
            connection.cancel(execution_id, reason="agent deregistered", timeout=0)
        # They die side by side: one time for all of them.
        deadline = Deadline(_CANCEL_SECONDS)
        for execution_id in running:
            if deadline.remaining():
                connection.cancel(execution_id, reason="agent deregistered", timeout=deadline.remaining())
    except FluxError as error:
        log.warning("agent %s may still run something: %s", connection.agent_id, error)


def _view(agent: Agent) -> AgentView:
    problem = agent.problem
    if not problem and agent.record.status.present and not agent.reachable:
        problem = "execution stream not connected"
    if not problem and agent.figures is not None and agent.figures.problem:
        problem = f"can run no programs: {agent.figures.problem}"
    if not problem and agent.missing_functions:
        name, reason = sorted(agent.missing_functions.items())[0]
        more = f" (and {len(agent.missing_functions) - 1} more)" if len(agent.missing_functions) > 1 else ""
        problem = f"lacks the function {name}{more}: {reason}"
    return AgentView(
        record=replace(agent.record, status=agent.shown_status, last_heartbeat=agent.last_heartbeat),
        active_count=agent.expected_active,
        figures=agent.figures,
        isolation_notes=agent.isolation_notes,
        problem=problem,
        in_step=agent.synced,
        certificate_not_after=agent.certificate_not_after,
    )
