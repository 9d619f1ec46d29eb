"""Removing whole directories of other people's files.

On Unix by descriptors, so that no link leads elsewhere, and by no more of them
than _DEEPEST levels take: what lies deeper is moved up to the top first. A
program can nest directories deeper than paths, stacks and descriptors reach.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from fluxlib.lifecycle import pause

log = logging.getLogger(__name__)

# On Windows a program's file stays in use for a moment after its end, and virus scanners open what is new.
_ATTEMPTS = 5 if sys.platform == "win32" else 1
_BETWEEN_ATTEMPTS = 0.2
# Two descriptors each.
_DEEPEST = 32
# Some file systems skip entries while others are removed; somebody who still writes must not keep this busy for ever.
_IDLE_PASSES = 10
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


def remove_tree(path: str | Path) -> None:
    """All of it. Raises OSError when something stays."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if sys.platform == "win32":
                _remove_by_paths(path)
            else:
                _Removal(os.fspath(path)).run()
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


class _Removal:
    """One tree's. A program that still runs may put anything in anything's place meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._prefix = f".{os.urandom(8).hex()}-"
        self._moved = 0
        self._failed: OSError | None = None
        self._top = _open(path, None)

    def run(self) -> None:
        try:
            idle = 0
            while True:
                before = self._moved
                self._empty(self._top, 1)
                if self._failed is not None:
                    raise self._failed
                idle = idle + 1 if self._moved == before else 0
                try:
                    os.rmdir(self._path)
                    return
                except OSError as error:
                    if error.errno not in _NOT_EMPTY or idle == _IDLE_PASSES:
                        raise
        finally:
            os.close(self._top)

    def _empty(self, directory: int, depth: int) -> None:
        """One look at all of it: what cannot be removed is kept in mind, what comes meanwhile is the next pass's."""
        try:
            # Not as a list: there may be millions.
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        self._remove(entry, directory, depth)
                    except FileNotFoundError:
                        continue
                    except OSError as error:
                        self._failed = self._failed or error
        except OSError as error:
            self._failed = self._failed or error

    def _remove(self, entry: os.DirEntry[str], parent: int, depth: int) -> None:
        name = entry.name
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(name, dir_fd=parent)
        elif _remove_if_empty(name, parent):
            return
        elif depth < _DEEPEST:
            directory = _open(name, parent)
            try:
                self._empty(directory, depth + 1)
            finally:
                os.close(directory)
            _remove_if_empty(name, parent)
        else:
            # What it says of its parent changes, so it has to be writable itself.
            os.close(_open(name, parent))
            self._moved += 1
            os.rename(name, f"{self._prefix}{self._moved}", src_dir_fd=parent, dst_dir_fd=self._top)


def _remove_if_empty(name: str, parent: int) -> bool:
    """Raises OSError for what is mounted: it is somebody else's, and nothing in it has been touched yet."""
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in _NOT_EMPTY:
            raise
        return False
    return True


def _open(name: str, parent: int | None) -> int:
    """A directory, never what a link points to; one that is closed to its owner is opened up."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        directory = os.open(name, flags, dir_fd=parent)
    except PermissionError:
        # Only this kind of descriptor needs no permission, and only by this name it takes a new mode.
        closed = os.open(name, flags | os.O_PATH, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{closed}", 0o700)
        finally:
            os.close(closed)
        return os.open(name, flags, dir_fd=parent)
    try:
        if os.fstat(directory).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.fchmod(directory, 0o700)
    except BaseException:
        os.close(directory)
        raise
    return directory


def _remove_by_paths(path: str | Path) -> None:
    try:
        shutil.rmtree(path, onerror=_make_writable_and_retry)
    except RecursionError as error:
        raise OSError(errno.ELOOP, "its directories are nested too deeply", os.fspath(path)) from error


def _make_writable_and_retry(function: Callable[..., object], path: str, _info: object) -> None:
    """A file's own missing write bit keeps it on Windows."""
    if not os.path.lexists(path):
        return
    for target in (os.path.dirname(path), path):
        if not os.path.islink(target):
            os.chmod(target, 0o700)
    if function in (os.scandir, os.listdir):
        shutil.rmtree(path)
    else:
        function(path)
