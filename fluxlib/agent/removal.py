"""Removing whole directories of other people's files."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from fluxlib.lifecycle import pause

log = logging.getLogger(__name__)

# On Windows a program's file stays in use for a moment after its end, and virus scanners open what is new.
_ATTEMPTS = 5 if sys.platform == "win32" else 1
_BETWEEN_ATTEMPTS = 0.2


def remove_tree(path: str | Path) -> None:
    """All of it. Raises OSError when something stays."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            shutil.rmtree(path, onerror=None if _is_root() else _make_writable_and_retry)
            return
        except OSError:
            if attempt == _ATTEMPTS:
                raise
            pause(_BETWEEN_ATTEMPTS * attempt)


def discard(path: str | Path) -> None:
    """As much of it as can be removed; what stays is logged and is the next start's."""
    try:
        remove_tree(path)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error)


def _is_root() -> bool:
    """Who needs no write bit, and must do nothing again by its path.

    A program that still runs may put a link in a directory's place meanwhile. rmtree itself goes by descriptors.
    """
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _make_writable_and_retry(function: Callable[..., object], path: str, _info: object) -> None:
    """A missing write bit: a parent's counts for removing on Unix, the file's own on Windows."""
    if not os.path.lexists(path):
        return
    for target in (os.path.dirname(path), path):
        if not os.path.islink(target):
            os.chmod(target, 0o700)
    if function in (os.open, os.scandir, os.listdir):
        shutil.rmtree(path)
    else:
        function(path)
