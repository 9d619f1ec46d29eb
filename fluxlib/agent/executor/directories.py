"""Private work directories: one per execution, gone afterwards.

An empty one is removed on the spot. What a function filled is removed by a
thread of its own: a million files must not hold up everybody's output.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from fluxlib.agent.removal import discard, remove_tree

log = logging.getLogger(__name__)


class WorkDirectories:
    """Makes and removes directories under ``root``; what an earlier life left there goes at the start."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._queue: queue.SimpleQueue[tuple[str, Callable[[], None] | None] | None] = queue.SimpleQueue()
        if root.exists():
            discard(root)
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        os.chmod(root, 0o711)
        self._thread = threading.Thread(target=self._run, name="work-directories", daemon=True)
        self._thread.start()

    def make(self, name: str, uid: int, gid: int) -> str:
        """A new directory of that owner, 0700. ``uid`` -1 leaves it the agent's."""
        path = os.path.join(self._root, name)
        os.mkdir(path, 0o700)
        if uid >= 0:
            os.chown(path, uid, gid)
        return path

    def remove(self, path: str, then: Callable[[], None] | None = None) -> None:
        """``then`` is called when nothing of it is left, at once or from the removing thread."""
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError:
            self._queue.put((path, then))
            return
        if then is not None:
            then()

    def stop(self, timeout: float) -> None:
        self._queue.put(None)
        self._thread.join(timeout)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            path, then = task
            try:
                remove_tree(path)
            except OSError as error:
                log.error("the work directory %s cannot be removed: %s", path, error)
                continue  # its user is not used again
            if then is not None:
                then()
