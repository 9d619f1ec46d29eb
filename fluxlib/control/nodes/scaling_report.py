"""What GET /autoscaling says: samples, decisions and their reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxlib.control.nodes.scaler_state import ScalerState
from fluxlib.control.nodes.scaling import Action, Decision, NodeView
from fluxlib.model import rfc3339
from fluxlib.providers import Cloud


def decision_json(decision: Decision, now: float) -> dict[str, Any]:
    found: dict[str, Any] = {"at": rfc3339(now), "action": decision.action.value, "reason": decision.reason}
    if decision.action is Action.LAUNCH:
        found |= {"instance_type": decision.instance_type, "count": decision.count}
    if decision.agents:
        found["agents"] = list(decision.agents)
    if decision.ends:
        found["ends"] = list(decision.ends)
    return found


def fleet_json(cloud: Cloud, state: ScalerState, nodes: Sequence[NodeView], now: float) -> dict[str, Any]:
    config = cloud.scaling
    return {
        "enabled": config.enabled,
        "min_nodes": config.min_nodes,
        "max_nodes": config.max_nodes,
        "desired": state.desired.value,
        "nodes": [
            {
                "agent_id": node.agent_id,
                "instance_type": node.instance_type,
                "condition": node.condition.value,
                "active": node.active,
                "samples": [
                    {"at": rfc3339(one.at), "cpu_percent": round(one.cpu, 1), "memory_percent": round(one.memory, 1)}
                    for one in node.samples
                ],
            }
            for node in nodes
        ],
        "last_decision": state.last or None,
        "decisions": list(reversed(state.decisions)),
        "failures": [{**one, "at": rfc3339(one["at"])} for one in reversed(state.failures)],
        "cooldown_left_sec": round(max(0.0, state.last_change_at + config.cooldown_sec - now), 1),
        "paused_sec": round(max(0.0, state.paused_until - now), 1),
    }
