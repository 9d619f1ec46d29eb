"""The time by which this process waits, counts ages and says what is due.

The wall clock may be set at any moment, by hours: what compares two of its readings waits for ever,
or finds everything overdue. It is for what outlives the process and for other machines' times only:
leases, how long a record is kept, certificates.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

# Of the time that passes, how much is spent on drawing near to a wall clock that was set.
_DRAW = 0.1


if sys.platform == "linux":

    def elapsed() -> float:
        """Seconds since some moment."""
        # Unlike the monotonic clock, it goes on while the machine is suspended: that time has passed for the agents.
        return time.clock_gettime(time.CLOCK_BOOTTIME)
else:
    elapsed = time.monotonic


class SteadyClock:
    """Epoch seconds that never go back and never jump.

    After the wall clock was set, they draw near to it, so that what is stored and shown comes true again;
    no pause becomes longer or shorter by more than a tenth.
    """

    def __init__(self, wall: Callable[[], float] = time.time, elapsed: Callable[[], float] = elapsed) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._lock = threading.Lock()
        self._now, self._at = wall(), elapsed()

    def __call__(self) -> float:
        with self._lock:
            at = self._elapsed()
            passed, self._at = at - self._at, at
            self._now += passed
            most = passed * _DRAW
            self._now += max(-most, min(most, self._wall() - self._now))
            return self._now


steady_time = SteadyClock()
