"""Directories that killed starts of a program in one file left: who removes which."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib.windows import unpacked

pytestmark = pytest.mark.windows


def directory(temp: Path, process: int, *, ours: bool = True) -> Path:
    """As PyInstaller's bootloader names and fills it."""
    made = temp / f"_MEI{process:08x}2"
    (made / "grpc").mkdir(parents=True)
    for name in ("python311.dll", "grpc/cygrpc.pyd", *([unpacked.MARKER] if ours else [])):
        (made / name).write_text("x")
    return made


@pytest.fixture
def ended() -> int:
    """The ID of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL)
    process.wait(60)
    return process.pid


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = directory(tmp_path, os.getpid())
    monkeypatch.setattr(sys, "_MEIPASS", str(made), raising=False)
    monkeypatch.setattr(unpacked, "_held", [])
    return made


def test_what_a_killed_start_left_is_removed(tmp_path: Path, own: Path, ended: int) -> None:
    left = directory(tmp_path, ended)
    (left / f"flux-in-use-{ended + 1}").touch()
    unpacked.keep_tidy()
    assert not left.exists()
    assert (own / "python311.dll").exists()


def test_what_is_in_use_stays_as_it_is(tmp_path: Path, own: Path, ended: int) -> None:
    """Also when only the bootloader was killed: the program itself holds its mark open."""
    left = directory(tmp_path, ended)
    with (left / "flux-in-use-1").open("w"):
        unpacked.keep_tidy()
        assert (left / "grpc" / "cygrpc.pyd").exists()
    unpacked.keep_tidy()
    assert not left.exists()


def test_one_that_is_being_unpacked_stays(tmp_path: Path, own: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        starting = directory(tmp_path, process.pid)
        unpacked.keep_tidy()
        assert (starting / "python311.dll").exists()
    finally:
        process.communicate(b"\n")


def test_another_programs_directory_stays(tmp_path: Path, own: Path, ended: int) -> None:
    other = directory(tmp_path, ended, ours=False)
    unpacked.keep_tidy()
    assert (other / "python311.dll").exists()


def test_the_own_mark_cannot_be_deleted_while_this_runs(own: Path) -> None:
    unpacked.keep_tidy()
    with pytest.raises(PermissionError):
        (own / f"flux-in-use-{os.getpid()}").unlink()
