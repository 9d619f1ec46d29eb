"""Work done in the background on a bounded number of threads, which never hold up the end of the process."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from fluxlib.lifecycle import Deadline

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """Does things soon, on at most ``threads`` threads of its own, which start as they are needed.

    Unlike an executor's they are daemons: what still blocks when ``stop``'s deadline has passed does not
    hold up the end of the process. ``work`` must catch what it raises; what it does not is logged.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._most = threads
        self._condition = threading.Condition()
        self._queue: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._stopping = False

    def submit(self, work: Callable[..., object], *arguments: Any) -> bool:
        """False: it will not be done, the pool was stopped."""
        with self._condition:
            if self._stopping:
                return False
            self._queue.append((work, arguments))
            if self._idle >= len(self._queue):
                self._condition.notify()
            elif len(self._threads) < self._most:
                self._grow()
            return True

    def _grow(self) -> None:
        """One more thread; where the machine has none left, those that are there do it."""
        thread = threading.Thread(target=self._run, name=f"{self.name}-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                self._queue.pop()  # whoever is told that it failed does not expect it to be done
                raise
            log.warning("%s has to make do with %d threads: %s", self.name, len(self._threads), error)
        else:
            self._threads.append(thread)

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R | None]:
        """What ``work`` answered of each item, once all are done; None: it was not, the pool was stopped."""
        futures: list[Future[R]] = [Future() for _ in items]
        for future, item in zip(futures, items, strict=True):
            if not self.submit(_fulfil, future, work, item):
                future.cancel()
        return [_outcome(future) for future in futures]

    def stop(self, deadline: Deadline) -> list[tuple[Any, ...]]:
        """Begin nothing more and wait for what was begun; the arguments of what was not."""
        with self._condition:
            self._stopping = True
            left = [arguments for _, arguments in self._queue]
            for work, arguments in self._queue:
                if work is _fulfil:
                    arguments[0].cancel()
            self._queue.clear()
            self._condition.notify_all()
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(deadline.remaining())
        late = sum(thread.is_alive() for thread in threads)
        if late:
            log.warning("%d threads of %s did not end in time", late, self.name)
        return left

    def _run(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                self._condition.wait_for(lambda: self._queue or self._stopping)
                self._idle -= 1
                if not self._queue:
                    return
                work, arguments = self._queue.popleft()
            try:
                work(*arguments)
            except Exception:
                log.exception("a thread of %s failed, and goes on", self.name)
            # Not kept until the next one comes: it may be megabytes.
            del work, arguments


class KeyedPool:
    """Jobs in the background: one at a time for each key, a bounded number of them together.

    A job may block for minutes where nothing can interrupt it (a cloud's SDK): it must have recorded what it does
    before it does it. ``stopping`` is set by ``stop``; jobs look at it between their steps, and wait on it instead of
    sleeping.
    """

    def __init__(self, name: str, threads: int = 16) -> None:
        self.stopping = threading.Event()
        self._name = name
        self._pool = Pool(name, threads)
        self._condition = threading.Condition()
        self._busy: set[str] = set()  # keys with a job that is queued or running
        self._next: dict[str, Callable[[], object]] = {}

    def submit(self, key: str, job: Callable[[], object]) -> bool:
        """Do it soon. False when there is a job for that key already, or this pool stops."""
        with self._condition:
            if self.stopping.is_set() or key in self._busy:
                return False
            self._busy.add(key)
        return self._start(key, job)

    def submit_after(self, key: str, job: Callable[[], object]) -> None:
        """As ``submit``, after the job for that key that is there; of several the last one counts."""
        with self._condition:
            if key in self._busy and not self.stopping.is_set():
                self._next[key] = job
                return
        self.submit(key, job)

    def busy(self, key: str) -> bool:
        with self._condition:
            return key in self._busy

    def wait(self, keys: Iterable[str], seconds: float | None = None) -> bool:
        """Until there is no job for any of these, or this pool stops; False when that takes longer."""
        keys = set(keys)
        with self._condition:
            return self._condition.wait_for(lambda: self.stopping.is_set() or not keys & self._busy, seconds)

    def stop(self, deadline: Deadline) -> None:
        """Drop what has not begun; what runs may end its step until the deadline."""
        with self._condition:
            self.stopping.set()
            self._next.clear()
            self._condition.notify_all()
        dropped = {key for key, _ in self._pool.stop(deadline)}
        with self._condition:
            self._busy -= dropped
            self._condition.notify_all()

    def _start(self, key: str, job: Callable[[], object]) -> bool:
        started = False
        try:
            started = self._pool.submit(self._run, key, job)
        finally:
            if not started:  # also when the machine has no thread left
                with self._condition:
                    self._busy.discard(key)
                    self._condition.notify_all()
        return started

    def _run(self, key: str, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception:
            log.exception("the job for %s failed in %s", key, self._name)
        with self._condition:
            following = self._next.pop(key, None)
            if following is None:
                self._busy.discard(key)
            self._condition.notify_all()
        if following is not None:
            self._start(key, following)


def _fulfil(future: Future[R], work: Callable[[T], R], item: T) -> None:
    try:
        future.set_result(work(item))
    except Exception as error:
        future.set_exception(error)


def _outcome(future: Future[R]) -> R | None:
    try:
        return future.result()
    except CancelledError:
        return None
