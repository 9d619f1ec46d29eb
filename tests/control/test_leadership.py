"""Leases: who leads, who lives, and what a process that was away may still do."""

from __future__ import annotations

import pytest

from fluxlib.control.agents.leadership import LEASE_SECONDS, RENEW_EVERY, Leadership
from fluxlib.errors import LeaseLost
from fluxlib.model import AgentRecord
from tests.support.memory_store import MemoryControlStore


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> MemoryControlStore:
    return MemoryControlStore()


def process(store: MemoryControlStore, clock: Clock, session: str, *, shared: bool = True) -> Leadership:
    made = Leadership(store, session, shared=shared, clock=clock)
    made.tick(clock.now)
    return made


def test_one_leads_and_the_others_know_each_other(store: MemoryControlStore, clock: Clock) -> None:
    first, second = process(store, clock, "a"), process(store, clock, "b")
    first.tick(clock.now)
    assert (first.leads, second.leads) == (True, False)
    assert (first.others, second.others) == ({"b"}, {"a"})
    for _ in range(10):
        clock.now += RENEW_EVERY
        first.tick(clock.now)
        second.tick(clock.now)
    assert (first.leads, second.leads) == (True, False)


def test_another_takes_over_within_the_lease_of_a_crash(store: MemoryControlStore, clock: Clock) -> None:
    process(store, clock, "a")
    second = process(store, clock, "b")
    changes: list[bool] = []
    second.on_change(changes.append)
    crashed = clock.now
    while not second.leads:
        clock.now += RENEW_EVERY
        second.tick(clock.now)
    assert clock.now - crashed <= LEASE_SECONDS
    assert changes == [True]
    assert second.gone == {"a"}


def test_one_that_resigns_is_followed_at_once(store: MemoryControlStore, clock: Clock) -> None:
    first, second = process(store, clock, "a"), process(store, clock, "b")
    first.resign()
    assert not first.leads
    second.tick(clock.now)
    assert second.leads
    assert second.others == set()


def test_a_former_life_in_a_file_of_ones_own_is_not_waited_for(store: MemoryControlStore, clock: Clock) -> None:
    former = process(store, clock, "a", shared=False)
    token = former.lease
    second = process(store, clock, "b", shared=False)
    assert second.leads
    assert second.others == set()
    assert token is not None
    assert second.lease is not None
    assert second.lease.token > token.token


def test_a_frozen_leader_has_no_lease_when_it_wakes_and_its_old_one_writes_nothing(
    store: MemoryControlStore, clock: Clock
) -> None:
    first, second = process(store, clock, "a"), process(store, clock, "b")
    stale = first.lease
    clock.now += 30
    second.tick(clock.now)
    assert first.lease is None  # before any tick of its own
    with pytest.raises(LeaseLost):
        store.save_agent(AgentRecord("w1", "w1:1"), stale)
    changes: list[bool] = []
    first.on_change(changes.append)
    first.tick(clock.now)
    assert not first.leads
    assert changes == [False]
    assert store.agents() == []


def test_waking_first_it_leads_again_under_a_new_token(store: MemoryControlStore, clock: Clock) -> None:
    first = process(store, clock, "a")
    stale = first.lease
    assert stale is not None
    clock.now += 30
    changes: list[bool] = []
    first.on_change(changes.append)
    first.tick(clock.now)
    assert first.lease is not None
    assert first.lease.token > stale.token
    # It ceased and began: whoever counts on an unbroken reign must hear of the break.
    assert changes == [False, True]


def test_a_refused_write_ends_it(store: MemoryControlStore, clock: Clock) -> None:
    first = process(store, clock, "a")
    first.lost(LeaseLost("another process holds leader now"))
    assert first.lease is None


def test_one_that_could_not_renew_its_own_lease_buries_nobody_before_a_whole_lease(
    store: MemoryControlStore, clock: Clock
) -> None:
    """The store was paused for everybody: whoever asks it first finds the leases of all others run out."""
    first, second = process(store, clock, "a"), process(store, clock, "b")
    first.tick(clock.now)
    clock.now += LEASE_SECONDS + 1
    first.tick(clock.now)
    assert first.gone == set()
    assert first.others == {"b"}
    second.tick(clock.now)
    assert second.gone == set()
    while first.gone != {"b"}:
        clock.now += RENEW_EVERY
        first.tick(clock.now)
        assert clock.now < 1000 + 4 * LEASE_SECONDS, "one that died in the outage is found in the end"


def test_health_checks_count_without_a_lease_unless_another_leads(store: MemoryControlStore, clock: Clock) -> None:
    first, second = process(store, clock, "a"), process(store, clock, "b")
    term = first.term
    assert term is not None
    assert second.term is None
    clock.now += LEASE_SECONDS + 1  # the store answers nobody
    assert first.lease is second.lease is None
    assert first.term == term
    assert second.term is not None
