"""Faults at steps that take two writes or two programs: leaving the fleet, inheriting, stopping under load."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fluxlib.store import open_control_store
from tests.faults.rig import Marks, SyncCall, account, deploy, pass_time, settle
from tests.faults.test_table import _FAST, Redis, World, at_burst, recovered, world
from tests.support.programs import Agent, Flux, enrolled, wait_until

__all__ = ["world"]

pytestmark = pytest.mark.faults


def test_killed_when_the_agent_had_left_and_what_it_ran_was_not_given_up(world: World) -> None:
    """Deregistering writes twice. The first write is made here as Flux makes it; then there is no Flux any more."""
    running, queued = [world.submit("plain", "60") for _ in range(2)], world.submit("plain", "0")
    world.call("plain", "60")
    wait_until(lambda: world.running(2), "two to run")
    world.flux.kill()
    store = open_control_store(world.redis.address if world.redis else "", world.flux.home / "state")
    assert store.delete_agent("worker-1")
    store.close()
    world.flux.start()
    for identifier in running:
        record = world.flux.api.ended(identifier, 40)
        assert (record["status"], "agent lost" in record["error"]) == ("failed", True), record
    # The fleet and the function are not stuck: the agent comes back, ends what was given up, and serves the queue.
    world.flux.register(world.agent)
    assert world.flux.api.ended(queued)["status"] == "success"
    recovered(world)
    assert world.flux.api.call("DELETE", "/functions/job")[0] == 200


def test_killed_while_it_deregisters(world: World) -> None:
    """At whatever moment: the agent belongs to the fleet afterwards or it does not, and nothing stays open."""
    for _ in range(2):
        world.submit("stubborn", "4")
    wait_until(lambda: world.running(2), "two to run")

    class Deregister(SyncCall):
        def _run(self, api: object, name: str, args: tuple[str, ...]) -> None:
            try:
                self.answer = world.flux.api.call("DELETE", "/agents/worker-1")
            except (OSError, ValueError) as error:
                self.answer = OSError(str(error))

    world.calls.append(Deregister(world.flux.api, ""))
    pass_time(0.05)
    world.flux.kill()
    world.flux.start()
    records = settle(world.flux.api, "job", 60)
    account(records, world.accepted, world.marks)
    # Its certificates may be revoked by now: it is enrolled again, as whoever deregistered it would.
    world.agent.stop()
    enrolled(world.flux.certs, "worker-1", world.agent.home / "certs")
    world.agent.start()
    if not world.flux.status_of("worker-1"):
        world.flux.register(world.agent)
    recovered(world)


def test_adopted_while_the_store_is_away(tmp_path: Path) -> None:
    """One of two Flux dies; the store is frozen over the moment at which the other would inherit."""
    with Marks() as marks, Redis(tmp_path / "redis") as redis:
        first = Flux(tmp_path, "first", redis_addr=redis.address, **_FAST)
        second = Flux(tmp_path, "second", redis_addr=redis.address, certs_dir=str(first.certs), **_FAST)
        with first, Agent(tmp_path, first, "worker-1", detach_grace_sec=2) as agent, second:
            first.register(agent)
            deploy(first, marks, "job", max_concurrency=2, max_concurrency_behavior="wait")
            wait_until(lambda: second.status_of("worker-1") == "online", "the second to see the agent")
            dying = World(first, agent, redis, marks)
            for _ in range(4):
                dying.submit("plain", "5")
            wait_until(lambda: dying.running(2), "two to run")
            first.kill()
            pass_time(10)
            redis.signal(signal.SIGSTOP)
            pass_time(8)  # the dead one's lease of 15 s runs out meanwhile
            redis.signal(signal.SIGCONT)
            records = settle(second.api, "job", 60)
            account(records, dying.accepted, marks)
            assert {record["status"] for record in records.values()} == {"success"}, records


def test_a_call_that_a_frozen_agent_was_sent_is_not_run_when_its_caller_has_been_told(world: World) -> None:
    """The request waits in its socket, and is read before the agent hears that nobody waits for it any more."""
    world.agent.signal(signal.SIGSTOP)
    call = SyncCall(world.flux.api, "job", "plain", "0")
    call.join()
    assert isinstance(call.answer, tuple)
    assert call.answer[0] == 502, call.answer
    world.agent.signal(signal.SIGCONT)
    wait_until(lambda: world.flux.api.execute("job", "plain", "0")[0] == 200, "the agent to be back", 30)
    # What was sent before it comes before it.
    assert call.answer[1]["execution_id"] not in world.marks.starts()


def test_stopped_while_submissions_arrive(world: World) -> None:
    """What was answered 202 is done by the next life, the rest was told to come again; within the time there is."""
    at_burst(world)
    assert world.flux.stop(15) == 0
    for call in world.calls:
        call.join()
    world.flux.start()
    recovered(world)


def test_stopped_under_calls_that_run(world: World) -> None:
    """They are told that Flux stops, with the ID, and the record says how they ended."""
    world.call("plain", "60")
    world.call("stubborn", "60")
    wait_until(lambda: world.running(2), "both to run")
    world.flux.stop(15)
    identifiers = set()
    for call in world.calls:
        call.join()
        assert isinstance(call.answer, tuple), call.answer
        status, answer = call.answer
        assert (status, "Flux is stopping" in answer["error"]) == (503, True), call.answer
        identifiers.add(answer["execution_id"])
    assert identifiers == set(world.marks.starts())
    world.flux.start()
    for identifier in identifiers:
        assert world.flux.api.ended(identifier, 40)["status"] == "cancelled"
    world.calls.clear()
    recovered(world)
