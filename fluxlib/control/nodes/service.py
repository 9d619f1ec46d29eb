"""The cloud nodes behind the HTTP API: initialize, remove, terminate; and the reconciliation of unfinished ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fluxlib.clock import steady_time
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.nodes.autoscaler import Autoscaler
from fluxlib.control.nodes.notes import NodePhase, notes_of
from fluxlib.control.nodes.provisioner import NodeCreation, NodeProvisioner
from fluxlib.control.nodes.scaler_state import DesiredFleet
from fluxlib.control.nodes.scaling import by_size
from fluxlib.control.nodes.terminator import NodeTerminator
from fluxlib.errors import Conflict, FluxError, NotFound, ProviderError, Unavailable
from fluxlib.lifecycle import Deadline
from fluxlib.pool import KeyedPool
from fluxlib.providers import Cloud

log = logging.getLogger(__name__)

# DELETE /nodes waits no longer than this for what runs.
_BRIEF_DRAIN = 10.0


class NodeService:
    """services.Nodes. ``tick``, about every second, takes the next step of each node that has one."""

    def __init__(
        self,
        clouds: Sequence[Cloud],
        fleet: Fleet,
        provisioner: NodeProvisioner,
        terminator: NodeTerminator,
        autoscaler: Autoscaler,
        jobs: KeyedPool,
        leadership: Leadership,
        *,
        drain_seconds: float,
        interrupt: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._clouds = {cloud.name: cloud for cloud in clouds}
        self._fleet = fleet
        self._provisioner = provisioner
        self._terminator = terminator
        self._autoscaler = autoscaler
        self._jobs = jobs
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
        creations: list[NodeCreation] = []
        faults: list[str] = []
        failed = present = 0
        with self._autoscaler.paused:
            for cloud in self._clouds.values():
                self._autoscaler.set_desired(cloud.name, DesiredFleet.ACTIVE)
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
                    creations.append(self._provisioner.begin(cloud, kind, "POST /initialize"))
        self._jobs.wait(creation.agent_id for creation in creations)
        good = [creation for creation in creations if not creation.error]
        bad = [creation for creation in creations if creation.error]
        return {
            "nodes": {"spawned": len(good), "failed": failed + len(bad)},
            "present": present,  # before, or on their way already
            "agents": [
                {
                    "agent_id": creation.agent_id,
                    "provider": creation.cloud.name,
                    "status": "failed" if creation.error else "spawned",
                    "message": creation.error,
                }
                for creation in creations
            ],
            "errors": faults + [f"{creation.cloud.name}: {creation.agent_id}: {creation.error}" for creation in bad],
        }

    def remove_all(self) -> dict[str, Any]:
        """Drain briefly, end, forget. Those that could not be ended are named and tried again.

        Raises StoreUnavailable, and Unavailable when another Flux leads.
        """
        self._check_leads()
        with self._autoscaler.paused:
            for name in self._clouds:
                self._autoscaler.set_desired(name, DesiredFleet.REMOVED)
            nodes = [state.agent_id for state in self._fleet.agents() if state.record.provider]
            for agent_id in nodes:
                self._end(agent_id, "DELETE /nodes", self._drain_seconds)
        self._jobs.wait(nodes)
        left = [state for state in self._fleet.agents() if state.agent_id in nodes]
        return {
            "status": "removed" if not left else "incomplete",
            "removed": len(nodes) - len(left),
            "errors": [f"{state.agent_id}: {state.problem}" for state in left],
        }

    def terminate(self, agent_id: str) -> None:
        """One node, at once; what it runs fails. Also raises NotFound, Conflict, ProviderError, StoreUnavailable."""
        self._check_leads()
        state = self._fleet.get(agent_id)
        if state is None:
            raise NotFound(f"there is no agent {agent_id[:80]}")
        if not state.record.provider:
            raise Conflict(f"agent {agent_id} was registered by hand: Flux has no machine of it to end")
        self._end(agent_id, "it was asked for", 0)
        self._jobs.wait([agent_id])
        left = self._fleet.get(agent_id)
        if left is not None:
            raise ProviderError(left.problem or f"node {agent_id} has not ended yet: it is tried again")

    def autoscaling(self) -> dict[str, Any]:
        return self._autoscaler.report()

    # -- for the application -----------------------------------------------------------

    def tick(self, now: float) -> None:
        """Reconcile every node that no job works on. ``now`` is epoch seconds."""
        if not self._leadership.leads:
            return
        try:
            self._autoscaler.catch_up()
        except Unavailable as error:
            log.warning("node reconciliation skipped: %s", error.message)
            return
        for agent_id in [state.agent_id for state in self._fleet.agents() if state.record.provider]:
            if self._jobs.busy(agent_id):
                continue
            # Read after that look: what was under way a moment ago may have ended it.
            state = self._fleet.get(agent_id)
            try:
                if state is not None:
                    self._step(state, now)
            except FluxError as error:
                log.warning("node %s: reconciliation failed: %s", agent_id, error.message)

    def stop(self, deadline: Deadline) -> None:
        """Interrupt the jobs; what they have recorded is continued by the next process."""
        self._jobs.stopping.set()
        self._interrupt()
        self._jobs.stop(deadline)

    # -- inside ------------------------------------------------------------------------

    def _end(self, agent_id: str, reason: str, drain_seconds: float) -> None:
        try:
            self._terminator.begin(agent_id, reason, drain_seconds)
        except NotFound:
            return  # it went by itself meanwhile
        self._provisioner.cancel(agent_id)

    def _step(self, state: Agent, now: float) -> None:
        """The next step of one node, by its phase: see NodePhase."""
        phase = notes_of(state.record).phase
        if phase is NodePhase.ENDING:
            self._terminator.resume(state.agent_id, now)
        elif phase is not NodePhase.READY:
            cloud = self._clouds.get(state.record.provider)
            if cloud is not None:
                self._provisioner.resume(cloud, state.agent_id)
            elif not state.problem:
                text = f"{state.record.provider} is not configured any more: put it back into flux.yaml"
                self._fleet.set_problem(state.agent_id, text)

    def _nodes(self, provider: str) -> list[Agent]:
        """Of one provider, whether joined or on their way."""
        return [
            state
            for state in self._fleet.agents()
            if state.record.provider == provider and notes_of(state.record).phase is not NodePhase.ENDING
        ]

    def _check_leads(self) -> None:
        if not self._leadership.leads:
            raise Unavailable(
                "another Flux leads: it alone makes and ends nodes; ask there (GET /health says `leader`)",
                retry_after=5,
            )
        self._autoscaler.catch_up()
