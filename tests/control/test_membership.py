"""Joining, leaving, draining: what is durable, what is refused, what an agent holds before it gets work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fluxlib.errors import AgentUnreachable, Conflict, NotFound, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus, ExecutionStatus
from tests.support.fleet import Fleet, spec
from tests.support.programs import make_zip

CODE = make_zip({"run.sh": "#!/bin/sh\necho hello\n"})


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.close()


def again(fleet: Fleet, **changes: object) -> Fleet:
    """Flux restarted: the same store and agents, nothing in memory."""
    fleet.close()
    return Fleet(fleet.store, fleet.wire, session="s2", clock=fleet.time)


def test_a_registered_agent_is_in_step_durable_and_takes_work(fleet: Fleet) -> None:
    fleet.functions.put(spec())
    fleet.functions.deploy("hello", CODE)
    machine = fleet.wire.add("w1")
    view = fleet.membership.register("w1:50052", legacy=False)
    assert (view.record.status, view.in_step, view.problem) == (AgentStatus.ONLINE, True, "")
    assert view.figures is not None
    assert fleet.state("w1").takes_work
    assert machine.functions["hello"].code_digest == fleet.functions.get("hello").code_digest
    stored = fleet.stored("w1")
    assert (stored.status, stored.address, str(stored.platform)) == (AgentStatus.ONLINE, "w1:50052", "linux/amd64")


def test_only_what_differs_by_digest_is_pushed(fleet: Fleet) -> None:
    for name in ("one", "two", "three"):
        fleet.functions.put(spec(name))
        fleet.functions.deploy(name, CODE)
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    machine.calls.clear()
    fleet.membership.deregister("w1")
    fleet.functions.put(spec("two", timeout_seconds=9))
    fleet.functions.delete("three", force=False)
    fleet.membership.register("w1:50052", legacy=False)
    assert [call for call in machine.calls if call != "inventory"] == ["remove three", "register two"]


def test_an_original_agent_gets_everything_and_keeps_what_is_deleted(fleet: Fleet) -> None:
    fleet.functions.put(spec())
    fleet.functions.deploy("hello", CODE)
    machine = fleet.wire.add("old", original=True)
    fleet.membership.register("old:50052", legacy=False)
    assert machine.calls == ["deploy hello"]
    assert fleet.stored("old").original
    result = fleet.functions.delete("hello", force=False)
    assert [(agent.agent_id, agent.status) for agent in result.agents] == [("old", "skipped")]
    assert "keep the code" in result.warnings[0]
    assert "hello" in machine.functions


def test_an_id_at_another_address_is_a_conflict_that_changes_nothing(fleet: Fleet) -> None:
    fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    fleet.wire.add("w1", "elsewhere:50052")
    before = fleet.stored("w1")
    with pytest.raises(Conflict, match="w1:50052"):
        fleet.membership.register("elsewhere:50052", legacy=False)
    assert fleet.stored("w1") == before
    assert fleet.state("w1").takes_work


def test_registering_a_known_agent_brings_it_in_step(fleet: Fleet) -> None:
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    fleet.functions.put(spec())
    machine.functions.clear()  # somebody emptied its disk
    connection = fleet.connection("w1")
    fleet.membership.register("w1:50052", legacy=False)
    assert "hello" in machine.functions
    assert fleet.connection("w1") is connection


def test_nothing_is_registered_when_the_agent_or_the_store_is_away(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AgentUnreachable):
        fleet.membership.register("nobody:1", legacy=False)
    fleet.wire.add("w1")

    def away(*_: object) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(fleet.store, "save_agent", away)
    with pytest.raises(StoreUnavailable):
        fleet.membership.register("w1:50052", legacy=False)
    assert fleet.membership.views() == []


def test_a_certificate_without_an_id_never_does_again_for_one_that_has_shown_it(fleet: Fleet) -> None:
    old = fleet.wire.add("w1", legacy_certificate=True)
    view = fleet.membership.register("w1:50052", legacy=True)
    assert view.record.legacy_certificate
    old.legacy_certificate = False  # it was enrolled
    view = fleet.membership.register("w1:50052", legacy=False)
    assert not view.record.legacy_certificate
    fleet.membership.deregister("w1")
    old.legacy_certificate = True
    restarted = again(fleet)
    try:
        with pytest.raises(Conflict, match="shown a certificate with its ID"):
            restarted.membership.register("w1:50052", legacy=True)
        assert restarted.membership.views() == []
    finally:
        restarted.close()


def test_a_restart_of_flux_forgets_no_agent_and_no_draining(fleet: Fleet) -> None:
    for agent_id in ("w1", "w2", "w3"):
        fleet.wire.add(agent_id)
        fleet.membership.register(f"{agent_id}:50052", legacy=False)
    assert fleet.membership.drain("w2").record.status is AgentStatus.DRAINING
    fleet.wire.machines["w3:50052"].up = False
    restarted = again(fleet)
    try:
        restarted.start()
        statuses = {view.record.agent_id: view.record.status for view in restarted.membership.views()}
        assert statuses == {"w1": AgentStatus.ONLINE, "w2": AgentStatus.DRAINING, "w3": AgentStatus.OFFLINE}
        assert "refused" in restarted.view("w3").problem
        assert ("reconcile", "w1") in restarted.executions.calls
        fleet.wire.machines["w3:50052"].up = True
        restarted.round(100)
        assert restarted.state("w3").takes_work
    finally:
        restarted.close()


def test_draining_outlives_being_offline_and_ends_when_asked(fleet: Fleet) -> None:
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    fleet.membership.drain("w1")
    assert not fleet.state("w1").takes_work
    machine.up = False
    for _ in range(4):
        fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.OFFLINE
    machine.up = True
    fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.DRAINING
    fleet.membership.undrain("w1")
    assert fleet.state("w1").takes_work
    with pytest.raises(NotFound):
        fleet.membership.drain("w2")


def test_deregistering_fails_what_ran_kills_it_there_and_forgets_the_agent(fleet: Fleet) -> None:
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    machine.runs = {"e1", "e2"}
    connection = fleet.connection("w1")
    fleet.membership.deregister("w1")
    assert ("lost", "w1") in fleet.executions.calls
    assert machine.runs == set()
    assert connection.closed
    assert connection.failed
    assert fleet.stored("w1") is None
    assert fleet.membership.views() == []
    with pytest.raises(NotFound):
        fleet.membership.deregister("w1")


def test_a_store_that_fails_in_deregister_leaves_no_connection_behind(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    machine.runs = {"e1"}
    connection = fleet.connection("w1")

    def away(agent_id: str, reason: str) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(fleet.executions, "agent_lost", away)
    fleet.membership.deregister("w1")
    assert connection.closed
    assert machine.runs == set()
    assert fleet.stored("w1") is None


def test_what_dies_slowly_is_waited_for_together(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    machine.runs = {"e1", "e2", "e3", "e4"}
    told: list[float] = []
    waited: list[float] = []

    def cancel(connection: object, execution_id: str, *, reason: str, timeout: float) -> ExecutionStatus:
        (waited if timeout else told).append(timeout)
        if timeout:
            assert len(told) == 4, "all are told before any is waited for"
        return ExecutionStatus.RUNNING

    monkeypatch.setattr(type(fleet.connection("w1")), "cancel", cancel)
    fleet.membership.deregister("w1")
    assert len(waited) == 4
    assert waited == sorted(set(waited), reverse=True), "one time for all of them"


def test_an_upgraded_agent_gets_a_connection_that_uses_what_it_can_do_now(fleet: Fleet) -> None:
    machine = fleet.wire.add("w1", original=True)
    fleet.membership.register("w1:50052", legacy=False)
    former = fleet.connection("w1")
    machine.original, machine.features = False, ("attach", "deploy_stream")
    fleet.round()
    assert fleet.connection("w1") is not former
    assert former.closed
    assert not fleet.stored("w1").original
    assert fleet.state("w1").takes_work
    fleet.connection("w1").events.attached(False)
    assert not fleet.state("w1").takes_work
    former.events.attached(True)  # of a life that is over
    assert not fleet.state("w1").takes_work
    fleet.connection("w1").events.attached(True)
    assert fleet.state("w1").takes_work


def test_a_node_is_provisioning_until_its_agent_answers(fleet: Fleet) -> None:
    fleet.membership.adopt_node(AgentRecord("n1", "", provider="aws", provider_id="i-1", instance_type="t3.small"))
    fleet.round()
    assert fleet.view("n1").record.status is AgentStatus.PROVISIONING
    with pytest.raises(Conflict):
        fleet.membership.adopt_node(AgentRecord("n1", ""))
    fleet.membership.save("n1", lambda record: replace(record, extra={"host_key": "abc"}))
    fleet.wire.add("n1", "10.0.0.1:50052")
    view = fleet.membership.node_ready("n1", "10.0.0.1:50052")
    assert (view.record.status, view.record.provider_id) == (AgentStatus.ONLINE, "i-1")
    assert fleet.stored("n1").extra == {"host_key": "abc"}
    assert fleet.state("n1").takes_work


# -- the end of the process --------------------------------------------------------------


def daemons(name: str) -> list[bool]:
    """Of the threads of a pool: the interpreter waits at its end for those that are no daemons."""
    return [one.daemon for one in threading.enumerate() if one.name.startswith(name)]


def test_a_host_that_swallows_everything_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet()
    fleet.store.save_agent(AgentRecord("w1", "w1:50052", status=AgentStatus.ONLINE))
    begun, given_up = threading.Event(), threading.Event()

    def swallow(*arguments: object, **more: object) -> None:
        begun.set()
        given_up.wait(10)
        raise AgentUnreachable("it does not answer")

    monkeypatch.setattr(fleet.wire, "probe", swallow)
    fleet.membership.start()
    try:
        assert begun.wait(10)
        fleet.membership.stop(Deadline(0.02))
        assert daemons("agent-reconciler") == [True]
    finally:
        given_up.set()
        fleet.close()


def test_an_agent_that_joins_is_probed_once(fleet: Fleet) -> None:
    fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    assert fleet.wire.probes == ["w1:50052"]
    assert fleet.state("w1").takes_work


def test_an_agent_whose_address_has_changed_is_registered_there_with_what_it_runs(fleet: Fleet) -> None:
    machine = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    machine.runs = {"e1"}
    fleet.executions.calls.clear()
    del fleet.wire.machines["w1:50052"]
    machine.address = "moved:50052"
    fleet.wire.machines["moved:50052"] = machine
    view = fleet.membership.register("moved:50052", legacy=False)
    assert (view.record.address, view.record.status) == ("moved:50052", AgentStatus.ONLINE)
    assert fleet.stored("w1").address == "moved:50052"
    assert fleet.executions.calls == [("reconcile", "w1")]
    assert fleet.executions.reconciled["w1"] == ("e1",)


def test_agents_that_were_online_are_awaited_until_each_was_tried_once(fleet: Fleet) -> None:
    for agent_id in ("w1", "w2"):
        fleet.wire.add(agent_id)
        fleet.membership.register(f"{agent_id}:50052", legacy=False)
    fleet.wire.machines["w2:50052"].up = False
    restarted = again(fleet)
    try:
        restarted.agents.load(restarted.now)
        assert restarted.agents.untried() == ["w1", "w2"]
        restarted.start()
        assert restarted.agents.untried() == []
        assert restarted.state("w1").takes_work
    finally:
        restarted.close()
