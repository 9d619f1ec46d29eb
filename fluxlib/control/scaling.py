"""When a provider's fleet grows, shrinks or changes a node: a pure decision.

No clock, thread or I/O: the autoscaler hands in what it has seen and carries
out what comes back; the simulation does the same under a virtual clock.

The rules, first match wins:

1. fewer nodes than ``min_nodes``: launch (healing knows no cooldown of its own,
   only a pause after a failed launch, which the autoscaler keeps);
2. a replacement under way goes on: its old node is drained as soon as that may be;
3. executions wait for room, and more of them than nodes on their way will take: launch;
4. within the cooldown: nothing;
5. every online node was hot (CPU or memory at or over its upper threshold) in every
   sample of a fully covered window: launch the smallest type; at ``max_nodes`` replace
   the least active node of a smaller type by the largest;
6. every online node was cold (both at or under the lower thresholds) likewise, nothing
   waits, and more than ``min_nodes`` are there: end the least loaded idle one.

Nodes registered by hand are not in the picture at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fluxlib.config.control import AutoscalingConfig, NodeType


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a node; ``at`` is epoch seconds, the rest percent."""

    at: float
    cpu: float
    memory: float


class NodeCondition(str, Enum):
    COMING = "coming"  # launched or being set up
    ONLINE = "online"
    OFFLINE = "offline"
    LEAVING = "leaving"  # draining or being ended


@dataclass(frozen=True, slots=True)
class NodeView:
    agent_id: str
    instance_type: str
    condition: NodeCondition
    active: int = 0  # executions running there
    samples: tuple[Sample, ...] = ()  # oldest first, within the window
    replaces: str = ""  # the agent this one was launched to replace


@dataclass(frozen=True, slots=True)
class FleetView:
    """One provider's nodes and what presses on them."""

    nodes: tuple[NodeView, ...]
    waiting: int = 0  # executions waiting for room that this provider is to answer
    slots_per_node: int = 1  # how many of them one new node is expected to take
    last_change_at: float = 0.0  # epoch seconds of the last growth or shrinkage


class Action(str, Enum):
    NOTHING = "nothing"
    LAUNCH = "launch"
    DRAIN = "drain"  # and end it when it is idle


@dataclass(frozen=True, slots=True)
class Decision:
    """``reason`` is for people and never empty."""

    action: Action
    reason: str
    instance_type: str = ""
    agent_id: str = ""  # the node to drain
    replaces: str = ""  # the node the launched one stands in for


def decide(view: FleetView, config: AutoscalingConfig, now: float) -> Decision:
    """What to do now. ``now`` is epoch seconds; ``config.node_types`` may be in any order."""
    types = sorted(config.node_types, key=lambda kind: (kind.vcpus, kind.memory_gb))
    here = [node for node in view.nodes if node.condition is not NodeCondition.LEAVING]
    coming = [node for node in here if node.condition is NodeCondition.COMING]
    online = [node for node in here if node.condition is NodeCondition.ONLINE]

    if len(here) < config.min_nodes:
        return _launch(types[0], f"{len(here)} nodes, min_nodes is {config.min_nodes}")
    finished = _finish_replacement(here, online)
    if finished is not None:
        return finished
    room_coming = len(coming) * max(1, view.slots_per_node)
    if view.waiting > room_coming:
        if len(here) < config.max_nodes:
            return _launch(types[0], f"{view.waiting} executions wait for room")
        if not online:
            return Decision(Action.NOTHING, f"{view.waiting} executions wait, but max_nodes is {config.max_nodes}")
    left = view.last_change_at + config.cooldown_sec - now
    if left > 0:
        return Decision(Action.NOTHING, f"cooling down for another {left:.0f} s")
    if not online:
        return Decision(Action.NOTHING, "no node is online")
    uncovered = [node.agent_id for node in online if not _covers(node, config, now)]
    if uncovered:
        return Decision(Action.NOTHING, f"the window of {uncovered[0]} is not covered yet")
    if all(_hot(node, config) for node in online):
        return _grow(here, coming, types, config)
    if all(_cold(node, config) for node in online) and not view.waiting:
        return _shrink(here, online, coming, config)
    return Decision(Action.NOTHING, "neither all hot nor all cold")


def _launch(kind: NodeType, reason: str, replaces: str = "") -> Decision:
    return Decision(Action.LAUNCH, reason, instance_type=kind.instance_type, replaces=replaces)


def _covers(node: NodeView, config: AutoscalingConfig, now: float) -> bool:
    """Whether the samples reach back over the whole window, to within one poll."""
    oldest = config.evaluation_window_sec - config.poll_interval_sec
    return bool(node.samples) and now - node.samples[0].at >= oldest


def _hot(node: NodeView, config: AutoscalingConfig) -> bool:
    return all(
        sample.cpu >= config.cpu_upper_threshold or sample.memory >= config.mem_upper_threshold
        for sample in node.samples
    )


def _cold(node: NodeView, config: AutoscalingConfig) -> bool:
    return all(
        sample.cpu <= config.cpu_lower_threshold and sample.memory <= config.mem_lower_threshold
        for sample in node.samples
    )


def _grow(here: list[NodeView], coming: list[NodeView], types: list[NodeType], config: AutoscalingConfig) -> Decision:
    reason = f"every online node was hot for {config.evaluation_window_sec} s"
    if coming:
        return Decision(Action.NOTHING, f"{reason}, and {coming[0].agent_id} is on its way")
    if len(here) < config.max_nodes:
        return _launch(types[0], reason)
    largest = types[-1]
    rank = {kind.instance_type: index for index, kind in enumerate(types)}
    smaller = [node for node in here if rank.get(node.instance_type, -1) < rank[largest.instance_type]]
    if not smaller:
        return Decision(Action.NOTHING, f"{reason}, but max_nodes ({config.max_nodes}) of the largest type are here")
    least = min(smaller, key=lambda node: (node.active, rank.get(node.instance_type, -1), node.agent_id))
    if config.max_surge > 0:
        return _launch(largest, f"{reason} at max_nodes: a larger node for {least.agent_id}", replaces=least.agent_id)
    if len(here) < 2:
        return Decision(Action.NOTHING, f"{reason}, but the only node is not taken away first (max_surge is 0)")
    return Decision(
        Action.DRAIN,
        f"{reason} at max_nodes: {least.agent_id} makes room for {largest.instance_type}",
        instance_type=largest.instance_type,
        agent_id=least.agent_id,
    )


def _finish_replacement(here: list[NodeView], online: list[NodeView]) -> Decision | None:
    """A surge node that is online lets its predecessor go."""
    present = {node.agent_id for node in here}
    for node in online:
        if node.replaces in present:
            return Decision(Action.DRAIN, f"{node.agent_id} has taken its place", agent_id=node.replaces)
    return None


def _shrink(
    here: list[NodeView], online: list[NodeView], coming: list[NodeView], config: AutoscalingConfig
) -> Decision:
    reason = f"every online node was cold for {config.evaluation_window_sec} s"
    if coming or len(here) <= config.min_nodes:
        return Decision(Action.NOTHING, f"{reason}, but min_nodes is {config.min_nodes} or a node is on its way")
    idle = [node for node in online if node.active == 0]
    if not idle:
        return Decision(Action.NOTHING, f"{reason}, but none is idle")
    least = min(idle, key=lambda node: (_load(node), node.agent_id))
    return Decision(Action.DRAIN, reason, agent_id=least.agent_id)


def _load(node: NodeView) -> float:
    """The node's mean of CPU and memory over its samples."""
    return sum(sample.cpu + sample.memory for sample in node.samples) / (2 * len(node.samples))
