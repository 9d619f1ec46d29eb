"""What an agent on Windows can hold a function to, and the functions it refuses for that."""

from __future__ import annotations

import sys

from fluxlib.agent.executor.base import Isolation, Limits
from fluxlib.errors import Unenforceable
from fluxlib.model import Enforcement, FunctionSpec, Network

assert sys.platform == "win32"

from fluxlib.agent.executor import winapi
from fluxlib.agent.executor.jobobject import JobObject


def probe(profile: str) -> Isolation:
    """The isolation in force for agent.yaml's ``isolation``. Raises Unenforceable for Linux's profiles."""
    if profile in ("strict", "minimal"):
        raise Unenforceable(f"isolation: {profile} is Linux's; on Windows choose default (or leave it out) or off")
    if profile == "off":
        note = "isolation is off: agent.yaml says so; functions run without limits, as this agent's user"
        return Isolation("off", frozenset(), (note,))
    notes = ["functions run as this agent's user, each in a job object; their files are not kept apart"]
    if winapi.is_wine():
        # It takes every limit and holds nothing to it.
        return Isolation("default", frozenset(), (*notes, "Wine holds no program to a limit: they are refused"))
    enforces = {Enforcement.MEMORY, Enforcement.PROCESSES}
    try:
        JobObject(Limits(cpu_millicores=1000), None, 0).close()
        enforces.add(Enforcement.CPU)
    except OSError as error:
        notes.append(f"this Windows has no CPU rate for jobs ({error})")
    return Isolation("default", frozenset(enforces), tuple(notes))


def check_limits(isolation: Isolation, spec: FunctionSpec) -> tuple[str, ...]:
    """Warnings under ``off``. Raises Unenforceable for what this host cannot hold the function to."""
    asked = {
        Enforcement.MEMORY: ("resources.memory", spec.memory_mb),
        Enforcement.CPU: ("resources.cpu", spec.cpu_millicores),
        Enforcement.PROCESSES: ("limits.processes", spec.max_processes),
        Enforcement.OPEN_FILES: ("limits.open_files", spec.max_open_files),
        Enforcement.FILE_SIZE: ("limits.file_size", spec.max_file_size_mb),
        Enforcement.TMP_SIZE: ("limits.tmp_size", spec.tmp_size_mb),
        Enforcement.NETWORK_NONE: ("network: none", spec.network is Network.NONE),
    }
    missing = [name for what, (name, value) in asked.items() if value and what not in isolation.enforces]
    if missing and isolation.profile != "off":
        raise Unenforceable(
            f"this Windows agent cannot enforce {', '.join(missing)} of {spec.name}: leave it out, "
            "run the function on Linux, or set isolation: off in agent.yaml to run it without"
        )
    return tuple(f"{name} is not enforced: isolation is off on this agent" for name in missing)
