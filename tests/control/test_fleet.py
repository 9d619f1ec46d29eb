"""The fleet: its order and its counts hold after any sequence of what can happen to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from fluxlib.control.agents.fleet import Agent, Fleet, Reservation, SyncState, free_share
from fluxlib.model import AgentRecord, AgentStatus, Inventory, NodeFigures, Platform

AGENTS = [f"w{number}" for number in range(5)]
FUNCTIONS = ["f", "g", "h"]
SLOTS = {"f": 2, "g": 3, "h": 0}

agents = st.sampled_from(AGENTS)
functions = st.sampled_from(FUNCTIONS)


LINUX, WINDOWS, UNKNOWN = Platform("linux", "amd64"), Platform("windows", "amd64"), Platform()
PLATFORMS = [LINUX, WINDOWS, UNKNOWN]
WANTED: list[tuple[Platform, ...]] = [(), (LINUX,), (WINDOWS,), (LINUX, WINDOWS), (Platform("unix"),)]


def on(agent: Agent, wanted: tuple[Platform, ...]) -> bool:
    return not wanted or any(agent.platform.matches(one) for one in wanted)


def state(agent_id: str, max_tasks: int = 0, platform: Platform = LINUX) -> Agent:
    made = Agent(
        AgentRecord(agent_id, f"{agent_id}:1", status=AgentStatus.ONLINE, max_tasks=max_tasks, platform=platform),
        SimpleNamespace(agent_id=agent_id),  # type: ignore[arg-type]
    )
    made.state = SyncState.READY
    return made


def first(candidates: Iterator[Agent]) -> Agent | None:
    return next(candidates, None)


class FleetMachine(RuleBasedStateMachine):
    """Anything in any order; afterwards the order and the counts are what a fresh look would say."""

    taken: Bundle[Reservation] = Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()

    @rule(agent_id=agents, max_tasks=st.sampled_from([0, 1, 4]), platform=st.sampled_from(PLATFORMS))
    def add(self, agent_id: str, max_tasks: int, platform: Platform) -> None:
        self.fleet.add(state(agent_id, max_tasks, platform))

    @rule(agent_id=agents, platform=st.sampled_from(PLATFORMS))
    def reinstall(self, agent_id: str, platform: Platform) -> None:
        known = self.fleet.get(agent_id)
        if known is not None:
            self.fleet.take_inventory(known, Inventory(agent_id, "1", platform=platform))

    @rule(agent_id=agents)
    def remove(self, agent_id: str) -> None:
        self.fleet.remove(agent_id)

    @rule(agent_id=agents, restarted=st.booleans(), reachable=st.booleans())
    def change(self, agent_id: str, restarted: bool, reachable: bool) -> None:
        known = self.fleet.get(agent_id)
        if known is not None:
            self.fleet.set_reachable(known, reachable)
            if restarted:
                self.fleet.greeted(known, "another process")
            else:
                self.fleet.synced(known, 1, 1.0)

    @rule(agent_id=agents, names=st.sets(functions))
    def lack(self, agent_id: str, names: set[str]) -> None:
        known = self.fleet.get(agent_id)
        if known is not None:
            self.fleet.set_functions(known, {}, dict.fromkeys(names, "refused"))

    @rule(
        agent_id=agents,
        cpu=st.one_of(st.floats(0, 100), st.just(float("nan")), st.just(float("inf"))),
        active=st.integers(0, 6),
        max_tasks=st.sampled_from([0, 1, 4]),
    )
    def report(self, agent_id: str, cpu: float, active: int, max_tasks: int) -> None:
        figures = NodeFigures(cpu_percent=cpu, active_tasks=active, max_tasks=max_tasks)
        self.fleet.report(agent_id, figures, at=1.0)

    def able(self) -> list[Agent]:
        return [one for one in self.fleet.agents() if one.takes_work]

    @rule(target=taken, name=functions, wanted=st.sampled_from(WANTED), only=st.one_of(st.just(""), agents))
    def place(self, name: str, wanted: tuple[Platform, ...], only: str) -> Any:
        slots = SLOTS[name]
        able = [
            one
            for one in self.able()
            if on(one, wanted) and name not in one.missing_functions and only in ("", one.agent_id)
        ]
        roomy = [one for one in able if not {name, ""} & one.full]
        best = max(roomy, key=lambda one: one._key, default=None)
        reservation = self.fleet.place(name, first, slots=slots, platforms=wanted, only=only)
        if reservation is None:
            # Nobody is passed over who has room by our own count, was not marked full and lacks nothing.
            assert best is None
            return multiple()
        agent = reservation.agent
        assert agent is best  # the freest, of all platforms that are asked for
        assert not slots or agent.in_flight[name] <= slots
        return reservation

    @rule(target=taken, agent_id=agents, name=functions)
    def reserve(self, agent_id: str, name: str) -> Any:
        reservation = self.fleet.reserve(agent_id, name, slots=SLOTS[name])
        return multiple() if reservation is None else reservation

    @rule(reservation=consumes(taken), twice=st.booleans())
    def release(self, reservation: Reservation, twice: bool) -> None:
        self.fleet.release(reservation)
        if twice:
            self.fleet.release(reservation)

    @rule(agent_id=agents, name=functions)
    def refuse(self, agent_id: str, name: str) -> None:
        self.fleet.mark_full(agent_id, name)

    @rule(agent_id=agents, name=st.one_of(functions, st.just("")))
    def free(self, agent_id: str, name: str) -> None:
        self.fleet.freed(agent_id, name)

    @rule(name=functions)
    def changed(self, name: str) -> None:
        self.fleet.function_changed(name)

    @invariant()
    def order_is_sorted_and_complete(self) -> None:
        for platform, ranking in self.fleet._rankings.items():
            assert ranking.order == sorted(ranking.order)
            ranked = [agent_id for _, _, agent_id in ranking.order]
            assert sorted(ranked) == [one.agent_id for one in self.able() if one.platform == platform]
        assert self.fleet.placeable() == len(self.able())
        assert [one.agent_id for one in self.fleet.agents()] == sorted(self.fleet._agents)

    @invariant()
    def full_counts_are_what_a_count_says(self) -> None:
        for platform, ranking in self.fleet._rankings.items():
            counts: dict[str, int] = {}
            for one in self.able():
                if one.platform == platform:
                    for name in ("",) if "" in one.full else one.full:
                        counts[name] = counts.get(name, 0) + 1
            assert ranking.full == counts
        for name in FUNCTIONS:
            for wanted in WANTED:
                able = [one for one in self.able() if on(one, wanted)]
                expected = bool(able) and all({name, ""} & one.full for one in able)
                assert self.fleet.full_everywhere(name, wanted) == expected

    @invariant()
    def nothing_is_counted_below_zero(self) -> None:
        for one in self.fleet.agents():
            assert one.total == sum(one.in_flight.values())
            assert one.total >= 0
            assert all(count > 0 for count in one.in_flight.values())


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_burst_spreads_over_equal_agents() -> None:
    fleet = Fleet()
    for agent_id in AGENTS:
        fleet.add(state(agent_id))
    chosen = [fleet.place("h", first) for _ in range(50)]
    per_agent = [sum(1 for one in chosen if one is not None and one.agent_id == agent_id) for agent_id in AGENTS]
    assert per_agent == [10] * 5


def test_a_report_does_not_reopen_slots_this_flux_knows_are_taken() -> None:
    fleet = Fleet()
    fleet.add(state("w1"))
    assert fleet.place("f", first, slots=1) is not None
    fleet.report("w1", NodeFigures(active_tasks=1), at=1.0)
    assert fleet.place("f", first, slots=1) is None
    fleet.mark_full("w1", "g")
    assert fleet.place("g", first) is None
    fleet.report("w1", NodeFigures(active_tasks=1), at=2.0)
    assert fleet.place("g", first) is not None  # the agent's refusal may be over


def test_listeners_hear_of_room_where_there_was_none() -> None:
    fleet = Fleet()
    fleet.add(state("w1"))
    heard: list[tuple[str, str | None]] = []
    fleet.on_capacity(lambda agent_id, name: heard.append((agent_id, name)))
    reservation = fleet.place("f", first, slots=1)
    assert reservation is not None
    fleet.release(reservation)
    fleet.freed("w1", "g")
    fleet.freed("w1", "")
    fleet.function_changed("f")
    assert heard == [("w1", "f"), ("w1", "g"), ("w1", None), ("", "f")]


def test_choosing_among_ten_thousand_agents_looks_at_few() -> None:
    """By the work done, not by a clock: a busy machine must not fail this."""
    ranked = 0

    def headroom(agent: Agent) -> float:
        nonlocal ranked
        ranked += 1
        return free_share(agent)

    fleet = Fleet(headroom=headroom)
    for number in range(10_000):
        fleet.add(state(f"w{number:05}", 8))
    ranked = 0
    looked = 0

    def choose(candidates: Iterator[Agent]) -> Agent | None:
        nonlocal looked
        for agent in candidates:
            looked += 1
            return agent
        return None

    begun = time.perf_counter()
    reservations = [fleet.place("f", choose, slots=4) for _ in range(2000)]
    for reservation in reservations:
        assert reservation is not None
        fleet.release(reservation)
    each = (time.perf_counter() - begun) / 4000
    assert (looked, ranked) == (2000, 4000)
    assert each < 0.005, f"{each * 1e6:.0f} µs for one step"


def test_idle_agents_of_another_platform_are_not_walked_over() -> None:
    fleet = Fleet()
    for number in range(500):
        fleet.add(state(f"windows-{number:03}", platform=WINDOWS))
        fleet.add(state(f"linux-{number:03}"))
        fleet.report(f"linux-{number:03}", NodeFigures(cpu_percent=60), at=1.0)
    looked = 0

    def choose(candidates: Iterator[Agent]) -> Agent | None:
        nonlocal looked
        for agent in candidates:
            looked += 1
            if agent.platform == LINUX:
                return agent
        return None

    assert fleet.place("f", choose, platforms=(LINUX,)) is not None
    assert looked == 1


def test_a_figure_that_is_no_number_spoils_nobodys_place() -> None:
    fleet = Fleet()
    for agent_id in AGENTS:
        fleet.add(state(agent_id))
    for agent_id in AGENTS[:4]:
        fleet.report(agent_id, NodeFigures(cpu_percent=float("nan")), at=1.0)
    for cpu in (90, 10, 50):
        fleet.report(AGENTS[4], NodeFigures(cpu_percent=cpu), at=1.0)
        reservation = fleet.place("f", first)
        assert reservation is not None
        assert reservation.agent_id == AGENTS[4]
    for agent_id in AGENTS:
        fleet.remove(agent_id)
    assert fleet.placeable() == 0
