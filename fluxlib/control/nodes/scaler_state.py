"""The autoscaler's state that survives a restart: cooldown, samples, replacements, pauses.

One small JSON document in the store for each provider, written under the leader's lease.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from fluxlib.control.nodes.scaling import Replacement, Sample

_DECISIONS = 50
_FAILURES = 20


class DesiredFleet(str, Enum):
    """What people have asked of a provider's fleet."""

    UNSET = "unset"  # nobody has asked for nodes yet: only waiting executions make some
    ACTIVE = "active"  # initialized: min_nodes are kept
    REMOVED = "removed"  # DELETE /nodes: nothing is made until the next POST /initialize

    @classmethod
    def _missing_(cls, value: object) -> DesiredFleet:
        """What version 0.1 called it, and what a newer one may: as long as that is unknown nothing is kept."""
        return cls.ACTIVE if value == "kept" else cls.UNSET


# As version 0.1 reads it, for as long as one may share the store.
_FORMER_WORDS = {DesiredFleet.UNSET: "none", DesiredFleet.ACTIVE: "kept", DesiredFleet.REMOVED: "removed"}


@dataclass
class ScalerState:
    """One provider's. Times are epoch seconds."""

    desired: DesiredFleet = DesiredFleet.UNSET
    last_change_at: float = 0.0
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    replacing: list[Replacement] = field(default_factory=list)
    paused_until: float = 0.0
    pause_reason: str = ""
    failures_in_a_row: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)  # newest last
    decisions: list[dict[str, Any]] = field(default_factory=list)  # newest last; those that changed something
    last: dict[str, Any] = field(default_factory=dict)  # the newest decision, whatever it was

    def sample(self, agent_id: str, sample: Sample, window: float) -> tuple[Sample, ...]:
        """Keep one more; the window's, and the last one before it."""
        # Those from the future are another process's, whose clock is ahead: they would stay until it has come.
        kept = self.samples[agent_id] = [one for one in self.samples.get(agent_id, ()) if one.at <= sample.at]
        kept.append(sample)
        while len(kept) > 1 and kept[1].at <= sample.at - window:
            del kept[0]
        return tuple(kept)

    def begin(self, now: float, longest_pause: float) -> None:
        """At the start of a process: times written by one whose clock was ahead must not hold this one up."""
        self.last_change_at = min(self.last_change_at, now)
        self.paused_until = min(self.paused_until, now + longest_pause)

    def failed(self, now: float, agent_id: str, error: str) -> None:
        self.failures = [*self.failures, {"at": now, "agent_id": agent_id, "error": error}][-_FAILURES:]

    def decided(self, decision: dict[str, Any], *, changes: bool) -> None:
        self.last = decision
        if changes:
            self.decisions = [*self.decisions, decision][-_DECISIONS:]

    def to_text(self) -> str:
        """Named fields; what is positional, and `wish`, is for version 0.1, which reads nothing without them."""
        data = {
            "desired": self.desired.value,
            "last_change_at": self.last_change_at,
            "measured": {
                agent_id: [
                    {"at": round(one.at, 1), "cpu": round(one.cpu, 1), "memory": round(one.memory, 1)}
                    for one in samples
                ]
                for agent_id, samples in self.samples.items()
            },
            "replacements": [{"agent_id": one.agent_id, "instance_type": one.instance_type} for one in self.replacing],
            "paused_until": self.paused_until,
            "pause_reason": self.pause_reason,
            "failures_in_a_row": self.failures_in_a_row,
            "failures": self.failures,
            "decisions": self.decisions,
            "last": self.last,
            "wish": _FORMER_WORDS[self.desired],
            "samples": {},
            "replacing": [],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str | None) -> Self:
        """What ``to_text`` wrote, in this version or another: unknown fields are ignored, missing ones defaulted."""
        data: dict[str, Any] = json.loads(text) if text else {}
        samples = {
            agent_id: [Sample(one["at"], one["cpu"], one["memory"]) for one in found]
            for agent_id, found in data.get("measured", {}).items()
        } or {agent_id: [Sample(*one[:3]) for one in found] for agent_id, found in data.get("samples", {}).items()}
        replacing = [Replacement(one["agent_id"], one["instance_type"]) for one in data.get("replacements", ())]
        new = cls()
        return cls(
            desired=DesiredFleet(data.get("desired") or data.get("wish")),
            last_change_at=data.get("last_change_at", new.last_change_at),
            samples=samples,
            replacing=replacing or [Replacement(*one[:2]) for one in data.get("replacing", ())],
            paused_until=data.get("paused_until", new.paused_until),
            pause_reason=data.get("pause_reason", new.pause_reason),
            failures_in_a_row=data.get("failures_in_a_row", new.failures_in_a_row),
            failures=data.get("failures", []),
            decisions=data.get("decisions", []),
            last=data.get("last", {}),
        )
