"""How a Unix program ended, or why it never began: what the kernel says, in the contract's terms."""

from __future__ import annotations

import os
from pathlib import Path

from fluxlib.agent.diagnosis import exec_problem
from fluxlib.agent.executor.base import Exit


def exit_of(status: int, cpu_seconds: float | None) -> Exit:
    """A wait status as the contract's Exit."""
    if os.WIFSIGNALED(status):
        return Exit(signal=os.WTERMSIG(status), cpu_seconds=cpu_seconds)
    return Exit(exit_code=os.WEXITSTATUS(status), cpu_seconds=cpu_seconds)


def explain(step: str, number: int, program: str, code_dir: Path) -> str:
    """Why a program could not be started, in words."""
    return f"{step}: {exec_problem(program, number, code_dir) if step == 'exec' else os.strerror(number)}"
