"""Profile ``off``: for development. Process groups and rlimits, nothing between functions but file modes.

As root it still drops to an unprivileged user. What it does not hold a function
to is accepted and named in warnings.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

from fluxlib.agent.executor.base import Exit, Isolation, Job
from fluxlib.agent.executor.launch import Launch
from fluxlib.agent.executor.leftovers import kill_executions
from fluxlib.agent.executor.spawned import Spawned, SpawningExecutor
from fluxlib.config.agent import AgentConfig
from fluxlib.model import Enforcement, FunctionSpec, Network, WorkingDirectory

# nobody's number on Linux: for machines without the named user.
_NOBODY = 65534


class OffExecutor(SpawningExecutor):
    """Programs by posix_spawn in the spawner, as one unprivileged user."""

    def __init__(self, config: AgentConfig, state_dir: Path, reason: str) -> None:
        self._uid, self._gid = runner(config.runner_user) if os.geteuid() == 0 else (-1, -1)
        notes = [f"isolation is off: {reason}; functions can see and disturb each other"]
        if os.geteuid() == 0:
            notes.append(f"every function runs as user {self._uid}")
            if self._uid == _NOBODY and config.runner_user not in (AgentConfig.runner_user, "nobody"):
                notes.append(f"runner_user {config.runner_user} is not used: there is no such user here, or it is root")
        enforces = frozenset({Enforcement.OPEN_FILES, Enforcement.FILE_SIZE})
        super().__init__(state_dir, Isolation("off", enforces, tuple(notes)))

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        asked = {
            "resources.memory": spec.memory_mb,
            "resources.cpu": spec.cpu_millicores,
            "limits.processes": spec.max_processes,
            "limits.tmp_size": spec.tmp_size_mb,
            "network: none": spec.network is Network.NONE,
        }
        return tuple(
            f"{name} is not enforced: isolation is off on this agent" for name, value in asked.items() if value
        )

    def new_launch(self) -> Launch:
        return Launch(uid=self._uid, gid=self._gid)

    def prepare(self, launch: Launch, job: Job) -> None:
        if job.limits.open_files is not None:
            launch.rlimits[resource.RLIMIT_NOFILE] = job.limits.open_files
        if job.limits.file_size_bytes is not None:
            launch.rlimits[resource.RLIMIT_FSIZE] = job.limits.file_size_bytes
        launch.home = launch.directory
        work = job.working_directory is WorkingDirectory.WORK
        launch.cwd = launch.directory if work else os.fspath(job.code_dir)

    def finish(self, launch: Launch, ended: Exit, then: Callable[[Exit], None]) -> None:
        then(ended)

    def end_trees(self, lost: list[Spawned]) -> None:
        for spawned in lost:
            if spawned.pid is None:
                continue
            for target in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    target(spawned.pid, signal.SIGKILL)
        kill_executions([spawned.job.execution_id for spawned in lost])

    def released(self, launch: Launch) -> None:
        return


def runner(user: str) -> tuple[int, int]:
    """The unprivileged user functions run as when they have none of their own."""
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return _NOBODY, _NOBODY
    return (entry.pw_uid, entry.pw_gid) if entry.pw_uid else (_NOBODY, _NOBODY)
