"""A request and its function as the program to run: words, environment, what is in force for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluxlib.agent.executor.base import Job, Limits
from fluxlib.agent.packages import Installed
from fluxlib.errors import Unenforceable
from fluxlib.model import ExecutionRequest, FunctionSpec

_MB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """What agent.yaml says about runs."""

    agent_id: str
    max_tasks: int
    kill_grace: float
    defaults: Limits
    environment: dict[str, str]  # the same for every function on this node
    timeout: float = 0.0  # the most that an execution gets, 0 = no such limit


def job_of(request: ExecutionRequest, installed: Installed, settings: Settings) -> Job:
    """The program to run. Nothing of the agent's own environment is in it."""
    spec, code_dir = installed.spec, installed.code_dir
    if code_dir is None:
        raise ValueError(f"{spec.name} has no code")
    return Job(
        execution_id=request.execution_id,
        argv=(f"{code_dir}/{spec.handler}", *request.args),
        env={
            **_without_overruled(settings.environment, spec.env),
            **spec.env,
            "FLUX_EXECUTION_ID": request.execution_id,
            "FLUX_FUNCTION_NAME": spec.name,
        },
        code_dir=code_dir,
        stdin=request.stdin,
        limits=limits_of(spec, settings.defaults),
        network=spec.network,
        working_directory=spec.working_directory,
    )


def _without_overruled(environment: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The node's variables. LC_ALL would outweigh a locale that the function names by LANG or one of LC_*."""
    chosen = any(name == "LANG" or name.startswith("LC_") for name in own)
    return {name: value for name, value in environment.items() if not (chosen and name == "LC_ALL")}


def check_limits(spec: FunctionSpec, settings: Settings) -> None:
    """Raises Unenforceable for a function that asks for more than agent.yaml gives one execution."""
    defaults = settings.defaults
    asked = (
        ("resources.memory", spec.memory_mb, (defaults.memory_bytes or 0) // _MB, "MB", "limits.memory"),
        ("resources.cpu", spec.cpu_millicores, defaults.cpu_millicores or 0, "millicores", "limits.cpu"),
        ("timeout", spec.timeout_seconds, settings.timeout, "s", "limits.timeout"),
    )
    faults = [
        f"{name} is {wanted} and this agent gives at most {most:g} {unit} ({setting} in its agent.yaml)"
        for name, wanted, most, unit, setting in asked
        if most and wanted > most
    ]
    if faults:
        raise Unenforceable("; ".join(faults))


def timeout_of(request: ExecutionRequest, spec: FunctionSpec, most: float = 0.0) -> float:
    """Seconds, 0 = none. A call may ask for less than its function and the agent allow, never for more."""
    asked = (request.timeout_seconds, float(spec.timeout_seconds), most)
    return min((seconds for seconds in asked if seconds), default=0.0)


def limits_of(spec: FunctionSpec, defaults: Limits) -> Limits:
    """What is in force for one run: the function's figures, the agent's where it says nothing.

    Of processes, files and /tmp a function may ask for less than the agent's default or for more; more memory or CPU
    than agent.yaml gives was refused (``check_limits``).
    """
    return Limits(
        memory_bytes=spec.memory_mb * _MB or defaults.memory_bytes,
        cpu_millicores=spec.cpu_millicores or defaults.cpu_millicores,
        processes=spec.max_processes or defaults.processes,
        open_files=spec.max_open_files or defaults.open_files,
        file_size_bytes=spec.max_file_size_mb * _MB or defaults.file_size_bytes,
        tmp_bytes=spec.tmp_size_mb * _MB or defaults.tmp_bytes,
    )
