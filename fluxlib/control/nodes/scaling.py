"""When a provider's fleet grows, shrinks or changes a node: a pure decision.

No clock, thread or I/O: the autoscaler hands in what it has seen and carries
out what comes back; the simulation does the same under a virtual clock.

The rules, first match wins:

1. fewer nodes than ``min_nodes``: launch what is missing;
2. a replacement under way goes on, as soon as its next step may be;
3. executions wait for room, more of them than nodes on their way will take:
   launch the smallest type that has what they ask for, at most doubling the fleet;
4. within the cooldown: nothing;
5. every online node was hot (CPU or memory at or over its upper threshold) in every
   sample of a fully covered window: launch the smallest type; at ``max_nodes`` replace
   the least active node of a smaller type by the largest;
6. every online node was cold (both at or under the lower thresholds) likewise, nothing
   waits, and more than ``min_nodes`` are there: end the least loaded idle one.

Beside each of them, nodes that have been away for too long are ended (unless somebody has
stopped their machine), once another one is online: when all are away it may be Flux's own
network that is. It is no rule of the list, for in a large fleet some node is lost at every
look, and nothing else would ever be done.

The work is spread over all agents, so heat and waiting are felt by every provider at
once: what another provider has answered is given time to take effect. Nodes
registered by hand are not in the picture at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from fluxlib.config.control import AutoscalingConfig, NodeType

# Of a type's memory, what its system and the agent itself use: no function gets it.
_SYSTEM_MB = 512


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
    LOST = "lost"  # offline for so long that it is given up
    STOPPED = "stopped"  # lost, with a machine that somebody has stopped: it is left to its owner
    LEAVING = "leaving"  # draining or being ended


@dataclass(frozen=True, slots=True)
class NodeView:
    agent_id: str
    instance_type: str
    condition: NodeCondition
    active: int = 0  # executions running there
    samples: tuple[Sample, ...] = ()  # oldest first; the oldest may lie just before the window
    replaces: str = ""  # the agent this one was launched to replace


@dataclass(frozen=True, slots=True)
class Wait:
    """Executions of one function that wait for room, and what each asks of a node."""

    function_name: str
    count: int
    memory_mb: int = 0
    slots: int = 0  # how many of them one node takes at a time; 0 = not limited


@dataclass(frozen=True, slots=True)
class Replacement:
    """A node that makes room for one of another type (``max_surge: 0``)."""

    agent_id: str
    instance_type: str


@dataclass(frozen=True, slots=True)
class FleetView:
    """One provider's nodes and what presses on them. Times are epoch seconds."""

    nodes: tuple[NodeView, ...] = ()
    waits: tuple[Wait, ...] = ()  # what this provider is to answer
    replacing: tuple[Replacement, ...] = ()
    last_change_at: float = 0.0  # the last growth or shrinkage
    paused_until: float = 0.0  # launches failed: no further one before
    pause_reason: str = ""
    elsewhere: str = ""  # a node on its way at another provider
    elsewhere_at: float = 0.0  # when another provider last changed its fleet


class Action(str, Enum):
    NOTHING = "nothing"
    LAUNCH = "launch"
    DRAIN = "drain"  # and end it when it is idle


@dataclass(frozen=True, slots=True)
class Decision:
    """``reason`` is for people and never empty."""

    action: Action
    reason: str
    instance_type: str = ""  # to launch now, or once ``agents`` have gone
    count: int = 0  # how many to launch
    agents: tuple[str, ...] = ()  # to drain
    ends: tuple[str, ...] = ()  # lost ones, whatever the action: gone but for the cloud's record and bill
    replaces: str = ""  # the node the launched one stands in for


def decide(view: FleetView, config: AutoscalingConfig, now: float) -> Decision:
    """What to do now. ``now`` is epoch seconds; ``config.node_types`` may be in any order, and is not empty."""
    decision = _decide(view, config, now)
    if decision.action is Action.LAUNCH and now < view.paused_until:
        left = view.paused_until - now
        decision = _nothing(f"{decision.reason}, but launching failed ({view.pause_reason}): again in {left:.0f} s")
    if any(node.condition is NodeCondition.ONLINE for node in view.nodes):
        lost = tuple(node.agent_id for node in view.nodes if node.condition is NodeCondition.LOST)
        decision = replace(decision, ends=lost)
    return decision


def by_size(types: Sequence[NodeType]) -> list[NodeType]:
    """Smallest first; equals stay in the order they were written in."""
    return sorted(types, key=lambda kind: (kind.vcpus, kind.memory_gb))


def fits(kind: NodeType, memory_mb: int) -> bool:
    """Whether an empty node of this type has the memory; a type whose size is not told is given the benefit."""
    return not kind.memory_gb or kind.memory_gb * 1024 - _SYSTEM_MB >= memory_mb


def _decide(view: FleetView, config: AutoscalingConfig, now: float) -> Decision:
    types = by_size(config.node_types)
    gone = (NodeCondition.LEAVING, NodeCondition.LOST, NodeCondition.STOPPED)
    here = [node for node in view.nodes if node.condition not in gone]
    coming = [node for node in here if node.condition is NodeCondition.COMING]
    online = [node for node in here if node.condition is NodeCondition.ONLINE]

    demanded = _answer_waiting(view, here, coming, online, types, config)
    missing = config.min_nodes - len(here) - len(view.replacing)
    if missing > 0 and (demanded is None or demanded.count <= missing):
        return _launch(types[0], f"{len(here)} nodes, min_nodes is {config.min_nodes}", missing)
    following = _go_on(view, here, online)
    if following is not None:
        return following
    if demanded is not None:
        return demanded
    left = view.last_change_at + config.cooldown_sec - now
    if left > 0:
        return _nothing(f"cooling down for another {left:.0f} s")
    if not online:
        return _nothing("no node is online" if view.nodes else "no nodes, and nothing waits for one")
    uncovered = [node.agent_id for node in online if not _covers(node, config, now)]
    if uncovered:
        return _nothing(f"the window of {uncovered[0]} is not covered yet")
    if all(_hot(node, config, now) for node in online):
        return _grow(view, here, coming, types, config, now)
    if all(_cold(node, config, now) for node in online) and not view.waits:
        return _shrink(view, online, coming, config, now)
    return _nothing("neither all hot nor all cold")


def _nothing(reason: str) -> Decision:
    return Decision(Action.NOTHING, reason)


def _launch(kind: NodeType, reason: str, count: int = 1, replaces: str = "") -> Decision:
    return Decision(Action.LAUNCH, reason, instance_type=kind.instance_type, count=count, replaces=replaces)


def _room(view: FleetView, config: AutoscalingConfig) -> int:
    """How many more there may be. What is leaving or lost still runs in the cloud, and is paid for."""
    return config.max_nodes - sum(node.condition is not NodeCondition.STOPPED for node in view.nodes)


# -- executions that wait --------------------------------------------------------------


def _answer_waiting(
    view: FleetView,
    here: list[NodeView],
    coming: list[NodeView],
    online: list[NodeView],
    types: list[NodeType],
    config: AutoscalingConfig,
) -> Decision | None:
    waits = [wait for wait in view.waits if any(fits(kind, wait.memory_mb) for kind in types)]
    if not waits:
        return None
    # One node takes several functions at a time, so the needs of different ones are not added up.
    wanted = max(-(-wait.count // wait.slots) if wait.slots else 1 for wait in waits) - len(coming)
    if wanted <= 0:
        return None
    total = sum(wait.count for wait in waits)
    reason = f"{total} execution{'s' if total > 1 else ''} of {waits[0].function_name} wait for room"
    if len(waits) > 1:
        reason = f"{total} executions of {len(waits)} functions wait for room"
    room = _room(view, config)
    if room <= 0:
        return None if online else _nothing(f"{reason}, but max_nodes is {config.max_nodes}")
    kind = next(one for one in types if all(fits(one, wait.memory_mb) for wait in waits))
    return _launch(kind, reason, min(wanted, room, max(1, len(here))))


# -- load ------------------------------------------------------------------------------


def _covers(node: NodeView, config: AutoscalingConfig, now: float) -> bool:
    """Whether the samples reach back over the whole window, to within one poll."""
    oldest = config.evaluation_window_sec - config.poll_interval_sec
    return bool(node.samples) and now - node.samples[0].at >= oldest


def _within(node: NodeView, config: AutoscalingConfig, now: float) -> list[Sample]:
    """The samples of the window; the one just before it when polls are too rare for any."""
    inside = [sample for sample in node.samples if now - sample.at <= config.evaluation_window_sec]
    return inside or list(node.samples[-1:])


def _hot(node: NodeView, config: AutoscalingConfig, now: float) -> bool:
    return all(
        sample.cpu >= config.cpu_upper_threshold or sample.memory >= config.mem_upper_threshold
        for sample in _within(node, config, now)
    )


def _cold(node: NodeView, config: AutoscalingConfig, now: float) -> bool:
    return all(
        sample.cpu <= config.cpu_lower_threshold and sample.memory <= config.mem_lower_threshold
        for sample in _within(node, config, now)
    )


def _answered_elsewhere(view: FleetView, config: AutoscalingConfig, now: float) -> str:
    """Why this load is another provider's to answer; empty when it is ours."""
    if view.elsewhere:
        return f"{view.elsewhere} is on its way at another provider"
    if now - view.elsewhere_at < config.evaluation_window_sec:
        return "another provider has just changed its fleet"
    return ""


def _grow(
    view: FleetView,
    here: list[NodeView],
    coming: list[NodeView],
    types: list[NodeType],
    config: AutoscalingConfig,
    now: float,
) -> Decision:
    reason = f"every online node was hot for {config.evaluation_window_sec} s"
    if coming:
        return _nothing(f"{reason}, and {coming[0].agent_id} is on its way")
    elsewhere = _answered_elsewhere(view, config, now)
    if elsewhere:
        return _nothing(f"{reason}, but {elsewhere}")
    if _room(view, config) > 0:
        return _launch(types[0], reason)
    if len(here) < config.max_nodes:
        return _nothing(f"{reason}, but a node has yet to leave (max_nodes is {config.max_nodes})")
    largest = types[-1]
    rank = {kind.instance_type: index for index, kind in enumerate(types)}
    smaller = [node for node in here if rank.get(node.instance_type, -1) < rank[largest.instance_type]]
    if not smaller:
        return _nothing(f"{reason}, but max_nodes ({config.max_nodes}) of the largest type are here")
    least = min(smaller, key=lambda node: (node.active, rank.get(node.instance_type, -1), node.agent_id))
    if config.max_surge > 0:
        return _launch(largest, f"{reason} at max_nodes: a larger node for {least.agent_id}", replaces=least.agent_id)
    if len(here) < 2:
        return _nothing(f"{reason}, but the only node is not taken away first (max_surge is 0)")
    return Decision(
        Action.DRAIN,
        f"{reason} at max_nodes: {least.agent_id} makes room for {largest.instance_type}",
        instance_type=largest.instance_type,
        agents=(least.agent_id,),
    )


def _go_on(view: FleetView, here: list[NodeView], online: list[NodeView]) -> Decision | None:
    """The next step of a replacement under way, if it may be made now."""
    conditions = {node.agent_id: node.condition for node in view.nodes}
    for one in view.replacing:
        condition = conditions.get(one.agent_id)
        if condition in (None, NodeCondition.STOPPED):
            return Decision(
                Action.LAUNCH,
                f"{one.agent_id} has made room for a larger node",
                instance_type=one.instance_type,
                count=1,
                replaces=one.agent_id,
            )
        if condition is not NodeCondition.LEAVING:
            return Decision(Action.DRAIN, f"it makes room for {one.instance_type}", agents=(one.agent_id,))
    present = {node.agent_id for node in here}
    for node in online:
        if node.replaces in present:
            return Decision(Action.DRAIN, f"{node.agent_id} has taken its place", agents=(node.replaces,))
    return None


def _shrink(
    view: FleetView,
    online: list[NodeView],
    coming: list[NodeView],
    config: AutoscalingConfig,
    now: float,
) -> Decision:
    reason = f"every online node was cold for {config.evaluation_window_sec} s"
    # Counted by those that work: one that is offline may not come back.
    if coming or len(online) <= config.min_nodes:
        return _nothing(f"{reason}, but min_nodes is {config.min_nodes} or a node is on its way")
    elsewhere = _answered_elsewhere(view, config, now)
    if elsewhere:
        return _nothing(f"{reason}, but {elsewhere}")
    idle = [node for node in online if node.active == 0]
    if not idle:
        return _nothing(f"{reason}, but none is idle")
    least = min(idle, key=lambda node: (_load(node), node.agent_id))
    return Decision(Action.DRAIN, reason, agents=(least.agent_id,))


def _load(node: NodeView) -> float:
    """The node's mean of CPU and memory over its samples."""
    return sum(sample.cpu + sample.memory for sample in node.samples) / (2 * len(node.samples))
