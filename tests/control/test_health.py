"""The poller under invented times: misses, coming back, giving up, restarts, and what followers see."""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fluxlib.control.agents.fleet import MISSES
from fluxlib.errors import LeaseLost, NotFound, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus
from tests.support.fleet import Fleet, Machine, spec
from tests.support.programs import make_zip, wait_until

CODE = make_zip({"run.sh": "#!/bin/sh\necho hello\n"})


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.close()


@pytest.fixture
def machine(fleet: Fleet) -> Machine:
    made = fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    return made


def test_three_misses_make_an_agent_offline_and_end_its_calls(fleet: Fleet, machine: Machine) -> None:
    machine.up = False
    fleet.round()
    fleet.round()
    assert fleet.state("w1").takes_work
    assert not fleet.connection("w1").failed
    fleet.round()
    view = fleet.view("w1")
    assert view.record.status is AgentStatus.OFFLINE
    assert "refused the connection" in view.problem
    assert not fleet.state("w1").takes_work
    assert fleet.connection("w1").failed
    assert fleet.stored("w1").status is AgentStatus.OFFLINE


def test_two_misses_and_an_answer_are_nothing(fleet: Fleet, machine: Machine) -> None:
    for _ in range(3):
        machine.up = False
        fleet.round()
        fleet.round()
        machine.up = True
        fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.ONLINE
    assert not fleet.connection("w1").failed


def test_an_agent_that_takes_questions_and_never_answers_is_offline_too(fleet: Fleet, machine: Machine) -> None:
    machine.slow = True
    for _ in range(4):
        fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.OFFLINE
    # The answers of then, much later: they are to questions nobody asks any more.
    pending = fleet.connection("w1").pending
    for on_report in pending[:-1]:
        on_report(machine.report())
    fleet.health.tick(fleet.now)
    fleet.settle()
    assert fleet.view("w1").record.status is AgentStatus.OFFLINE


def test_an_agent_that_is_back_gets_no_work_before_it_is_in_step(fleet: Fleet, machine: Machine) -> None:
    machine.up = False
    for _ in range(3):
        fleet.round()
    fleet.functions.put(spec())
    fleet.functions.deploy("hello", CODE)
    assert "hello" not in machine.functions
    seen: list[bool] = []

    def watch(agent_id: str) -> None:
        if fleet.state(agent_id).takes_work:
            seen.append("hello" in machine.functions)

    fleet.agents.on_change(watch)
    fleet.executions.calls.clear()
    machine.up = True
    fleet.round()
    assert fleet.state("w1").takes_work
    assert seen
    assert all(seen)
    assert fleet.executions.calls == [("reconcile", "w1")]
    assert fleet.stored("w1").status is AgentStatus.ONLINE
    assert fleet.stored("w1").offline_since == 0


def test_what_ran_on_an_agent_is_given_up_once_and_compared_when_it_returns(fleet: Fleet, machine: Machine) -> None:
    machine.up = False
    machine.runs = {"e1"}
    for _ in range(3):
        fleet.round()
    fleet.round(200)
    assert ("lost", "w1") not in fleet.executions.calls
    fleet.round(100)
    fleet.round()
    fleet.round()
    assert fleet.executions.calls.count(("lost", "w1")) == 1
    machine.up = True
    fleet.executions.calls.clear()
    fleet.round()
    assert fleet.executions.calls == [("reconcile", "w1")]
    assert tuple(fleet.executions.reconciled["w1"] or ()) == ("e1",)


def test_a_restarted_agent_is_compared_before_it_gets_work_again(fleet: Fleet, machine: Machine) -> None:
    fleet.functions.put(spec())
    fleet.executions.calls.clear()
    machine.restart()
    machine.functions.clear()
    fleet.round()
    assert fleet.executions.calls == [("reconcile", "w1")]
    assert "hello" in machine.functions
    assert fleet.state("w1").takes_work


def test_a_restart_that_the_stream_tells_is_seen_before_there_is_work_again(fleet: Fleet) -> None:
    machine = fleet.wire.add("w2")
    machine.features = ("attach", "deploy_stream")
    fleet.membership.register("w2:50052", legacy=False)
    fleet.functions.put(spec())
    events = fleet.connection("w2").events
    fleet.executions.calls.clear()
    events.greeted(machine.instance)  # the same life, on a new channel
    fleet.settle()
    assert fleet.executions.calls == []
    events.attached(False)
    machine.restart()
    machine.functions.clear()
    gate = machine.gate = threading.Event()
    events.greeted(machine.instance)
    events.attached(True)
    assert not fleet.state("w2").takes_work
    view = fleet.view("w2")
    assert (view.record.status, view.in_step) == (AgentStatus.OFFLINE, False), "whoever sees it online may call"
    assert "restarted" in view.problem
    gate.set()
    fleet.settle()
    assert fleet.executions.calls == [("reconcile", "w2")]
    assert "hello" in machine.functions
    assert fleet.state("w2").takes_work
    fleet.round()
    assert fleet.executions.calls == [("reconcile", "w2")]


def test_a_life_that_is_greeted_brings_nobody_back_before_the_leader_says_so(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    machine = leader.wire.add("w1")
    machine.features = ("attach", "deploy_stream")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    machine.up = False
    both(leader, follower, 4)
    assert follower.view("w1").record.status is AgentStatus.OFFLINE
    machine.restart()
    machine.up = True
    follower.connection("w1").events.greeted(machine.instance)
    follower.settle()
    assert follower.view("w1").record.status is AgentStatus.OFFLINE
    both(leader, follower, 2)
    assert follower.state("w1").takes_work
    assert follower.state("w1").instance_id == machine.instance


def test_a_follower_tries_again_what_failed_while_the_store_was_away(
    pair: tuple[Fleet, Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = pair
    machine = leader.wire.add("w1")
    machine.features = ("attach", "deploy_stream")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    machine.restart()

    def away() -> int:
        raise StoreUnavailable("away")

    with monkeypatch.context() as broken:
        broken.setattr(follower.functions, "refresh", away)
        follower.connection("w1").events.greeted(machine.instance)
        follower.settle()
    assert not follower.state("w1").takes_work
    both(leader, follower, 2)
    assert follower.state("w1").takes_work


def test_a_life_greeted_on_a_connection_that_was_replaced_says_nothing(fleet: Fleet) -> None:
    machine = fleet.wire.add("w2")
    machine.features = ("attach", "deploy_stream")
    fleet.membership.register("w2:50052", legacy=False)
    former = fleet.connection("w2")
    fleet.agents.must_connect(fleet.state("w2"))
    fleet.reconciler.reconcile(fleet.state("w2"))
    fleet.settle()
    assert fleet.connection("w2") is not former
    fleet.executions.calls.clear()
    former.events.greeted("another")
    fleet.settle()
    assert fleet.executions.calls == []


@pytest.fixture
def old(fleet: Fleet) -> Machine:
    """An original agent that has a function with its code."""
    machine = fleet.wire.add("old", original=True)
    fleet.membership.register("old:50052", legacy=False)
    fleet.functions.put(spec())
    fleet.functions.deploy("hello", CODE)
    fleet.round()
    return machine  # type: ignore[no-any-return]


def test_a_restarted_original_is_known_by_its_age_and_gets_everything(fleet: Fleet, old: Machine) -> None:
    fleet.executions.calls.clear()
    old.restart()
    assert old.functions == {}
    fleet.round()
    assert "hello" in old.functions
    # What it ran is lost; its records do not say so.
    assert ("restarted", "old") in fleet.executions.calls
    assert fleet.executions.began == pytest.approx(old.up_since - 1, abs=1)


def test_an_original_that_took_a_deploy_badly_gets_its_former_code_again(fleet: Fleet, old: Machine) -> None:
    """It may have unpacked half of the new one over it."""
    old.refuses["hello"] = "no space left on device"
    fleet.functions.deploy("hello", make_zip({"run.sh": "#!/bin/sh\necho other"}))
    assert "hello" in fleet.state("old").missing_functions
    old.refuses.clear()
    old.calls.clear()
    fleet.functions.deploy("hello", CODE)
    assert old.calls == ["deploy hello"]


def test_an_original_that_runs_the_program_to_be_replaced_gets_it_later(fleet: Fleet, old: Machine) -> None:
    new = make_zip({"run.sh": "#!/bin/sh\necho other\n"})
    old.refuses["hello"] = "open /home/flux-runner/apps/hello/run.sh: text file busy"
    fleet.functions.deploy("hello", new)
    assert "text file busy" in fleet.state("old").missing_functions["hello"]
    old.refuses.clear()
    fleet.round()
    assert fleet.state("old").missing_functions == {}
    assert old.functions["hello"].code_digest == hashlib.sha256(new).hexdigest()


def test_an_original_that_tells_no_uptime_is_left_in_service(fleet: Fleet) -> None:
    machine = fleet.wire.add("mute", original=True)
    machine.counts_uptime = False
    fleet.membership.register("mute:50052", legacy=False)
    fleet.functions.put(spec())
    fleet.executions.calls.clear()
    pushed = len(machine.calls)
    for _ in range(4):
        fleet.round()
        assert fleet.state("mute").takes_work
    assert fleet.executions.calls == []
    assert len(machine.calls) == pushed


def test_an_original_that_restarted_while_it_was_away_for_long_is_known_by_its_age(fleet: Fleet, old: Machine) -> None:
    """It has been up for longer than it had been before, and for less than has passed."""
    fleet.time[0] += 50
    old.restart()
    fleet.round(seconds=200)
    assert "hello" in old.functions
    deployed = len(old.calls)
    for _ in range(3):
        fleet.round()
    assert len(old.calls) == deployed


def test_what_somebody_changed_at_the_agent_is_put_right(fleet: Fleet, machine: Machine) -> None:
    fleet.functions.put(spec())
    fleet.round()
    del machine.functions["hello"]
    machine.revision += 1
    fleet.round()
    assert "hello" in machine.functions
    fleet.round()  # its own count of changes, our push included, is learnt
    machine.calls.clear()
    fleet.round()
    fleet.round()
    assert machine.calls == []  # nothing to compare while nothing changes


def test_a_push_that_was_missed_is_made_up_for(fleet: Fleet, machine: Machine) -> None:
    machine.up = False
    result = fleet.functions.put(spec())
    assert [agent.status for agent in result.agents] == ["failed"]
    assert "hello" in fleet.state("w1").missing_functions
    machine.up = True
    fleet.round()
    assert "hello" in machine.functions
    assert fleet.state("w1").missing_functions == {}


def test_another_agent_at_the_address_is_a_miss_with_the_reason(fleet: Fleet, machine: Machine) -> None:
    machine.agent_id = "intruder"
    for _ in range(3):
        fleet.round()
    state = fleet.state("w1")
    assert state.record.status is AgentStatus.OFFLINE
    assert "intruder" in state.problem


def test_a_state_the_store_missed_is_written_when_it_is_back(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = fleet.store.update_agent

    def away(*_: object) -> None:
        raise StoreUnavailable("away")

    machine.up = False
    monkeypatch.setattr(fleet.store, "update_agent", away)
    for _ in range(3):
        fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.OFFLINE
    monkeypatch.setattr(fleet.store, "update_agent", update)
    assert fleet.stored("w1").status is AgentStatus.ONLINE
    fleet.round()
    assert fleet.stored("w1").status is AgentStatus.OFFLINE


def test_misses_of_a_former_reign_are_not_counted(fleet: Fleet, machine: Machine) -> None:
    machine.up = False
    fleet.round()
    fleet.round()
    fleet.leadership.lost(LeaseLost("another process led"))
    fleet.health.tick(fleet.now)
    fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.ONLINE
    fleet.round()
    fleet.round()
    assert fleet.view("w1").record.status is AgentStatus.OFFLINE


def test_one_found_offline_while_it_was_brought_in_is_brought_in_again(fleet: Fleet, machine: Machine) -> None:
    fleet.functions.put(spec())
    code = fleet.functions.deploy("hello", CODE)
    machine.functions.clear()
    machine.restart()
    machine.gate = threading.Event()
    fleet.time[0] += 10
    fleet.leadership.tick(fleet.now)
    fleet.health.tick(fleet.now)
    fleet.health.tick(fleet.now)
    wait_until(lambda: machine.waiting == 1, "its worker to be at the deployment")
    machine.up = False
    for _ in range(3):
        fleet.time[0] += 10
        fleet.leadership.tick(fleet.now)
        fleet.health.tick(fleet.now)
        fleet.health.tick(fleet.now)
    assert fleet.view("w1").record.status is AgentStatus.OFFLINE
    machine.gate.set()
    fleet.settle()
    assert not fleet.state("w1").takes_work
    machine.gate = None
    machine.up = True
    machine.functions.clear()
    seen: list[bool] = []
    fleet.agents.on_change(
        lambda agent_id: seen.append("hello" in machine.functions) if fleet.state(agent_id).takes_work else None
    )
    fleet.round()
    assert seen
    assert all(seen)
    assert machine.functions["hello"].code_digest == code.function.code_digest


def test_a_fault_at_one_agent_hides_no_others_death(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fleet.wire.add("w2")
    fleet.membership.register("w2:50052", legacy=False)

    def broken(on_report: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fleet.connection("w1"), "report_async", broken)
    other.up = False
    for _ in range(3):
        fleet.round()
    assert fleet.view("w2").record.status is AgentStatus.OFFLINE


def test_deaths_are_seen_while_the_store_is_away_and_nobody_waits_for_it(
    fleet: Fleet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [fleet.wire.add(f"x{number}") for number in range(5)]
    for other in others:
        fleet.membership.register(other.address, legacy=False)
    written: list[str] = []
    judging = threading.current_thread()

    def away(record: AgentRecord, *_: object) -> None:
        assert threading.current_thread() is not judging or replicating, "health checks wait for the store"
        written.append(record.agent_id)
        raise StoreUnavailable("away")

    replicating = False
    fleet.time[0] += 60  # and with it the lease: nobody leads
    monkeypatch.setattr(fleet.store, "update_agent", away)
    for one in (machine, *others):
        one.up = False
    for _ in range(4):
        fleet.time[0] += 10
        fleet.health.tick(fleet.now)
        fleet.health.tick(fleet.now)
        fleet.settle()
    assert fleet.leadership.lease is None
    for one in (machine, *others):
        assert fleet.view(one.agent_id).record.status is AgentStatus.OFFLINE
        assert fleet.connection(one.agent_id).failed
    assert written == []
    fleet.leadership.tick(fleet.now)
    replicating = True
    with pytest.raises(StoreUnavailable):
        fleet.replication.tick(fleet.now)
    assert len(written) == 1, "an outage costs one timeout, not one for each agent"
    monkeypatch.undo()
    fleet.round()
    assert {fleet.stored(one.agent_id).status for one in (machine, *others)} == {AgentStatus.OFFLINE}


# ---- several Flux on one store ---------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[Fleet, Fleet]]:
    """A leader and a follower on one store, one clock and the same agents."""
    leader = Fleet(shared=True)
    follower = Fleet(leader.store, leader.wire, session="s2", shared=True, clock=leader.time)
    leader.leadership.tick(leader.now)
    yield leader, follower
    leader.close()
    follower.close()


def writes_of(fleet: Fleet) -> list[str]:
    """The agents whose records this process writes from now on."""
    written: list[str] = []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(fleet.store, name)

        def save_agent(self, record: AgentRecord, lease: object = None) -> None:
            written.append(record.agent_id)
            fleet.store.save_agent(record, lease)  # type: ignore[arg-type]

        def update_agent(self, record: AgentRecord, lease: object = None) -> bool:
            written.append(record.agent_id)
            return fleet.store.update_agent(record, lease)  # type: ignore[arg-type]

    fleet.agents._records.store = Watched()  # type: ignore[assignment]
    return written


def both(leader: Fleet, follower: Fleet, rounds: int = 1) -> None:
    for _ in range(rounds):
        leader.round()
        follower.round(0)
        follower.round(0.001)


def test_a_follower_joins_and_sees_figures_but_judges_nobody(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    written = writes_of(follower)
    machine = leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    machine.version = "2"  # what a follower learns is not its to write
    both(leader, follower, 3)
    assert follower.state("w1").takes_work
    assert follower.state("w1").figures is not None
    assert written == []
    machine.up = False
    for _ in range(5):
        follower.round()
        leader.leadership.tick(leader.now)
    assert follower.view("w1").record.status is AgentStatus.ONLINE
    both(leader, follower, 4)
    assert leader.view("w1").record.status is AgentStatus.OFFLINE
    assert follower.view("w1").record.status is AgentStatus.OFFLINE
    assert follower.connection("w1").failed
    machine.up = True
    both(leader, follower, 3)
    assert follower.state("w1").takes_work


def test_what_is_asked_of_a_follower_reaches_the_leader(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    machine = leader.wire.add("w1")
    follower.membership.register("w1:50052", legacy=False)
    assert follower.state("w1").takes_work
    follower.functions.put(spec())
    both(leader, follower)
    assert leader.state("w1").takes_work
    assert leader.functions.lookup("hello").spec == spec()
    assert "hello" in machine.functions
    follower.membership.drain("w1")
    both(leader, follower, 2)
    assert leader.view("w1").record.status is AgentStatus.DRAINING
    assert follower.view("w1").record.status is AgentStatus.DRAINING
    assert leader.stored("w1").status is AgentStatus.DRAINING
    follower.membership.deregister("w1")
    both(leader, follower, 2)
    assert leader.membership.views() == []
    assert leader.stored("w1") is None


def test_who_joins_and_leaves_at_one_is_known_at_the_others_before_their_next_round(pair: tuple[Fleet, Fleet]) -> None:
    for here, there in (pair, pair[::-1]):
        both(*pair)
        here.wire.add("w1")
        here.membership.register("w1:50052", legacy=False)
        there.round(1)
        assert there.state("w1").takes_work
        here.membership.drain("w1")
        there.round(1)
        assert there.view("w1").record.status is AgentStatus.DRAINING
        here.membership.deregister("w1")
        there.round(1)
        assert there.membership.views() == []


def test_an_agent_that_was_deregistered_and_came_back_elsewhere_is_connected_to_anew(pair: tuple[Fleet, Fleet]) -> None:
    """Its former connection could go on with a certificate that is revoked by now."""
    leader, follower = pair
    leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    former = follower.connection("w1")
    leader.time[0] += 1
    leader.membership.deregister("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    assert former.closed
    assert follower.connection("w1") is not former
    assert follower.state("w1").takes_work


def test_the_leaders_judgement_brings_nobody_back_who_was_deregistered_elsewhere(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    machine = leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    follower.membership.deregister("w1")
    # Judged by what was asked before, without a look at the store in between.
    machine.up = False
    for _ in range(MISSES):
        leader.agents.missed(leader.state("w1"), "it did not answer", leader.now)
    leader.agents.write_changes()
    assert leader.stored("w1") is None
    both(leader, follower, 2)
    assert leader.membership.views() == follower.membership.views() == []


def test_a_dead_leaders_place_and_work_are_taken_over(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    machine = leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    follower.round(16)  # the leader says nothing any more
    assert follower.leadership.leads
    assert ("adopt", "s1") in follower.executions.calls
    follower.round()
    assert follower.executions.calls.count(("adopt", "s1")) == 1
    machine.up = False
    for _ in range(3):
        follower.round()
    assert follower.stored("w1").status is AgentStatus.OFFLINE


def test_a_leader_that_was_frozen_writes_nothing_on_waking(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    machine = leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    stale = leader.leadership.lease
    assert stale is not None
    follower.round(16)
    assert follower.leadership.leads
    before = leader.stored("w1")
    machine.up = False
    for _ in range(5):
        leader.round(1, lead=False)
    assert leader.stored("w1") == before
    assert not leader.leadership.leads
    # Even one whose clock stood still is stopped by the store.
    leader.leadership._lease = stale
    leader.leadership._until = math.inf
    for _ in range(5):
        leader.time[0] += 10
        leader.health.tick(leader.now)
        leader.health.tick(leader.now)
        leader.replication.tick(leader.now)
    assert leader.stored("w1") == before
    assert leader.leadership.lease is None


@pytest.mark.parametrize("asked", [0, 1], ids=["leader", "follower"])
def test_nobodys_wish_brings_back_who_was_deregistered_elsewhere(pair: tuple[Fleet, Fleet], asked: int) -> None:
    pair[0].wire.add("w1")
    pair[0].membership.register("w1:50052", legacy=False)
    both(*pair, 2)
    pair[1 - asked].membership.deregister("w1")
    with pytest.raises(NotFound):
        pair[asked].membership.drain("w1")
    assert pair[0].stored("w1") is None


def test_what_a_follower_was_asked_while_it_read_the_store_is_not_undone_by_that_reading(
    pair: tuple[Fleet, Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = pair
    leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    leader.membership.drain("w1")
    read = follower.store.agents

    def slowly() -> list[AgentRecord]:
        found = read()
        follower.membership.undrain("w1")
        return found

    with monkeypatch.context() as slow:
        slow.setattr(follower.store, "agents", slowly)
        follower.time[0] += 10
        follower.replication.tick(follower.now)
    assert follower.view("w1").record.status is AgentStatus.ONLINE
    follower.round(0.001)
    assert follower.stored("w1").status is AgentStatus.ONLINE


def test_a_restart_just_before_the_leader_goes_costs_nobody_a_refusal_later(pair: tuple[Fleet, Fleet]) -> None:
    """The figures a follower reads last are of the agent's former life."""
    leader, follower = pair
    machine = leader.wire.add("w1")
    machine.features = ("attach", "deploy_stream")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    leader.round()
    machine.restart()
    follower.connection("w1").events.greeted(machine.instance)
    follower.settle()
    refused: list[str] = []
    follower.agents.on_change(lambda agent_id: None if follower.state("w1").takes_work else refused.append(agent_id))
    follower.round(0)
    follower.round(16)
    assert follower.leadership.leads
    follower.round()
    assert follower.state("w1").instance_id == machine.instance
    assert refused == []


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here only", "elsewhere as well"])
@pytest.mark.parametrize("takes_over", [False, True], ids=["a leader", "one that takes over"])
def test_what_was_saved_while_the_store_was_read_is_not_undone(
    pair: tuple[Fleet, Fleet], monkeypatch: pytest.MonkeyPatch, elsewhere: bool, takes_over: bool
) -> None:
    leader, follower = pair
    leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    if elsewhere:
        leader.store.save_agent(replace(leader.stored("w1"), extra={"note": "of another Flux"}))
    asked, read, told = follower if takes_over else leader, leader.store.agents, []

    def slowly() -> list[AgentRecord]:
        found = read()
        if not told:
            if takes_over:
                leader.leadership.resign()
                follower.leadership.tick(follower.now)
            told.append(asked.membership.drain("w1"))
        return found

    leader.time[0] += 10
    leader.leadership.tick(leader.now)
    with monkeypatch.context() as slow:
        slow.setattr(leader.store, "agents", slowly)
        asked.replication.tick(asked.now)
    assert told
    assert asked.view("w1").record.status is AgentStatus.DRAINING
    asked.round()
    assert asked.stored("w1").status is AgentStatus.DRAINING


@pytest.mark.parametrize("wished", [False, True], ids=["by itself", "as somebody wished"])
def test_whoever_lost_the_lease_unawares_may_carry_out_wishes_and_nothing_else(
    pair: tuple[Fleet, Fleet], wished: bool
) -> None:
    leader, _ = pair
    leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    leader.leadership.tick(leader.now)
    assert leader.store.acquire_lease("leader", "s2", 15, leader.now + 20) is not None
    assert leader.leadership.leads
    if wished:
        leader.membership.drain("w1")
    else:
        with pytest.raises(LeaseLost):
            leader.membership.save("w1", lambda record: replace(record, extra={"node": "as it was"}))
    assert not leader.leadership.leads
    assert leader.stored("w1").extra == ({"draining": True} if wished else {})


def test_one_that_leads_again_reads_at_once_what_the_other_left(pair: tuple[Fleet, Fleet]) -> None:
    _, follower = pair
    frozen = Fleet(follower.store, follower.wire, session="s3", shared=True, clock=follower.time, interval=60)
    try:
        pair[0].leadership.resign()
        frozen.round()
        assert frozen.leadership.leads
        follower.time[0] += 20
        follower.leadership.tick(follower.now)
        follower.wire.add("w1")
        follower.membership.register("w1:50052", legacy=False)
        follower.leadership.resign()
        # Between two looks of its loops it lost the lease and has it again.
        frozen.round(1)
        assert [view.record.agent_id for view in frozen.membership.views()] == ["w1"]
    finally:
        frozen.close()


def test_what_is_asked_of_a_follower_changes_nothing_else(pair: tuple[Fleet, Fleet]) -> None:
    leader, follower = pair
    leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    both(leader, follower, 2)
    # A third that has just started has reached no agent yet, and heard nothing of what the leader notes now.
    third = Fleet(leader.store, leader.wire, session="s3", shared=True, clock=leader.time)
    try:
        third.agents.load(third.now)
        leader.membership.save("w1", lambda record: replace(record, extra={"node": {"reason": "it was asked for"}}))
        third.membership.drain("w1")
        stored = leader.stored("w1")
        assert stored.status is AgentStatus.DRAINING
        assert stored.extra == {"node": {"reason": "it was asked for"}, "draining": True}
        both(leader, follower)
        assert follower.view("w1").record.status is AgentStatus.DRAINING
        assert not follower.connection("w1").failed
        third.round(0)
        assert third.view("w1").record.extra == stored.extra
    finally:
        third.close()


def test_one_that_takes_over_while_the_store_is_away_reads_it_later(
    pair: tuple[Fleet, Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = pair
    both(leader, follower)
    leader.wire.add("w1")
    leader.membership.register("w1:50052", legacy=False)
    leader.leadership.resign()

    def away() -> list[AgentRecord]:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as broken:
        broken.setattr(follower.store, "agents", away)
        follower.round()
    assert follower.leadership.leads
    assert follower.membership.views() == []
    follower.time[0] += 20
    follower.round()  # nobody else lives by now
    follower.round()
    assert [view.record.agent_id for view in follower.membership.views()] == ["w1"]


# -- a clock that is set -----------------------------------------------------------------


def test_a_wall_clock_that_is_set_back_does_not_stop_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, set_back = time.time, [0.0]
    # Before the loop is made, which keeps the clock it finds.
    monkeypatch.setattr(time, "time", lambda: wall() - set_back[0])
    fleet = Fleet(interval=0.01)
    fleet.wire.add("w1")
    fleet.membership.register("w1:50052", legacy=False)
    agent = fleet.state("w1")
    try:
        fleet.health.start()
        wait_until(lambda: agent.question > 0, "the first question")
        set_back[0] = 3600.0
        asked = agent.question
        wait_until(lambda: agent.question > asked + 2, "further questions")
    finally:
        fleet.health.stop(Deadline(5))
        fleet.close()


def test_an_agent_recorded_as_offline_in_the_future_is_given_up_in_time() -> None:
    fleet = Fleet(lost_after=300)
    fleet.store.save_agent(AgentRecord("w1", "w1:50052", status=AgentStatus.OFFLINE, offline_since=fleet.now + 3600))
    fleet.start()
    try:
        for _ in range(31):
            fleet.round()
        assert ("lost", "w1") in fleet.executions.calls
    finally:
        fleet.close()
