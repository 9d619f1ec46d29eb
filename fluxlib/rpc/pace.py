"""When the next frame of a stream goes: at once, or a moment later with more in it.

A frame costs both sides some 200 us of CPU whatever is in it (six threads are
woken on its way), one more execution in it a tenth of that. So the more is
under way, the longer a frame waits after the one before it. Who calls alone
never waits.
"""

from __future__ import annotations

_EACH, _LONGEST = 0.00025, 0.004  # seconds


class Pace:
    """Of one direction of one stream. Not safe from several threads."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0.0

    def left(self, under_way: int, now: float) -> float:
        """Seconds to wait before the next frame, 0 or less = none. ``now`` is time.monotonic's."""
        return self._last + min(_LONGEST, _EACH * under_way) - now

    def went(self, now: float) -> None:
        """A frame goes now."""
        self._last = now
