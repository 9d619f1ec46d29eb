"""Executions with real agents over real mTLS: waiting, cancelling, following, restarts of either side."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Agent, Flux, is_alive, wait_until

ECHO = '#!/bin/sh\necho "$@"\ncat\n'
# Writes a line, then stays until it is told to stop.
STAY = '#!/bin/sh\necho begun "$@"\nexec sleep "${1:-60}"\n'
GRANDCHILD = "#!/bin/sh\nsetsid sleep 300 &\necho $!\nexec sleep 300\n"
WAIT = {"max_concurrency_behavior": "wait", "resource_pressure_behavior": "wait"}


class Pair:
    def __init__(self, directory: Path) -> None:
        self.flux = Flux(directory, kill_grace_sec=0.3, agent_lost_after_sec=2.5, health_interval_sec=0.5)
        self.agents = [Agent(directory, self.flux, f"w{number}", kill_grace_sec=0.3) for number in (1, 2)]
        self.api = self.flux.api
        self.pool = ThreadPoolExecutor(16)
        # All of its threads now: one that a test starts would be taken for a leak.
        together = threading.Barrier(17)
        for _ in range(16):
            self.pool.submit(together.wait)
        together.wait()

    def __enter__(self) -> Pair:
        self.flux.start()
        for agent in self.agents:
            agent.start()
            self.flux.register(agent)
        self.api.deploy({"name": "echo", "handler": "run.sh", "max_concurrency": 50}, {"run.sh": ECHO})
        self.api.deploy({"name": "stay", "handler": "run.sh"}, {"run.sh": STAY})
        self.api.deploy({"name": "family", "handler": "run.sh"}, {"run.sh": GRANDCHILD})
        self.api.deploy({"name": "one", "handler": "run.sh", "max_concurrency": 1, **WAIT}, {"run.sh": STAY})
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        for agent in self.agents:
            agent.stop()
        self.flux.stop()

    def submit(self, name: str, *args: str) -> str:
        status, answer = self.api.call("POST", f"/execute/{name}/async", {"args": list(args)})
        assert status == 202, answer
        return str(answer["execution_id"])

    def record(self, execution_id: str) -> dict[str, Any]:
        status, record = self.api.call("GET", f"/executions/{execution_id}")
        assert status == 200, record
        return dict(record)

    def begun(self, execution_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            record = self.record(execution_id)
            return record if "begun" in record["output"] else None

        return dict(wait_until(look, f"{execution_id} to begin"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("pair")) as made:
        yield made


def test_sync_and_async_have_the_same_record(pair: Pair) -> None:
    status, answer = pair.api.execute("echo", "hello")
    assert (status, answer["output"]) == (200, "hello\n")
    sync = pair.api.ended(answer["execution_id"])
    execution_id = pair.submit("echo", "hello")
    later = pair.api.ended(execution_id)
    assert set(sync) == set(later)
    assert (sync["output"], sync["exit_code"], sync["async"]) == ("hello\n", 0, False)
    assert (later["output"], later["exit_code"], later["async"]) == ("hello\n", 0, True)


def test_a_running_one_is_followed_live_from_an_offset(pair: Pair) -> None:
    execution_id = pair.submit("stay", "1")
    status, body, _ = pair.api.request("GET", f"/executions/{execution_id}/output?follow=1&offset=6")
    assert (status, body) == (200, b"1\n")
    assert pair.record(execution_id)["status"] == "success"


def test_a_sync_one_is_seen_and_cancelled_from_outside(pair: Pair) -> None:
    running = pair.pool.submit(pair.api.execute, "stay", "50")

    def find() -> Any:
        _, page = pair.api.call("GET", "/executions?function=stay&status=running")
        return page["items"][0] if page["items"] else None

    execution_id = wait_until(find, "it to be listed")["execution_id"]
    pair.begun(execution_id)
    status, answer = pair.api.call("DELETE", f"/executions/{execution_id}")
    assert (status, answer["status"]) == (200, "cancelled")
    status, answer = running.result(10)
    assert (status, answer["status"]) == (500, "cancelled")
    assert pair.record(execution_id)["status"] == "cancelled"
    status, answer = pair.api.call("DELETE", f"/executions/{execution_id}")
    assert status == 409
    assert "cancelled" in answer["error"]


def test_a_cancel_is_answered_when_the_whole_tree_is_dead(pair: Pair) -> None:
    execution_id = pair.submit("family")
    child = int(wait_until(lambda: pair.record(execution_id)["output"].strip(), "the grandchild"))
    assert is_alive(child)
    assert pair.api.call("DELETE", f"/executions/{execution_id}")[0] == 200
    assert not is_alive(child)


def test_waiting_starts_when_a_slot_is_free_in_order(pair: Pair) -> None:
    """Within 20 ms on a quiet machine (benchmarks measure it); on any, far sooner than anything that polled."""
    direct = sorted(pair.api.ended(pair.submit("echo"))["queue_ms"] for _ in range(7))[3] / 1000
    held = [pair.submit("one", "60") for _ in range(2)]
    for execution_id in held:
        pair.begun(execution_id)
    waiting = [pair.submit("one", "60") for _ in range(3)]
    assert all(pair.record(one)["phase"] == "queued" for one in waiting)
    _, page = pair.api.call("GET", "/executions?status=queued")
    assert [item["execution_id"] for item in page["items"]] == waiting[::-1]
    assert pair.api.call("DELETE", f"/executions/{waiting[2]}")[0] == 200
    best = 1.0
    for ended, following in zip(held, waiting[:2], strict=True):
        pair.api.call("DELETE", f"/executions/{ended}")
        before = pair.api.ended(ended)
        after = pair.begun(following)
        best = min(best, _seconds(after["run_started_at"]) - _seconds(before["status_at"]))
    assert best < 0.02 + 4 * direct
    for execution_id in waiting[:2]:
        pair.api.call("DELETE", f"/executions/{execution_id}")
    assert pair.record(waiting[2])["status"] == "cancelled"


def _seconds(text: str) -> float:
    from fluxlib.model import epoch

    return epoch(text)


def test_a_client_that_hangs_up_cancels_its_run(pair: Pair) -> None:
    with pytest.raises(TimeoutError):
        pair.api.execute("stay", "55", timeout=1)

    def cancelled() -> Any:
        _, page = pair.api.call("GET", "/executions?function=stay&status=cancelled")
        return [item for item in page["items"] if "gone away" in item["error"]]

    wait_until(cancelled, "its run to be cancelled")


@pytest.mark.leaks("restarts processes of the module's fixture")
def test_a_killed_flux_finds_what_it_left(pair: Pair) -> None:
    running = pair.submit("stay", "3")
    pair.begun(running)
    held = [pair.submit("one", "60") for _ in range(2)]
    for execution_id in held:
        pair.begun(execution_id)
    queued = pair.submit("one", "0")
    sync = pair.pool.submit(_tolerant, pair, "stay", "70")
    sync_id = wait_until(
        lambda: next(
            (
                one
                for one in pair.api.call("GET", "/executions?function=stay")[1]["items"]
                if not one["async"] and one["status"] == "running"
            ),
            None,
        ),
        "the sync one",
    )["execution_id"]
    pair.begun(sync_id)
    pair.flux.kill()
    sync.result(10)
    pair.flux.start()
    wait_until(lambda: pair.flux.status_of("w1") == pair.flux.status_of("w2") == "online", "the agents")
    # A new life may offer it once more to agents that are full, and is told so.
    wait_until(lambda: pair.record(queued)["phase"] == "queued", "it to wait again")
    assert pair.api.ended(running)["status"] == "success"
    assert pair.api.ended(sync_id)["status"] == "cancelled"
    for execution_id in held:
        assert pair.api.call("DELETE", f"/executions/{execution_id}")[0] == 200
    assert pair.api.ended(queued)["status"] == "success"


def _tolerant(pair: Pair, *args: str) -> object:
    try:
        return pair.api.execute(*args)
    except OSError as error:
        return error


@pytest.mark.leaks("restarts processes of the module's fixture")
def test_a_killed_agent_accounts_for_what_it_ran_and_a_lost_one_is_given_up(pair: Pair) -> None:
    agent = pair.agents[0]
    # One more than an agent takes: both have some, however busy this machine makes one of them look.
    ids = [pair.submit("stay", "80") for _ in range(6)]
    records = [pair.begun(one) for one in ids]
    theirs = [one["execution_id"] for one in records if one["agent_id"] == "w1"]
    others = [one["execution_id"] for one in records if one["agent_id"] != "w1"]
    assert theirs
    assert others
    agent.kill()
    agent.start()
    for execution_id in theirs:
        record = pair.api.ended(execution_id)
        assert (record["status"], bool(record["error"])) == ("failed", True)
    wait_until(lambda: pair.flux.status_of("w1") == "online", "w1")
    # For good now.
    again = pair.submit("stay", "81")
    wait_until(lambda: pair.begun(again), "it")
    victim = pair.agents[int(pair.record(again)["agent_id"] == "w2")]
    victim.kill()
    status, answer = pair.api.call("GET", f"/executions/{again}")
    assert status == 503
    assert answer["record"]["status"] == "running"
    record = pair.api.ended(again)
    assert record["error_kind"] == "agent_lost"
    victim.start()
    wait_until(lambda: pair.flux.status_of(victim.agent_id) == "online", "the agent")
    assert pair.record(again)["error_kind"] == "agent_lost"
    for execution_id in others:
        pair.api.call("DELETE", f"/executions/{execution_id}")


def test_a_burst_is_answered_wholly_and_uses_both_agents(pair: Pair) -> None:
    results = list(pair.pool.map(lambda number: pair.api.execute("echo", str(number)), range(100)))
    assert [answer["output"] for _, answer in results] == [f"{number}\n" for number in range(100)]
    # Ten at a time are all the slots there are: five at each.
    slow = list(pair.pool.map(lambda _: pair.api.execute("stay", "0.5"), range(10)))
    assert sorted(answer["agent_id"] for _, answer in slow) == ["w1"] * 5 + ["w2"] * 5
