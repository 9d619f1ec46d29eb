"""Who belongs to the fleet: joining, leaving, draining, and nodes that are being made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from fluxlib.clock import steady_time
from fluxlib.control.agents.connection import AgentConnection, Connector
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.member import STEP_IN, Member, Wanted
from fluxlib.control.agents.pushes import Pusher
from fluxlib.control.agents.reconciler import ExecutionsPart, Joiner
from fluxlib.control.agents.roster import DRAINING, Change, Roster, present_status
from fluxlib.control.services import AgentView
from fluxlib.errors import Conflict, FluxError, NotFound, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus
from fluxlib.pki.identity import check_agent_id

log = logging.getLogger(__name__)

# A registration answers when the agent is in step, or after this: large code may take longer.
_REGISTER_SECONDS = 25.0
_CANCEL_SECONDS = 2.0
_CLOSE_SECONDS = 3.0
_CLOSE_AT_A_TIME = 64


class Membership:
    """services.Agents, and what nodes and the autoscaler need of it.

    ``start`` loads the agents of the store and joins them in the background. How agents are afterwards
    is judged by :class:`fluxlib.control.agents.health.HealthPoller` alone.
    """

    def __init__(
        self,
        fleet: Fleet,
        roster: Roster,
        joiner: Joiner,
        connector: Connector,
        executions: ExecutionsPart,
        pusher: Pusher,
        *,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._fleet = fleet
        self._roster = roster
        self._joiner = joiner
        self._connector = connector
        self._executions = executions
        self._pusher = pusher
        self._clock = clock
        self._lock = threading.Lock()  # one registration at a time decides who is new

    def start(self) -> None:
        """Load and join everybody in the store. Raises StoreUnavailable."""
        for member in self._roster.load(self._clock()):
            if member.stored.address and member.stored.status is not AgentStatus.PROVISIONING:
                self._joiner.want(member, STEP_IN)

    def stop(self, deadline: Deadline) -> None:
        """Close every connection; calls in flight are waited for until the deadline."""
        # Workers and calls in flight end at the same agents: those that do not answer take half of the time each.
        self._joiner.stop(Deadline(deadline.remaining() / 2))
        connections = [state.connection for state in self._fleet.agents() if state.connection is not None]
        with ThreadPoolExecutor(_CLOSE_AT_A_TIME, thread_name_prefix="close") as pool:
            for connection in connections:
                pool.submit(connection.close, deadline)

    # -- services.Agents ---------------------------------------------------------------

    def views(self) -> Sequence[AgentView]:
        return [_view(state) for state in self._fleet.agents()]

    def register(self, address: str, *, legacy: bool) -> AgentView:
        """Also raises AgentRefused (an ID that is none), StoreUnavailable (nothing was changed then)."""
        introduction = self._connector.introduce(address, legacy=legacy)
        agent_id = introduction.agent_id
        legacy = introduction.legacy_certificate and self._joiner.tls
        with self._lock:
            member = self._roster.get(agent_id)
            known = self._fleet.get(agent_id)
            if known is not None and known.record.address not in ("", introduction.address):
                raise Conflict(
                    f"agent {agent_id} is registered at {known.record.address}: deregister it first"
                    f" (DELETE /agents/{agent_id}), or give this agent another agent_id"
                )
            self._joiner.check_identity(introduction)
            now = self._clock()
            if member is None:
                record = AgentRecord(
                    agent_id,
                    introduction.address,
                    registered_at=now,
                    last_heartbeat=now,
                    status=AgentStatus.ONLINE,
                    original=introduction.inventory is None,
                    legacy_certificate=legacy,
                )
                member = self._roster.enlist(record, now)
                log.info("agent %s registered at %s", agent_id, introduction.address)
            else:
                self._roster.save(
                    member,
                    lambda record: replace(
                        record,
                        address=introduction.address,
                        registered_at=record.registered_at or now,
                        status=record.status if record.status.present else AgentStatus.OFFLINE,
                        legacy_certificate=legacy,
                    ),
                )
        state = self._state(agent_id)
        anew = state.connection is None or not state.record.status.present
        anew = anew or state.instance_id not in ("", introduction.report.instance_id)
        self._joiner.want(member, STEP_IN | (Wanted.RECONNECT if anew else Wanted.NOTHING))
        self._joiner.wait(member, _REGISTER_SECONDS)
        return _view(state)

    def deregister(self, agent_id: str) -> None:
        member = self._member(agent_id)
        state = self._roster.delete(member)
        log.info("agent %s deregistered", agent_id)
        try:
            self._executions.agent_lost(agent_id, "it was deregistered")
        except StoreUnavailable as error:
            # A second try would not find it here. Recovery gives up what is at an agent that has left.
            log.warning("what agent %s ran is given up once the store is back: %s", agent_id, error.message)
        finally:
            self.let_go(agent_id, state, kill=True)

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
            if self._roster.get(record.agent_id) is not None:
                raise Conflict(f"there is an agent {record.agent_id} already")
            self._roster.enlist(replace(record, status=AgentStatus.PROVISIONING), self._clock(), by_leader=True)

    def node_ready(self, agent_id: str, address: str) -> AgentView:
        """The node's agent should answer at ``address`` now: join it. Raises AgentError with the reason."""
        member = self._member(agent_id)
        introduction = self._connector.introduce(address, expected_id=agent_id)
        self._joiner.check_identity(introduction)
        now = self._clock()
        self._roster.save(
            member,
            lambda record: replace(
                record,
                address=introduction.address,
                registered_at=record.registered_at or now,
                status=AgentStatus.OFFLINE,
                offline_since=now,
            ),
            by_leader=True,
        )
        self._joiner.want(member, STEP_IN | Wanted.RECONNECT)
        self._joiner.wait(member, _REGISTER_SECONDS)
        return _view(self._state(agent_id))

    def save(self, agent_id: str, change: Change) -> None:
        """Change the provider's part of a record, durably, as the leader. Raises NotFound, StoreUnavailable, LeaseLost.

        A job that outlives our reign must not undo what the next leader has made of its node.
        """
        self._roster.save(self._member(agent_id), change, by_leader=True)

    # -- shared with the health poller -------------------------------------------------------

    def let_go(self, agent_id: str, state: Agent | None, *, kill: bool) -> None:
        """End the connection of an agent that left. ``kill``: what runs there is nobody's any more."""
        self._pusher.forget(agent_id)
        connection = state.connection if state is not None else None
        if connection is None:
            return
        connection.fail_in_flight(f"agent {agent_id} was deregistered")
        if kill and state is not None and state.record.status.present:
            _kill_everything(connection)
        connection.close(Deadline(_CLOSE_SECONDS))

    def _change(self, agent_id: str, change: Change) -> AgentView:
        self._roster.save(self._member(agent_id), change)
        return _view(self._state(agent_id))

    def _member(self, agent_id: str) -> Member:
        member = self._roster.get(agent_id)
        if member is None:
            raise NotFound(f"there is no agent {agent_id[:80]}")
        return member

    def _state(self, agent_id: str) -> Agent:
        state = self._fleet.get(agent_id)
        if state is None:
            raise NotFound(f"there is no agent {agent_id[:80]}")
        return state


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
        running = inventory.open_executions if inventory is not None else ()
        for execution_id in running:
            connection.cancel(execution_id, reason="agent deregistered", timeout=0)
        # They die side by side: one time for all of them.
        deadline = Deadline(_CANCEL_SECONDS)
        for execution_id in running:
            if deadline.remaining():
                connection.cancel(execution_id, reason="agent deregistered", timeout=deadline.remaining())
    except FluxError as error:
        log.warning("agent %s may still run something: %s", connection.agent_id, error)


def _view(state: Agent) -> AgentView:
    problem = state.problem
    if not problem and state.record.status.present and not state.reachable:
        problem = "its connection for executions is not up"
    if not problem and state.figures is not None and state.figures.problem:
        problem = f"can run no programs: {state.figures.problem}"
    if not problem and state.lacking:
        name, reason = sorted(state.lacking.items())[0]
        more = f" (and {len(state.lacking) - 1} more)" if len(state.lacking) > 1 else ""
        problem = f"lacks the function {name}{more}: {reason}"
    return AgentView(
        record=replace(state.record, status=state.shown_status, last_heartbeat=state.last_heartbeat),
        active_count=state.expected_active,
        figures=state.figures,
        isolation_notes=state.isolation_notes,
        problem=problem,
        in_step=state.in_step,
        certificate_not_after=state.certificate_not_after,
    )
