"""The numeric users of running slots: one per run, never two at a time, never anybody else's."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from pathlib import Path

from fluxlib.errors import AtCapacity, Unenforceable

_SUBORDINATE = (Path("/etc/subuid"), Path("/etc/subgid"))


class Users:
    """``count`` users from ``first`` on, without passwd entries; each also names its own group.

    The one that rested longest is taken, so that a mistake elsewhere shows as late as possible
    in a number met again.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count
        self._lock = threading.Lock()
        self._free = deque(range(first, first + count))

    def take(self) -> int:
        """Raises AtCapacity when all are in use, or files of ended runs are still being removed."""
        with self._lock:
            if not self._free:
                raise AtCapacity(
                    f"all {self.count} users of uid_range are in use: set a larger uid_range", retry_after=1
                )
            return self._free.popleft()

    def give_back(self, uid: int) -> None:
        """Only when nothing of that user is left: no process, no file."""
        with self._lock:
            self._free.append(uid)


def check_range(first: int, count: int, subordinate: tuple[Path, ...] = _SUBORDINATE) -> None:
    """Raises Unenforceable when one of the users is somebody: an account, a container's range, a running process."""
    problem = _account(first, count) or _delegated(first, count, subordinate) or _process(first, count)
    if problem:
        raise Unenforceable(f"uid_range {first}+{count} overlaps {problem}: choose another `uid_range` in agent.yaml")


def _account(first: int, count: int) -> str:
    import grp
    import pwd

    for number in range(first, first + count):
        with contextlib.suppress(KeyError):
            return f"the user {pwd.getpwuid(number).pw_name} ({number})"
        with contextlib.suppress(KeyError):
            return f"the group {grp.getgrgid(number).gr_name} ({number})"
    return ""


def _delegated(first: int, count: int, files: tuple[Path, ...]) -> str:
    for file in files:
        try:
            lines = file.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            owner, _, numbers = line.partition(":")
            start, _, length = numbers.partition(":")
            if start.isdigit() and length.isdigit() and int(start) < first + count and first < int(start) + int(length):
                return f"the range {numbers} of {owner} in {file}"
    return ""


def _process(first: int, count: int) -> str:
    """By getpriority, which sees every process; /proc may hide them from the agent's unit."""
    for number in range(first, first + count):
        with contextlib.suppress(ProcessLookupError):
            os.getpriority(os.PRIO_USER, number)
            if not _only_zombies(number):
                return f"processes that run as user {number}"
    return ""


def _only_zombies(user: int) -> bool:
    """Whether all that is left of ``user`` waits to be reaped: the first process of many a container never does that.

    False where /proc hides them.
    """
    dead = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                lines = Path("/proc", name, "status").read_text(errors="replace").splitlines()
                fields = dict(line.split(":", 1) for line in lines if ":" in line)
                if int(fields["Uid"].split()[0]) == user:
                    # The first thread may have ended before the others.
                    dead.append(fields["State"].split()[0] == "Z" and int(fields["Threads"]) <= 1)
    return bool(dead) and all(dead)
