"""What Flux and its agents talk about: frozen records, enums, and which state may follow which.

No clock, thread or I/O here: times are epoch seconds handed in by the caller.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum, IntEnum
from typing import Any

FUNCTION_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
AGENT_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
EXECUTION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
RESERVED_AGENT_IDS = frozenset({"flux", "flux-agent"})


# ---- functions ---------------------------------------------------------------


class Behavior(str, Enum):
    """What a call does when nothing can take it now."""

    EXIT = "exit"
    WAIT = "wait"


class Network(str, Enum):
    HOST = "host"
    NONE = "none"


class WorkingDirectory(str, Enum):
    """Where a function starts: its own code (read-only, the original's way) or a private work directory."""

    CODE = "code"
    WORK = "work"


@dataclass(frozen=True, slots=True, order=True)
class Platform:
    """An operating system and architecture in Go's words; an empty part is unknown or any."""

    os: str = ""
    architecture: str = ""

    def __str__(self) -> str:
        return f"{self.os or 'any'}/{self.architecture or 'any'}"

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``linux/amd64`` or ``linux``; ``any`` and an empty part match everything."""
        os, _, architecture = text.strip().lower().partition("/")
        return cls("" if os == "any" else os, "" if architecture == "any" else architecture)

    def matches(self, wanted: Platform) -> bool:
        """Whether a node of this platform can run what asks for ``wanted``; unknown fits all."""
        same_os = not self.os or not wanted.os or self.os == wanted.os or (wanted.os == "unix" and self.os != "windows")
        same_arch = not self.architecture or not wanted.architecture or self.architecture == wanted.architecture
        return same_os and same_arch


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A function as its owner declared it. Zero means "not limited" or "the agent's default"."""

    name: str
    handler: str
    cpu_millicores: int = 0
    memory_mb: int = 0
    timeout_seconds: int = 0
    max_concurrency: int = 5
    max_concurrency_behavior: Behavior = Behavior.EXIT
    resource_pressure_behavior: Behavior = Behavior.EXIT
    env: Mapping[str, str] = field(default_factory=dict)
    platforms: tuple[Platform, ...] = ()
    network: Network = Network.HOST
    working_directory: WorkingDirectory = WorkingDirectory.CODE
    max_processes: int = 0
    max_open_files: int = 0
    max_file_size_mb: int = 0
    tmp_size_mb: int = 0

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values, every field present."""
        return {
            "name": self.name,
            "handler": self.handler,
            "resources": {"cpu": self.cpu_millicores, "memory": self.memory_mb},
            "timeout": self.timeout_seconds,
            "max_concurrency": self.max_concurrency,
            "max_concurrency_behavior": self.max_concurrency_behavior.value,
            "resource_pressure_behavior": self.resource_pressure_behavior.value,
            "env": dict(self.env),
            "platforms": [str(platform) for platform in self.platforms],
            "network": self.network.value,
            "cwd": self.working_directory.value,
            "limits": {
                "processes": self.max_processes,
                "open_files": self.max_open_files,
                "file_size": self.max_file_size_mb,
                "tmp_size": self.tmp_size_mb,
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FunctionSpec:
        """The inverse of :meth:`to_json`, for values a store or a peer of ours wrote."""
        limits = data.get("limits") or {}
        return cls(
            name=data["name"],
            handler=data["handler"],
            cpu_millicores=data["resources"]["cpu"],
            memory_mb=data["resources"]["memory"],
            timeout_seconds=data["timeout"],
            max_concurrency=data["max_concurrency"],
            max_concurrency_behavior=Behavior(data["max_concurrency_behavior"]),
            resource_pressure_behavior=Behavior(data["resource_pressure_behavior"]),
            env=dict(data["env"]),
            platforms=tuple(Platform.parse(text) for text in data.get("platforms", ())),
            network=Network(data.get("network", "host")),
            working_directory=WorkingDirectory(data.get("cwd", "code")),
            max_processes=limits.get("processes", 0),
            max_open_files=limits.get("open_files", 0),
            max_file_size_mb=limits.get("file_size", 0),
            tmp_size_mb=limits.get("tmp_size", 0),
        )

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON; agents report it back in their inventory."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Function:
    """The desired state of one function: what was declared, what was deployed."""

    spec: FunctionSpec
    spec_digest: str
    code_digest: str = ""  # empty = nothing deployed yet
    code_bytes: int = 0
    detected_platforms: tuple[Platform, ...] = ()  # read from the handler when it was deployed
    updated_at: float = 0.0

    @property
    def platforms(self) -> tuple[Platform, ...]:
        """Where it may run; empty means anywhere. What the owner said wins over what was read."""
        return self.spec.platforms or self.detected_platforms


# ---- agents ------------------------------------------------------------------


class AgentStatus(str, Enum):
    PROVISIONING = "provisioning"  # a node being made; not yet an agent
    ONLINE = "online"
    BUSY = "busy"  # online, every slot taken
    OFFLINE = "offline"
    DRAINING = "draining"  # finishes what runs, takes nothing new

    def may_become(self, following: AgentStatus) -> bool:
        return following in _AGENT_MOVES[self]

    @property
    def takes_work(self) -> bool:
        return self in (AgentStatus.ONLINE, AgentStatus.BUSY)


_AGENT_MOVES = {
    AgentStatus.PROVISIONING: {AgentStatus.ONLINE, AgentStatus.OFFLINE},
    AgentStatus.ONLINE: {AgentStatus.BUSY, AgentStatus.OFFLINE, AgentStatus.DRAINING},
    AgentStatus.BUSY: {AgentStatus.ONLINE, AgentStatus.OFFLINE, AgentStatus.DRAINING},
    AgentStatus.OFFLINE: {AgentStatus.ONLINE, AgentStatus.DRAINING},
    AgentStatus.DRAINING: {AgentStatus.OFFLINE, AgentStatus.ONLINE},
}


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
    """An agent as the store keeps it. What changes by the second lives in the registry only."""

    agent_id: str
    address: str  # host:port of its gRPC server; empty while provisioning
    registered_at: float = 0.0
    last_heartbeat: float = 0.0
    status: AgentStatus = AgentStatus.OFFLINE
    provider: str = ""  # "" = registered by hand
    provider_id: str = ""
    instance_type: str = ""
    platform: Platform = Platform()
    version: str = ""
    isolation: str = ""
    enforces: tuple[str, ...] = ()
    max_tasks: int = 0
    original: bool = False  # answers only the original contract
    legacy_certificate: bool = False  # its certificate carries no ID
    offline_since: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)  # a provider's own notes


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
    platform: Platform = Platform()
    max_tasks: int = 0
    isolation: str = ""
    isolation_notes: tuple[str, ...] = ()
    enforces: tuple[str, ...] = ()
    functions: tuple[FunctionState, ...] = ()
    revision: int = 0  # counts changes of its functions
    features: tuple[str, ...] = ()
    certificate_not_after: float = 0.0  # 0 = no TLS
    open_executions: tuple[str, ...] = ()


# ---- executions --------------------------------------------------------------


class ExecutionStatus(str, Enum):
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self is not ExecutionStatus.RUNNING


class Phase(str, Enum):
    """Where a running execution is; the status stays ``running`` until ``ended``."""

    QUEUED = "queued"
    STARTING = "starting"  # an agent owns it
    RUNNING = "running"
    ENDING = "ending"  # told to stop, its processes are being killed
    ENDED = "ended"


class ErrorKind(IntEnum):
    """Why an execution did not succeed; the numbers are those of flux.proto."""

    NONE = 0
    EXIT_CODE = 1
    SIGNAL = 2
    TIMEOUT = 3
    OUT_OF_MEMORY = 4
    CANCELLED = 5
    AT_CAPACITY = 6
    NOT_FOUND = 7
    NO_CODE = 8
    UNENFORCEABLE = 9
    INVALID = 10
    CANNOT_START = 11
    AGENT_STOPPED = 12
    AGENT_LOST = 13
    STOPPING = 14
    INTERNAL = 15

    @property
    def nothing_started(self) -> bool:
        """The agent refused: the work may be offered to another one."""
        return self in _REFUSALS


_REFUSALS = frozenset(
    {
        ErrorKind.AT_CAPACITY,
        ErrorKind.NOT_FOUND,
        ErrorKind.NO_CODE,
        ErrorKind.UNENFORCEABLE,
        ErrorKind.INVALID,
        ErrorKind.STOPPING,
    }
)


@dataclass(frozen=True, slots=True)
class ExecutionRequest:
    execution_id: str
    function_name: str
    args: tuple[str, ...] = ()
    stdin: bytes = b""
    timeout_seconds: float = 0.0  # 0 = the function's
    asynchronous: bool = False


@dataclass(frozen=True, slots=True)
class ExecutionRecord:
    """One execution, from being accepted to its end.

    ``output`` is bytes here and text (with replacement characters) in JSON;
    None means "kept elsewhere" (at the agent). Times are epoch seconds, 0 = not yet.
    """

    execution_id: str
    function_name: str
    agent_id: str = ""
    status: ExecutionStatus = ExecutionStatus.RUNNING
    phase: Phase = Phase.RUNNING
    asynchronous: bool = False
    output: bytes | None = None
    output_bytes: int = 0  # how much is kept, after truncation
    truncated: bool = False
    error: str = ""
    error_kind: ErrorKind = ErrorKind.NONE
    exit_code: int | None = None
    signal: int | None = None
    duration_ms: int = 0  # of the run itself
    queue_ms: int = 0  # accepted until an agent started it
    started_at: float = 0.0  # accepted
    run_started_at: float = 0.0
    status_at: float = 0.0  # ended
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    warnings: tuple[str, ...] = ()

    def ended(
        self, status: ExecutionStatus, *, at: float, error: str = "", kind: ErrorKind = ErrorKind.NONE
    ) -> ExecutionRecord:
        """This record with an end put to it; an ended record stays as it is."""
        if self.status.ended:
            return self
        return replace(self, status=status, phase=Phase.ENDED, error=error, error_kind=kind, status_at=at)

    def to_json(self, *, with_output: bool = True) -> dict[str, Any]:
        """The record of wire.md (``status_at`` absent while running) and what ours adds to it."""
        data: dict[str, Any] = {
            "execution_id": self.execution_id,
            "agent_id": self.agent_id,
            "function_name": self.function_name,
            "status": self.status.value,
            "phase": self.phase.value,
            "async": self.asynchronous,
            "error": self.error,
            "error_kind": self.error_kind.name.lower() if self.error_kind else None,
            "duration_ms": self.duration_ms,
            "queue_ms": self.queue_ms,
            "started_at": rfc3339(self.started_at),
            "run_started_at": rfc3339(self.run_started_at) if self.run_started_at else None,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "timed_out": self.error_kind is ErrorKind.TIMEOUT,
            "out_of_memory": self.error_kind is ErrorKind.OUT_OF_MEMORY,
            "truncated": self.truncated,
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "cpu_seconds": self.cpu_seconds,
            "warnings": list(self.warnings),
        }
        if self.status_at:
            data["status_at"] = rfc3339(self.status_at)
        if with_output:
            data["output"] = (self.output or b"").decode("utf-8", "replace")
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExecutionRecord:
        """A record from an agent, ours or the original's (which lacks most fields)."""
        status = ExecutionStatus(data["status"])
        kind = data.get("error_kind")
        output = data.get("output")
        return cls(
            execution_id=data["execution_id"],
            function_name=data.get("function_name", ""),
            agent_id=data.get("agent_id", ""),
            status=status,
            phase=Phase(data.get("phase") or ("ended" if status.ended else "running")),
            asynchronous=bool(data.get("async", True)),
            output=output.encode() if isinstance(output, str) else None,
            output_bytes=data.get("output_bytes") or 0,
            truncated=bool(data.get("truncated")),
            error=data.get("error") or "",
            error_kind=ErrorKind[kind.upper()] if kind else ErrorKind.NONE,
            exit_code=data.get("exit_code"),
            signal=data.get("signal"),
            duration_ms=data.get("duration_ms") or 0,
            queue_ms=data.get("queue_ms") or 0,
            started_at=epoch(data.get("started_at")),
            run_started_at=epoch(data.get("run_started_at")),
            status_at=epoch(data.get("status_at")),
            peak_memory_bytes=data.get("peak_memory_bytes"),
            cpu_seconds=data.get("cpu_seconds"),
            warnings=tuple(data.get("warnings") or ()),
        )


# ---- time in text ------------------------------------------------------------


def rfc3339(seconds: float) -> str:
    """Epoch seconds as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def epoch(text: str | None) -> float:
    """RFC 3339 (Go's nanoseconds included) to epoch seconds; 0.0 for nothing and for Go's zero time."""
    if not text or text.startswith("0001-"):
        return 0.0
    trimmed = re.sub(r"(\.\d{6})\d+", r"\1", text)
    return datetime.fromisoformat(trimmed).timestamp()
