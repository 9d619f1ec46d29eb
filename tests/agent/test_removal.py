"""Directories of other people's files are removed, and nothing else is."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fluxlib.agent.removal import discard, remove_tree
from tests.support.need import lacking, need, need_root
from tests.support.nesting import nest

_NOBODY = 65534


def nested(top: Path, levels: int, *, link: Path, name: str = "deeper") -> None:
    """Every hundredth level holds a file, and links to what is outside."""

    def fill(at: int, level: int) -> None:
        if level % 100 == 0:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
            os.symlink(link, "link", dir_fd=at)
            os.symlink(link / "kept", "link-to-file", dir_fd=at)

    nest(top, levels, name, fill)


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def nobody() -> Iterator[Path]:
    """A directory of somebody without rights, who this process is meanwhile."""
    root = os.geteuid() == 0
    if root:
        os.setegid(_NOBODY)
        os.seteuid(_NOBODY)
    directory = Path(tempfile.mkdtemp())
    try:
        yield directory
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)
        shutil.rmtree(directory)


def test_directories_deeper_than_a_path(tmp_path: Path) -> None:
    outside, work = tmp_path / "outside", tmp_path / "work"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    work.mkdir()
    nested(work, 3000, link=outside)
    # Two chains, one of which comes up where the other's parts are.
    (work / "other").mkdir()
    nested(work / "other", 200, link=outside)
    with few_descriptors(80):
        remove_tree(work)
    assert os.listdir(tmp_path) == ["outside"]
    assert (outside / "kept").read_text() == "kept"


def test_closed_directories_in_closed_ones() -> None:
    with nobody() as directory:
        for name in ("a/b/c", "a/d"):
            (directory / "work" / name).mkdir(parents=True)
            (directory / "work" / name / "file").touch(mode=0)
        for name in ("a/b/c", "a/b", "a/d", "a", "."):
            (directory / "work" / name).chmod(0o500 if name == "a/d" else 0)
        remove_tree(directory / "work")
        assert os.listdir(directory) == []


def test_deep_closed_directories() -> None:
    with nobody() as directory:
        (directory / "work").mkdir()
        at = os.open(directory / "work", os.O_RDONLY)
        for _ in range(100):
            os.mkdir("d", dir_fd=at)
            inner = os.open("d", os.O_RDONLY, dir_fd=at)
            os.fchmod(at, 0)
            os.close(at)
            at = inner
        os.close(at)
        remove_tree(directory / "work")
        assert os.listdir(directory) == []


def test_what_stays_keeps_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/one", "b/stays", "c/three"):
        (tmp_path / "work" / name).parent.mkdir(parents=True)
        (tmp_path / "work" / name).touch()
    unlink = os.unlink

    def refuse(name: str, *, dir_fd: int | None = None) -> None:
        if name == "stays":
            raise PermissionError(1, "Operation not permitted", name)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(OSError, match="stays"):
        remove_tree(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["b", "stays"]


def test_a_link_is_no_directory_to_remove(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "kept").touch()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(OSError, match="link"):
        remove_tree(tmp_path / "link")
    assert (tmp_path / "real" / "kept").exists()


def test_what_is_mounted_in_it_is_somebody_elses(tmp_path: Path) -> None:
    need_root()
    need("mount", "umount")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "kept").touch()
    place = tmp_path / "work" / "sub"
    place.mkdir(parents=True)
    # The same file system: its number tells nothing.
    if subprocess.run(["mount", "--bind", tmp_path / "precious", place], capture_output=True).returncode != 0:
        lacking("needs to mount")
    try:
        with pytest.raises(OSError, match="sub"):
            remove_tree(tmp_path / "work")
        assert (tmp_path / "precious" / "kept").exists()
    finally:
        subprocess.run(["umount", place], check=True)
    remove_tree(tmp_path / "work")


def test_nobody_leads_root_elsewhere_while_it_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program puts a link in the place of a directory that is just being emptied."""
    need_root()
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o755)
    (precious / "passwd").write_text("kept")
    bait = tmp_path / "work" / "sub"
    bait.mkdir(parents=True)
    (bait / "passwd").write_text("")
    unlink = os.unlink
    swapped: list[str] = []

    def swap(name: str, *, dir_fd: int | None = None) -> None:
        if name == "passwd" and not swapped:
            swapped.append(name)
            bait.rename(tmp_path / "work" / "elsewhere")
            bait.symlink_to(precious)
            raise PermissionError(1, "Operation not permitted", name)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", swap)
    with pytest.raises(OSError, match="passwd"):
        remove_tree(tmp_path / "work")
    assert swapped
    assert (precious / "passwd").read_text() == "kept"
    assert precious.stat().st_mode & 0o777 == 0o755
    discard(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert (precious / "passwd").read_text() == "kept"
