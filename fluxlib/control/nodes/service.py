"""Nodes as HTTP asks for them: made, removed, ended one by one; and what was left undone is taken up again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fluxlib.clock import steady_time
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.registry import AgentState, Registry
from fluxlib.control.nodes.autoscaler import Autoscaler
from fluxlib.control.nodes.crew import Crew
from fluxlib.control.nodes.notes import NodePhase, notes_of
from fluxlib.control.nodes.provisioner import Making, Spawner
from fluxlib.control.nodes.scaler_state import FleetWish
from fluxlib.control.nodes.scaling import by_size
from fluxlib.control.nodes.terminator import Retirer
from fluxlib.errors import Conflict, FluxError, NotFound, ProviderError, Unavailable
from fluxlib.lifecycle import Deadline
from fluxlib.providers import Cloud

log = logging.getLogger(__name__)

# DELETE /nodes waits no longer than this for what runs.
_BRIEF_DRAIN = 10.0


class NodeService:
    """services.Nodes. ``tick`` about every second takes up what another life, or a failure, has left."""

    def __init__(
        self,
        clouds: Sequence[Cloud],
        registry: Registry,
        spawner: Spawner,
        retirer: Retirer,
        autoscaler: Autoscaler,
        crew: Crew,
        leadership: Leadership,
        *,
        drain_seconds: float,
        interrupt: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._clouds = {cloud.name: cloud for cloud in clouds}
        self._registry = registry
        self._spawner = spawner
        self._retirer = retirer
        self._autoscaler = autoscaler
        self._crew = crew
        self._leadership = leadership
        self._drain_seconds = min(drain_seconds, _BRIEF_DRAIN)
        self._interrupt = interrupt
        self._clock = clock

    # -- services.Nodes ----------------------------------------------------------------

    def initialize(self) -> dict[str, Any]:
        """Every provider's minimum, all at once; returns when each node has joined or failed.

        Raises StoreUnavailable, and Unavailable when another Flux leads.
        """
        self._check_leads()
        makings: list[Making] = []
        faults: list[str] = []
        failed = present = 0
        with self._autoscaler.paused:
            for cloud in self._clouds.values():
                self._autoscaler.wish(cloud.name, FleetWish.KEPT)
                here = len(self._nodes(cloud.name))
                present += here
                missing = max(0, cloud.scaling.min_nodes - here)
                if missing and not cloud.scaling.node_types:
                    failed += missing
                    where = f"providers.{cloud.name}.autoscaling.node_types"
                    faults.append(f"{cloud.name}: no instance type is configured: name one under {where}")
                    continue
                log.info("%s: %d nodes are here, min_nodes is %d", cloud.name, here, cloud.scaling.min_nodes)
                for _ in range(missing):
                    kind = by_size(cloud.scaling.node_types)[0].instance_type
                    makings.append(self._spawner.begin(cloud, kind, "POST /initialize"))
        self._crew.wait(making.agent_id for making in makings)
        good = [making for making in makings if not making.error]
        bad = [making for making in makings if making.error]
        return {
            "nodes": {"spawned": len(good), "failed": failed + len(bad)},
            "present": present,  # before, or on their way already
            "agents": [
                {
                    "agent_id": making.agent_id,
                    "provider": making.cloud.name,
                    "status": "failed" if making.error else "spawned",
                    "message": making.error,
                }
                for making in makings
            ],
            "errors": faults + [f"{making.cloud.name}: {making.agent_id}: {making.error}" for making in bad],
        }

    def remove_all(self) -> dict[str, Any]:
        """Drain briefly, end, forget. Those that could not be ended are named and tried again.

        Raises StoreUnavailable, and Unavailable when another Flux leads.
        """
        self._check_leads()
        with self._autoscaler.paused:
            for name in self._clouds:
                self._autoscaler.wish(name, FleetWish.REMOVED)
            nodes = [state.agent_id for state in self._registry.agents() if state.record.provider]
            for agent_id in nodes:
                self._end(agent_id, "DELETE /nodes", self._drain_seconds)
        self._crew.wait(nodes)
        left = [state for state in self._registry.agents() if state.agent_id in nodes]
        return {
            "status": "removed" if not left else "incomplete",
            "removed": len(nodes) - len(left),
            "errors": [f"{state.agent_id}: {state.problem}" for state in left],
        }

    def terminate(self, agent_id: str) -> None:
        """One node, at once; what it runs fails. Also raises NotFound, Conflict, ProviderError, StoreUnavailable."""
        self._check_leads()
        state = self._registry.get(agent_id)
        if state is None:
            raise NotFound(f"there is no agent {agent_id[:80]}")
        if not state.record.provider:
            raise Conflict(f"agent {agent_id} was registered by hand: Flux has no machine of it to end")
        self._end(agent_id, "it was asked for", 0)
        self._crew.wait([agent_id])
        left = self._registry.get(agent_id)
        if left is not None:
            raise ProviderError(left.problem or f"node {agent_id} has not ended yet: it is tried again")

    def autoscaling(self) -> dict[str, Any]:
        return self._autoscaler.report()

    # -- for the application -----------------------------------------------------------

    def tick(self, now: float) -> None:
        """Take up what is neither done nor under way. ``now`` is epoch seconds."""
        if not self._leadership.leads:
            return
        try:
            self._autoscaler.catch_up()
        except Unavailable as error:
            log.warning("no node is gone on with now: %s", error.message)
            return
        for agent_id in [state.agent_id for state in self._registry.agents() if state.record.provider]:
            if self._crew.busy(agent_id):
                continue
            # Read after that look: what was under way a moment ago may have ended it.
            state = self._registry.get(agent_id)
            try:
                if state is not None:
                    self._take_up(state, now)
            except FluxError as error:
                log.warning("node %s cannot be gone on with: %s", agent_id, error.message)

    def stop(self, deadline: Deadline) -> None:
        """Break off what is under way; it is recorded, and gone on with by the next life."""
        self._crew.stopping.set()
        self._interrupt()
        self._crew.stop(deadline)

    # -- inside ------------------------------------------------------------------------

    def _end(self, agent_id: str, reason: str, drain_seconds: float) -> None:
        try:
            self._retirer.begin(agent_id, reason, drain_seconds)
        except NotFound:
            return  # it went by itself meanwhile
        self._spawner.give_up(agent_id)

    def _take_up(self, state: AgentState, now: float) -> None:
        phase = notes_of(state.record).phase
        if phase is NodePhase.ENDING:
            self._retirer.resume(state.agent_id, now)
        elif phase is not NodePhase.READY:
            cloud = self._clouds.get(state.record.provider)
            if cloud is not None:
                self._spawner.resume(cloud, state.agent_id)
            elif not state.problem:
                text = f"{state.record.provider} is not configured any more: put it back into flux.yaml"
                self._registry.update(state.agent_id, problem=text)

    def _nodes(self, provider: str) -> list[AgentState]:
        """Of one provider, whether joined or on their way."""
        return [
            state
            for state in self._registry.agents()
            if state.record.provider == provider and notes_of(state.record).phase is not NodePhase.ENDING
        ]

    def _check_leads(self) -> None:
        if not self._leadership.leads:
            raise Unavailable(
                "another Flux leads: it alone makes and ends nodes; ask there (GET /health says `leader`)",
                retry_after=5,
            )
        self._autoscaler.catch_up()
