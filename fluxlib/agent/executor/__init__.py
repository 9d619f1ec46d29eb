"""Running programs: one contract (``base``), and what fills it on this machine."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    # The spawner passes through here and must stay small: it needs none of these, nor typing itself.
    from pathlib import Path

    from fluxlib.agent.executor.base import Executor
    from fluxlib.config.agent import AgentConfig


def build_executor(config: AgentConfig, state_dir: Path) -> Executor:
    """The executor that ``isolation`` and this machine ask for.

    Raises Unenforceable when the machine cannot hold functions to the profile:
    the message says what is missing and which setting to choose.
    """
    if sys.platform == "win32":
        from fluxlib.agent.executor.windows import WindowsExecutor

        return WindowsExecutor(config, state_dir)
    from fluxlib.agent.executor.off import OffExecutor

    if config.isolation == "off":
        return OffExecutor(config, state_dir, "agent.yaml says so")
    if not sys.platform.startswith("linux"):
        return OffExecutor(config, state_dir, f"{sys.platform} has neither cgroups nor namespaces")
    if not config.isolation and os.geteuid() != 0:
        return OffExecutor(config, state_dir, "the agent does not run as root (development)")
    from fluxlib.agent.executor.linux import LinuxExecutor

    return LinuxExecutor(config, state_dir)
