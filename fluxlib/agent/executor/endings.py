"""How a Unix program ended, or why it never began: what the kernel says, in the contract's terms."""

from __future__ import annotations

import errno
import os

from fluxlib.agent.executor.base import Exit


def exit_of(status: int, cpu_seconds: float | None) -> Exit:
    """A wait status as the contract's Exit."""
    if os.WIFSIGNALED(status):
        return Exit(signal=os.WTERMSIG(status), cpu_seconds=cpu_seconds)
    return Exit(exit_code=os.WEXITSTATUS(status), cpu_seconds=cpu_seconds)


def explain(step: str, number: int, program: str) -> str:
    """Why a program could not be started, in words."""
    name = os.path.basename(program)
    if step == "exec":
        reasons = {
            errno.ENOENT: f"{name} is not there, or the interpreter its first line names is not on this machine",
            errno.EACCES: f"{name} may not be executed",
            errno.ENOEXEC: f"{name} is neither a program of this machine nor a script with a #! line",
            errno.E2BIG: "its arguments and environment are too large",
            errno.ETXTBSY: f"{name} is still being written",
        }
        if number in reasons:
            return f"{step}: {reasons[number]}"
    return f"{step}: {os.strerror(number)}"
