"""The directory that a program in one file unpacks itself into, and those that killed starts left behind.

PyInstaller's bootloader is a process of its own: it unpacks to ``%TEMP%\\_MEI`` and its process ID in eight hexadecimal
digits, starts the program from there, and removes the directory when the program has ended. When both are killed nobody
does, and each start would leave 80 MB.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

# flux.spec puts it first into the archive, so that it is there however early a start was killed.
MARKER = "0-flux.txt"
_IN_USE = "flux-in-use-"
_held: list[object] = []  # open as long as this process lives


def keep_tidy() -> None:
    """Mark this process's directory as in use, and remove those that nobody uses. Nothing where it is not unpacked."""
    own = Path(getattr(sys, "_MEIPASS", ""))
    if not own.name.startswith("_MEI"):
        return
    try:
        # Windows deletes no file that is open: neither anybody's attempt below nor the bootloader's.
        _held.append(open(own / f"{_IN_USE}{os.getpid()}", "w"))  # noqa: SIM115
        for directory in own.parent.glob("_MEI????????*"):
            if directory != own and (directory / MARKER).exists():
                _remove_stale(directory)
    except OSError:
        pass  # a temporary directory that may not be listed, or is full


def _remove_stale(directory: Path) -> None:
    try:
        if _is_starting(directory):
            return
        # First of all these: where one cannot be removed the program still runs, without its bootloader.
        for mark in directory.glob(f"{_IN_USE}*"):
            mark.unlink()
    except (OSError, ValueError):
        return
    # The marker last: what is left of a removal that was broken off is found by the next.
    for entry in directory.iterdir():
        if entry.name != MARKER:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _is_starting(directory: Path) -> bool:
    """Whether the process that made it is alive: the same number may be another one's by now, a younger process's."""
    import psutil

    try:
        made_by = psutil.Process(int(directory.name[4:12], 16))
        return bool(made_by.create_time() <= directory.stat().st_ctime)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
