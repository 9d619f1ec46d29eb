"""What is left behind: threads, children, and programs of functions that nobody owns any more.

Used by tests/conftest.py after each test, and once more when a session (each
worker of xdist has one) has torn its last fixture down.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil


class Detector:
    """Remembers what there is, and says later what has been added and does not go away."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._children = set(_children(os.getpid()))

    def left(self, seconds: float, more: Callable[[], list[str]] = list) -> list[str]:
        """Empty, or what is still there after ``seconds``; children among it are killed. ``more`` finds others."""
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while True:
            threads = [thread for thread in threading.enumerate() if thread not in self._threads and _ours(thread)]
            children = [child for child in _processes(set(_children(os.getpid())) - self._children) if _alive(child)]
            others = more()
            if not threads and not children and not others:
                return []
            if time.monotonic() > deadline:
                break
            pause.wait(0.02)
        found = [f"thread {thread.name}" for thread in threads]
        found += [f"process {_describe(child)}" for child in children]
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        return found + others


class Places:
    """The directories a session's tests make, and so whose functions are whose on a shared machine."""

    def __init__(self) -> None:
        self._made: list[str] = []
        self._mkdtemp = tempfile.mkdtemp

    def watch(self) -> None:
        tempfile.mkdtemp = self._recorded  # type: ignore[assignment]

    def add(self, directory: Path) -> None:
        self._made.append(str(directory))

    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        made = self._mkdtemp(*args, **kwargs)
        self._made.append(os.fspath(made))
        return made

    def orphans(self) -> list[str]:
        """Living programs of functions in these directories. Linux; those of other users as root only."""
        found = []
        for pid in _numbers("/proc"):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    variables = dict(item.partition(b"=")[::2] for item in file.read().split(b"\0"))
            except OSError:
                continue
            if b"FLUX_EXECUTION_ID" not in variables:
                continue
            home = os.fsdecode(variables.get(b"HOME", b""))
            if any(home == made or home.startswith(made + os.sep) for made in self._made):
                found.append(f"a function's process {pid} of {home}")
        return found


def _ours(thread: threading.Thread) -> bool:
    """gRPC's own threads outlive their channel a little, or live as long as the process."""
    target = getattr(thread, "_target", None)
    return not str(getattr(target, "__module__", "")).startswith("grpc")


def _numbers(directory: str) -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(name) for name in os.listdir(directory) if name.isdigit())


def _children(pid: int) -> list[int]:
    """Children and theirs. psutil would look at every process of the machine, twice for each test."""
    if not Path("/proc/self/task").is_dir():
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found += [int(child) for child in file.read().split()]
    return found + [one for child in found for one in _children(child)]


def _processes(pids: Iterable[int]) -> Iterator[psutil.Process]:
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return str(process.pid)
