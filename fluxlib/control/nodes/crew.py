"""Work on nodes in the background: one job at a time for each node, a bounded number of them together.

A job may wait for minutes inside a cloud's SDK, which nothing can interrupt. Its
threads do not hold up the end of the process: whatever a job does is recorded
before it is done, and the next life goes on with it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable

from fluxlib.lifecycle import Deadline

log = logging.getLogger(__name__)


class Crew:
    """``stopping`` is set by ``stop``: jobs look at it between their steps, and wait on it instead of sleeping."""

    def __init__(self, at_a_time: int = 16) -> None:
        self.stopping = threading.Event()
        self._at_a_time = at_a_time
        self._condition = threading.Condition()
        self._queue: deque[tuple[str, Callable[[], None]]] = deque()
        self._names: set[str] = set()
        self._next: dict[str, Callable[[], None]] = {}
        self._threads: set[threading.Thread] = set()

    def start(self, name: str, job: Callable[[], None]) -> bool:
        """Have it done soon. False when a job of that name is under way, or this process stops."""
        with self._condition:
            if self.stopping.is_set() or name in self._names:
                return False
            self._enqueue(name, job)
            return True

    def follow(self, name: str, job: Callable[[], None]) -> None:
        """As ``start``, after the job of that name that is under way; the last one asked for counts."""
        with self._condition:
            if name in self._names and not self.stopping.is_set():
                self._next[name] = job
                return
        self.start(name, job)

    def busy(self, name: str) -> bool:
        with self._condition:
            return name in self._names

    def wait(self, names: Iterable[str], seconds: float | None = None) -> bool:
        """Until none of these is under way, or this process stops; False when that takes longer."""
        names = set(names)
        with self._condition:
            return self._condition.wait_for(lambda: self.stopping.is_set() or not names & self._names, seconds)

    def stop(self, deadline: Deadline) -> None:
        """What was not begun is dropped; what is under way may end its step until the deadline."""
        with self._condition:
            self.stopping.set()
            for name, _ in self._queue:
                self._names.discard(name)
            self._queue.clear()
            self._next.clear()
            self._condition.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join(deadline.remaining())
            if thread.is_alive():
                log.warning("work on a node goes on with the next start of Flux")

    def _work(self) -> None:
        while True:
            with self._condition:
                if not self._queue:
                    self._threads.discard(threading.current_thread())
                    return
                name, job = self._queue.popleft()
            try:
                job()
            except Exception:
                log.exception("work on the node %s failed", name)
            finally:
                with self._condition:
                    self._names.discard(name)
                    following = self._next.pop(name, None)
                    if following is not None:
                        self._enqueue(name, following)
                    self._condition.notify_all()

    def _enqueue(self, name: str, job: Callable[[], None]) -> None:
        self._names.add(name)
        self._queue.append((name, job))
        if len(self._threads) < self._at_a_time:
            thread = threading.Thread(target=self._work, name="nodes", daemon=True)
            self._threads.add(thread)
            thread.start()
