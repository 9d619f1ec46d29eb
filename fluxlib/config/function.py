"""The YAML of PUT /functions: a function as its owner declares it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxlib.config.document import load_mapping
from fluxlib.config.reader import Faults, between, nearest, one_of, setting, take
from fluxlib.model import (
    FUNCTION_NAME,
    Behavior,
    FunctionSpec,
    Network,
    Platform,
    WorkingDirectory,
    handler_path,
)

# With the dots and hyphens of Spring, Elastic and Node, which a shell may drop but every program can read.
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,255}")
_DEVICE = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_MAX_HANDLER = 512
_MAX_ENV_BYTES = 64 * 1024
_RESERVED_ENV = "FLUX_"
# In Go's words, as agents report themselves; `unix` is everything but Windows.
_OSES = ("linux", "windows", "darwin", "freebsd", "unix", "any")
_ARCHITECTURES = ("amd64", "arm64", "386", "arm", "riscv64", "ppc64le", "s390x", "loong64", "any")
_OTHER_NAMES = {"x86_64": "amd64", "x64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "x86": "386"}


def name_problem(value: Any) -> str | None:
    """What is wrong with a function's name, or None."""
    if not FUNCTION_NAME.fullmatch(value) or ".." in value:
        return "must be 1 to 64 letters, digits, dots, hyphens and underscores, with a letter or digit at both ends"
    return None


def is_device(name: str) -> bool:
    """Whether Windows opens a device by this name, in whichever directory it is asked for."""
    return _DEVICE.fullmatch(name) is not None


def handler_problem(value: Any) -> str | None:
    """What is wrong with a path inside a zip, or None. Held to what Windows and Unix both take literally."""
    value = handler_path(value)
    if not value or len(value) > _MAX_HANDLER:
        return f"must be a path inside the zip, 1 to {_MAX_HANDLER} characters"
    if not value.isprintable():
        return "must consist of printable characters"
    if any(char in '\\:*?"<>|' for char in value):
        return 'must not contain backslashes or any of : * ? " < > |'
    parts = value.split("/")
    if value.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "must be a relative path without '..' and with no slash at either end"
    # Windows drops what ends a name and opens devices by theirs.
    if any(part != part.strip() or part.endswith(".") or is_device(part) for part in parts):
        return "must not have parts that end with a dot, begin or end with a space, or are names of Windows devices"
    return None


def _env_name_problem(value: Any) -> str | None:
    if not _ENV_NAME.fullmatch(value):
        return "is no variable name (letters, digits, underscores, dots and hyphens, no digit first)"
    if value.upper().startswith(_RESERVED_ENV):
        return f"begins with {_RESERVED_ENV}, which Flux sets itself"
    return None


def env_problem(env: Mapping[str, str]) -> str | None:
    """What no program can be given, or None: for what comes from an original Flux, which checks nothing."""
    if any(not name or "=" in name or "\0" in name + text for name, text in env.items()):
        return "has a name that is empty or contains =, or NUL somewhere"
    return None


def _env_problem(value: Any) -> str | None:
    size = sum(len(name) + len(text.encode()) for name, text in value.items())
    return f"is larger than {_MAX_ENV_BYTES // 1024} KiB" if size > _MAX_ENV_BYTES else None


def _platform_problem(value: Any) -> str | None:
    os, slash, architecture = value.strip().lower().partition("/")
    if os not in _OSES:
        return f"the system must be one of {', '.join(_OSES)}{nearest(os, _OSES)}"
    if slash and architecture in _OTHER_NAMES:
        return f"the architecture is called {_OTHER_NAMES[architecture]} here"
    if slash and architecture not in _ARCHITECTURES:
        return f"the architecture must be one of {', '.join(_ARCHITECTURES)}{nearest(architecture, _ARCHITECTURES)}"
    return None


def _parse_platforms(value: tuple[str, ...]) -> tuple[Platform, ...]:
    return tuple(Platform.parse(text) for text in value)


@dataclass(frozen=True)
class FunctionFile:
    """The keys of a function's YAML; names are those of FunctionSpec."""

    name: str = setting("name", "string", why="how it is called: POST /execute/NAME", check=name_problem)
    handler: str = setting(
        "handler", "string", why="the program, a path inside the zip", check=handler_problem, convert=handler_path
    )
    cpu_millicores: int = setting(
        "resources.cpu",
        "integer",
        0,
        unit="millicores",
        why="1000 = one core; 0 = not limited",
        check=between(0, 10**6),
    )
    memory_mb: int = setting(
        "resources.memory", "integer", 0, unit="MB", why="0 = not limited", check=between(0, 10**7)
    )
    timeout_seconds: int = setting("timeout", "integer", 0, unit="s", why="0 = none", check=between(0, 7 * 86400))
    max_concurrency: int = setting(
        "max_concurrency", "integer", 5, unit="executions", why="at a time on each agent", check=between(1, 10000)
    )
    max_concurrency_behavior: Behavior = setting(
        "max_concurrency_behavior",
        "string",
        Behavior.EXIT,
        why="when all slots are taken: exit (503) or wait",
        check=one_of("exit", "wait"),
        convert=Behavior,
    )
    resource_pressure_behavior: Behavior = setting(
        "resource_pressure_behavior",
        "string",
        Behavior.EXIT,
        why="when no agent has the memory or CPU free: exit (429) or wait",
        check=one_of("exit", "wait"),
        convert=Behavior,
    )
    env: Mapping[str, str] = setting(
        "env", "map", {}, why="variables of its environment", check=_env_problem, each=_env_name_problem
    )
    platforms: tuple[Platform, ...] = setting(
        "platforms",
        "strings",
        (),
        why="where it runs, for example linux/amd64; absent = read from the handler",
        each=_platform_problem,
        convert=_parse_platforms,
    )
    network: Network = setting(
        "network",
        "string",
        Network.HOST,
        why="host, or none for no network at all",
        check=one_of("host", "none"),
        convert=Network,
    )
    working_directory: WorkingDirectory = setting(
        "cwd",
        "string",
        WorkingDirectory.CODE,
        why="code = its own files, read-only; work = a private, writable directory",
        check=one_of("code", "work"),
        convert=WorkingDirectory,
    )
    max_processes: int = setting(
        "limits.processes", "integer", 0, unit="processes", why="0 = the agent's default", check=between(0, 10**6)
    )
    max_open_files: int = setting(
        "limits.open_files", "integer", 0, unit="files", why="0 = the agent's default", check=between(0, 10**6)
    )
    max_file_size_mb: int = setting(
        "limits.file_size", "integer", 0, unit="MB", why="0 = the agent's default", check=between(0, 10**7)
    )
    tmp_size_mb: int = setting(
        "limits.tmp_size", "integer", 0, unit="MB", why="0 = the agent's default", check=between(0, 10**6)
    )


def read_function(data: bytes | str) -> FunctionSpec:
    """The declared function. Raises InvalidInput with every fault and the field's name."""
    document = load_mapping(data, "the function's YAML")
    faults = Faults()
    values = take(FunctionFile, document, "", faults)
    # cpu.max has a floor of 1 ms in each 100 ms.
    if 0 < values.get("cpu_millicores", 0) < 10:
        faults.add("resources.cpu", "must be 0 or at least 10 millicores")
    # Fewer and no program gets as far as its own first line.
    if 0 < values.get("max_open_files", 0) < 16:
        faults.add("limits.open_files", "must be 0 or at least 16 files")
    faults.raise_if_any("the function's YAML cannot be used")
    return FunctionSpec(**values)
