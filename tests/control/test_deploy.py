"""The desired state: checked, saved in one step, pushed in parallel, with an answer for every agent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from fluxlib import archive as archives
from fluxlib.control.agents.pushes import Archives
from fluxlib.control.services import PushResult
from fluxlib.errors import Conflict, InvalidInput, NotFound, TooLarge
from fluxlib.lifecycle import Deadline
from fluxlib.model import Function, Platform
from tests.support.fleet import Fleet, Machine, spec
from tests.support.programs import make_zip, wait_until

CODE = make_zip({"run.sh": "#!/bin/sh\necho hello\n", "other.sh": "#!/bin/sh\necho other\n"})
NEWER = make_zip({"run.sh": "#!/bin/sh\necho newer\n"})


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.close()


def joined(fleet: Fleet, agent_id: str, **fields: object) -> Machine:
    machine = fleet.wire.add(agent_id, **fields)
    fleet.membership.register(machine.address, legacy=False)
    return machine


def statuses(result: object) -> dict[str, str]:
    return {agent.agent_id: agent.status for agent in result.agents}  # type: ignore[attr-defined]


def test_with_no_agent_it_is_saved_and_reaches_them_as_they_join(fleet: Fleet) -> None:
    result = fleet.functions.put(spec())
    assert (result.done, result.total_agents) == (0, 0)
    fleet.functions.deploy("hello", CODE)
    assert joined(fleet, "w1").calls == ["deploy hello"]


def test_each_agent_has_an_answer_of_its_own(fleet: Fleet) -> None:
    joined(fleet, "good")
    joined(fleet, "strict", refuses={"hello": "cannot enforce network: none"})
    joined(fleet, "windows", platform=Platform("windows", "amd64"))
    joined(fleet, "old", original=True, largest=10)
    gone = joined(fleet, "gone")
    gone.up = False
    for _ in range(3):
        fleet.round()
    fleet.functions.put(spec())
    result = fleet.functions.deploy("hello", CODE)
    assert statuses(result) == {
        "good": "success",
        "strict": "failed",
        "windows": "skipped",
        "old": "failed",
        "gone": "skipped",
    }
    messages = {agent.agent_id: agent.message for agent in result.agents}
    assert "cannot enforce" in messages["strict"]
    assert "50 MiB" in messages["old"]
    assert "windows/amd64" in messages["windows"]
    assert "offline" in messages["gone"]
    assert (result.done, result.total_agents) == (1, 5)
    # It is deployed all the same; who cannot have it gets no such work, and says why.
    assert fleet.functions.lookup("hello").code_digest
    assert "cannot enforce" in fleet.state("strict").missing_functions["hello"]
    assert "hello" in fleet.view("strict").problem
    assert fleet.state("strict").takes_work
    seen: list[str] = []
    fleet.agents.place("hello", lambda agents: seen.extend(agent.agent_id for agent in agents))  # type: ignore[func-returns-value]
    assert "strict" not in seen
    assert "good" in seen


def test_a_function_that_no_agent_can_run_is_said_to_be_one(fleet: Fleet) -> None:
    assert fleet.functions.put(spec()).problem == ""  # there is no agent yet
    first = joined(fleet, "w1", cannot_start={"hello": "run.sh asks for /gone/python3"})
    second = joined(fleet, "w2", refuses={"hello": "cannot enforce network: none"})
    windows = joined(fleet, "w3", platform=Platform("windows", "amd64"))
    result = fleet.functions.deploy("hello", CODE)
    assert statuses(result) == {"w1": "success", "w2": "failed", "w3": "skipped"}
    assert result.problem == (
        "no agent can run hello: run.sh asks for /gone/python3 (w1); cannot enforce network: none (w2);"
        " the agent is windows/amd64, the function is for unix/any (w3)"
    )
    # Also where the agents have it already, and until one of them can.
    assert fleet.functions.deploy("hello", CODE).problem == result.problem
    assert fleet.functions.put(spec()).problem == result.problem
    first.cannot_start.clear()
    assert fleet.functions.deploy("hello", CODE).problem == ""
    # One that is away may be able to.
    first.cannot_start["hello"] = "gone again"
    assert fleet.functions.deploy("hello", NEWER).problem
    second.up = windows.up = False
    for _ in range(3):
        fleet.round()
    assert fleet.functions.deploy("hello", CODE).problem == ""


def test_what_is_refused_is_not_pushed_again_until_something_changes(fleet: Fleet) -> None:
    machine = joined(fleet, "strict", refuses={"hello": "no"})
    fleet.functions.put(spec())
    fleet.round()
    machine.calls.clear()
    fleet.round()
    fleet.round()
    assert machine.calls == []
    machine.refuses.clear()
    machine.restart()
    fleet.round()
    assert "hello" in machine.functions
    assert fleet.state("strict").missing_functions == {}


def test_pushes_run_in_parallel_and_within_their_bound(fleet: Fleet) -> None:
    gate = threading.Event()
    machines = [joined(fleet, f"w{number}", gate=gate) for number in range(6)]
    fleet.functions.put(spec())
    done = threading.Thread(target=lambda: fleet.functions.deploy("hello", CODE), name="deploying")
    done.start()
    try:
        wait_until(lambda: sum(machine.waiting for machine in machines) >= 4, "four pushes under way")
        assert fleet.functions.lookup("hello").code_digest  # reading does not wait for them
        assert sum(machine.waiting for machine in machines) == 4
    finally:
        gate.set()
        done.join(10)
    assert all(machine.functions["hello"].code_digest for machine in machines)


def test_a_fault_at_one_agent_spoils_no_others_answer(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    joined(fleet, "w1")
    joined(fleet, "w2")

    def broken(*_: object) -> tuple[str, ...]:
        raise ZeroDivisionError

    monkeypatch.setattr(fleet.connection("w1"), "register_function", broken)
    result = fleet.functions.put(spec())
    assert statuses(result) == {"w1": "failed", "w2": "success"}


def test_a_new_handler_must_be_in_the_deployed_zip(fleet: Fleet) -> None:
    machine = joined(fleet, "w1")
    fleet.functions.put(spec())
    fleet.functions.deploy("hello", CODE)
    before = fleet.store.function("hello")
    with pytest.raises(InvalidInput, match=r"missing\.sh"):
        fleet.functions.put(spec(handler="missing.sh"))
    assert fleet.store.function("hello") == before
    machine.calls.clear()
    result = fleet.functions.put(spec(handler="other.sh"))
    assert result.function.code_digest == before.code_digest  # type: ignore[union-attr]
    assert machine.calls == ["register hello"]  # the code is there already


def test_a_bad_zip_changes_nothing(fleet: Fleet) -> None:
    fleet.functions.put(spec())
    fleet.functions.deploy("hello", CODE)
    before = fleet.store.function("hello")
    with pytest.raises(InvalidInput, match="handler"):
        fleet.functions.deploy("hello", make_zip({"else": "x"}))
    with pytest.raises(InvalidInput, match="zip"):
        fleet.functions.deploy("hello", b"no zip")
    with pytest.raises(TooLarge):
        fleet.functions.deploy("hello", bytes(10**6 + 1))
    with pytest.raises(NotFound):
        fleet.functions.deploy("nobody", CODE)
    assert fleet.store.function("hello") == before


def test_new_code_moves_the_function_to_where_it_can_run(fleet: Fleet) -> None:
    linux = joined(fleet, "linux")
    windows = joined(fleet, "windows", platform=Platform("windows", "amd64"))
    fleet.functions.put(spec())
    assert "hello" in windows.functions  # nothing is known of its platform yet
    fleet.functions.deploy("hello", CODE)
    assert linux.functions["hello"].code_digest
    assert "hello" not in windows.functions
    fleet.round()
    fleet.round()
    assert "hello" not in windows.functions


def test_deleting_while_executions_run_needs_force() -> None:
    running = 2
    fleet = Fleet()
    fleet.functions._count_open = lambda name: running
    try:
        machine = joined(fleet, "w1")
        fleet.functions.put(spec())
        with pytest.raises(Conflict, match="2 executions"):
            fleet.functions.delete("hello", force=False)
        assert fleet.functions.lookup("hello")
        fleet.functions.delete("hello", force=True)
        assert machine.functions == {}
        with pytest.raises(NotFound):
            fleet.functions.lookup("hello")
        with pytest.raises(NotFound):
            fleet.functions.delete("hello", force=True)
    finally:
        fleet.close()


def test_a_function_saved_while_an_agent_joins_reaches_it(fleet: Fleet) -> None:
    fleet.functions.put(spec("first"))
    fleet.functions.deploy("first", CODE)
    gate = threading.Event()
    machine = fleet.wire.add("w1", gate=gate)
    registering = threading.Thread(
        target=lambda: fleet.membership.register("w1:50052", legacy=False), name="registering"
    )
    registering.start()
    try:
        wait_until(lambda: fleet.agents.get("w1") and fleet.state("w1").connection, "the agent to be connected")
        saved = threading.Thread(target=lambda: fleet.functions.put(spec("second")), name="saving")
        saved.start()
    finally:
        gate.set()
        registering.join(10)
        saved.join(10)
    fleet.settle()
    assert {"first", "second"} <= machine.functions.keys()
    assert fleet.state("w1").takes_work


def test_a_change_through_another_flux_is_seen_and_reaches_the_agents(fleet: Fleet) -> None:
    machine = joined(fleet, "w1")
    other = Fleet(fleet.store, fleet.wire, session="s2", shared=True, clock=fleet.time)
    try:
        other.functions.put(spec())
        assert fleet.functions.lookup("hello").spec == spec()  # unknown here: the store is asked
        other.functions.deploy("hello", CODE)
        fleet.round()
        assert fleet.functions.lookup("hello").code_digest
        assert machine.functions["hello"].code_digest
        other.functions.delete("hello", force=False)
        fleet.round()
        assert machine.functions == {}
    finally:
        other.close()


def test_what_two_flux_change_at_once_holds_both(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Fleet(fleet.store, fleet.wire, session="s2", shared=True, clock=fleet.time)
    try:
        fleet.functions.put(spec(memory_mb=64))
        save = fleet.store.save_function
        meanwhile = [lambda: other.functions.put(spec(memory_mb=512))]

        def slow_upload(function: Function, archive: bytes | None = None, **fields: Any) -> None:
            if archive is not None and meanwhile:
                fleet.time[0] += 60  # whatever it takes
                meanwhile.pop()()
            save(function, archive, **fields)

        monkeypatch.setattr(fleet.store, "save_function", slow_upload)
        deployed = fleet.functions.deploy("hello", CODE)
        assert not meanwhile
        for found in (deployed.function, fleet.store.function("hello"), fleet.functions.lookup("hello")):
            assert found is not None
            assert (found.spec.memory_mb, bool(found.code_digest)) == (512, True)
    finally:
        other.close()


def test_one_that_others_outrun_each_time_is_told_so(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    save = fleet.store.save_function

    def outrun(function: Function, archive: bytes | None = None, **fields: Any) -> None:
        save(replace(function, updated_at=fleet.now))
        save(function, archive, **fields)

    monkeypatch.setattr(fleet.store, "save_function", outrun)
    with pytest.raises(Conflict, match="hello was changed by somebody else at the same time: try again"):
        fleet.functions.put(spec())


def test_an_unknown_name_is_answered_while_a_zip_is_inspected(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    inspect, begun, gate = archives.inspect, threading.Event(), threading.Event()

    def slow(*arguments: Any, **fields: Any) -> Any:
        begun.set()
        gate.wait(20)
        return inspect(*arguments, **fields)

    fleet.functions.put(spec())
    fleet.store.save_function(Function(spec("elsewhere"), "digest"))
    monkeypatch.setattr(archives, "inspect", slow)
    deploying = threading.Thread(target=lambda: fleet.functions.deploy("hello", CODE), name="deploying")
    deploying.start()
    try:
        assert begun.wait(10)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(fleet.functions.lookup, "elsewhere").result(5).spec.name == "elsewhere"
    finally:
        gate.set()
        deploying.join(10)
    assert fleet.functions.lookup("hello").code_digest


def test_archives_are_read_once_and_kept_within_their_bound() -> None:
    reads: list[str] = []

    def read(digest: str) -> bytes | None:
        reads.append(digest)
        return None if digest == "gone" else bytes(60)

    archives = Archives(read, limit=100)
    assert archives.get("a") == archives.get("a") == bytes(60)
    assert reads == ["a"]
    archives.get("b")
    archives.get("a")
    assert reads == ["a", "b", "a"]
    assert archives.get("gone") is None


def test_a_push_that_is_not_taken_does_not_hold_up_the_end(fleet: Fleet) -> None:
    gate = threading.Event()
    for number in range(6):  # four are pushed to at a time
        joined(fleet, f"w{number}", gate=gate)
    fleet.functions.put(spec())
    results: list[PushResult] = []
    pushing = threading.Thread(target=lambda: results.append(fleet.functions.deploy("hello", CODE)))
    pushing.start()
    try:
        wait_until(lambda: sum(one.waiting for one in fleet.wire.machines.values()) == 4, "four pushes to be under way")
        fleet.pusher.stop(Deadline(0.01))
        # The interpreter waits at its end for threads that are no daemons.
        assert [one.daemon for one in threading.enumerate() if one.name.startswith("push")] == [True] * 4
    finally:
        gate.set()
        pushing.join(10)
    messages = [one.message for one in results[0].agents]
    assert sum("Flux is stopping" in message for message in messages) == 2
