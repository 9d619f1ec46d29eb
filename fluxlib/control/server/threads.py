"""The threads requests are served on: many when many wait, few when few do."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Protocol

from fluxlib.lifecycle import Deadline

log = logging.getLogger(__name__)

_IDLE_SECONDS = 60.0


class Task(Protocol):
    """A channel with a request to serve."""

    def service(self) -> None: ...

    def cancel(self) -> None: ...


class _Worker:
    """One thread. ``wake`` is held while it has nothing to do and released to hand it ``task``."""

    __slots__ = ("task", "thread", "wake")

    def __init__(self, pool: LazyThreads, number: int, task: Task) -> None:
        self.task: Task | None = task
        self.wake = threading.Lock()
        self.wake.acquire()
        self.thread = threading.Thread(target=pool.work, args=(self,), name=f"http-{number}", daemon=True)


class LazyThreads:
    """waitress's task dispatcher, with threads made when they are needed and ended when idle for long.

    The thread that went idle last is used next: its stack is still in the
    cache, and those not needed any more find their time to end.
    """

    def __init__(self, limit: int, idle_seconds: float = _IDLE_SECONDS) -> None:
        self._limit = limit
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._waiting: deque[Task] = deque()
        self._made = 0
        self._stopping = False

    @property
    def count(self) -> int:
        """Threads there are now."""
        return len(self._workers)

    def add_task(self, task: Task) -> None:
        """Serve it now, or as soon as a thread is free. Raises RuntimeError when not one thread can be had."""
        with self._lock:
            if self._idle:
                worker = self._idle.pop()
                worker.task = task
                worker.wake.release()
                return
            if len(self._workers) >= self._limit or not self._start(task):
                self._waiting.append(task)

    def _start(self, task: Task) -> bool:
        self._made += 1
        worker = _Worker(self, self._made, task)
        self._workers.add(worker)
        try:
            worker.thread.start()
        except RuntimeError:
            # The system has no more: those there are will come to it.
            self._workers.discard(worker)
            if not self._workers:
                raise
            return False
        return True

    def work(self, me: _Worker) -> None:
        """A thread's life."""
        while True:
            task, me.task = me.task, None
            if task is not None:
                try:
                    task.service()
                except Exception:
                    log.exception("serving a request failed")
                del task
            with self._lock:
                if self._waiting:
                    me.task = self._waiting.popleft()
                    continue
                if self._stopping:
                    self._workers.discard(me)
                    return
                self._idle.append(me)
            if me.wake.acquire(timeout=self._idle_seconds):
                continue
            with self._lock:
                if me in self._idle:
                    self._idle.remove(me)
                    self._workers.discard(me)
                    return
            # A task was handed over between the timeout and the lock.
            me.wake.acquire()

    def stop(self, deadline: Deadline) -> None:
        """End idle threads and wait for the others; what waits unserved is cancelled."""
        with self._lock:
            self._stopping = True
            cancelled, self._waiting = self._waiting, deque()
            for worker in self._idle:
                worker.wake.release()
            self._idle.clear()
            workers = list(self._workers)
        for task in cancelled:
            task.cancel()
        for worker in workers:
            worker.thread.join(deadline.remaining())
        left = sum(worker.thread.is_alive() for worker in workers)
        if left:
            log.warning("%d requests did not end in time", left)
