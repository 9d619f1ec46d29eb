"""The agent's side of the profiles with cgroups: what becomes of a tree that cannot be ended at once."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.agent.executor import linux
from fluxlib.agent.executor.base import Exit, Job
from fluxlib.agent.executor.cgroup import RunGroup
from fluxlib.agent.executor.launch import Launch
from fluxlib.agent.executor.linux import LinuxExecutor
from fluxlib.agent.executor.reactor import OutputPipe, Reactor
from fluxlib.agent.executor.spawned import Spawned

SECONDS = 10


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[LinuxExecutor]:
    """Without a spawner, whose controllers few machines lend to a test: this is what comes after it."""
    monkeypatch.setattr(linux, "_AGAIN", 0.01)
    executor = LinuxExecutor.__new__(LinuxExecutor)
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


def test_a_kill_without_a_descriptor_is_made_when_there_is_one(executor: LinuxExecutor, tree: Tree) -> None:
    job = Job("e-1", ("/bin/sleep",), {}, Path("/"))
    spawned = Spawned(executor, 1, job, Launch(own=tree.group), OutputPipe(-1, lambda data: None))
    spawned.pid = tree.process.pid
    with no_descriptors():
        spawned.kill()
        assert tree.process.poll() is None, "it has to fail for this to show anything"
    assert tree.process.wait(SECONDS) == -9


def test_what_a_program_left_is_ended_when_there_is_a_descriptor(executor: LinuxExecutor, tree: Tree) -> None:
    ends: list[Exit] = []
    over = threading.Event()
    with no_descriptors():
        executor._end_rest(tree.group, Exit(exit_code=0), lambda ended: (ends.append(ended), over.set()))
        assert not ends
    assert tree.process.wait(SECONDS) == -9
    assert over.wait(SECONDS)
    assert ends[0].exit_code == 0
    assert not os.path.exists(tree.group.path)


def test_it_is_killed_although_its_end_cannot_be_watched_yet(
    executor: LinuxExecutor, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def events(group: RunGroup) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(RunGroup, "events", events)
    executor._end_rest(tree.group, Exit(exit_code=0), lambda ended: None)
    assert tree.process.wait(SECONDS) == -9
    monkeypatch.undo()
