"""What every test gets: a state directory of its own, and a detector that is always on.

A test that leaves a thread, a child process or a temporary CA behind fails.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# gRPC's own event threads and hypothesis' live as long as the process.
_NOT_OURS = ("grpc", "_channel_spin", "pydev", "asyncio_", "Thread-")


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads and children that appear during a test must be gone at its end.

    Waits a moment for those on their way out; module- and session-wide fixtures
    set up before the test are not counted. Mark ``leaks`` with a reason to opt out.
    """
    threads_before = set(threading.enumerate())
    children_before = set(_children(os.getpid()))
    yield
    if request.node.get_closest_marker("leaks") is not None:
        return
    deadline = time.monotonic() + 5
    gone = threading.Event()
    while True:
        threads = [
            thread.name
            for thread in threading.enumerate()
            if thread not in threads_before and not thread.name.startswith(_NOT_OURS)
        ]
        children = [child for child in _processes(set(_children(os.getpid())) - children_before) if _alive(child)]
        if not threads and not children:
            return
        if time.monotonic() > deadline:
            break
        gone.wait(0.02)
    for child in children:
        child.kill()
    pytest.fail(f"left behind: threads {threads}, processes {[_describe(child) for child in children]}")


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


def _processes(pids: set[int]) -> Iterator[psutil.Process]:
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


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """An empty directory only its owner may enter, as the programs make theirs."""
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(scope="session")
def top() -> Path:
    """The top of the source tree."""
    return Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks(reason): this test may leave threads or processes behind")
    # Children the tests start must not need an installed package.
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
