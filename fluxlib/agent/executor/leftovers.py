"""Processes of executions that nobody watches any more."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)

_ROUNDS = 50
_EXECUTION = b"FLUX_EXECUTION_ID="


def kill_executions(execution_ids: Collection[str], home: Path | None = None) -> int:
    """SIGKILL to every process whose environment names one of the executions; how many there were.

    And to those of every execution whose home directory is below ``home``.

    A walk over /proc, so only for what is rare: a dead spawner, a restarted agent.
    """
    named = {_EXECUTION + one.encode() for one in execution_ids}
    below = b"HOME=" + os.fsencode(home) + b"/" if home is not None else None

    def left_over(environment: list[bytes]) -> bool:
        if not any(item.startswith(_EXECUTION) for item in environment):
            return False
        if below is not None and any(item.startswith(below) for item in environment):
            return True
        return not named.isdisjoint(environment)

    killed: set[int] = set()
    for _ in range(_ROUNDS):
        # Again until there is none: one may have forked between two looks.
        found = [pid for pid in _processes() if pid not in killed and left_over(_environment(pid))]
        if not found:
            break
        for pid in found:
            killed.add(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    return len(killed)


def _processes() -> list[int]:
    own = os.getpid()
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own]
    except OSError:
        return []


def _environment(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []
