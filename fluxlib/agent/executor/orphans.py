"""What left its program's process group: as a subreaper, the spawner becomes its parent.

Part of the spawner, for programs without a cgroup: standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from fluxlib.agent.executor.child import Child

_SWEEPS = 200
_PART = 2048  # the kernel gives such a file a page at a time: less than half of one is its end


class Orphans:
    """The adopted children of this process. ``programs``: what it started, by process; the spawner's own table."""

    def __init__(self, programs: dict[int, Child]) -> None:
        self._programs = programs
        self._file = f"/proc/self/task/{os.getpid()}/children"
        self._children = -1

    def of(self, execution_id: bytes) -> list[int]:
        """Those of this execution, or of none that still runs (their environment was wiped)."""
        adopted = [pid for pid in self._listed() if pid not in self._programs]
        if not adopted:
            return []
        running = {program.execution_id for program in self._programs.values()}
        return [pid for pid in adopted if (owner := _execution_of(pid)) == execution_id or owner not in running]

    def sweep(self, execution_id: bytes) -> None:
        """Kill them and wait for it. Each round's dead hand their own children over, until there are none."""
        for _ in range(_SWEEPS):
            orphans = self.of(execution_id)
            if not orphans:
                return
            kill(orphans, signal.SIGKILL)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _listed(self) -> list[int]:
        try:
            if self._children < 0:
                self._children = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            # From its beginning each time, which makes the kernel write it anew.
            listed = piece = os.pread(self._children, 65536, 0)
            while len(piece) >= _PART:
                piece = os.pread(self._children, 65536, len(listed))
                listed += piece
        except OSError:
            return []  # /proc is hidden: the process group has to do
        return [int(pid) for pid in listed.split()]


def kill(processes: Collection[int], number: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _execution_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            for item in file.read().split(b"\0"):
                if item.startswith(b"FLUX_EXECUTION_ID="):
                    return item.partition(b"=")[2]
    except OSError:
        pass
    return b""
