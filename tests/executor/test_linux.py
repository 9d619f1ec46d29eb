"""The agent's side of the profiles with cgroups: what becomes of a tree that cannot be ended at once."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxlib.agent.executor import reactor, unix
from fluxlib.agent.executor.cgroup import RunGroup
from fluxlib.agent.executor.reactor import OutputPipe, Reactor
from fluxlib.agent.executor.unix import UnixExecutor, UnixSandbox

SECONDS = 10


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[UnixExecutor]:
    """Without a spawner, whose controllers few machines lend to a test: this is what comes after it."""
    for module in (unix, reactor):
        monkeypatch.setattr(module, "_AGAIN", 0.01)
    executor = UnixExecutor.__new__(UnixExecutor)
    executor._lock = threading.Lock()
    executor._reactor = Reactor("test-reactor")
    executor._reactor.start()
    yield executor
    executor._reactor.stop(SECONDS)


class Tree:
    """A process in a cgroup of its own."""

    def __init__(self, cgroups: Path) -> None:
        path = cgroups / "tree"
        path.mkdir()
        self.group = RunGroup(str(path))
        self.process = subprocess.Popen(["sleep", "600"])
        (path / "cgroup.procs").write_text(str(self.process.pid))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.group.fd >= 0:
            assert self.group.wait_until_empty(SECONDS)
            self.group.remove()
            self.group.close()


@pytest.fixture
def tree(cgroups: Path) -> Iterator[Tree]:
    tree = Tree(cgroups)
    yield tree
    tree.close()


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_kill_without_a_descriptor_is_made_when_there_is_one(executor: UnixExecutor, tree: Tree) -> None:
    sandbox = UnixSandbox(executor, "e-1", -1, -1, keep=False)
    sandbox.group, sandbox.running, sandbox.pid = tree.group, True, tree.process.pid
    with no_descriptors():
        sandbox.kill()
        assert tree.process.poll() is None, "it has to fail for this to show anything"
    assert tree.process.wait(SECONDS) == -9


def test_what_a_program_left_is_ended_when_there_is_a_descriptor(executor: UnixExecutor, tree: Tree) -> None:
    over = threading.Event()
    with no_descriptors():
        executor._end_rest(tree.group, remove=True, then=over.set)
        assert not over.is_set()
    assert tree.process.wait(SECONDS) == -9
    assert over.wait(SECONDS)
    assert not os.path.exists(tree.group.path)


def test_a_tree_of_many_processes_is_told_to_stop_to_the_last(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    processes = RunGroup.processes

    def look(group: RunGroup) -> list[int]:
        found = processes(group)
        looks.append(len(found))
        return found

    monkeypatch.setattr(RunGroup, "processes", look)
    path = cgroups / "crowd"
    path.mkdir()
    group = RunGroup(str(path))
    crowd = f"echo $$ > {path}/cgroup.procs; for n in $(seq 700); do sleep 600 & done; echo up; wait"
    process = subprocess.Popen(["sh", "-c", crowd], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == b"up\n"
        group.signal(signal.SIGTERM)
        emptied = group.wait_until_empty(SECONDS)
    group.kill()
    assert process.wait(SECONDS) == -signal.SIGTERM
    assert group.wait_until_empty(SECONDS)
    group.remove()
    group.close()
    assert emptied
    assert looks[0] == 701
    assert len(looks) < 20


class Unwilling:
    """A poller whose user has no watches left at first."""

    def __init__(self, poller: select.epoll) -> None:
        self._poller = poller
        self.refused = 0

    def register(self, fd: int, events: int) -> None:
        if self.refused < 2:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._poller.register(fd, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)


@pytest.fixture
def unwilling(executor: UnixExecutor) -> Unwilling:
    executor._reactor._poller = poller = Unwilling(executor._reactor._poller)  # type: ignore[assignment]
    return poller


def test_what_a_program_left_is_ended_when_it_can_be_watched(
    executor: UnixExecutor, tree: Tree, unwilling: Unwilling
) -> None:
    over = threading.Event()
    before = len(os.listdir("/proc/self/fd"))
    executor._end_rest(tree.group, remove=True, then=over.set)
    assert over.wait(SECONDS)
    assert unwilling.refused == 2
    assert len(os.listdir("/proc/self/fd")) == before - 1, "its cgroup's"


def test_output_that_cannot_be_watched_yet_keeps_nobody_elses(executor: UnixExecutor, unwilling: Unwilling) -> None:
    came = [threading.Event() for _ in range(3)]
    pipes = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in came]
    for (reading, writing), event in zip(pipes, came, strict=True):
        os.write(writing, b"x")
        executor._reactor.add_pipe(OutputPipe(reading, lambda data, event=event: event.set()))  # type: ignore[misc]
    executor._reactor.call(lambda: None)
    assert [event.wait(SECONDS) for event in came] == [True] * 3
    assert unwilling.refused == 2
    for _, writing in pipes:
        os.close(writing)


def test_it_is_killed_although_its_end_cannot_be_watched_yet(
    executor: UnixExecutor, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def events(group: RunGroup) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(RunGroup, "events", events)
    executor._end_rest(tree.group, remove=True, then=lambda: None)
    assert tree.process.wait(SECONDS) == -9
    monkeypatch.undo()
