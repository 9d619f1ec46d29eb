"""A node's phase and provisioning state, kept in the agent's record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from fluxlib.model import AgentRecord

_KEY = "node"


class NodePhase(str, Enum):
    ASKED = "asked"  # recorded; the cloud may or may not have heard of it
    SETUP = "setup"  # launched, being made an agent
    READY = "ready"
    ENDING = "ending"  # being drained, or its end was not confirmed yet


@dataclass(frozen=True, slots=True)
class NodeNotes:
    """Times are epoch seconds, 0 = not yet."""

    phase: NodePhase = NodePhase.ASKED
    asked_at: float = 0.0
    reach: str = ""  # the address Flux uses
    private_ip: str = ""
    public_ip: str = ""
    host_key: str = ""  # of its sshd, as first seen
    done: tuple[str, ...] = ()  # steps of the bootstrap
    replaces: str = ""
    ending_at: float = 0.0
    drain_until: float = 0.0
    reason: str = ""  # why it ends


def notes_of(record: AgentRecord) -> NodeNotes:
    """Of a record whose ``provider`` is set. What an unknown version wrote beside is passed over."""
    data: Mapping[str, Any] = record.extra.get(_KEY) or {}
    known = {one.name: data[one.name] for one in fields(NodeNotes) if one.name in data}
    if "phase" in known:
        known["phase"] = NodePhase(known["phase"])
    if "done" in known:
        known["done"] = tuple(known["done"])
    return NodeNotes(**known)


def with_notes(record: AgentRecord, notes: NodeNotes) -> AgentRecord:
    data = {**asdict(notes), "phase": notes.phase.value, "done": list(notes.done)}
    return replace(record, extra={**record.extra, _KEY: data})


def noted(record: AgentRecord, **changes: Any) -> AgentRecord:
    """The record with these notes changed."""
    return with_notes(record, replace(notes_of(record), **changes))
