"""Who gets an execution, and what is said when nobody does."""

from __future__ import annotations

from dataclasses import replace
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib.control.agents.fleet import Agent, Fleet, SyncState, free_share
from fluxlib.control.executions.placement import BUSY_CPU_PERCENT, Need, chooser, fits, need_of, refusal, reject_reason
from fluxlib.errors import AgentUnreachable, AtCapacity, NoAgentFits
from fluxlib.model import AgentStatus, Behavior, Function, FunctionSpec, Network, NodeFigures, Platform
from tests.support.fake_agents import change, join

LINUX, WINDOWS = Platform("linux", "amd64"), Platform("windows", "amd64")
NEED = need_of(Function(FunctionSpec("f", "run.sh"), "d", "c"))


def agents(fleet: Fleet, count: int, **figures: object) -> list[Agent]:
    values: dict[str, object] = {"memory_total_mb": 4096, "memory_used_mb": 1024, "max_tasks": 1000, **figures}
    return [join(fleet, f"a{n:05}", figures=NodeFigures(**values)) for n in range(count)]  # type: ignore[arg-type]


def place(fleet: Fleet, need: Need = NEED) -> str | None:
    taken = fleet.place(need.function_name, chooser(need, {}), slots=need.slots, memory_mb=need.memory_mb)
    return taken.agent_id if taken is not None else None


def test_a_burst_between_two_reports_spreads_evenly() -> None:
    fleet = Fleet()
    agents(fleet, 4)
    need = replace(NEED, slots=0)
    taken = [place(fleet, need) for _ in range(400)]
    assert {taken.count(f"a{n:05}") for n in range(4)} == {100}


def test_the_freest_comes_first_until_it_is_no_longer() -> None:
    fleet = Fleet()
    join(fleet, "busy", figures=NodeFigures(80, 80, 4096, 3000, 0, 100))
    join(fleet, "idle", figures=NodeFigures(0, 0, 4096, 100, 0, 100))
    need = replace(NEED, slots=0)
    taken = [place(fleet, need) for _ in range(60)]
    assert taken[:10] == ["idle"] * 10
    assert "busy" in taken


def test_memory_promised_since_the_report_counts() -> None:
    fleet = Fleet()
    (agent,) = agents(fleet, 1)
    need = replace(NEED, memory_mb=1000, slots=0)
    assert [place(fleet, need) for _ in range(4)] == ["a00000"] * 3 + [None]
    assert agent.expected_memory_free_mb == 72
    refused = refusal(need, fleet.agents(), {})
    assert isinstance(refused.error, NoAgentFits)
    assert "1000 MB" in refused.error.message
    assert "72 MB" in refused.error.message
    assert refused.for_resources


def test_cpu_matters_only_to_those_that_ask_for_it() -> None:
    fleet = Fleet()
    agents(fleet, 1, cpu_percent=BUSY_CPU_PERCENT)
    assert place(fleet) == "a00000"
    assert place(fleet, replace(NEED, cpu_millicores=100)) is None
    agents(fleet, 1, cpu_percent=BUSY_CPU_PERCENT - 1)
    assert place(fleet, replace(NEED, cpu_millicores=100)) == "a00000"


def test_unknown_figures_and_platforms_fit_all() -> None:
    fleet = Fleet()
    state = join(fleet, "original", platform=Platform())
    change(fleet, "original", figures=None)
    assert fits(replace(NEED, memory_mb=10**6, cpu_millicores=1, platforms=(WINDOWS,)), state)


@pytest.mark.parametrize(
    ("isolation", "enforces", "takes"),
    [("default", ("memory", "network_none"), True), ("minimal", ("memory",), False), ("off", (), True), ("", (), True)],
)
def test_what_is_asked_must_be_enforced_unless_nothing_is(
    isolation: str, enforces: tuple[str, ...], takes: bool
) -> None:
    fleet = Fleet()
    spec = FunctionSpec("f", "run.sh", memory_mb=10, network=Network.NONE)
    join(fleet, "a", isolation=isolation, enforces=enforces)
    need = need_of(Function(spec, "d", "c"))
    assert (place(fleet, need) == "a") is takes
    if not takes:
        error = refusal(need, fleet.agents(), {}).error
        assert "network_none" in error.message
        assert "memory" not in error.message.replace("memory_mb", "")


def test_the_owners_platforms_win_over_what_was_read() -> None:
    spec = FunctionSpec("f", "run.sh", platforms=(WINDOWS,))
    assert need_of(Function(spec, "d", "c", detected_platforms=(LINUX,))).platforms == (WINDOWS,)
    assert need_of(Function(replace(spec, platforms=()), "d", "c", detected_platforms=(LINUX,))).platforms == (LINUX,)


class TestRefusals:
    def test_a_missing_platform_is_final_and_names_both_sides(self) -> None:
        fleet = Fleet()
        agents(fleet, 5)
        need = replace(NEED, platforms=(WINDOWS,), when_full=Behavior.WAIT, when_resources_exhausted=Behavior.WAIT)
        refused = refusal(need, fleet.agents(), {})
        assert isinstance(refused.error, NoAgentFits)
        assert "windows/amd64" in refused.error.message
        assert "linux/amd64" in refused.error.message
        assert "2 more" in refused.error.message
        assert not refused.wait

    def test_one_full_agent_that_fits_means_at_capacity(self) -> None:
        fleet = Fleet()
        agents(fleet, 3)
        change(fleet, "a00000", record=replace(fleet.agents()[0].record, platform=WINDOWS))
        fleet.mark_full("a00002", "f")
        change(fleet, "a00001", state=SyncState.SYNCING)
        for behavior in Behavior:
            refused = refusal(replace(NEED, when_full=behavior, platforms=(LINUX,)), fleet.agents(), {})
            assert isinstance(refused.error, AtCapacity)
            assert refused.error.retry_after
            assert refused.wait is (behavior is Behavior.WAIT)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"state": SyncState.SYNCING}, "synchronizing functions"),
            ({"reachable": False}, "not reachable"),
            ({"missing_functions": {"f": "the disk is full"}}, "the disk is full"),
        ],
    )
    def test_lasting_and_passing_reasons_are_told(self, fields: dict[str, object], words: str) -> None:
        fleet = Fleet()
        agents(fleet, 1)
        change(fleet, "a00000", **fields)
        refused = refusal(replace(NEED, when_resources_exhausted=Behavior.WAIT), fleet.agents(), {})
        assert words in refused.error.message
        assert refused.wait

    def test_an_offline_fleet_and_an_empty_one(self) -> None:
        fleet = Fleet()
        assert "none is registered" in refusal(NEED, fleet.agents(), {}).error.message
        agents(fleet, 1)
        record = replace(fleet.agents()[0].record, status=AgentStatus.OFFLINE)
        change(fleet, "a00000", record=record)
        assert "offline" in refusal(NEED, fleet.agents(), {}).error.message

    def test_an_agent_nobody_reaches_is_an_error_of_its_own(self) -> None:
        fleet = Fleet()
        agents(fleet, 1)
        error = refusal(NEED, fleet.agents(), {("a00000", "f"): AgentUnreachable("no route")}).error
        assert isinstance(error, AgentUnreachable)
        assert error.retry_after


figures = st.builds(
    NodeFigures,
    cpu_percent=st.floats(0, 100),
    memory_percent=st.floats(0, 100),
    memory_total_mb=st.integers(0, 8192),
    memory_used_mb=st.integers(0, 8192),
    active_tasks=st.integers(0, 8),
    max_tasks=st.integers(0, 8),
)
platforms = st.sampled_from([LINUX, WINDOWS, Platform("linux", "arm64"), Platform("linux"), Platform()])
fleets = st.lists(st.tuples(figures, platforms, st.booleans(), st.booleans()), max_size=8)
needs = st.builds(
    replace,
    st.just(NEED),
    slots=st.integers(0, 3),
    memory_mb=st.sampled_from([0, 100, 4000]),
    cpu_millicores=st.sampled_from([0, 500]),
    platforms=st.lists(platforms, max_size=2).map(tuple),
)


@settings(max_examples=200, deadline=None)
@given(members=fleets, need=needs, calls=st.integers(1, 30))
def test_what_is_placed_fits_and_a_refusal_is_true(
    members: list[tuple[NodeFigures, Platform, bool, bool]], need: Need, calls: int
) -> None:
    fleet = Fleet()
    for number, (seen, platform, in_step, lacks) in enumerate(members):
        state = join(fleet, f"a{number}", figures=seen, platform=platform)
        change(
            fleet,
            state.agent_id,
            state=SyncState.READY if in_step else SyncState.SYNCING,
            missing_functions={"f": "no"} if lacks else {},
        )
    taken: list[str] = []
    for _ in range(calls):
        before = {agent.agent_id: reject_reason(need, agent, {}) for agent in fleet.agents()}
        free = [agent_id for agent_id, reason in before.items() if reason is None]
        headroom = {agent.agent_id: free_share(agent) for agent in fleet.agents()}
        chosen = place(fleet, need)
        if chosen is None:
            assert not free
            refused = refusal(need, fleet.agents(), {})
            full = any(reason is not None and reason.value == "full" for reason in before.values())
            assert isinstance(refused.error, AtCapacity if full else NoAgentFits)
        else:
            assert chosen in free
            assert headroom[chosen] == max(headroom[one] for one in free)
            taken.append(chosen)
    for agent in fleet.agents():
        assert not need.slots or taken.count(agent.agent_id) <= need.slots
        assert not agent.max_tasks or agent.total <= agent.max_tasks


def test_ten_thousand_agents_cost_no_more_than_a_hundred() -> None:
    def cost(count: int) -> float:
        fleet = Fleet()
        agents(fleet, count)
        need = replace(NEED, slots=0)
        rounds = []
        for _ in range(5):
            began = process_time()
            for _ in range(200):
                place(fleet, need)
            rounds.append(process_time() - began)
        return min(rounds)

    assert cost(10_000) < 8 * cost(100)


def test_one_that_looks_idle_does_not_get_the_whole_of_a_burst() -> None:
    """Sixteen at a time, each over before the next: the others had just started, and said so."""
    fleet = Fleet()
    for n in range(3):
        join(fleet, f"starting-{n}", figures=NodeFigures(95, 30, 4096, 1200, 0, 256))
    join(fleet, "idle", figures=NodeFigures(2, 30, 4096, 1200, 0, 256))
    need = replace(NEED, slots=0)
    taken: dict[str, int] = {}
    held = []
    for _ in range(100):
        reservation = fleet.place("f", chooser(need, {}))
        assert reservation is not None
        taken[reservation.agent_id] = taken.get(reservation.agent_id, 0) + 1
        held.append(reservation)
        if len(held) == 16:
            fleet.release(held.pop(0))
    assert len(taken) == 4
    assert max(taken.values()) < 75


def test_what_ended_since_the_report_gives_back_no_more_than_there_is() -> None:
    fleet = Fleet()
    join(fleet, "was-busy", figures=NodeFigures(0, 30, 4096, 1200, 0, 0))
    join(fleet, "idle", figures=NodeFigures(0, 30, 4096, 1200, 0, 0))
    before = [fleet.reserve("was-busy", "f") for _ in range(20)]
    fleet.report("was-busy", NodeFigures(100, 30, 4096, 1200, 20, 0), at=1.0)
    for reservation in before:
        assert reservation is not None
        fleet.release(reservation)
    need = replace(NEED, slots=0)
    taken = [place(fleet, need) for _ in range(20)]
    assert 8 <= taken.count("was-busy") <= 14
