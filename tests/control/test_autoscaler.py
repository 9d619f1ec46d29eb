"""The autoscaler over invented clouds and times: what it sees, what it does, what it remembers."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator

import pytest

from fluxlib.control.nodes.scaler_state import DesiredFleet, ScalerState
from fluxlib.control.nodes.scaling import Sample
from fluxlib.errors import ProviderError, StoreUnavailable, Unavailable
from fluxlib.model import AgentStatus, Behavior, Platform
from tests.support.clouds import CloudFleet, cloud, with_scaling
from tests.support.fleet import spec
from tests.support.memory_store import MemoryControlStore
from tests.support.programs import make_zip, wait_until

CODE = make_zip({"run.sh": "#!/bin/sh\n"})


def fleet_of(*clouds: object, **settings: object) -> CloudFleet:
    return CloudFleet(*(clouds or (cloud(min_nodes=1, max_nodes=3),)), now=100_000.0, **settings)  # type: ignore[arg-type]


@pytest.fixture
def fleet() -> Iterator[CloudFleet]:
    made = fleet_of()
    yield made
    made.close()


def hold(fleet: CloudFleet, cpu: float, seconds: float, memory: float = 10.0) -> None:
    """This load for so long, looked at every ten seconds."""
    for _ in range(int(seconds / 10)):
        fleet.load(cpu, memory)
        fleet.later(10)


def declare(fleet: CloudFleet, name: str = "hello", **fields: object) -> None:
    fields.setdefault("resource_pressure_behavior", Behavior.WAIT)
    fleet.functions.put(spec(name, **fields))
    fleet.functions.deploy(name, CODE)


# -- growing and shrinking ---------------------------------------------------------------


def test_nothing_is_made_before_anybody_asked(fleet: CloudFleet) -> None:
    hold(fleet, 0, 100)
    assert fleet.cloud().running() == []
    assert "nothing waits" in fleet.last()["reason"]


def test_a_hot_fleet_grows_by_one_of_the_smallest_and_then_cools_down(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    hold(fleet, 95, 50)
    assert len(fleet.node_ids()) == 1
    hold(fleet, 95, 20)
    assert len(fleet.node_ids()) == 2
    assert {state.record.instance_type for state in fleet.agents.agents()} == {"small"}
    hold(fleet, 95, 280)
    assert len(fleet.node_ids()) == 2
    assert "cooling down" in fleet.last()["reason"]
    hold(fleet, 95, 40)
    assert len(fleet.node_ids()) == 3


def test_a_cold_fleet_shrinks_to_its_minimum_one_by_one(fleet: CloudFleet) -> None:
    fleet.clouds[0] = with_scaling(fleet.clouds[0])
    fleet.nodes.initialize()
    hold(fleet, 95, 420)
    assert len(fleet.node_ids()) == 3
    hold(fleet, 5, 370)
    assert len(fleet.node_ids()) == 2
    hold(fleet, 5, 310)
    assert len(fleet.node_ids()) == 1
    hold(fleet, 5, 700)
    assert len(fleet.node_ids()) == len(fleet.cloud().running()) == 1


def test_agents_added_by_hand_are_invisible(fleet: CloudFleet) -> None:
    fleet.wire.add("manual")
    fleet.membership.register("manual:50052", legacy=False)
    fleet.nodes.initialize()
    # The one by hand is idle all the time: it does not keep the others from being hot.
    hold(fleet, 95, 70)
    assert len(fleet.cloud().running()) == 2
    hold(fleet, 5, 400)
    assert "manual" in {state.agent_id for state in fleet.agents.agents()}
    assert "manual" not in fleet.conditions()


def test_at_the_maximum_a_small_node_is_drained_and_replaced_by_the_largest() -> None:
    fleet = fleet_of(cloud(min_nodes=2, max_nodes=2))
    try:
        fleet.nodes.initialize()
        first, second = fleet.node_ids()
        slot = fleet.agents.reserve(second, "hello")
        for _ in range(6):
            fleet.load(95)
            fleet.later(10)
        fleet.load(95)
        fleet.later(10)
        kinds = [fleet.state(agent_id).record.instance_type for agent_id in fleet.node_ids()]
        assert first not in fleet.node_ids()
        fleet.later(10)
        kinds = sorted(fleet.state(agent_id).record.instance_type for agent_id in fleet.node_ids())
        assert kinds == ["large", "small"]
        assert second in fleet.node_ids()
        assert slot is not None
    finally:
        fleet.close()


def test_a_replacement_survives_a_restart_in_every_step() -> None:
    fleet = fleet_of(cloud(min_nodes=2, max_nodes=2))
    try:
        fleet.nodes.initialize()
        first = fleet.node_ids()[0]
        for agent_id in fleet.node_ids():
            assert fleet.agents.reserve(agent_id, "hello") is not None
        for _ in range(7):
            fleet.load(95)
            fleet.pass_time(10)
            fleet.autoscaler.tick(fleet.now)
        wait_until(lambda: fleet.state(first).record.status is AgentStatus.DRAINING, "it to drain")
        fleet = fleet.again()
        assert fleet.conditions()[first] == "leaving"
        fleet.later(10)
        wait_until(lambda: first not in fleet.cloud().running(), "it to go")
        fleet = fleet.again(session="s3")
        fleet.later(1)
        kinds = sorted(fleet.state(agent_id).record.instance_type for agent_id in fleet.node_ids())
        assert kinds == ["large", "small"]
    finally:
        fleet.close()


def test_a_replacement_whose_launch_could_not_be_recorded_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = fleet_of(cloud(min_nodes=2, max_nodes=2))
    try:
        fleet.nodes.initialize()
        first, second = fleet.node_ids()
        assert fleet.agents.reserve(second, "hello") is not None
        while first in fleet.node_ids():
            fleet.load(95)
            fleet.later(10)

        def away(*_: object) -> None:
            raise StoreUnavailable("the store is away")

        with monkeypatch.context() as broken:
            broken.setattr(fleet.store, "save_agent", away)
            fleet.later(10)
        assert fleet.node_ids() == [second]
        for _ in range(3):
            fleet.later(10)
        assert sorted(fleet.state(one).record.instance_type for one in fleet.node_ids()) == ["large", "small"]
        assert fleet.autoscaler._fleets["aws"].state.replacing == []
    finally:
        fleet.close()


# -- healing -----------------------------------------------------------------------------


def test_a_fleet_heals_below_its_minimum(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    fleet.nodes.terminate(fleet.node_ids()[0])
    fleet.later(10)
    assert len(fleet.node_ids()) == len(fleet.cloud().running()) == 1
    assert "min_nodes is 1" in fleet.autoscaler.report()["providers"]["aws"]["decisions"][0]["reason"]


def test_delete_nodes_is_not_healed_until_initialize(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    fleet.nodes.remove_all()
    fleet.waiting["hello"] = 5
    hold(fleet, 0, 100)
    assert fleet.cloud().running() == []
    assert "POST /initialize" in fleet.last()["reason"]
    fleet.waiting.clear()
    fleet.nodes.initialize()
    fleet.nodes.terminate(fleet.node_ids()[0])
    fleet.later(10)
    assert len(fleet.cloud().running()) == 1


def test_a_wish_that_was_refused_is_not_kept(fleet: CloudFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.nodes.initialize()

    def away(*_: object) -> None:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as broken:
        broken.setattr(fleet.store, "set_note", away)
        with pytest.raises(StoreUnavailable):
            fleet.nodes.remove_all()
    assert fleet.autoscaler.report()["providers"]["aws"]["desired"] == "active"
    fleet.nodes.terminate(fleet.node_ids()[0])
    fleet.later(10)
    assert len(fleet.cloud().running()) == 1


def test_failed_launches_are_tried_again_more_and_more_rarely(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    fleet.cloud().faults.launch[""] = ProviderError("aws: InsufficientInstanceCapacity")
    fleet.nodes.terminate(fleet.node_ids()[0])
    tried = []
    for _ in range(40):
        before = len(fleet.cloud().calls)
        fleet.later(10)
        tried += [fleet.now] if len(fleet.cloud().calls) > before else []
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert pauses[:4] == [30, 60, 120, 240][: len(pauses[:4])]
    report = fleet.autoscaler.report()["providers"]["aws"]
    assert "InsufficientInstanceCapacity" in report["last_decision"]["reason"]
    assert "InsufficientInstanceCapacity" in report["failures"][0]["error"]
    fleet.cloud().faults.launch.clear()
    fleet.later(600)
    assert len(fleet.cloud().running()) == 1
    assert fleet.autoscaler.report()["providers"]["aws"]["paused_sec"] == 0


def test_launches_that_fail_together_are_one_failure() -> None:
    fleet = fleet_of(cloud(min_nodes=3))
    try:
        fleet.cloud().faults.launch[""] = ProviderError("aws: quota")
        fleet.nodes.initialize()
        report = fleet.autoscaler.report()["providers"]["aws"]
        assert len(report["failures"]) == 3
        assert report["paused_sec"] == 30
    finally:
        fleet.close()


def test_what_a_node_was_like_before_it_was_away_says_nothing(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    (agent_id,) = fleet.node_ids()
    machine = fleet.wire.machines[fleet.state(agent_id).record.address]
    hold(fleet, 95, 40)
    machine.up = False
    for _ in range(3):
        fleet.round()
    fleet.later(10)
    machine.up = True
    fleet.round()
    fleet.settle()
    assert fleet.conditions() == {agent_id: "online"}
    hold(fleet, 95, 40)
    assert len(fleet.node_ids()) == 1
    hold(fleet, 95, 30)
    assert len(fleet.node_ids()) == 2


def test_one_sample_before_the_window_is_kept_so_that_rare_polls_cover_it() -> None:
    state = ScalerState()
    for at in (0.0, 25.0, 50.0, 75.0, 100.0):
        kept = state.sample("a", Sample(at, 90, 10), 60)
    assert [sample.at for sample in kept] == [25.0, 50.0, 75.0, 100.0]
    # One exactly at its edge covers it alone.
    assert [one.at for one in state.sample("a", Sample(110.0, 90, 10), 60)] == [50.0, 75.0, 100.0, 110.0]
    again = ScalerState.from_text(state.to_text())
    assert again == state


def test_the_state_of_another_version_is_read() -> None:
    former = (
        '{"wish":"kept","last_change_at":5.0,"samples":{"a":[[1.0,90.0,10.0]]},"replacing":[["a","small"]],'
        '"paused_until":0.0,"pause_reason":"","failures_in_a_row":0,"failures":[],"decisions":[],"last":{}}'
    )
    state = ScalerState.from_text(former)
    assert (state.desired, state.last_change_at) == (DesiredFleet.ACTIVE, 5.0)
    assert state.samples == {"a": [Sample(1.0, 90.0, 10.0)]}
    assert [(one.agent_id, one.instance_type) for one in state.replacing] == [("a", "small")]
    newer = ScalerState.from_text(
        '{"desired":"hibernated","measured":{"a":[{"at":1.0,"cpu":2.0,"memory":3.0,"gpu":4.0}]},"more":1}'
    )
    assert newer.desired is DesiredFleet.UNSET
    assert newer.samples == {"a": [Sample(1.0, 2.0, 3.0)]}
    # What version 0.1 looks up without a default.
    written = json.loads(state.to_text())
    assert (written["wish"], written["samples"], written["replacing"]) == ("kept", {}, [])


def test_a_node_offline_for_too_long_is_replaced_and_ended() -> None:
    fleet = fleet_of(cloud(min_nodes=2, max_nodes=3))
    try:
        fleet.nodes.initialize()
        dead, alive = fleet.node_ids()
        fleet.wire.machines[fleet.state(dead).record.address].up = False
        for _ in range(4):
            fleet.round()
        assert fleet.conditions() == {dead: "offline", alive: "online"}
        fleet.later(10)
        assert len(fleet.cloud().running()) == 2
        for _ in range(32):
            fleet.round()
        fleet.later(10)
        fleet.later(10)
        assert dead not in fleet.node_ids()
        assert dead not in fleet.cloud().running()
        assert len(fleet.node_ids()) == 2
    finally:
        fleet.close()


# -- executions that wait ----------------------------------------------------------------


def test_what_waits_makes_a_node_from_none_at_once() -> None:
    fleet = fleet_of(cloud(min_nodes=0))
    try:
        declare(fleet)
        fleet.waiting["hello"] = 1
        fleet.later(1)
        assert len(fleet.node_ids()) == 1
        assert "1 execution of hello wait" in fleet.autoscaler.report()["providers"]["aws"]["decisions"][0]["reason"]
        fleet.waiting.clear()
        hold(fleet, 5, 400)
        assert fleet.cloud().running() == []
    finally:
        fleet.close()


def test_a_burst_that_is_over_by_the_next_look_makes_no_node(fleet: CloudFleet) -> None:
    declare(fleet)
    fleet.nodes.initialize()
    fleet.waiting["hello"] = 50
    fleet.later(10)
    fleet.waiting.clear()
    fleet.later(10)
    assert len(fleet.node_ids()) == 1
    fleet.waiting["hello"] = 50
    fleet.later(10)
    fleet.later(10)
    assert len(fleet.node_ids()) == 2


def test_what_no_node_could_take_makes_none() -> None:
    fleet = fleet_of(cloud(min_nodes=0))
    try:
        declare(fleet, "exe", platforms=(Platform("windows"),))
        declare(fleet, "huge", memory_mb=10**6)
        fleet.waiting.update(exe=3, huge=3, deleted=3)
        hold(fleet, 0, 50)
        assert fleet.cloud().running() == []
    finally:
        fleet.close()


def test_what_a_flux_that_has_gone_told_is_deleted_and_told_again_should_it_come_back() -> None:
    store = MemoryControlStore()
    leader = fleet_of(cloud(min_nodes=0), store=store, shared=True)
    follower = fleet_of(cloud(min_nodes=0), store=store, shared=True, session="s2", clock=leader.time)
    try:
        follower.waiting["hello"] = 2
        follower.demand.publish(leader.now)
        leader.leadership.tick(leader.now)
        leader.demand.read()
        assert store.note("waiting/s2") is not None
        leader.pass_time(60)
        leader.demand.read()
        assert store.note("waiting/s2") is None
        follower.demand.publish(leader.now)
        assert store.note("waiting/s2") is not None
    finally:
        follower.close()
        leader.close()


def test_what_waits_at_another_flux_is_demand_too() -> None:
    store = MemoryControlStore()
    leader = fleet_of(cloud(min_nodes=0), store=store, shared=True)
    follower = fleet_of(cloud(min_nodes=0), store=store, shared=True, session="s2", clock=leader.time)
    try:
        leader.leadership.tick(leader.now)
        declare(leader)
        follower.waiting["hello"] = 2
        follower.autoscaler.tick(follower.now)
        assert follower.cloud().running() == []
        leader.later(1)
        assert len(leader.cloud().running()) == 1
        follower.waiting.clear()
        follower.autoscaler.tick(follower.now)
        assert leader.demand.read() == ()
    finally:
        follower.close()
        leader.close()


# -- two providers -----------------------------------------------------------------------


def two(**settings: object) -> CloudFleet:
    return fleet_of(cloud("aws", **settings), cloud("gcp", **settings))


def test_two_providers_do_not_both_answer_one_heat() -> None:
    fleet = two(min_nodes=1, max_nodes=3)
    try:
        fleet.nodes.initialize()
        gate = fleet.setup.gates["install flux-agent"] = threading.Event()
        for _ in range(12):
            fleet.load(95)
            fleet.pass_time(10)
            fleet.autoscaler.tick(fleet.now)
        wait_until(lambda: len(fleet.cloud("aws").running()) == 2, "the launch")
        assert len(fleet.cloud("gcp").running()) == 1
        gate.set()
        fleet.quiet()
        hold(fleet, 95, 50)
        # The new node has not had a whole window to take its share.
        assert len(fleet.cloud("gcp").running()) == 1
        hold(fleet, 95, 30)
        assert len(fleet.cloud("gcp").running()) == 2
    finally:
        fleet.close()


def test_two_providers_do_not_both_answer_one_queue() -> None:
    fleet = two(min_nodes=0, max_nodes=1)
    try:
        declare(fleet)
        fleet.waiting["hello"] = 1
        fleet.later(1)
        assert (len(fleet.cloud("aws").running()), len(fleet.cloud("gcp").running())) == (1, 0)
        # The first is full, and it lasts: the second one's turn.
        hold(fleet, 50, 20)
        assert len(fleet.cloud("gcp").running()) == 1
    finally:
        fleet.close()


def test_the_second_provider_answers_when_the_first_cannot() -> None:
    fleet = two(min_nodes=0, max_nodes=5)
    try:
        declare(fleet)
        fleet.cloud("aws").faults.launch[""] = ProviderError("aws: quota")
        fleet.waiting["hello"] = 1
        fleet.later(1)
        fleet.later(10)
        assert (len(fleet.cloud("aws").running()), len(fleet.cloud("gcp").running())) == (0, 1)
    finally:
        fleet.close()


# -- what is remembered ------------------------------------------------------------------


def test_a_restart_forgets_neither_cooldown_nor_samples(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    hold(fleet, 95, 50)
    again = fleet.again()
    try:
        hold(again, 95, 20)
        assert len(again.node_ids()) == 2
        third = again.again(session="s3")
        try:
            hold(third, 95, 100)
            assert len(third.node_ids()) == 2
            assert "cooling down" in third.last()["reason"]
            decisions = third.autoscaler.report()["providers"]["aws"]["decisions"]
            assert "hot" in decisions[0]["reason"]
        finally:
            third.close()
    finally:
        again.close()


def test_a_store_that_is_away_scales_nothing(fleet: CloudFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.nodes.initialize()
    hold(fleet, 95, 50)

    def away(*_: object) -> None:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as broken:
        broken.setattr(fleet.store, "set_note", away)
        fleet.load(95)
        fleet.time[0] += 10
        fleet.autoscaler.tick(fleet.now)
        assert len(fleet.cloud().running()) == 1
    hold(fleet, 95, 10)
    assert len(fleet.cloud().running()) == 2


def test_a_follower_decides_nothing_and_takes_over_with_what_the_leader_knew() -> None:
    store = MemoryControlStore()
    one = cloud(min_nodes=1, max_nodes=3)
    leader = fleet_of(one, store=store, shared=True)
    follower = fleet_of(one, store=store, wire=leader.wire, shared=True, session="s2", clock=leader.time)
    try:
        leader.nodes.initialize()
        hold(leader, 95, 50)
        follower.autoscaler.tick(follower.now)
        assert follower.autoscaler.report()["providers"]["aws"]["last_decision"] == leader.last()
        leader.leadership.resign()
        follower.time[0] += 10
        follower.leadership.tick(follower.now)
        assert follower.leadership.leads
        follower.replication.tick(follower.now)
        follower.settle()
        follower.autoscaler.tick(follower.now)
        remembered = follower.autoscaler._fleets["aws"].state
        assert remembered.desired.value == "active"
    finally:
        follower.close()
        leader.close()


def test_a_leader_that_has_not_read_the_last_ones_nodes_yet_makes_none() -> None:
    store, one = MemoryControlStore(), cloud(min_nodes=2, max_nodes=3)
    leader = fleet_of(one, store=store, shared=True)
    follower = fleet_of(one, store=store, wire=leader.wire, shared=True, session="s2", clock=leader.time)
    try:
        leader.nodes.initialize()
        leader.leadership.resign()
        follower.time[0] += 10
        follower.leadership.tick(follower.now)
        follower.autoscaler.tick(follower.now)
        with pytest.raises(Unavailable, match="taken over"):
            follower.nodes.initialize()
        assert len(follower.cloud().running()) == 2
        follower.replication.tick(follower.now)
        follower.settle()
        follower.autoscaler.tick(follower.now)
        assert follower.nodes.initialize()["nodes"] == {"spawned": 0, "failed": 0}
        assert len(follower.cloud().running()) == 2
    finally:
        follower.close()
        leader.close()


def test_the_report_shows_samples_conditions_and_reasons(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    hold(fleet, 42, 30)
    report = fleet.autoscaler.report()["providers"]["aws"]
    (node,) = report["nodes"]
    assert node["condition"] == "online"
    assert [sample["cpu_percent"] for sample in node["samples"]] == [42, 42, 42]
    assert report["enabled"] is True
    assert report["last_decision"]["reason"]


# -- another life's clock ----------------------------------------------------------------


def test_what_a_clock_that_was_ahead_has_left_holds_nothing_up() -> None:
    store = MemoryControlStore()
    state = ScalerState(last_change_at=103_600.0, paused_until=103_600.0)
    for second in range(3):
        state.sample("w1", Sample(103_600.0 + second, 10, 10), 60)
    assert [one.at for one in state.sample("w1", Sample(100_000.0, 10, 10), 60)] == [100_000.0]
    store.set_note("autoscaler/aws", state.to_text())
    fleet = fleet_of(store=store)
    try:
        fleet.later(1)
        assert "cooling down" in fleet.last()["reason"]
        fleet.later(600)
        assert "cooling down" not in fleet.last()["reason"]
        stored = ScalerState.from_text(store.note("autoscaler/aws"))
        assert stored.last_change_at <= 100_001
        assert stored.paused_until <= 100_601
    finally:
        fleet.close()
