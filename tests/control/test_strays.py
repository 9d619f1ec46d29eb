"""What the cloud runs held against what Flux knows: reported, rarely ended, never the wrong ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fluxlib.errors import ProviderError, StoreUnavailable
from fluxlib.model import AgentStatus
from fluxlib.providers.base import NodeState
from tests.support.clouds import CloudFleet, cloud
from tests.support.memory_store import MemoryControlStore

LONG_AGO = 5000.0  # after the store's records began, and well over 15 minutes before NOW
NOW = 10_000.0


def made(**settings: object) -> CloudFleet:
    """A Flux whose store has kept nodes since 1000, at NOW."""
    fleet = CloudFleet(cloud(min_nodes=1, enabled=False), now=1000.0, **settings)
    fleet.strays.tick(1000.0)
    fleet.pass_time(NOW - 1000.0)
    return fleet


@pytest.fixture(params=[True, False], ids=["end_strays", "report"])
def ends(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def fleet(ends: bool) -> Iterator[CloudFleet]:
    fleet = made(end_strays=ends)
    yield fleet
    fleet.close()


def test_nodes_that_are_known_are_no_strays(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    fleet.pass_time(2000)
    fleet.strays.tick(fleet.now)
    assert fleet.strays.warnings() == []
    assert len(fleet.cloud().running()) == 1


def test_a_stray_is_reported_and_ended_only_when_told_to(fleet: CloudFleet, ends: bool) -> None:
    node = fleet.cloud().put("web-lost", launched_at=LONG_AGO)
    fleet.strays.tick(NOW)
    (warning,) = fleet.strays.warnings()
    assert node.provider_id in warning
    assert "web-lost" in warning
    assert ("end_strays: true" in warning) == (not ends)
    assert fleet.cloud().running() == ([] if ends else ["web-lost"])
    fleet.strays.tick(NOW + 180)
    assert len(fleet.strays.warnings()) == (0 if ends else 1)


def test_a_young_stray_is_left_alone_for_a_quarter_of_an_hour(fleet: CloudFleet, ends: bool) -> None:
    fleet.cloud().put("web-young", launched_at=NOW - 899)
    fleet.strays.tick(NOW)
    assert len(fleet.strays.warnings()) == 1
    assert fleet.cloud().running() == ["web-young"]
    fleet.strays.tick(NOW + 2)
    assert fleet.cloud().running() == ([] if ends else ["web-young"])


def test_other_installations_and_foreign_machines_are_not_even_looked_at(fleet: CloudFleet) -> None:
    fleet.cloud().put("web-theirs", launched_at=LONG_AGO, installation_id="there")
    fleet.strays.tick(NOW)
    assert fleet.strays.warnings() == []
    assert fleet.cloud().running() == ["web-theirs"]


def test_an_emptied_store_ends_nothing() -> None:
    fleet = made(end_strays=True)
    fleet.nodes.initialize()
    fleet.pass_time(5000)
    # Somebody flushed Redis: the agents reads well, and is empty.
    fleet.close()
    after = CloudFleet(*fleet.clouds, store=MemoryControlStore(), clock=fleet.time, end_strays=True)
    try:
        for _ in range(20):
            after.strays.tick(after.now)
            after.pass_time(180)
        (warning,) = after.strays.warnings()
        assert "older than the store's records" in warning
        assert len(after.cloud().running()) == 1
        # What it makes itself from then on is its own again.
        stray = after.cloud().put("web-new", launched_at=after.now)
        after.pass_time(1000)
        after.strays.tick(after.now)
        assert stray.agent_id not in after.cloud().running()
    finally:
        after.close()


def test_a_registry_that_cannot_be_read_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = made(end_strays=True)
    try:
        fleet.nodes.initialize()
        fleet.pass_time(2000)

        def away() -> None:
            raise StoreUnavailable("the store is away")

        monkeypatch.setattr(fleet.store, "agents", away)
        fleet.strays.tick(fleet.now)
        assert len(fleet.cloud().running()) == 1
        assert [call for call in fleet.cloud().calls if call[0] == "terminate"] == []
    finally:
        fleet.close()


def test_a_list_that_cannot_be_read_is_a_warning_and_ends_nothing(fleet: CloudFleet) -> None:
    fleet.cloud().put("web-lost", launched_at=LONG_AGO)
    fleet.cloud().faults.listing = ProviderError("aws: listing instances failed: UnauthorizedOperation")
    fleet.strays.tick(NOW)
    assert any("UnauthorizedOperation" in warning for warning in fleet.strays.warnings())
    assert fleet.cloud().running() == ["web-lost"]


def test_a_stray_that_cannot_be_ended_says_why() -> None:
    fleet = made(end_strays=True)
    try:
        node = fleet.cloud().put("web-lost", launched_at=LONG_AGO)
        fleet.cloud().faults.terminate[node.provider_id] = ProviderError("aws: it is protected")
        fleet.strays.tick(NOW)
        assert "it is protected" in fleet.strays.warnings()[0]
    finally:
        fleet.close()


def test_a_second_machine_of_one_agent_is_a_stray(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    (agent_id,) = fleet.node_ids()
    provider_id = fleet.state(agent_id).record.provider_id
    double = fleet.cloud().put("other", launched_at=LONG_AGO)
    fleet.cloud()._machines[double.provider_id] = type(double)(
        "aws", double.provider_id, agent_id, "small", NodeState.RUNNING, launched_at=LONG_AGO
    )
    fleet.strays.tick(NOW)
    (warning,) = fleet.strays.warnings()
    assert double.provider_id in warning
    assert provider_id not in warning


def test_a_follower_says_and_ends_nothing() -> None:
    store = MemoryControlStore()
    leader = CloudFleet(cloud(), store=store, shared=True, now=1000.0)
    follower = CloudFleet(cloud(), store=store, shared=True, session="s2", now=1000.0, end_strays=True)
    try:
        follower.cloud().put("web-lost", launched_at=0.0)
        follower.strays.tick(5000.0)
        assert follower.strays.warnings() == []
        assert follower.cloud().running() == ["web-lost"]
    finally:
        leader.close()
        follower.close()


def test_a_node_just_ended_is_no_stray_while_the_list_lags(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    (agent_id,) = fleet.node_ids()
    provider_id = fleet.state(agent_id).record.provider_id
    fleet.nodes.remove_all()
    fleet.cloud().end(provider_id, NodeState.RUNNING)
    fleet.strays.tick(fleet.now)
    assert fleet.strays.warnings() == []
    # Its end was accepted and did not come: from now on it is one.
    fleet.pass_time(700)
    fleet.strays.tick(fleet.now)
    assert provider_id in fleet.strays.warnings()[0]


def test_a_machine_that_ended_by_itself_is_forgotten_once_its_agent_is_away(fleet: CloudFleet) -> None:
    fleet.nodes.initialize()
    (agent_id,) = fleet.node_ids()
    fleet.pass_time(400)
    fleet.cloud().end(fleet.state(agent_id).record.provider_id)
    fleet.strays.tick(fleet.now)
    fleet.quiet()
    assert fleet.node_ids() == [agent_id]  # it still answers: the list is what is wrong
    fleet.wire.machines[fleet.state(agent_id).record.address].up = False
    for _ in range(3):
        fleet.round()
    fleet.strays.tick(fleet.now)
    fleet.quiet()
    assert fleet.node_ids() == []
    assert ("lost", agent_id) in fleet.executions.calls


@pytest.mark.parametrize("scaled", [True, False], ids=["autoscaling", "no autoscaling"])
def test_a_machine_that_is_being_stopped_is_not_taken_for_one_that_ended(scaled: bool) -> None:
    # Compute Engine says STOPPING of both for a minute and more, while the agent is away already.
    fleet = CloudFleet(cloud("gcp", min_nodes=2, max_nodes=2, enabled=scaled), now=NOW)
    try:
        fleet.nodes.initialize()
        stopped = fleet.node_ids()[0]
        record = fleet.state(stopped).record
        fleet.cloud("gcp").end(record.provider_id, NodeState.ENDING)
        fleet.wire.machines[record.address].up = False
        for _ in range(3):
            fleet.round()
        for state in (NodeState.ENDING, NodeState.STOPPED):
            fleet.cloud("gcp").end(record.provider_id, state)
            fleet.later(305)
            fleet.strays.tick(fleet.now)
            fleet.quiet()
            assert [call for call in fleet.cloud("gcp").calls if call[0] == "terminate"] == []
        fleet.cloud("gcp").end(record.provider_id)
        fleet.strays.tick(fleet.now)
        fleet.quiet()
        assert stopped not in fleet.node_ids()
    finally:
        fleet.close()


@pytest.mark.parametrize("scaled", [True, False], ids=["autoscaling", "no autoscaling"])
def test_a_machine_that_somebody_stopped_is_left_to_its_owner(scaled: bool) -> None:
    fleet = CloudFleet(cloud(min_nodes=2, max_nodes=2, enabled=scaled), now=NOW)
    try:
        fleet.nodes.initialize()
        stopped, other = fleet.node_ids()
        record = fleet.state(stopped).record
        fleet.cloud().end(record.provider_id, NodeState.STOPPED)
        fleet.wire.machines[record.address].up = False
        for _ in range(3):
            fleet.round()
        # The autoscaler may look before the clouds' list is compared, or after.
        for _ in range(3):
            fleet.later(305)
            fleet.strays.tick(fleet.now)
            fleet.quiet()
        assert [call for call in fleet.cloud().calls if call[0] == "terminate"] == []
        assert fleet.state(stopped).record.status is AgentStatus.OFFLINE
        assert fleet.strays.warnings() == []
        assert len(fleet.node_ids()) == (3 if scaled else 2)
        if scaled:
            assert fleet.conditions()[stopped] == "stopped"
            assert all("ends" not in one for one in fleet.autoscaler.report()["providers"]["aws"]["decisions"][1:])
        # Started again it is a node as before.
        fleet.cloud().end(record.provider_id, NodeState.RUNNING)
        fleet.wire.machines[record.address].up = True
        for _ in range(2):
            fleet.round()
        assert fleet.state(stopped).takes_work
        assert fleet.state(other).takes_work
    finally:
        fleet.close()
