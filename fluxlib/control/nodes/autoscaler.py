"""Each provider's fleet follows its load: looked at, decided (scaling.decide), carried out in the background.

Only the leader scales. What it must not forget is in the store before anything is
done, so that another process continues with the same cooldown, samples and replacements.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fluxlib.clock import steady_time
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.nodes.demand import Demand
from fluxlib.control.nodes.notes import NodePhase, notes_of
from fluxlib.control.nodes.provisioner import NodeCreation, NodeProvisioner
from fluxlib.control.nodes.scaler_state import DesiredFleet, ScalerState
from fluxlib.control.nodes.scaling import (
    Action,
    Decision,
    FleetView,
    NodeCondition,
    NodeView,
    Replacement,
    Sample,
    Wait,
    decide,
)
from fluxlib.control.nodes.scaling_report import decision_json, fleet_json
from fluxlib.control.nodes.terminator import NodeTerminator
from fluxlib.errors import FluxError, LeaseLost, StoreUnavailable, Unavailable
from fluxlib.model import AgentStatus
from fluxlib.providers import Cloud
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

# After launches that failed in a row.
_FIRST_PAUSE = 30.0
_LONGEST_PAUSE = 600.0


class _Fleet:
    """One provider's part of the autoscaler."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.state = ScalerState()
        self.due_at = 0.0
        self.joined_at = 0.0  # when its newest node joined
        self.waited: dict[str, int] = {}  # what waited at the last tick


class Autoscaler:
    """``tick`` about every second; each provider is looked at every ``poll_interval_sec``."""

    def __init__(
        self,
        clouds: Sequence[Cloud],
        store: ControlStore,
        agents: Fleet,
        provisioner: NodeProvisioner,
        terminator: NodeTerminator,
        demand: Demand,
        leadership: Leadership,
        *,
        drain_seconds: float,
        lost_after: float,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._store = store
        self._agents = agents
        self._provisioner = provisioner
        self._terminator = terminator
        self._demand = demand
        self._leadership = leadership
        self._drain_seconds = drain_seconds
        self._lost_after = lost_after
        self._clock = clock
        self._lock = threading.RLock()
        self._fleets = {cloud.name: _Fleet(cloud) for cloud in clouds}
        # The tokens of the leases under which it was done: between two ticks another process may have led.
        self._caught_up: int | None = None
        self._loaded: int | None = None
        provisioner.listen(self._made)

    def tick(self, now: float) -> None:
        """``now`` is epoch seconds. A store that is away leaves everything as it is."""
        try:
            if not self._leadership.leads:
                self._loaded = None
                self._demand.publish(now)
                return
            with self._lock:
                self._load()
                due = [fleet for fleet in self._fleets.values() if now >= fleet.due_at]
                waits = self._demand.read() if due else ()
                for fleet in due:
                    fleet.due_at = now + fleet.cloud.scaling.poll_interval_sec
                    self._look(fleet, waits, now)
        except Unavailable as error:
            self._loaded = None  # what was decided and not kept is forgotten
            log.warning("autoscaling skipped: %s", error.message)
        except LeaseLost as error:
            self._leadership.lost(error)

    def catch_up(self) -> None:
        """Raises Unavailable until the nodes are here as the last leader left them, StoreUnavailable."""
        lease = self._leadership.lease
        if lease is None or lease.token == self._caught_up:
            return
        kept = {one.agent_id: one.extra for one in self._store.agents() if one.provider in self._fleets}
        here = {one.agent_id: one.record.extra for one in self._agents.agents() if one.record.provider in self._fleets}
        if kept != here:
            # Without its newest ones the fleet would look too small; one that works would be set up once more.
            raise Unavailable("this Flux has just taken over, and is still reading the nodes", retry_after=2)
        self._caught_up = lease.token

    @property
    def paused(self) -> threading.RLock:
        """Held while a person's order counts and begins nodes: no tick overlaps it."""
        return self._lock

    def set_desired(self, provider: str, desired: DesiredFleet) -> None:
        """What a person asked for, durable when this returns. Raises StoreUnavailable, Unavailable."""
        with self._lock:
            self._load()
            fleet = self._fleets[provider]
            fleet.state.desired = desired
            if desired is DesiredFleet.REMOVED:
                fleet.state.replacing.clear()
            if desired is DesiredFleet.ACTIVE:
                fleet.state.paused_until = 0.0
            try:
                self._save(fleet)
            except FluxError:
                self._loaded = None  # it was refused: the next look must not keep it after all
                raise

    def report(self) -> dict[str, Any]:
        """GET /autoscaling: by provider, with what was seen and why what was decided. Raises StoreUnavailable."""
        leads = self._leadership.leads
        with self._lock:
            if leads:
                self._load()
            answer = {}
            for name, fleet in self._fleets.items():
                state = fleet.state if leads else ScalerState.from_text(self._store.note(_fact(name)))
                answer[name] = fleet_json(fleet.cloud, state, self._nodes(fleet, state, self._clock()), self._clock())
            return {"leader": leads, "providers": answer}

    # -- one look ----------------------------------------------------------------------

    def _look(self, fleet: _Fleet, waits: tuple[Wait, ...], now: float) -> None:
        state, config = fleet.state, fleet.cloud.scaling
        if not config.enabled:
            state.last = {}
            return
        self._sample(fleet, now)
        nodes = self._nodes(fleet, state, now)
        self._forget_replaced(state, {node.replaces for node in nodes})
        if nodes and state.desired is DesiredFleet.UNSET:
            state.desired = DesiredFleet.ACTIVE
        view = self._view(fleet, nodes, waits)
        if state.desired is DesiredFleet.REMOVED:
            decision = Decision(Action.NOTHING, "removed by DELETE /nodes: POST /initialize makes nodes again")
        else:
            minimum = config.min_nodes if state.desired is DesiredFleet.ACTIVE else 0
            decision = decide(view, replace(config, min_nodes=minimum), now)
        self._note(fleet, decision, now)
        self._save(fleet)
        self._carry_out(fleet, decision)

    def _sample(self, fleet: _Fleet, now: float) -> None:
        window = fleet.cloud.scaling.evaluation_window_sec
        online = {
            agent.agent_id: agent
            for agent in self._agents_of(fleet)
            if self._condition(agent, now) is NodeCondition.ONLINE and agent.figures is not None
        }
        samples = fleet.state.samples
        for gone in samples.keys() - online.keys():
            # What it was like before it went away says nothing about now.
            del samples[gone]
        for agent_id, agent in online.items():
            if agent.figures is not None:
                fleet.state.sample(
                    agent_id, Sample(now, agent.figures.cpu_percent, agent.figures.memory_percent), window
                )

    def _agents_of(self, fleet: _Fleet) -> list[Agent]:
        return [agent for agent in self._agents.agents() if agent.record.provider == fleet.cloud.name]

    def _nodes(self, fleet: _Fleet, state: ScalerState, now: float) -> tuple[NodeView, ...]:
        return tuple(
            NodeView(
                agent.agent_id,
                agent.record.instance_type,
                self._condition(agent, now),
                agent.expected_active,
                tuple(state.samples.get(agent.agent_id, ())),
                notes_of(agent.record).replaces,
            )
            for agent in self._agents_of(fleet)
        )

    def _condition(self, agent: Agent, now: float) -> NodeCondition:
        record = agent.record
        phase = notes_of(record).phase
        if phase is NodePhase.ENDING or record.status is AgentStatus.DRAINING:
            return NodeCondition.LEAVING
        if phase is not NodePhase.READY or record.status is AgentStatus.PROVISIONING:
            return NodeCondition.COMING
        if record.status.present:
            return NodeCondition.ONLINE
        lost = record.offline_since and now - record.offline_since >= self._lost_after
        if not lost:
            return NodeCondition.OFFLINE
        return NodeCondition.STOPPED if self._terminator.is_stopped(record) else NodeCondition.LOST

    def _view(self, fleet: _Fleet, nodes: tuple[NodeView, ...], waits: tuple[Wait, ...]) -> FleetView:
        others = [other for other in self._fleets.values() if other is not fleet and other.cloud.scaling.enabled]
        coming = [
            node.agent_id
            for other in others
            for node in self._nodes(other, other.state, self._clock())
            if node.condition is NodeCondition.COMING
        ]
        state = fleet.state
        # A short burst is over before any machine has booted; with no node online nobody works it off.
        online = any(node.condition is NodeCondition.ONLINE for node in nodes)
        lasting = [
            replace(wait, count=min(wait.count, fleet.waited.get(wait.function_name, 0))) if online else wait
            for wait in waits
        ]
        fleet.waited = {wait.function_name: wait.count for wait in waits}
        return FleetView(
            nodes=nodes,
            waits=() if self._answered_by_another(fleet, coming) else tuple(one for one in lasting if one.count),
            replacing=tuple(state.replacing),
            last_change_at=state.last_change_at,
            paused_until=state.paused_until,
            pause_reason=state.pause_reason,
            elsewhere=coming[0] if coming else "",
            elsewhere_at=max((max(one.state.last_change_at, one.joined_at) for one in others), default=0.0),
        )

    def _answered_by_another(self, fleet: _Fleet, coming: list[str]) -> bool:
        """The first provider that may still grow answers what waits; nobody while another's node is on its way."""
        if coming:
            return True
        now = self._clock()
        for other in self._fleets.values():
            if other is fleet:
                return False
            room = len(self._agents_of(other)) < other.cloud.scaling.max_nodes
            willing = other.cloud.scaling.enabled and other.state.desired is not DesiredFleet.REMOVED
            if willing and room and now >= other.state.paused_until:
                return True
        return False

    # -- what follows ------------------------------------------------------------------

    def _note(self, fleet: _Fleet, decision: Decision, now: float) -> None:
        state = fleet.state
        changes = decision.action is not Action.NOTHING or bool(decision.ends)
        if changes or decision.reason != state.last.get("reason"):
            log.info("autoscaling %s: %s: %s", fleet.cloud.name, decision.action.value, decision.reason)
        state.decided(decision_json(decision, now), changes=changes)
        if decision.action is not Action.NOTHING:
            state.last_change_at = now
        if decision.action is Action.LAUNCH:
            state.desired = DesiredFleet.ACTIVE
        if decision.action is Action.DRAIN and decision.instance_type:
            state.replacing += [Replacement(agent_id, decision.instance_type) for agent_id in decision.agents]

    def _forget_replaced(self, state: ScalerState, replaced: set[str]) -> None:
        state.replacing = [one for one in state.replacing if one.agent_id not in replaced]

    def _carry_out(self, fleet: _Fleet, decision: Decision) -> None:
        try:
            if decision.action is Action.LAUNCH:
                for _ in range(decision.count):
                    self._provisioner.begin(fleet.cloud, decision.instance_type, decision.reason, decision.replaces)
                # Only now: one that could not be recorded is tried again, also by the next process.
                self._forget_replaced(fleet.state, {decision.replaces})
            for agent_id in decision.agents:
                self._terminator.begin(agent_id, decision.reason, self._drain_seconds)
            for agent_id in decision.ends:
                self._terminator.terminate_lost(agent_id, f"offline for more than {self._lost_after:.0f} s")
        except StoreUnavailable:
            raise
        except FluxError as error:
            # A node that left meanwhile; what was not done is decided again.
            log.warning("autoscaling %s: %s", fleet.cloud.name, error.message)

    def _made(self, creation: NodeCreation) -> None:
        """On the node's own thread: how its launch went."""
        with self._lock:
            fleet = self._fleets.get(creation.cloud.name)
            if fleet is None:
                return
            state, now = fleet.state, self._clock()
            if not creation.error:
                state.failures_in_a_row, state.paused_until = 0, 0.0
                # From now on it takes part of the load: the other providers look at what is left of it.
                fleet.joined_at = now
                return
            state.failed(now, creation.agent_id, creation.error)
            # Several launched together fail together, and are one failure.
            if now >= state.paused_until:
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**state.failures_in_a_row)
                state.failures_in_a_row = min(state.failures_in_a_row + 1, 10)
                state.paused_until, state.pause_reason = now + pause, creation.error

    # -- the store ---------------------------------------------------------------------

    def _load(self) -> None:
        """Load what a previous process or another leader has left. Raises Unavailable, StoreUnavailable."""
        lease = self._leadership.lease
        if lease is not None and lease.token == self._loaded:
            return
        self.catch_up()
        for name, fleet in self._fleets.items():
            fleet.state = ScalerState.from_text(self._store.note(_fact(name)))
            fleet.state.begin(self._clock(), _LONGEST_PAUSE)
            fleet.due_at = 0.0
        self._loaded = lease.token if lease is not None else None

    def _save(self, fleet: _Fleet) -> None:
        """Raises StoreUnavailable, LeaseLost."""
        lease = self._leadership.lease
        if lease is None:
            raise LeaseLost("this process does not lead any more")
        self._store.set_note(_fact(fleet.cloud.name), fleet.state.to_text(), lease)


def _fact(provider: str) -> str:
    return f"autoscaler/{provider}"
