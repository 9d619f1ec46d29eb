"""Running programs: one contract (``base``), and what fills it on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fluxlib.agent.executor.base import Executor
from fluxlib.config.agent import AgentConfig
from fluxlib.errors import Unenforceable


def build_executor(config: AgentConfig, state_dir: Path) -> Executor:
    """The executor that ``isolation`` and this machine ask for.

    Raises Unenforceable when the machine cannot hold functions to the profile:
    the message says what is missing and which setting to choose.
    """
    if sys.platform == "win32":
        from fluxlib.agent.executor.windows import WindowsExecutor

        return WindowsExecutor(config, state_dir)
    if not sys.platform.startswith("linux"):
        raise Unenforceable(
            f"an agent runs on Linux or Windows, and this is {sys.platform}: start Flux here, agents there"
        )
    from fluxlib.agent.executor.unix import UnixExecutor

    why_off = ""
    if config.isolation == "off":
        why_off = "agent.yaml says so"
    elif not config.isolation and os.geteuid() != 0:
        why_off = "the agent does not run as root (development)"
    return UnixExecutor(config, state_dir, why_off)


def users_walk_to_code(config: AgentConfig) -> bool:
    """Whether functions' users must be able to enter every directory on the way to their code.

    Not where the spawner attaches the code to a function's own view by a descriptor.
    """
    if sys.platform == "win32":
        return False
    from fluxlib.spawner.sandbox import DEFAULT, PROFILES, Step

    return Step.MOUNTS not in PROFILES[config.isolation or DEFAULT]
