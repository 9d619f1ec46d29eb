"""Threads with a name, an owner and a way to stop; one order and one deadline for stopping.

Nothing else in the tree starts an endless thread, reads a signal or sleeps.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from fluxlib.errors import FluxError

log = logging.getLogger(__name__)

# A loop that crashes at once is not restarted in a spin.
_RESTART_PAUSE = 1.0
# How many cancelled timers are not worth removing.
_CANCELLED = 1000


class Deadline:
    """A point in monotonic time that several waits share."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True, slots=True)
class LoopReport:
    """What /health says of one loop."""

    name: str
    alive: bool
    crashes: int
    last_error: str
    last_ran_at: float  # epoch seconds, 0 = never


class Loop:
    """Calls ``body(now)`` every ``interval`` seconds, or sooner when woken.

    ``now`` is epoch seconds, by the wall clock unless another one is given: a body that pauses or counts
    ages needs ``fluxlib.clock.steady_time``. A body that raises is logged, counted and called
    again after a pause (a FluxError is an expected failure: one line, and no crash); the loop itself ends only by
    ``stop``.
    """

    def __init__(
        self, name: str, body: Callable[[float], object], interval: float, clock: Callable[[], float] | None = None
    ) -> None:
        self.name = name
        self._body = body
        self._interval = interval
        self._clock = clock or time.time
        self._condition = threading.Condition()
        self._woken = False
        self._stopping = False
        self._crashes = 0
        self._last_error = ""
        self._unavailable = ""  # the expected failure that was logged last, until the body succeeds
        self._last_ran_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Loop:
        self._thread.start()
        return self

    def wake(self) -> None:
        """Run the body now, or again at once if it is running."""
        with self._condition:
            self._woken = True
            self._condition.notify()

    def stop(self, deadline: Deadline) -> None:
        """End the loop; returns when its thread has ended or the deadline has passed."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(deadline.remaining())
            if self._thread.is_alive():
                log.warning("the loop %s did not stop in time", self.name)

    def report(self) -> LoopReport:
        return LoopReport(self.name, self._thread.is_alive(), self._crashes, self._last_error, self._last_ran_at)

    def _run(self) -> None:
        pause = 0.0
        while self._wait(pause):
            try:
                self._last_ran_at = time.time()
                self._body(self._clock())
                pause, self._unavailable = self._interval, ""
            except FluxError as error:
                # Expected, such as a store that is away: one line when it begins, not a traceback for each try.
                self._last_error = error.message
                pause = max(_RESTART_PAUSE, self._interval)
                if error.message != self._unavailable:
                    log.warning("loop %s failed, retrying every %.0f s: %s", self.name, pause, error.message)
                self._unavailable = error.message
            except Exception as error:
                self._crashes += 1
                self._last_error = f"{type(error).__name__}: {error}"
                pause = max(_RESTART_PAUSE, self._interval)
                log.exception(
                    "loop %s crashed (%d crashes so far), retrying in %.0f s", self.name, self._crashes, pause
                )

    def _wait(self, seconds: float) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._woken or self._stopping, seconds)
            self._woken = False
            return not self._stopping


class Timer:
    """A call that :class:`Timers` will make; ``cancel`` is idempotent and needs no lock."""

    __slots__ = ("_call", "_owner", "at")

    def __init__(self, at: float, call: Callable[[], object], owner: Timers) -> None:
        self.at = at
        self._call: Callable[[], object] | None = call
        self._owner = owner

    def cancel(self) -> None:
        if self._call is not None:
            self._call = None
            self._owner.cancelled += 1

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()

    @property
    def cancelled(self) -> bool:
        return self._call is None


class Timers:
    """Many timeouts on one thread. Calls must be short: they hold up the ones behind them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._heap: list[tuple[float, int, Timer]] = []
        self.cancelled = 0  # about how many of them; counted without a lock
        self._order = itertools.count()
        self._condition = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Timers:
        self._thread.start()
        return self

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        timer = Timer(time.monotonic() + seconds, call, self)
        with self._condition:
            if self.cancelled > _CANCELLED and self.cancelled > len(self._heap) // 2:
                # Long timeouts of short executions: thousands a second, none of which will fire.
                self._heap = [entry for entry in self._heap if not entry[2].cancelled]
                heapq.heapify(self._heap)
                self.cancelled = 0
            heapq.heappush(self._heap, (timer.at, next(self._order), timer))
            if self._heap[0][2] is timer:
                self._condition.notify()
        return timer

    def stop(self, deadline: Deadline) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(deadline.remaining())

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._stopping:
                    # Cancelled timers at the top are dropped here, those further down when they are many.
                    while self._heap and self._heap[0][2].cancelled:
                        heapq.heappop(self._heap)
                    wait = self._heap[0][0] - time.monotonic() if self._heap else None
                    if wait is not None and wait <= 0:
                        break
                    # No wait may be longer: on Windows that is seven weeks. And a caller's timeout may be infinite.
                    self._condition.wait(wait if wait is None else min(wait, threading.TIMEOUT_MAX))
                if self._stopping:
                    return
                timer = heapq.heappop(self._heap)[2]
            try:
                timer.fire()
            except Exception:
                log.exception("a timer of %s failed", self.name)


def pause(seconds: float) -> None:
    """Wait where only time helps: between two looks at something outside that tells nobody of its changes."""
    time.sleep(seconds)


class Parts:
    """What a process is made of, stopped in the reverse of the order it was added.

    One failing stop never skips the next, and all share one deadline.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[str, Callable[[Deadline], object]]] = []

    def add(self, name: str, stop: Callable[[Deadline], object]) -> None:
        self._parts.append((name, stop))

    def stop(self, deadline: Deadline) -> None:
        while self._parts:
            name, stop = self._parts.pop()
            try:
                stop(deadline)
            except Exception:
                log.exception("stopping %s failed", name)


class StopSignal:
    """SIGTERM, SIGINT and Ctrl-C as an event; a second one ends the process at once.

    The handler may run between any two instructions of the thread that waits: an Event's lock may be
    held there, and setting it would wait for itself for ever. SimpleQueue.put is made for this.
    """

    def __init__(self) -> None:
        self.failed = False
        self._stopped = False
        self._installed: list[int] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._within: float | None = None

    def install(self) -> StopSignal:
        """Only from the main thread, as signal.signal demands."""
        for name in ("SIGTERM", "SIGINT", "SIGBREAK", "SIGHUP"):
            number = getattr(signal, name, None)
            # SIGHUP is a closed terminal, unless nohup has said that it is not meant.
            if number is not None and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._handle)
                self._installed.append(number)
        return self

    def set(self, within: float | None = None) -> None:
        """``within``: seconds until the system ends this process, finished or not."""
        self._within = within
        self._stopped = True
        self._wake.put(None)

    def fail(self, reason: str) -> None:
        """Stop because a part that the process cannot do without has ended; the exit code tells the service manager."""
        log.critical("stopping: %s", reason)
        self.failed = True
        self.set()

    def seconds(self, usual: float) -> float:
        """How long stopping may take: ``usual`` seconds, or what the system leaves."""
        return usual if self._within is None else min(usual, self._within)

    def is_set(self) -> bool:
        return self._stopped

    def wait(self) -> None:
        """Until told to stop. Looks twice a second: a lock wait is interrupted neither on Windows, nor anywhere
        by a signal that the kernel gave to another thread."""
        while not self._stopped:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=0.5)
        self._wake.put(None)  # for whoever else waits

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # The next one is the kernel's to act on: a handler in Python waits for whatever its thread is blocked in.
        for installed in self._installed:
            signal.signal(installed, signal.SIG_DFL)
        if self._stopped:
            signal.raise_signal(number)
        self._stopped = True
        self._wake.put(None)
