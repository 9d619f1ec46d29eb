"""A write on its way to a store's writer thread."""

from __future__ import annotations

import queue
import threading
from typing import Any, Generic, TypeVar

from fluxlib.errors import StoreUnavailable

W = TypeVar("W")


class Pending(Generic[W]):
    """``wait`` returns when the write holds. Cheap when nobody waits."""

    __slots__ = ("_done", "durable", "error", "result", "work")

    def __init__(self, work: W, durable: bool = False) -> None:
        self.work = work
        self.durable = durable
        self.result: Any = None
        self.error: Exception | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self, timeout: float | None = None) -> None:
        """Raises what the write raised, StoreUnavailable when it did not hold in time."""
        if not self._done.acquire(timeout=-1 if timeout is None else timeout):
            raise StoreUnavailable("the store is too slow: a write did not hold in time")
        self._done.release()
        if self.error is not None:
            raise self.error

    def value(self) -> Any:
        """Wait, then what the write returned."""
        self.wait()
        return self.result

    @property
    def settled(self) -> bool:
        return not self._done.locked()

    def settle(self) -> None:
        self._done.release()


class WriteQueue(Generic[W]):
    """Writes in their order, taken in batches by one writer; closed once."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._queue: queue.SimpleQueue[Pending[W] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False

    def put(self, work: W, *, durable: bool = False) -> Pending[W]:
        """Raises StoreUnavailable when the queue is closed."""
        pending = Pending(work, durable)
        with self._lock:
            # Under the lock, so that nothing is queued behind the end of the queue.
            if self._closed:
                raise StoreUnavailable("the store is closed")
            self._queue.put(pending)
        return pending

    def close(self) -> bool:
        """What is queued is still to be written. False when it was closed before."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            self._queue.put(None)
            return True

    @property
    def closed(self) -> bool:
        return self._closed

    def next_batch(self) -> tuple[list[Pending[W]], bool]:
        """What waits now, at least one; and whether the queue ends here."""
        first = self._queue.get()
        if first is None:
            return [], True
        batch = [first]
        while len(batch) < self._max_batch:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return batch, True
            batch.append(following)
        return batch, False
