"""Whether this process has just stood still: stopped, or its machine suspended.

What waited in its sockets meanwhile is read when it goes on, before it hears that
nobody waits for that any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fluxlib.clock import elapsed
from fluxlib.lifecycle import Deadline, Loop

# Seconds. Flux gives an agent up after three questions without an answer, of 5 s each at least.
_STILL = 10.0
_BEAT = 1.0
# What was sent before is read within so long after it goes on.
_AFTERWARDS = 1.0


class Pulse:
    """``beat`` is called every second by a thread of its own (``start``)."""

    def __init__(self, clock: Callable[[], float] = elapsed) -> None:
        self._clock = clock
        self._at = clock()
        self._woke_at = -math.inf
        self._loop = Loop("pulse", lambda now: self.beat(), _BEAT)

    def start(self) -> None:
        self._loop.start()

    def stop(self, deadline: Deadline) -> None:
        self._loop.stop(deadline)

    def beat(self) -> None:
        now = self._clock()
        if now - self._at > _STILL:
            self._woke_at = now
        self._at = now

    @property
    def stood_still(self) -> bool:
        """It does, or did a moment ago: what is read now may be as old as that."""
        now = self._clock()
        return now - self._at > _STILL or now - self._woke_at < _AFTERWARDS
