"""Work directories are as new for the next execution, and looked into no more often than that needs."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.agent.executor import directories
from fluxlib.agent.executor.directories import WorkDirectories
from tests.support.nesting import nest


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkDirectories]:
    made = WorkDirectories(tmp_path / "work")
    yield made
    made.stop(5)


def use(work: WorkDirectories) -> str:
    owner = 0 if os.geteuid() == 0 else -1
    return work.make(owner, owner)


def test_an_untouched_one_is_used_again_with_one_look(work: WorkDirectories, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "_TICK", -1)  # as if it had been made long ago
    path = use(work)
    work.remove(path)
    looks: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda at: looks.append(at) or scandir(at))  # type: ignore[func-returns-value]
    for _ in range(3):
        assert use(work) == path
        work.remove(path)
    assert looks == []


def test_a_fresh_one_is_looked_into_each_time(work: WorkDirectories, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stamp may be that of a change in the same tick of the clock."""
    monkeypatch.setattr(directories, "_TICK", 10**15)
    path = use(work)
    work.remove(path)
    use(work)
    Path(path, "left").touch()
    work.remove(path)
    assert use(work) != path


@pytest.mark.parametrize("what", ["file", "file and gone", "mode", "times"])
def test_what_was_done_to_it_is_seen(work: WorkDirectories, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    path = use(work)
    monkeypatch.setattr(directories, "_TICK", -1)
    work.remove(path)
    assert use(work) == path
    before = os.stat(path)
    # A tick of the file system's clock, so that the stamp can differ.
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:
        os.utime(path)
    if what.startswith("file"):
        Path(path, "secret").write_text("x")
        if what == "file and gone":
            os.unlink(Path(path, "secret"))
    elif what == "mode":
        os.chmod(path, 0o777)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # what a function would do to hide it
    work.remove(path)
    reused = use(work) == path
    assert reused == (what in ("file and gone", "times"))
    if reused:
        assert os.listdir(path) == []


def test_one_nested_too_deeply_for_a_path_is_removed_now_and_after_a_restart(tmp_path: Path) -> None:
    first = WorkDirectories(tmp_path / "work")
    removed = threading.Event()
    path = use(first)
    nest(path, 1500)
    first.remove(path, removed.set)
    assert removed.wait(30)
    assert not os.path.exists(path)
    nest(use(first), 1500)
    first.stop(5)
    second = WorkDirectories(tmp_path / "work")
    second.stop(5)
    assert os.listdir(tmp_path / "work") == []


@pytest.mark.parametrize("what", [RecursionError("too deep"), PermissionError(1, "Operation not permitted")])
def test_what_cannot_be_removed_keeps_nobody_elses(
    work: WorkDirectories, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: Exception
) -> None:
    def fail(path: str) -> None:
        monkeypatch.undo()
        raise what

    monkeypatch.setattr(directories, "remove_tree", fail)
    stays, goes = use(work), use(work)
    for path in (stays, goes):
        Path(path, "file").touch()
    ended: list[str] = []
    removed = threading.Event()
    with caplog.at_level(logging.ERROR):
        work.remove(stays, lambda: ended.append("stays"))
        work.remove(goes, removed.set)
        assert removed.wait(10)
    assert f"{stays} cannot be removed" in caplog.text
    assert ended == []


def test_what_there_was_no_descriptor_to_remove_with_is_removed_when_there_is(
    work: WorkDirectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "_AGAIN", 0.01)
    remove_tree, failed, released = directories.remove_tree, threading.Event(), threading.Event()

    def watched(path: str) -> None:
        try:
            remove_tree(path)
        except OSError:
            failed.set()
            raise

    monkeypatch.setattr(directories, "remove_tree", watched)
    path = use(work)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        work.remove(path, released.set)  # even an empty one: it cannot be looked into
        assert failed.wait(10)
        assert not released.is_set()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert released.wait(10)
    assert not os.path.exists(path)


def test_one_that_cannot_be_its_users_is_not_left_behind(
    work: WorkDirectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over_quota(path: str, uid: int, gid: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "chown", over_quota)
    with pytest.raises(OSError, match="quota"):
        work.make(1000, 1000)
    assert os.listdir(tmp_path / "work") == []
