"""Telling that this process stood still, by a clock that goes on meanwhile."""

from __future__ import annotations

from fluxlib.agent.pulse import Pulse


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_read_after_a_standstill_is_known_to_be_old_whoever_goes_on_first() -> None:
    clock = Clock()
    for beats_first in (False, True):
        pulse = Pulse(clock)
        assert not pulse.stood_still
        clock.now += 30
        if beats_first:
            pulse.beat()
        assert pulse.stood_still
        pulse.beat()
        clock.now += 0.5
        pulse.beat()
        assert pulse.stood_still
        clock.now += 2
        pulse.beat()
        assert not pulse.stood_still


def test_a_late_beat_is_no_standstill() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    for _ in range(10):
        clock.now += 3
        assert not pulse.stood_still
        pulse.beat()
        assert not pulse.stood_still
