"""The scaling decision: each rule by itself, and what holds whatever the fleet looks like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib.config.control import AutoscalingConfig, NodeType
from fluxlib.control.nodes.scaling import (
    Action,
    Decision,
    FleetView,
    NodeCondition,
    NodeView,
    Replacement,
    Sample,
    Wait,
    decide,
)

NOW = 100_000.0
SMALL, MIDDLE, LARGE = NodeType("small", 2, 4), NodeType("middle", 4, 8), NodeType("large", 8, 16)
COMING, ONLINE, OFFLINE, LOST, STOPPED, LEAVING = (
    NodeCondition.COMING,
    NodeCondition.ONLINE,
    NodeCondition.OFFLINE,
    NodeCondition.LOST,
    NodeCondition.STOPPED,
    NodeCondition.LEAVING,
)


def config(**changes: object) -> AutoscalingConfig:
    # Written largest first on purpose: the order in the file must not matter.
    base = AutoscalingConfig(enabled=True, name="web", min_nodes=1, max_nodes=4, node_types=(LARGE, SMALL, MIDDLE))
    return replace(base, **changes)  # type: ignore[arg-type]


def samples(cpu: float, memory: float = 30.0, seconds: float = 60, every: float = 10) -> tuple[Sample, ...]:
    count = int(seconds / every)
    return tuple(Sample(NOW - every * (count - i), cpu, memory) for i in range(count + 1))


def node(name: str, cpu: float = 50.0, memory: float = 30.0, **fields: object) -> NodeView:
    defaults: dict[str, object] = {"instance_type": "small", "condition": ONLINE, "samples": samples(cpu, memory)}
    return NodeView(name, **{**defaults, **fields})  # type: ignore[arg-type]


def away(name: str, condition: NodeCondition, **fields: object) -> NodeView:
    return node(name, condition=condition, samples=(), **fields)


def asked(*nodes: NodeView, using: AutoscalingConfig | None = None, **fields: object) -> Decision:
    return decide(FleetView(nodes, **fields), using or config(), NOW)  # type: ignore[arg-type]


# -- below the minimum -------------------------------------------------------------------


def test_what_is_missing_to_the_minimum_is_launched_at_once_whatever_the_cooldown() -> None:
    decision = asked(using=config(min_nodes=3), last_change_at=NOW)
    assert (decision.action, decision.instance_type, decision.count) == (Action.LAUNCH, "small", 3)


def test_nodes_on_their_way_and_those_briefly_away_count_towards_the_minimum() -> None:
    nodes = (away("a", COMING), away("b", OFFLINE))
    assert asked(*nodes, using=config(min_nodes=2)).action is Action.NOTHING
    assert asked(*nodes, away("c", LEAVING), away("d", LOST), using=config(min_nodes=3)).count == 1


def test_after_failed_launches_nothing_is_launched_until_the_pause_is_over() -> None:
    decision = asked(paused_until=NOW + 30, pause_reason="aws: quota")
    assert decision.action is Action.NOTHING
    assert "aws: quota" in decision.reason
    assert "again in 30 s" in decision.reason
    assert asked(paused_until=NOW).action is Action.LAUNCH


# -- heat --------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpu", "memory"), [(80, 30), (99, 30), (10, 80), (80, 80)])
def test_a_fleet_hot_for_the_whole_window_gets_one_of_the_smallest(cpu: float, memory: float) -> None:
    decision = asked(node("a", cpu, memory), node("b", 90))
    assert (decision.action, decision.instance_type, decision.count) == (Action.LAUNCH, "small", 1)


def test_one_node_that_is_not_hot_is_enough_against_it() -> None:
    assert asked(node("a", 99), node("b", 79.9, 79.9)).action is Action.NOTHING


def test_one_sample_that_is_not_hot_is_enough_against_it() -> None:
    for index in range(len(samples(90))):
        cooled = list(samples(90))
        cooled[index] = replace(cooled[index], cpu=10.0)
        assert asked(node("a", samples=tuple(cooled))).action is Action.NOTHING, index


def test_the_sample_before_the_window_covers_it_and_is_not_judged() -> None:
    early = Sample(NOW - 61, 5.0, 5.0)
    assert asked(node("a", samples=(early, *samples(90, seconds=40)))).action is Action.LAUNCH


@pytest.mark.parametrize(("oldest", "covered"), [(50, True), (49.9, False), (60, True), (0, False)])
def test_a_window_is_covered_to_within_one_poll(oldest: float, covered: bool) -> None:
    one = node("a", samples=(Sample(NOW - oldest, 95, 30), Sample(NOW, 95, 30)))
    decision = asked(one)
    assert (decision.action is Action.LAUNCH) == covered
    assert covered or "not covered" in decision.reason


def test_a_new_node_without_a_window_holds_everything_still() -> None:
    assert asked(node("a", 99), node("b", samples=samples(99, seconds=20))).action is Action.NOTHING
    assert asked(node("a", 99), node("b", samples=())).action is Action.NOTHING


def test_within_the_cooldown_nothing_happens() -> None:
    assert "cooling down for another 1 s" in asked(node("a", 99), last_change_at=NOW - 299).reason
    assert asked(node("a", 99), last_change_at=NOW - 300).action is Action.LAUNCH
    assert asked(node("a", 1), node("b", 1), last_change_at=NOW - 299).action is Action.NOTHING


def test_a_node_on_its_way_is_waited_for() -> None:
    decision = asked(node("a", 99), away("b", COMING))
    assert decision.action is Action.NOTHING
    assert "b is on its way" in decision.reason


def test_offline_and_leaving_nodes_have_no_say_in_heat() -> None:
    assert asked(node("a", 99), away("b", OFFLINE), away("c", LEAVING)).action is Action.LAUNCH


def test_another_provider_that_has_answered_is_given_time() -> None:
    hot = node("a", 99)
    assert asked(hot, elsewhere="gcp-1").action is Action.NOTHING
    assert asked(hot, elsewhere_at=NOW - 59).action is Action.NOTHING
    assert asked(hot, elsewhere_at=NOW - 60).action is Action.LAUNCH


# -- at the maximum ----------------------------------------------------------------------


def full(*types: str, cpu: float = 99.0) -> list[NodeView]:
    return [node(f"n{i}", cpu, instance_type=kind, active=i) for i, kind in enumerate(types)]


def test_at_the_maximum_the_least_active_smaller_node_makes_room_for_the_largest() -> None:
    decision = asked(*full("large", "small", "middle", "small"))
    assert (decision.action, decision.agents, decision.instance_type) == (Action.DRAIN, ("n1",), "large")


def test_with_surge_the_larger_one_starts_first_and_the_old_one_goes_when_it_is_online() -> None:
    surge = config(max_surge=1)
    decision = asked(*full("large", "small", "middle", "small"), using=surge)
    assert (decision.action, decision.instance_type, decision.replaces) == (Action.LAUNCH, "large", "n1")
    nodes = full("large", "small", "middle", "small")
    assert asked(*nodes, away("new", COMING, replaces="n1"), using=surge).action is Action.NOTHING
    done = asked(*nodes, node("new", 99, instance_type="large", replaces="n1"), using=surge, last_change_at=NOW)
    assert (done.action, done.agents, done.instance_type) == (Action.DRAIN, ("n1",), "")
    leaving = [away("n1", LEAVING) if one.agent_id == "n1" else one for one in nodes]
    assert asked(*leaving, node("new", 99, replaces="n1"), using=surge, last_change_at=NOW).action is Action.NOTHING


def test_without_surge_the_only_node_is_not_taken_away() -> None:
    one = config(max_nodes=1)
    assert "max_surge is 0" in asked(*full("small"), using=one).reason
    assert asked(*full("small"), using=replace(one, max_surge=1)).action is Action.LAUNCH


def test_a_fleet_of_the_largest_stays_as_it_is() -> None:
    assert "largest type are here" in asked(*full("large", "large", "large", "large")).reason


def test_a_type_that_is_not_configured_any_more_is_replaced_first() -> None:
    assert asked(*full("large", "middle", "ancient", "small")).agents == ("n1",)  # least active first
    same = [replace(one, active=0) for one in full("large", "middle", "ancient", "small")]
    assert asked(*same).agents == ("n2",)


def test_a_replacement_goes_on_by_its_steps_whatever_the_cooldown() -> None:
    two = config(min_nodes=2, max_nodes=2)
    owed = (Replacement("b", "large"),)
    # Decided and recorded, and Flux died before it was begun.
    begin = asked(node("a", 99), node("b", 99), using=two, replacing=owed, last_change_at=NOW)
    assert (begin.action, begin.agents) == (Action.DRAIN, ("b",))
    assert asked(node("a", 99), away("b", OFFLINE), using=two, replacing=owed).agents == ("b",)
    # While it drains nothing else is launched in its place, though fewer than the minimum are here.
    going = asked(node("a", 99), away("b", LEAVING), using=two, replacing=owed, last_change_at=NOW)
    assert going.action is Action.NOTHING
    after = asked(node("a", 99), using=two, replacing=owed, last_change_at=NOW)
    assert (after.action, after.instance_type, after.count, after.replaces) == (Action.LAUNCH, "large", 1, "b")


def test_what_is_leaving_still_counts_against_the_maximum() -> None:
    decision = asked(node("a", 99), away("b", LEAVING), using=config(max_nodes=2))
    assert decision.action is Action.NOTHING
    assert "yet to leave" in decision.reason


# -- cold --------------------------------------------------------------------------------


def test_a_cold_fleet_lets_the_least_loaded_idle_node_go() -> None:
    decision = asked(node("a", 15, 15), node("b", 5, 5), node("c", 1, 1, active=1))
    assert (decision.action, decision.agents, decision.instance_type) == (Action.DRAIN, ("b",), "")


def test_cold_means_both_at_or_under_their_thresholds_in_every_sample() -> None:
    assert asked(node("a", 20, 20), node("b", 20, 20)).action is Action.DRAIN
    assert asked(node("a", 20.1, 20), node("b", 20, 20)).action is Action.NOTHING
    assert asked(node("a", 20, 20.1), node("b", 20, 20)).action is Action.NOTHING


def test_never_under_the_minimum_nor_while_a_node_comes_or_an_execution_waits() -> None:
    assert asked(node("a", 1, 1)).action is Action.NOTHING
    assert asked(node("a", 1, 1), node("b", 1, 1), away("c", COMING)).action is Action.NOTHING
    waits = (Wait("huge", 1, memory_mb=10**6),)
    assert asked(node("a", 1, 1), node("b", 1, 1), waits=waits).action is Action.NOTHING
    assert asked(node("a", 1, 1), using=config(min_nodes=0)).action is Action.DRAIN


def test_a_node_that_is_offline_does_not_make_another_one_dispensable() -> None:
    assert asked(node("a", 1, 1), away("b", OFFLINE)).action is Action.NOTHING


def test_a_cold_fleet_that_is_busy_everywhere_stays() -> None:
    assert "none is idle" in asked(node("a", 1, 1, active=1), node("b", 1, 1, active=2)).reason


# -- nodes that are gone -----------------------------------------------------------------


def test_lost_nodes_are_ended_once_another_is_online() -> None:
    assert asked(node("a"), away("b", LOST), away("c", LOST)).ends == ("b", "c")
    # All of them away: it may be Flux that is cut off. One is made, none is ended.
    decision = asked(away("b", LOST), away("c", LOST))
    assert (decision.action, decision.ends) == (Action.LAUNCH, ())
    waiting = asked(away("b", LOST), away("c", LOST), away("d", COMING))
    assert (waiting.action, waiting.ends) == (Action.NOTHING, ())


def test_one_whose_machine_was_stopped_is_replaced_beside_the_bound_and_not_ended() -> None:
    stopped = away("z", STOPPED)
    healing = asked(node("a"), stopped, using=config(min_nodes=2, max_nodes=2))
    assert (healing.action, healing.count, healing.ends) == (Action.LAUNCH, 1, ())
    growing = asked(node("a", 99), stopped, using=config(max_nodes=2))
    assert (growing.action, growing.ends, growing.replaces) == (Action.LAUNCH, (), "")
    room = asked(node("a"), stopped, replacing=(Replacement("z", "large"),))
    assert (room.action, room.instance_type, room.replaces) == (Action.LAUNCH, "large", "z")


def test_ending_lost_nodes_keeps_nothing_else_from_being_done() -> None:
    lost = away("z", LOST)
    hot = asked(node("a", 99), lost)
    assert (hot.action, hot.ends) == (Action.LAUNCH, ("z",))
    waits = asked(node("a"), lost, waits=(Wait("f", 5),))
    assert (waits.action, waits.ends) == (Action.LAUNCH, ("z",))
    healing = asked(node("a"), lost, using=config(min_nodes=2))
    assert (healing.action, healing.ends) == (Action.LAUNCH, ("z",))


def test_what_is_missing_and_what_waits_are_not_two_turns() -> None:
    """Where nodes are lost at every look, what waits would never have its turn."""
    waits = (Wait("f", 40, slots=1),)
    ten = config(min_nodes=10, max_nodes=50)
    nodes = [node(f"n{i}") for i in range(9)]
    assert asked(*nodes, using=ten, waits=waits).count == 9
    assert asked(*nodes[:3], using=ten, waits=waits).count == 7


# -- executions that wait ----------------------------------------------------------------


def test_waiting_executions_make_a_node_from_none_and_in_the_cooldown() -> None:
    decision = asked(using=config(min_nodes=0), waits=(Wait("f", 1),), last_change_at=NOW)
    assert (decision.action, decision.instance_type, decision.count) == (Action.LAUNCH, "small", 1)


def test_nodes_on_their_way_answer_as_many_as_they_have_slots() -> None:
    zero = config(min_nodes=0, max_nodes=9)
    assert asked(away("a", COMING), using=zero, waits=(Wait("f", 5, slots=5),)).action is Action.NOTHING
    assert asked(away("a", COMING), using=zero, waits=(Wait("f", 6, slots=5),)).count == 1
    assert asked(away("a", COMING), using=zero, waits=(Wait("f", 600),)).action is Action.NOTHING


def test_the_fleet_at_most_doubles_and_never_passes_its_maximum() -> None:
    waits = (Wait("f", 100, slots=1),)
    assert asked(node("a"), node("b"), node("c"), using=config(max_nodes=50), waits=waits).count == 3
    assert asked(node("a"), node("b"), node("c"), using=config(max_nodes=4), waits=waits).count == 1
    assert asked(*full("small", "small", "small", "small", cpu=50), waits=waits).action is Action.NOTHING


def test_the_smallest_type_that_has_what_waits_is_taken() -> None:
    assert asked(node("a"), waits=(Wait("f", 9, memory_mb=3000),)).instance_type == "small"
    assert asked(node("a"), waits=(Wait("f", 9, memory_mb=4096),)).instance_type == "middle"
    assert asked(node("a"), waits=(Wait("f", 9, memory_mb=3000), Wait("g", 1, memory_mb=9000))).instance_type == "large"


def test_what_no_type_can_take_makes_no_node() -> None:
    assert asked(node("a"), waits=(Wait("f", 9, memory_mb=10**6),)).action is Action.NOTHING
    unknown = config(node_types=(NodeType("mystery"),))
    assert asked(node("a"), using=unknown, waits=(Wait("f", 9, memory_mb=10**6),)).action is Action.LAUNCH


# -- whatever the fleet looks like ---------------------------------------------------------

percent = st.floats(0, 100, allow_nan=False)
conditions = st.sampled_from(NodeCondition)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[FleetView, AutoscalingConfig]:
    low = draw(st.integers(0, 4))
    using = config(
        min_nodes=low,
        max_nodes=draw(st.integers(low, 8)),
        max_surge=draw(st.integers(0, 1)),
        cooldown_sec=draw(st.sampled_from([0, 300])),
        node_types=tuple(draw(st.permutations([SMALL, MIDDLE, LARGE]))[: draw(st.integers(1, 3))]),
    )
    steady = draw(st.sampled_from([None, 1.0, 99.0]))
    nodes = []
    for index in range(draw(st.integers(0, 9))):
        condition = draw(conditions)
        load = draw(percent) if steady is None else steady
        seen = samples(load, load, seconds=draw(st.sampled_from([0, 30, 60])))
        nodes.append(
            NodeView(
                f"n{index}",
                draw(st.sampled_from(["small", "middle", "large", "other"])),
                condition,
                draw(st.integers(0, 2)),
                seen if condition is ONLINE else (),
                draw(st.sampled_from(["", "", "n0", "gone"])),
            )
        )
    names = [one.agent_id for one in nodes] + ["gone"]
    return (
        FleetView(
            nodes=tuple(nodes),
            waits=tuple(draw(st.lists(st.builds(Wait, st.just("f"), st.integers(1, 50)), max_size=2))),
            replacing=tuple(
                Replacement(name, "large") for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
            ),
            last_change_at=draw(st.sampled_from([0.0, NOW - 10])),
            paused_until=draw(st.sampled_from([0.0, 0.0, NOW + 10])),
            elsewhere=draw(st.sampled_from(["", "", "other"])),
        ),
        using,
    )


@settings(max_examples=250, deadline=None)
@given(fleets())
def test_no_decision_breaks_the_bounds(fleet: tuple[FleetView, AutoscalingConfig]) -> None:
    view, using = fleet
    decision = decide(view, using, NOW)
    by_id = {one.agent_id: one for one in view.nodes}
    here = [one for one in view.nodes if one.condition not in (LEAVING, LOST, STOPPED)]
    paid = sum(one.condition is not STOPPED for one in view.nodes)
    online = [one for one in here if one.condition is ONLINE]
    assert decision.reason
    assert decide(view, using, NOW) == decision
    if decision.action is Action.LAUNCH:
        assert view.paused_until <= NOW
        assert decision.count >= 1
        owed_types = {one.instance_type for one in view.replacing}
        assert decision.instance_type in {kind.instance_type for kind in using.node_types} | owed_types
        healing = len(here) + decision.count <= using.min_nodes
        replacing = bool(decision.replaces)
        assert healing or replacing or paid + decision.count <= using.max_nodes
    if decision.action is Action.DRAIN:
        for agent_id in decision.agents:
            assert by_id[agent_id].condition not in (LEAVING, STOPPED)
        makes_room = decision.instance_type or any(one.agent_id in decision.agents for one in view.replacing)
        succeeded = any(one.replaces in decision.agents for one in online)
        if not makes_room and not succeeded:
            # A shrinking fleet keeps its minimum of working nodes, and takes only an idle one.
            assert len(online) - len(decision.agents) >= using.min_nodes
            assert all(by_id[agent_id].active == 0 for agent_id in decision.agents)
            assert not view.waits
    lost = {one.agent_id for one in view.nodes if one.condition is LOST}
    assert set(decision.ends) == (lost if online else set())


@settings(max_examples=100, deadline=None)
@given(fleets(), st.randoms())
def test_the_order_of_nodes_and_types_does_not_matter(
    fleet: tuple[FleetView, AutoscalingConfig], random: object
) -> None:
    view, using = fleet
    nodes, types = list(view.nodes), list(using.node_types)
    random.shuffle(nodes)  # type: ignore[attr-defined]
    random.shuffle(types)  # type: ignore[attr-defined]
    first = decide(view, using, NOW)
    second = decide(replace(view, nodes=tuple(nodes)), replace(using, node_types=tuple(types)), NOW)
    assert (first.action, first.instance_type, first.count) == (second.action, second.instance_type, second.count)
    if first.action is not Action.DRAIN or not any(one.replaces for one in nodes):
        assert set(first.agents) == set(second.agents)
