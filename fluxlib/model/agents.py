"""Agents: their states, what they can enforce, and what they say of themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

from fluxlib.model.functions import ANYWHERE, Platform
from fluxlib.model.times import rfc3339

AGENT_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# The names of certificates, and /agents/register, which is a path of its own.
RESERVED_AGENT_IDS = frozenset({"flux", "flux-agent", "register"})


def known_fields(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``data`` that the dataclass has: a newer version stores more."""
    return {one.name: data[one.name] for one in fields(cls) if one.name in data}


class AgentStatus(str, Enum):
    PROVISIONING = "provisioning"  # a node being made; not yet an agent
    ONLINE = "online"
    BUSY = "busy"  # online, every slot taken
    OFFLINE = "offline"
    DRAINING = "draining"  # finishes what runs, takes nothing new
    UNKNOWN = "unknown"  # one that only a newer version knows; it takes no work

    @classmethod
    def _missing_(cls, value: object) -> AgentStatus:
        return cls.UNKNOWN

    @property
    def present(self) -> bool:
        """Whether it answers now, as far as is known."""
        return self not in (AgentStatus.OFFLINE, AgentStatus.PROVISIONING, AgentStatus.UNKNOWN)

    @property
    def takes_work(self) -> bool:
        return self in (AgentStatus.ONLINE, AgentStatus.BUSY)


class Enforcement(str, Enum):
    """What an agent's isolation can hold a function to."""

    MEMORY = "memory"
    CPU = "cpu"
    PROCESSES = "processes"
    OPEN_FILES = "open_files"
    FILE_SIZE = "file_size"
    TMP_SIZE = "tmp_size"
    NETWORK_NONE = "network_none"
    OWN_USER = "own_user"
    PRIVATE_FILES = "private_files"


@dataclass(frozen=True, slots=True)
class NodeFigures:
    """One look at a machine. Percentages are 0 to 100."""

    cpu_percent: float = 0.0
    memory_percent: float = 0.0
    memory_total_mb: int = 0
    memory_used_mb: int = 0
    active_tasks: int = 0
    max_tasks: int = 0  # 0 = unknown (an original agent)
    uptime_seconds: int = 0
    collected_at: float = 0.0
    disk_free_mb: int = 0
    problem: str = ""  # why the agent can run no programs now; empty = it can
    warnings: tuple[str, ...] = ()  # what needs an operator's attention

    @classmethod
    def from_fields(cls, data: Mapping[str, Any]) -> NodeFigures:
        """What another process made of it with ``asdict``, perhaps of another version."""
        known = known_fields(cls, data)
        known["warnings"] = tuple(known.get("warnings", ()))
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        return {
            "cpu_percent": round(self.cpu_percent, 1),
            "memory_percent": round(self.memory_percent, 1),
            "memory_total_mb": self.memory_total_mb,
            "memory_used_mb": self.memory_used_mb,
            "active_tasks": self.active_tasks,
            "max_tasks": self.max_tasks,
            "uptime_seconds": self.uptime_seconds,
            "disk_free_mb": self.disk_free_mb,
            "collected_at": rfc3339(self.collected_at) if self.collected_at else None,
        }


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent as the store keeps it. What changes by the second lives in the fleet only."""

    agent_id: str
    address: str  # host:port of its gRPC server; empty while provisioning
    registered_at: float = 0.0
    last_heartbeat: float = 0.0
    status: AgentStatus = AgentStatus.OFFLINE
    provider: str = ""  # "" = registered by hand
    provider_id: str = ""
    instance_type: str = ""
    platform: Platform = ANYWHERE
    version: str = ""
    isolation: str = ""
    enforces: tuple[str, ...] = ()
    max_tasks: int = 0
    original: bool = False  # answers only the original contract
    legacy_certificate: bool = False  # its certificate carries no ID
    offline_since: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)  # a provider's own notes

    def to_fields(self) -> dict[str, Any]:
        """By name, as stores keep it."""
        return asdict(self) | {"platform": str(self.platform), "status": self.status.value}

    @classmethod
    def from_fields(cls, data: Mapping[str, Any]) -> AgentRecord:
        """What ``to_fields`` of this or another version made: what is missing has its default, what is unknown is
        ignored.
        """
        known = known_fields(cls, data)
        known["platform"] = Platform.parse(data.get("platform", ""))
        known["status"] = AgentStatus(data.get("status", AgentStatus.OFFLINE))
        known["enforces"] = tuple(data.get("enforces", ()))
        return cls(**{"address": "", **known})


@dataclass(frozen=True, slots=True)
class FunctionState:
    """What an agent holds of one function, by digest; an empty code digest = registered, no code."""

    name: str
    spec_digest: str
    code_digest: str = ""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What an agent of ours says of itself when asked."""

    agent_id: str
    instance_id: str  # changes with every start of the agent process
    version: str = ""
    platform: Platform = ANYWHERE
    max_tasks: int = 0
    isolation: str = ""
    isolation_notes: tuple[str, ...] = ()
    enforces: tuple[str, ...] = ()
    functions: tuple[FunctionState, ...] = ()
    revision: int = 0  # counts changes of its functions
    features: tuple[str, ...] = ()
    certificate_not_after: float = 0.0  # 0 = no TLS
    open_executions: tuple[str, ...] | None = ()  # None = it does not say
    # When an agent that does not say what it runs was seen to have restarted, epoch seconds; what ran before is lost.
    restarted_at: float = 0.0
