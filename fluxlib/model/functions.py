"""A function as its owner declares it, and where it may run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

E = TypeVar("E", bound=Enum)

FUNCTION_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def handler_path(text: str) -> str:
    """A handler's path as it is kept: people also write ``./run.sh`` and ``bin//run.sh``.

    A slash at either end stays: such a path is no file inside a zip.
    """
    parts = text.split("/")
    ends = (0, len(parts) - 1)
    return "/".join(part for number, part in enumerate(parts) if part != "." and (part or number in ends))


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
        # 64-bit x86 runs 32-bit programs, on Windows and on Linux as distributions build it.
        return same_os and (same_arch or (self.architecture, wanted.architecture) == ("amd64", "386"))


ANYWHERE = Platform()


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
        """The inverse of :meth:`to_json`, for values a store or a peer of ours wrote, perhaps of another version.

        What is missing has its default and what is unknown is ignored. A word that only a newer version knows means
        what holds a function tightest: no network, no waiting, its code as the directory.
        """
        get = data.get
        resources, limits = get("resources") or {}, get("limits") or {}
        return cls(
            name=data["name"],
            handler=data["handler"],
            cpu_millicores=resources.get("cpu", 0),
            memory_mb=resources.get("memory", 0),
            timeout_seconds=get("timeout", 0),
            max_concurrency=get("max_concurrency", 5),
            max_concurrency_behavior=_known(Behavior, get("max_concurrency_behavior", "exit"), Behavior.EXIT),
            resource_pressure_behavior=_known(Behavior, get("resource_pressure_behavior", "exit"), Behavior.EXIT),
            env=dict(get("env") or {}),
            platforms=tuple(Platform.parse(text) for text in get("platforms", ())),
            network=_known(Network, get("network", "host"), Network.NONE),
            working_directory=_known(WorkingDirectory, get("cwd", "code"), WorkingDirectory.CODE),
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

    def to_fields(self) -> dict[str, Any]:
        """By name, as stores keep it."""
        return {
            "spec": self.spec.to_json(),
            "spec_digest": self.spec_digest,
            "code_digest": self.code_digest,
            "code_bytes": self.code_bytes,
            "detected": [str(platform) for platform in self.detected_platforms],
            "updated_at": self.updated_at,
        }

    @classmethod
    def from_fields(cls, data: Mapping[str, Any]) -> Function:
        """What ``to_fields`` of this or another version made: what is missing has its default, what is unknown is
        ignored.
        """
        spec = FunctionSpec.from_json(data["spec"])
        return cls(
            spec=spec,
            spec_digest=data.get("spec_digest") or spec.digest(),
            code_digest=data.get("code_digest", ""),
            code_bytes=data.get("code_bytes", 0),
            detected_platforms=tuple(Platform.parse(name) for name in data.get("detected", ())),
            updated_at=data.get("updated_at", 0.0),
        )


def _known(cls: type[E], value: Any, otherwise: E) -> E:
    try:
        return cls(value)
    except ValueError:
        return otherwise
