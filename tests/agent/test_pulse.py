"""Telling that this process stood still, by a clock that goes on meanwhile."""

from __future__ import annotations

from fluxlib.agent.health import StallDetector


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_read_after_a_standstill_is_known_to_be_old_whoever_goes_on_first() -> None:
    clock = Clock()
    for beats_first in (False, True):
        pulse = StallDetector(clock)
        assert not pulse.recently_stalled
        clock.now += 30
        if beats_first:
            pulse.beat()
        assert pulse.recently_stalled
        pulse.beat()
        clock.now += 0.5
        pulse.beat()
        assert pulse.recently_stalled
        clock.now += 2
        pulse.beat()
        assert not pulse.recently_stalled


def test_a_late_beat_is_no_standstill() -> None:
    clock = Clock()
    pulse = StallDetector(clock)
    for _ in range(10):
        clock.now += 3
        assert not pulse.recently_stalled
        pulse.beat()
        assert not pulse.recently_stalled
