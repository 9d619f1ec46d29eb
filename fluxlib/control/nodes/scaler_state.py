"""What the autoscaler must not forget over a restart: cooldown, samples, replacements, pauses.

One small fact of the store for each provider, written under the leader's lease.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from fluxlib.control.nodes.scaling import Replacement, Sample

_DECISIONS = 50
_FAILURES = 20


class FleetWish(str, Enum):
    """What people have asked of a provider's fleet."""

    NONE = "none"  # nobody has asked for nodes yet: only waiting executions make some
    KEPT = "kept"  # initialised: min_nodes are held
    REMOVED = "removed"  # DELETE /nodes: nothing is made until the next POST /initialize


@dataclass
class ScalerState:
    """One provider's. Times are epoch seconds."""

    wish: FleetWish = FleetWish.NONE
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
        """A new life: what another one's clock, which was ahead, has written must not hold this one up."""
        self.last_change_at = min(self.last_change_at, now)
        self.paused_until = min(self.paused_until, now + longest_pause)

    def failed(self, now: float, agent_id: str, error: str) -> None:
        self.failures = [*self.failures, {"at": now, "agent_id": agent_id, "error": error}][-_FAILURES:]

    def decided(self, decision: dict[str, Any], *, changes: bool) -> None:
        self.last = decision
        if changes:
            self.decisions = [*self.decisions, decision][-_DECISIONS:]

    def to_text(self) -> str:
        data = {
            "wish": self.wish.value,
            "last_change_at": self.last_change_at,
            "samples": {
                agent_id: [[round(one.at, 1), round(one.cpu, 1), round(one.memory, 1)] for one in samples]
                for agent_id, samples in self.samples.items()
            },
            "replacing": [[one.agent_id, one.instance_type] for one in self.replacing],
            "paused_until": self.paused_until,
            "pause_reason": self.pause_reason,
            "failures_in_a_row": self.failures_in_a_row,
            "failures": self.failures,
            "decisions": self.decisions,
            "last": self.last,
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str | None) -> Self:
        """What ``to_text`` wrote; a fresh one for None."""
        if text is None:
            return cls()
        data = json.loads(text)
        return cls(
            wish=FleetWish(data["wish"]),
            last_change_at=data["last_change_at"],
            samples={agent_id: [Sample(*one) for one in samples] for agent_id, samples in data["samples"].items()},
            replacing=[Replacement(*one) for one in data["replacing"]],
            paused_until=data["paused_until"],
            pause_reason=data["pause_reason"],
            failures_in_a_row=data["failures_in_a_row"],
            failures=data["failures"],
            decisions=data["decisions"],
            last=data["last"],
        )
