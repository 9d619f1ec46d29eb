"""One execution's control group (version 2): what it is held to, how its tree is ended, what it used.

A group is never used twice: after cgroup.kill kernel 6.1 kills whatever is
cloned into it. Files: Linux's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading
from dataclasses import dataclass

from fluxlib.agent.executor.base import Limits

CPU_PERIOD_US = 100_000
# The kernel refuses quotas under a millisecond.
MIN_MILLICORES = 10
_KILL_ROUNDS = 100
# Each look at the members takes as long as they are many, and everybody's timeouts may wait for this.
_TOGETHER = 64
_PART = 2048  # the kernel gives a file a page at a time, which is some 500 processes: less than half of one is its end


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run used. ``peak_memory_bytes`` is None on kernels before 5.19."""

    peak_memory_bytes: int | None
    cpu_seconds: float | None
    out_of_memory: bool


class RunGroup:
    """One execution's group. ``fd`` is its directory: what it is cloned into.

    ``signal``, ``kill`` and ``close`` may be called from any thread, also after ``close``.
    """

    __slots__ = ("_lock", "fd", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        # A closed descriptor's number may be another group's by the time it is written to.
        self._lock = threading.Lock()
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def limit(self, limits: Limits) -> None:
        if limits.memory_bytes is not None:
            self._set("memory.max", limits.memory_bytes)
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                self._set("memory.swap.max", 0)
        # All or nothing: a function with one of its processes killed would go on half dead.
        self._set("memory.oom.group", 1)
        if limits.processes is not None:
            self._set("pids.max", limits.processes)
        if limits.cpu_millicores is not None:
            self._set("cpu.max", f"{limits.cpu_millicores * CPU_PERIOD_US // 1000} {CPU_PERIOD_US}")

    def processes(self) -> list[int]:
        try:
            return [int(pid) for pid in self._get("cgroup.procs").split()]
        except OSError:
            return []

    def signal(self, number: int) -> None:
        """To every process that is a member now. What is forked meanwhile may miss it."""
        with self._lock:
            if self.fd >= 0:
                self._signal(number)

    def _signal(self, number: int) -> None:
        told = self.processes()
        for first in range(0, len(told), _TOGETHER):
            opened: dict[int, int] = {}
            try:
                for pid in told[first : first + _TOGETHER]:
                    with contextlib.suppress(OSError):
                        opened[pid] = os.pidfd_open(pid)
                # The number may have become another process's before it was opened: a member still is this one.
                members = set(self.processes())
                for pid, process in opened.items():
                    if pid in members:
                        with contextlib.suppress(OSError):
                            signal.pidfd_send_signal(process, number)
            finally:
                for process in opened.values():
                    os.close(process)

    def kill(self) -> None:
        """SIGKILL to every member and to what they fork meanwhile."""
        with self._lock:
            if self.fd >= 0:
                self._kill()

    def _kill(self) -> None:
        try:
            self._set("cgroup.kill", 1)
        except FileNotFoundError:
            self._kill_one_by_one()  # Linux before 5.14
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def _kill_one_by_one(self) -> None:
        # Frozen ones fork no more, and SIGKILL reaches them all the same.
        self._set("cgroup.freeze", 1)
        for _ in range(_KILL_ROUNDS):
            members = self.processes()
            if not members:
                break
            for pid in members:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self._set("cgroup.freeze", 0)

    def figures(self) -> Figures:
        """Final once the group is empty."""
        peak = seconds = None
        with contextlib.suppress(OSError):
            peak = int(self._get("memory.peak"))
        with contextlib.suppress(OSError):
            seconds = _field(self._get("cpu.stat"), b"usage_usec") / 1e6
        killed = 0
        with contextlib.suppress(OSError):
            killed = _field(self._get("memory.events"), b"oom_kill")
        return Figures(peak, seconds, killed > 0)

    def events(self) -> int:
        """A descriptor that reports (POLLPRI) when ``is_empty`` may have changed."""
        return os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)

    def wait_until_empty(self, seconds: float) -> bool:
        events = self.events()
        try:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while not is_empty(events):
                if not poller.poll(seconds * 1000):
                    return is_empty(events)
            return True
        finally:
            os.close(events)

    def remove(self) -> bool:
        """Whether it is gone; False while it has members."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1

    def _set(self, name: str, value: int | str) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)

    def _get(self, name: str) -> bytes:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            text = piece = os.read(fd, 65536)
            while len(piece) >= _PART:
                piece = os.read(fd, 65536)
                text += piece
            return text
        finally:
            os.close(fd)


def is_empty(events: int) -> bool:
    """Reads what ``RunGroup.events`` gave; a group that was removed is empty."""
    try:
        return _field(os.pread(events, 4096, 0), b"populated") == 0
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return True


def _field(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    return 0
