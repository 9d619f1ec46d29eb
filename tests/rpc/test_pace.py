"""When frames go."""

from __future__ import annotations

from fluxlib.rpc.pace import Pace


def test_who_calls_alone_never_waits() -> None:
    pace = Pace()
    pace.went(100.0)
    assert pace.left(1, 100.002) <= 0
    assert pace.left(0, 100.0) <= 0


def test_the_more_is_under_way_the_longer_a_frame_waits_up_to_a_bound() -> None:
    pace = Pace()
    pace.went(100.0)
    waits = [pace.left(under_way, 100.0) for under_way in (1, 4, 16, 1000, 100_000)]
    assert waits == sorted(waits)
    assert waits[1] > waits[0] > 0
    assert 0.001 < waits[-1] < 0.01


def test_a_frame_after_a_while_goes_at_once() -> None:
    pace = Pace()
    assert pace.left(1000, 50.0) <= 0
    pace.went(100.0)
    assert pace.left(1000, 100.1) <= 0
