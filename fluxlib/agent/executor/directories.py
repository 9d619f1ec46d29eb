"""Private work directories: one per execution, gone afterwards.

An empty one is kept for the same user's next execution, or removed on the spot. What a function filled is removed by a
thread of its own: a million files must not hold up everybody's output.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fluxlib.agent.removal import discard, remove_tree

log = logging.getLogger(__name__)

# A path, and what is called when nothing of it is left.
_Task = tuple[str, Callable[[], None] | None]

# Of one owner, kept empty: as many as may run at once on a busy node.
_SPARE = 64
# How long what cannot be removed is left alone (seconds).
_AGAIN = 30.0
# File systems stamp changes with the time of the last clock tick: older than this (ns), a stamp is no later change's.
_TICK = 50_000_000


class WorkDirectories:
    """Makes and removes directories under ``root``; what the previous run left there goes at the start."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._spare: dict[int, list[str]] = {}  # by owner
        self._stamps: dict[str, int] = {}  # of the last change before one was found empty
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        if root.exists():
            discard(root)
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        os.chmod(root, 0o711)
        self._thread = threading.Thread(target=self._run, name="work-directories", daemon=True)
        self._thread.start()

    def make(self, uid: int, gid: int) -> str:
        """An empty directory of that owner, 0700. ``uid`` -1 leaves it the agent's.

        Its name cannot be guessed, and says nothing of an execution: it may have served another one before.
        """
        try:
            return self._spare[uid].pop()
        except (KeyError, IndexError):
            pass
        path = os.path.join(self._root, secrets.token_hex(8))
        os.mkdir(path, 0o700)
        try:
            if uid >= 0:
                os.chown(path, uid, gid)
        except OSError:
            os.rmdir(path)
            raise
        return path

    def remove(self, path: str, then: Callable[[], None] | None = None) -> None:
        """``then`` is called when nothing of it is left, at once or from the removing thread."""
        try:
            if self._keep(path):
                if then is not None:
                    then()
                return
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError:
            self._queue.put((path, then))
            return
        if then is not None:
            then()

    def _keep(self, path: str) -> bool:
        """Whether it is as new, and kept for the same user's next execution.

        Making and removing one waits for the file system's journal: about a millisecond of the thread that
        reads everybody's output.
        """
        found = os.lstat(path)
        if self._stamps.get(path) != found.st_ctime_ns and not self._is_as_new(path, found):
            self._stamps.pop(path, None)
            return False
        uid = found.st_uid if os.geteuid() == 0 else -1
        spare = self._spare.setdefault(uid, [])
        if len(spare) >= _SPARE:
            self._stamps.pop(path, None)
            return False
        spare.append(path)
        return True

    def _is_as_new(self, path: str, found: os.stat_result) -> bool:
        """A look inside. What is done to it later changes a stamp that nobody can set: then there is another look."""
        if found.st_mode != stat.S_IFDIR | 0o700 or _holds_anything(path):
            return False
        if not hasattr(os, "listxattr") or os.listxattr(path, follow_symlinks=False):
            return False
        if time.time_ns() - found.st_ctime_ns > _TICK:
            self._stamps[path] = found.st_ctime_ns
        return True

    def stop(self, timeout: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        stayed: list[_Task] = []
        again_at = 0.0
        while True:
            left = again_at - time.monotonic()
            try:
                # New work must not keep the leftovers waiting for ever.
                if stayed and left <= 0:
                    raise queue.Empty
                task = self._queue.get(timeout=left if stayed else None)
                if task is None:
                    return
                failed = self._try([task], logging.ERROR)
                if not stayed:
                    again_at = time.monotonic() + _AGAIN
                stayed += failed
            except queue.Empty:
                stayed = self._try(stayed, logging.DEBUG)
                again_at = time.monotonic() + _AGAIN

    def _try(self, tasks: list[_Task], level: int) -> list[_Task]:
        """Those of which something stays."""
        stayed = []
        for path, then in tasks:
            # Whatever it is: without this thread nothing is removed any more, and no user is used again.
            try:
                remove_tree(path)
                if then is not None:
                    then()
            except OSError as error:
                # Its user is not used again before it is gone. When descriptors run out, that is everybody's who ends.
                log.log(level, "the work directory %s cannot be removed: %s; trying again", path, error)
                stayed.append((path, then))
            except Exception:
                log.exception("the work directory %s cannot be removed", path)
        return stayed


def _holds_anything(path: str) -> bool:
    # Not a list of them: there may be millions.
    with os.scandir(path) as entries:
        return next(entries, None) is not None
