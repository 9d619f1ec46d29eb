"""The time of pauses and ages, under a wall clock that is set."""

from __future__ import annotations

import pytest

from fluxlib.clock import SteadyClock


class Clocks:
    """A machine's two clocks, moved by hand."""

    def __init__(self) -> None:
        self.wall, self.elapsed = 1000.0, 50.0

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def steady(clocks: Clocks) -> SteadyClock:
    return SteadyClock(lambda: clocks.wall, lambda: clocks.elapsed)


def test_it_is_the_wall_clock_as_long_as_nobody_sets_that(clocks: Clocks, steady: SteadyClock) -> None:
    assert steady() == 1000
    clocks.pass_time(3600)
    assert steady() == pytest.approx(4600)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_jump_of_the_wall_clock_is_drawn_near_to_by_a_tenth(clocks: Clocks, steady: SteadyClock, jump: float) -> None:
    clocks.wall += jump
    assert steady() == 1000
    clocks.pass_time(10)
    before = steady()
    assert before == pytest.approx(1011 if jump > 0 else 1009)
    # It never comes to a standstill, and has arrived in the end.
    for _ in range(4000):
        clocks.pass_time(10)
        assert steady() - before > 8.9
        before = steady()
    assert before == pytest.approx(clocks.wall)
