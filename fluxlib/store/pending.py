"""A write on its way to a store's writer thread."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fluxlib.errors import StoreUnavailable
from fluxlib.store.base import COMMIT_TIMEOUT

log = logging.getLogger(__name__)

W = TypeVar("W")

# A write that nobody waits for goes along with the next one, at the latest after so long (seconds): a transaction
# and a thread woken for each end would cost more than the end itself.
_COMPANY = 0.02


class Pending(Generic[W]):
    """``wait`` returns when the write is committed. Cheap when nobody waits."""

    __slots__ = ("_calls", "_done", "_hurry", "durable", "error", "result", "work")

    def __init__(self, work: W, durable: bool = False, hurry: Callable[[], None] | None = None) -> None:
        self.work = work
        self.durable = durable
        self.result: Any = None
        self.error: Exception | None = None
        self._hurry = hurry  # it waits for company, and somebody waits for it after all
        self._calls: list[Callable[[Exception | None], None]] = []
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Raises what the write raised, StoreUnavailable when it was not committed in time (seconds)."""
        if not self.settles_within(timeout):
            raise StoreUnavailable(f"the store did not commit the write within {timeout:g} s")
        if self.error is not None:
            raise self.error

    def settles_within(self, timeout: float) -> bool:
        """Whether it is written or has failed by then."""
        if self._hurry is not None and self._done.locked():
            self._hurry()
        if not self._done.acquire(timeout=max(0.0, timeout)):
            return False
        self._done.release()
        return True

    def then(self, call: Callable[[Exception | None], None]) -> None:
        """``call(error)`` once it is written (None) or has failed, on the writer's thread or at once: it must be quick.

        Instead of ``wait``, not beside it.
        """
        self._calls.append(call)
        if not self._done.locked():
            self._tell()

    def value(self, timeout: float = COMMIT_TIMEOUT) -> Any:
        """Wait, then what the write returned."""
        self.wait(timeout)
        return self.result

    @property
    def settled(self) -> bool:
        return not self._done.locked()

    def settle(self) -> None:
        self._done.release()
        if self._calls:
            self._tell()

    def _tell(self) -> None:
        try:
            # pop is atomic: the writer and a ``then`` that comes at the same moment call once.
            call = self._calls.pop()
        except IndexError:
            return
        try:
            call(self.error)
        except Exception:
            log.exception("what was to follow a write failed")


class WriteQueue(Generic[W]):
    """Writes in their order, taken in batches by one writer; closed once."""

    def __init__(self, max_batch: int) -> None:
        self._max_batch = max_batch
        self._condition = threading.Condition(threading.Lock())
        self._queue: deque[Pending[W]] = deque()
        self._wanted = False  # something queued is waited for
        self._dozing = False  # the writer sleeps until anything comes
        self._last_patient: Pending[W] | None = None
        self._closed = False

    def put(self, work: W, *, durable: bool = False, patient: bool = False) -> Pending[W]:
        """``patient``: nobody waits for it, so it may wait for company. Raises StoreUnavailable when it is closed."""
        pending = Pending(work, durable, self._hurry if patient else None)
        with self._condition:
            # Under the lock, so that nothing is queued behind the end of the queue.
            if self._closed:
                raise StoreUnavailable("the store is closed")
            self._queue.append(pending)
            if patient:
                self._last_patient = pending
            else:
                self._wanted = True
            if self._dozing or not patient:
                self._condition.notify()
        return pending

    def catch_up(self, timeout: float) -> bool:
        """Whether everything patient has been written, or has failed, by then: readers must see it."""
        last = self._last_patient
        return last is None or last.settles_within(timeout)

    def close(self) -> bool:
        """What is queued is still to be written. False when it was closed before."""
        with self._condition:
            if self._closed:
                return False
            self._closed = True
            self._condition.notify()
            return True

    @property
    def closed(self) -> bool:
        return self._closed

    def next_batch(self) -> tuple[list[Pending[W]], bool]:
        """What waits now; and whether the queue ends here. It may be nothing."""
        with self._condition:
            # After a batch the writer looks once more by itself; only then must a patient write wake it.
            if not self._somebody_waits() and not self._queue:
                self._dozing = True
                self._condition.wait_for(lambda: self._queue or self._closed)
                self._dozing = False
                self._somebody_waits()
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), self._max_batch))]
            # Who waits for what is left is not known: it is taken next.
            self._wanted = bool(self._queue)
            return batch, self._closed and not self._queue

    def _somebody_waits(self) -> bool:
        """Within the time patient writes have. Under the lock, which it lets go meanwhile."""
        return self._condition.wait_for(lambda: self._wanted or self._closed, _COMPANY)

    def _hurry(self) -> None:
        with self._condition:
            self._wanted = True
            self._condition.notify()
