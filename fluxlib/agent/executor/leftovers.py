"""Processes of executions that nobody watches any more."""

from __future__ import annotations

import contextlib
import logging
import os
import signal

log = logging.getLogger(__name__)

_ROUNDS = 50


def kill_execution(execution_id: str) -> int:
    """SIGKILL to every process whose environment names the execution; how many there were.

    A walk over /proc, so only for what is rare: a dead spawner, a restarted agent.
    """
    return _kill(b"FLUX_EXECUTION_ID=" + execution_id.encode())


def _kill(marker: bytes) -> int:
    killed: set[int] = set()
    for _ in range(_ROUNDS):
        found = [pid for pid in _processes() if pid not in killed and marker in _environment(pid)]
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
