"""The parts that make, keep and end cloud nodes, put together; built only when a provider is configured."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fluxlib.clock import steady_time
from fluxlib.config.control import ControlConfig
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.membership import Membership
from fluxlib.control.agents.reconciler import shown_id_note
from fluxlib.control.executions.service import ExecutionService
from fluxlib.control.functions.deploy import FunctionService
from fluxlib.control.nodes.autoscaler import Autoscaler
from fluxlib.control.nodes.demand import Demand
from fluxlib.control.nodes.orphans import LOOK_EVERY, OrphanedNodes
from fluxlib.control.nodes.provisioner import NodeProvisioner
from fluxlib.control.nodes.service import NodeService
from fluxlib.control.nodes.setup import CARRIED, NodeSetup
from fluxlib.control.nodes.terminator import NodeTerminator
from fluxlib.lifecycle import Deadline, Loop
from fluxlib.pki import Authority
from fluxlib.pool import KeyedPool
from fluxlib.providers import build_clouds
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

_TICK = 1.0
# A cloud's SDK cannot be interrupted: its answer is not waited for when Flux stops.
_STOP_SECONDS = 2.0


@dataclass(frozen=True)
class NodeParts:
    """``loops`` are the caller's to start and stop; ``stop`` comes before theirs."""

    service: NodeService
    loops: tuple[Loop, ...]
    warnings: Callable[[], list[str]]
    stop: Callable[[Deadline], None]


def build_nodes(
    config: ControlConfig,
    authority: Authority,
    store: ControlStore,
    fleet: Fleet,
    functions: FunctionService,
    executions: ExecutionService,
    membership: Membership,
    leadership: Leadership,
    *,
    carried: Path = CARRIED,
) -> NodeParts:
    """Raises ProviderError when a configured cloud cannot be used, CertificatesUnusable."""
    installation_id = authority.installation_id()
    key = authority.ssh_key(for_ec2=config.providers.aws is not None)
    clouds = build_clouds(config.providers, installation_id)
    jobs = KeyedPool("nodes")
    setup = NodeSetup(config, authority, tls=not config.disable_grpc_tls, private_key=key.private, carried=carried)
    terminator = NodeTerminator(
        clouds,
        membership,
        fleet,
        jobs,
        leadership,
        # Another Flux learns in its next round that a node drains.
        settle=lambda: config.health_interval_sec * 1.5 if leadership.others else 0.0,
        forget=partial(forget_node, store),
    )
    provisioner = NodeProvisioner(
        membership,
        fleet,
        setup,
        terminator,
        jobs,
        leadership,
        ssh_public_key=key.public,
        agent_port=config.agent_port,
        start_seconds=config.node_start_sec,
    )
    demand = Demand(store, leadership, executions.waiting, functions.lookup)
    autoscaler = Autoscaler(
        clouds,
        store,
        fleet,
        provisioner,
        terminator,
        demand,
        leadership,
        drain_seconds=config.drain_timeout_sec,
        lost_after=config.agent_lost_after_sec,
    )
    service = NodeService(
        clouds,
        fleet,
        provisioner,
        terminator,
        autoscaler,
        jobs,
        leadership,
        drain_seconds=config.drain_timeout_sec,
        interrupt=setup.interrupt,
    )
    orphans = OrphanedNodes(
        clouds, store, terminator, leadership, installation_id=installation_id, end_strays=config.end_strays
    )
    looks = Loop("orphaned-nodes", orphans.tick, LOOK_EVERY, steady_time)

    def stop(deadline: Deadline) -> None:
        brief = Deadline(min(_STOP_SECONDS, deadline.remaining()))
        service.stop(brief)
        looks.stop(brief)

    settings = setup.warnings(clouds)
    for warning in settings:
        log.warning("%s", warning)
    return NodeParts(
        service,
        (
            Loop("nodes", service.tick, _TICK, steady_time),
            Loop("autoscaler", autoscaler.tick, _TICK, steady_time),
            looks,
        ),
        lambda: settings + orphans.warnings(),
        stop,
    )


def forget_node(store: ControlStore, agent_id: str) -> None:
    """The note that it has shown its ID. Raises StoreUnavailable."""
    store.delete_note(shown_id_note(agent_id))
