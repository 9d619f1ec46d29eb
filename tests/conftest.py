"""What every test gets: a state directory of its own, and a detector that is always on.

A test that leaves a thread, a child process or a temporary CA behind fails.
"""

from __future__ import annotations

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
    children_before = {child.pid for child in psutil.Process().children(recursive=True)}
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
        children = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.pid not in children_before and _alive(child)
        ]
        if not threads and not children:
            return
        if time.monotonic() > deadline:
            break
        gone.wait(0.02)
    for child in children:
        child.kill()
    pytest.fail(f"left behind: threads {threads}, processes {[_describe(child) for child in children]}")


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
