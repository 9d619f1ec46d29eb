"""Nodes made and ended: what is counted, recorded, undone, resumed, and never left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from fluxlib.control.agents.reconciler import shown_id_note
from fluxlib.control.nodes.notes import NodePhase
from fluxlib.control.nodes.parts import forget_node
from fluxlib.control.nodes.provisioner import new_agent_id
from fluxlib.errors import Conflict, NotFound, ProviderError, StoreUnavailable, Unavailable
from fluxlib.model import AGENT_ID, AgentStatus
from tests.support.clouds import STEPS, CloudFleet, cloud
from tests.support.memory_store import MemoryControlStore
from tests.support.programs import wait_until


@pytest.fixture
def fleet() -> Iterator[CloudFleet]:
    made = CloudFleet(cloud(min_nodes=2, enabled=False))
    yield made
    made.close()


@contextmanager
def held_up(fleet: CloudFleet, nodes: int) -> Iterator[tuple[threading.Event, Future[Any]]]:
    """It is creation nodes, which wait for the event while flux-agent is installed; what it answers then."""
    gate = fleet.setup.gates["install flux-agent"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(fleet.nodes.initialize)
        try:
            wait_until(lambda: len(fleet.setup.seen) == 2 * nodes, "it to install")
            yield gate, asked
        finally:
            gate.set()


def test_initialize_makes_the_minimum_and_the_nodes_take_work(fleet: CloudFleet) -> None:
    answer = fleet.nodes.initialize()
    assert answer["nodes"] == {"spawned": 2, "failed": 0}
    assert answer["errors"] == []
    views = fleet.membership.views()
    assert [(view.record.status, view.record.provider, view.record.instance_type) for view in views] == [
        (AgentStatus.ONLINE, "aws", "small")
    ] * 2
    assert fleet.cloud().running() == sorted(view.record.agent_id for view in views)
    assert all(fleet.state(agent_id).takes_work for agent_id in fleet.node_ids())
    assert all(view.record.agent_id.startswith("web-") for view in views)


def test_only_what_is_missing_is_made_and_agents_of_others_do_not_count(fleet: CloudFleet) -> None:
    fleet.wire.add("manual")
    fleet.membership.register("manual:50052", legacy=False)
    assert fleet.nodes.initialize()["nodes"] == {"spawned": 2, "failed": 0}
    again = fleet.nodes.initialize()
    assert (again["nodes"], again["present"]) == ({"spawned": 0, "failed": 0}, 2)
    fleet.nodes.terminate(fleet.node_ids()[0])
    assert fleet.nodes.initialize()["nodes"] == {"spawned": 1, "failed": 0}
    assert len(fleet.cloud().running()) == 2


def test_two_that_initialize_at_once_make_the_minimum_once(fleet: CloudFleet) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: fleet.nodes.initialize(), range(4)))
    assert sum(answer["nodes"]["spawned"] for answer in answers) == 2
    assert len(fleet.cloud().running()) == 2


def test_each_provider_has_its_own_minimum() -> None:
    fleet = CloudFleet(cloud("aws", min_nodes=1), cloud("gcp", min_nodes=2))
    try:
        fleet.cloud("gcp").faults.launch[""] = ProviderError("gcp: quota CPUS exceeded")
        answer = fleet.nodes.initialize()
        assert answer["nodes"] == {"spawned": 1, "failed": 2}
        assert all("quota CPUS exceeded" in error for error in answer["errors"])
        assert (len(fleet.cloud("aws").running()), len(fleet.cloud("gcp").running())) == (1, 0)
        assert [view.record.provider for view in fleet.membership.views()] == ["aws"]
    finally:
        fleet.close()


def test_no_instance_type_is_a_failure_that_says_where_to_name_one() -> None:
    fleet = CloudFleet(cloud(min_nodes=1, node_types=()))
    try:
        answer = fleet.nodes.initialize()
        assert answer["nodes"] == {"spawned": 0, "failed": 1}
        assert "providers.aws.autoscaling.node_types" in answer["errors"][0]
    finally:
        fleet.close()


# -- what is recorded ------------------------------------------------------------------


def test_a_launch_is_in_the_store_before_it_is_asked_for(fleet: CloudFleet) -> None:
    seen = []
    provider = fleet.cloud()
    launch = provider.launch

    def watched(wanted, deadline):  # type: ignore[no-untyped-def]
        stored = fleet.stored(wanted.agent_id)
        seen.append((stored.status, stored.provider, stored.instance_type, stored.provider_id))
        return launch(wanted, deadline)

    provider.launch = watched  # type: ignore[method-assign]
    fleet.nodes.initialize()
    assert seen == [(AgentStatus.PROVISIONING, "aws", "small", "")] * 2


def test_a_store_that_is_away_launches_nothing(fleet: CloudFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr(fleet.store, "save_agent", away)
    with pytest.raises(StoreUnavailable):
        fleet.nodes.initialize()
    assert fleet.cloud().running() == []


def test_progress_is_seen_while_a_node_is_made(fleet: CloudFleet) -> None:
    with held_up(fleet, 2) as (gate, answer):
        for view in fleet.membership.views():
            assert view.record.status is AgentStatus.PROVISIONING
            assert view.problem == "is being made: install flux-agent"
        gate.set()
        assert answer.result()["nodes"]["spawned"] == 2


def test_host_key_and_steps_are_kept_and_a_restart_goes_on_where_it_stopped(fleet: CloudFleet) -> None:
    fleet.setup.gates["install flux-agent"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fleet.nodes.initialize)
        wait_until(lambda: len(fleet.setup.seen) == 4, "both to install")
        ids = fleet.node_ids()
        again = fleet.again()
    try:
        for agent_id in ids:
            notes = again.notes(agent_id)
            assert (notes.phase, notes.done) == (NodePhase.SETUP, ("check for dpkg",))
            assert notes.host_key == f"ssh-ed25519 of-{agent_id}"
        again.later(1)
        assert sorted(again.setup.seen) == sorted((agent_id, step) for agent_id in ids for step in STEPS[1:])
        # The key that was seen first is demanded of the resumed connection.
        assert sorted(again.setup.host_keys) == sorted(f"ssh-ed25519 of-{agent_id}" for agent_id in ids)
        assert again.cloud().running() == sorted(ids)
        assert [view.record.status for view in again.membership.views()] == [AgentStatus.ONLINE] * 2
        assert [call for call in again.cloud().calls if call[0] == "terminate"] == []
    finally:
        again.close()


def test_a_life_that_ended_between_asking_and_the_answer_gets_the_same_machine(fleet: CloudFleet) -> None:
    provider = fleet.cloud()
    launch, asked = provider.launch, threading.Event()

    def dies(wanted, deadline):  # type: ignore[no-untyped-def]
        launch(wanted, deadline)
        asked.set()
        assert fleet.jobs.stopping.wait(10)
        raise RuntimeError("the process is gone: nobody hears the answer")

    provider.launch = dies  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fleet.nodes.initialize)
        assert asked.wait(10)
        wait_until(lambda: len(provider.running()) == 2, "both to run")
        again = fleet.again()
    try:
        provider.launch = launch  # type: ignore[method-assign]
        again.later(1)
        assert again.cloud().running() == sorted(again.node_ids())
        assert len(again.node_ids()) == 2
        assert all(again.state(agent_id).takes_work for agent_id in again.node_ids())
    finally:
        again.close()


# -- what fails ------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_ends_the_machine_and_is_named(fleet: CloudFleet, step: str) -> None:
    fleet.setup.fails[step] = "exit status 1: no space left on device"
    answer = fleet.nodes.initialize()
    assert answer["nodes"] == {"spawned": 0, "failed": 2}
    assert all(step in error and "no space left on device" in error for error in answer["errors"])
    assert (fleet.cloud().running(), fleet.node_ids(), fleet.store.agents()) == ([], [], [])


def test_an_agent_that_never_answers_ends_the_machine(fleet: CloudFleet) -> None:
    fleet.setup.dumb = True
    answer = fleet.nodes.initialize()
    assert answer["nodes"] == {"spawned": 0, "failed": 2}
    assert "refused the connection" in answer["errors"][0]
    assert fleet.cloud().running() == []


def test_what_cannot_be_ended_is_listed_and_tried_again_until_it_is_gone(fleet: CloudFleet) -> None:
    fleet.setup.fails["install flux-agent"] = "exit status 1"
    fleet.cloud().faults.terminate[""] = ProviderError("aws: the API is down")
    answer = fleet.nodes.initialize()
    assert answer["nodes"] == {"spawned": 0, "failed": 2}
    assert "the API is down: it is tried again" in answer["errors"][0]
    assert len(fleet.node_ids()) == len(fleet.cloud().running()) == 2
    assert all("retrying" in view.problem for view in fleet.membership.views())
    fleet.later(31)
    assert len(fleet.node_ids()) == 2
    again = fleet.again()
    try:
        again.cloud().faults.terminate.clear()
        again.later(31)
        assert (again.cloud().running(), again.node_ids(), again.store.agents()) == ([], [], [])
    finally:
        again.close()


def test_a_launch_whose_answer_was_lost_is_found_by_its_agent_id_and_ended(fleet: CloudFleet) -> None:
    fleet.cloud().faults.lost_answer.add("")
    fleet.cloud().faults.listing = ProviderError("aws: the API is down")
    answer = fleet.nodes.initialize()
    assert answer["nodes"]["failed"] == 2
    assert len(fleet.cloud().running()) == len(fleet.node_ids()) == 2
    fleet.cloud().faults.listing = None
    fleet.later(31)
    assert (fleet.cloud().running(), fleet.node_ids()) == ([], [])


def test_a_resumed_launch_that_is_refused_may_have_been_accepted_before(fleet: CloudFleet) -> None:
    provider = fleet.cloud()
    launch, asked = provider.launch, threading.Event()

    def dies(wanted, deadline):  # type: ignore[no-untyped-def]
        launch(wanted, deadline)
        asked.set()
        assert fleet.jobs.stopping.wait(10)
        raise RuntimeError("the process is gone: nobody hears the answer")

    provider.launch = dies  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fleet.nodes.initialize)
        assert asked.wait(10)
        wait_until(lambda: len(provider.running()) == 2, "both to run")
        again = fleet.again()
    try:
        # The configuration changed meanwhile: the token is refused, and the machine is there.
        provider.launch = launch  # type: ignore[method-assign]
        provider.faults.launch[""] = ProviderError("aws: IdempotentParameterMismatch")
        again.later(1)
        assert (provider.running(), again.node_ids()) == ([], [])
    finally:
        again.close()


def test_a_stranded_machine_is_ended_by_its_own_id_without_the_clouds_list(fleet: CloudFleet) -> None:
    faults = fleet.cloud().faults
    faults.half_way[""] = "aws: it does not run"
    faults.terminate[""] = faults.listing = ProviderError("aws: the API is down")
    fleet.nodes.initialize()
    assert len(fleet.node_ids()) == len(fleet.cloud().running()) == 2
    faults.terminate.clear()
    fleet.later(31)
    assert (fleet.node_ids(), fleet.cloud().running()) == ([], [])


def test_a_removal_ordered_while_a_machine_is_launched_is_not_forgotten(fleet: CloudFleet) -> None:
    provider, gate = fleet.cloud(), threading.Event()
    launch = provider.launch

    def slow(wanted, deadline):  # type: ignore[no-untyped-def]
        node = launch(wanted, deadline)
        assert gate.wait(10)
        return node

    provider.launch = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        made = pool.submit(fleet.nodes.initialize)
        wait_until(lambda: len(provider.running()) == 2, "both to run")
        # Launched and not answered yet: known by their agents' IDs.
        fleet.strays.tick(fleet.now)
        assert fleet.strays.warnings() == []
        removed = pool.submit(fleet.nodes.remove_all)
        ids = fleet.node_ids()
        wait_until(lambda: all(fleet.notes(one).phase is NodePhase.ENDING for one in ids), "both to be ending")
        gate.set()
        assert removed.result(10)["removed"] == 2
        assert "DELETE /nodes" in made.result(10)["errors"][0]
    assert fleet.setup.seen == []
    assert (provider.running(), fleet.store.agents()) == ([], [])


def test_a_node_that_is_leaving_does_not_count(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    busy = fleet.node_ids()[0]
    assert fleet.agents.reserve(busy, "hello") is not None
    fleet.terminator.begin(busy, "cold", 300)
    wait_until(lambda: fleet.state(busy).record.status is AgentStatus.DRAINING, "it to drain")
    assert fleet.nodes.initialize()["nodes"] == {"spawned": 1, "failed": 0}


def test_a_launch_that_may_show_later_is_not_forgotten_at_once(fleet: CloudFleet) -> None:
    provider = fleet.cloud()
    fleet.cloud().faults.lost_answer.add("")
    nodes, hidden = provider.nodes, True
    provider.nodes = lambda: [] if hidden else nodes()  # type: ignore[method-assign]
    fleet.nodes.initialize()
    fleet.later(31)
    assert len(fleet.node_ids()) == 2
    hidden = False
    fleet.later(31)
    assert (provider.running(), fleet.node_ids()) == ([], [])


def test_a_refused_launch_leaves_nothing_to_try_again(fleet: CloudFleet) -> None:
    fleet.cloud().faults.launch[""] = ProviderError("aws: InsufficientInstanceCapacity")
    assert "InsufficientInstanceCapacity" in fleet.nodes.initialize()["errors"][0]
    assert (fleet.node_ids(), fleet.store.agents()) == ([], [])


def test_a_key_pair_that_cannot_be_imported_launches_nothing(fleet: CloudFleet) -> None:
    fleet.cloud().faults.prepare = ProviderError("aws: UnauthorizedOperation: ec2:ImportKeyPair")
    answer = fleet.nodes.initialize()
    assert "ec2:ImportKeyPair" in answer["errors"][0]
    assert [call for call in fleet.cloud().calls if call[0] == "launch"] == []
    assert fleet.node_ids() == []


@pytest.mark.parametrize("ends", [True, False])
def test_a_node_deregistered_while_it_is_made_is_ended_too(fleet: CloudFleet, ends: bool) -> None:
    if not ends:
        fleet.cloud().faults.terminate[""] = ProviderError("aws: the API is down")
    with held_up(fleet, 2) as (gate, made):
        for agent_id in fleet.node_ids():
            fleet.membership.deregister(agent_id)
        gate.set()
        assert "deregistered meanwhile" in made.result()["errors"][0]
    assert fleet.node_ids() == []
    assert len(fleet.cloud().running()) == (0 if ends else 2)
    fleet.strays.tick(fleet.now)
    assert len(fleet.strays.warnings()) == (0 if ends else 2)


def test_a_node_that_is_ended_at_once_takes_nothing_new_meanwhile(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    first = fleet.node_ids()[0]
    seen: list[bool] = []
    end = fleet.cloud().terminate

    def watched(provider_id: str) -> None:
        seen.append(fleet.state(first).takes_work)
        end(provider_id)

    fleet.cloud().terminate = watched  # type: ignore[method-assign]
    fleet.nodes.terminate(first)
    assert seen == [False]


# -- ending ----------------------------------------------------------------------------


def test_remove_all_ends_every_node_and_leaves_agents_added_by_hand(fleet: CloudFleet) -> None:
    fleet.wire.add("manual")
    fleet.membership.register("manual:50052", legacy=False)
    fleet.nodes.initialize()
    assert fleet.nodes.remove_all() == {"status": "removed", "removed": 2, "errors": []}
    assert fleet.cloud().running() == []
    assert [view.record.agent_id for view in fleet.membership.views()] == ["manual"]


def test_remove_all_ends_nodes_that_are_still_being_made(fleet: CloudFleet) -> None:
    fleet.setup.gates["install flux-agent"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(fleet.nodes.initialize)
        wait_until(lambda: len(fleet.setup.seen) == 4, "both to install")
        assert fleet.nodes.remove_all() == {"status": "removed", "removed": 2, "errors": []}
        assert made.result()["nodes"] == {"spawned": 0, "failed": 2}
    assert (fleet.cloud().running(), fleet.node_ids(), fleet.store.agents()) == ([], [], [])


def test_remove_all_counts_only_what_is_gone(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    first = fleet.node_ids()[0]
    fleet.cloud().faults.terminate[fleet.state(first).record.provider_id] = ProviderError("aws: it is protected")
    answer = fleet.nodes.remove_all()
    assert (answer["status"], answer["removed"]) == ("incomplete", 1)
    assert first in answer["errors"][0]
    assert "it is protected" in answer["errors"][0]
    assert fleet.node_ids() == [first]


def test_what_runs_may_end_before_its_node_does(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    busy, idle = fleet.node_ids()
    slot = fleet.agents.reserve(busy, "hello")
    assert slot is not None
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fleet.nodes.remove_all)
        wait_until(lambda: fleet.agents.get(idle) is None, "the idle one to go")
        assert fleet.state(busy).record.status is AgentStatus.DRAINING
        assert not fleet.state(busy).takes_work
        assert fleet.cloud().running() == [busy]
        fleet.agents.release(slot)
        assert answer.result(10)["removed"] == 2
    assert fleet.cloud().running() == []


def test_a_node_that_goes_away_while_it_drains_is_ended_at_once(
    fleet: CloudFleet, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.nodes.initialize()
    busy = fleet.node_ids()[0]
    assert fleet.agents.reserve(busy, "hello") is not None
    fleet.terminator.begin(busy, "cold", 300)
    wait_until(lambda: fleet.state(busy).record.status is AgentStatus.DRAINING, "it to drain")
    fleet.wire.machines[fleet.state(busy).record.address].up = False
    for _ in range(3):
        fleet.round()
    wait_until(lambda: fleet.agents.get(busy) is None, "it to go")
    assert busy not in fleet.cloud().running()
    assert ("lost", busy) in fleet.executions.calls
    assert f"node {busy} went offline while draining" in caplog.text


def test_a_drain_ends_at_its_deadline_and_survives_a_restart(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    busy, other = fleet.node_ids()
    assert fleet.agents.reserve(busy, "hello") is not None
    fleet.terminator.begin(busy, "cold", 300)
    wait_until(lambda: fleet.state(busy).record.status is AgentStatus.DRAINING, "it to drain")
    again = fleet.again()
    try:
        assert again.notes(busy).phase is NodePhase.ENDING
        assert again.notes(busy).drain_until == 1300
        assert again.agents.reserve(busy, "hello") is not None
        again.pass_time(200)
        again.nodes.tick(again.now)
        assert not again.jobs.wait([busy], 0.1)
        again.pass_time(101)
        assert again.jobs.wait([busy], 10)
        assert again.cloud().running() == [other]
    finally:
        again.close()


def test_a_draining_node_that_a_new_life_has_not_reached_yet_is_not_taken_for_dead(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    busy, other = fleet.node_ids()
    assert fleet.agents.reserve(busy, "hello") is not None
    fleet.terminator.begin(busy, "cold", 300)
    wait_until(lambda: fleet.state(busy).record.status is AgentStatus.DRAINING, "it to drain")
    machine = fleet.wire.machines[fleet.state(busy).record.address]
    machine.up = False
    again = fleet.again()
    try:
        again.later(1)
        assert busy in again.cloud().running()
        again.later(60)
        assert again.cloud().running() == [other]
    finally:
        again.close()


def test_a_draining_node_that_is_just_being_reached_is_not_taken_for_dead(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    agent_id = fleet.node_ids()[0]
    slot = fleet.agents.reserve(agent_id, "hello")
    fleet.terminator.begin(agent_id, "test", 100)
    wait_until(lambda: fleet.state(agent_id).record.status is AgentStatus.DRAINING, "it to drain")
    fleet.close()
    again = CloudFleet(*fleet.clouds, store=fleet.store, wire=fleet.wire, session="s2", clock=fleet.time)
    looked = []

    def look(changed: str) -> None:
        state = again.agents.get(agent_id)
        if changed == agent_id and state is not None and state.connection is not None and not looked:
            # Connected, and not present yet: the loop looks at this very moment.
            looked.append(state.record.status)
            again.nodes.tick(again.now)
            again.jobs.wait([agent_id], 1)

    again.agents.on_change(look)
    try:
        again.start()
        assert looked == [AgentStatus.OFFLINE]
        assert agent_id in again.cloud().running()
        assert again.state(agent_id).record.status is AgentStatus.DRAINING
    finally:
        again.close()
    assert slot is not None


def test_terminate_ends_one_node_and_refuses_what_is_none(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    first, second = fleet.node_ids()
    fleet.nodes.terminate(first)
    assert fleet.cloud().running() == [second]
    with pytest.raises(NotFound):
        fleet.nodes.terminate(first)
    fleet.wire.add("manual")
    fleet.membership.register("manual:50052", legacy=False)
    with pytest.raises(Conflict, match="by hand"):
        fleet.nodes.terminate("manual")
    fleet.cloud().faults.terminate[""] = ProviderError("aws: the API is down")
    with pytest.raises(ProviderError, match="API is down"):
        fleet.nodes.terminate(second)
    assert fleet.node_ids() == [second]


def test_a_follower_makes_and_ends_nothing() -> None:
    store = MemoryControlStore()
    leader = CloudFleet(cloud(), store=store, shared=True)
    follower = CloudFleet(cloud(), store=store, shared=True, session="s2")
    try:
        for order in (follower.nodes.initialize, follower.nodes.remove_all, lambda: follower.nodes.terminate("x")):
            with pytest.raises(Unavailable, match="another Flux leads"):
                order()
        follower.nodes.tick(follower.now)
        assert follower.nodes.autoscaling()["leader"] is False
        assert leader.nodes.autoscaling()["leader"] is True
    finally:
        leader.close()
        follower.close()


def test_one_that_ceases_to_lead_leaves_its_nodes_to_the_next(fleet: CloudFleet) -> None:
    with held_up(fleet, 2) as (gate, answer):
        fleet.leadership._set(None)
        gate.set()
        assert answer.result()["nodes"]["spawned"] == 0
    assert len(fleet.cloud().running()) == 2
    assert [fleet.notes(agent_id).phase for agent_id in fleet.node_ids()] == [NodePhase.SETUP] * 2


@pytest.fixture
def two() -> Iterator[tuple[CloudFleet, CloudFleet]]:
    """A leader and a follower: one store, one cloud, one clock, the same machines."""
    store, shared = MemoryControlStore(), cloud(min_nodes=1)
    leader = CloudFleet(shared, store=store, shared=True)
    follower = CloudFleet(shared, store=store, wire=leader.wire, shared=True, session="s2", clock=leader.time)
    yield leader, follower
    leader.close()
    follower.close()


def test_a_node_under_way_is_gone_on_with_by_the_flux_that_takes_over(two: tuple[CloudFleet, CloudFleet]) -> None:
    leader, follower = two
    with held_up(leader, 1) as (gate, asked):
        leader.leadership.resign()
        follower.round(10)
        assert follower.leadership.leads
        follower.nodes.tick(follower.now)
        follower.quiet()
        gate.set()
        asked.result(10)
    (agent_id,) = follower.node_ids()
    assert follower.state(agent_id).takes_work
    assert follower.setup.seen == [(agent_id, step) for step in STEPS[1:]]
    assert follower.cloud().running() == [agent_id]
    assert not any(call == "terminate" for call, _ in follower.cloud().calls)


def test_a_node_that_works_is_not_set_up_again_by_a_flux_that_has_yet_to_read_so(
    two: tuple[CloudFleet, CloudFleet],
) -> None:
    leader, follower = two
    with held_up(leader, 1) as (gate, asked):
        follower.round(0)
        gate.set()
        asked.result(10)
    leader.leadership.resign()
    follower.leadership.tick(follower.now)
    (agent_id,) = follower.node_ids()
    assert follower.notes(agent_id).phase is NodePhase.SETUP
    follower.nodes.tick(follower.now)
    follower.quiet()
    with pytest.raises(Unavailable, match="still reading"):
        follower.nodes.terminate(agent_id)
    follower.round(0)
    follower.nodes.tick(follower.now)
    follower.quiet()
    assert follower.setup.seen == []
    assert follower.notes(agent_id).phase is NodePhase.READY
    follower.nodes.terminate(agent_id)
    assert follower.cloud().running() == []


def test_a_frozen_flux_that_leads_again_takes_over_what_happened_meanwhile(two: tuple[CloudFleet, CloudFleet]) -> None:
    leader, follower = two
    leader.nodes.initialize()
    leader.later(1)
    follower.round(0)
    for _ in range(2):
        follower.round(10)
    follower.nodes.remove_all()
    follower.leadership.resign()
    # Between two looks of its loops it lost the lease and has it again.
    leader.leadership.tick(leader.now)
    assert leader.leadership.leads
    leader.round(0)
    assert leader.node_ids() == []
    leader.later(10)
    assert leader.cloud().running() == []
    assert "POST /initialize" in leader.last()["reason"]


def test_a_job_that_outlives_the_reign_undoes_nothing_of_the_next_one(two: tuple[CloudFleet, CloudFleet]) -> None:
    leader, follower = two
    with held_up(leader, 1) as (gate, asked):
        leader.leadership.resign()
        follower.round(10)
        follower.nodes.tick(follower.now)
        follower.quiet()
        (agent_id,) = follower.node_ids()
        before = follower.stored(agent_id)
        assert follower.notes(agent_id).phase is NodePhase.READY
        gate.set()
        assert asked.result(10)["nodes"]["spawned"] == 0
    assert follower.stored(agent_id) == before


@pytest.mark.parametrize("name", ["web", "My Fleet!", "", "9-lives", "a" * 200, "--", "ÄÖ"])
def test_names_of_nodes_fit_every_cloud(name: str) -> None:
    made = new_agent_id(name)
    assert AGENT_ID.fullmatch(made)
    assert made[0].isalpha()
    assert new_agent_id(name) != made


# -- what is left of a node ----------------------------------------------------------------


def test_nothing_is_kept_of_a_node_that_has_ended_and_everything_of_an_agent_by_hand(fleet: CloudFleet) -> None:
    fleet.wire.add("by-hand")
    fleet.membership.register("by-hand:50052", legacy=False)
    fleet.nodes.initialize()
    nodes = fleet.node_ids()
    assert fleet.forgotten == []
    fleet.nodes.terminate(nodes[0])
    fleet.nodes.remove_all()
    fleet.membership.deregister("by-hand")
    assert sorted(fleet.forgotten) == sorted(nodes)


def test_forgetting_a_node_takes_what_it_has_shown() -> None:
    store = MemoryControlStore()
    kept = {}
    for agent_id in ("web-1", "web-2"):
        kept[agent_id] = shown_id_note(agent_id)
        store.set_note(kept[agent_id], "yes")
    forget_node(store, "web-1")
    assert (store.note(kept["web-1"]), store.note(kept["web-2"])) == (None, "yes")
    forget_node(store, "web-1")
