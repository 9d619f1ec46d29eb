"""Executions over their whole life with real processes: followed by many, chatty, queued, repeated, expired."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.programs import Agent, Flux, Program, wait_until

# Says a line each time the file of its argument grows, until that says "end".
TALK = """#!/bin/sh
echo ready
exec tail -n +1 -f "$1" | while read -r line; do
  [ "$line" = end ] && exit 0
  echo "$line"
done
"""
# 200 000 writes of 500 bytes.
CHATTY = """#!/bin/sh
exec awk 'BEGIN {
  for (i = 0; i < 7; i++) text = text "0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123 "
  for (i = 0; i < 200000; i++) { printf "%s\\n", substr(sprintf("%07d ", i) text, 1, 499); fflush() }
}'
"""
LINE, LINES = 500, 200_000
ONE_AT_A_TIME = {"max_concurrency": 1, "max_concurrency_behavior": "wait"}
STAY = '#!/bin/sh\nexec sleep "${1:-60}"\n'


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.flux = Flux(directory, kill_grace_sec=0.3, health_interval_sec=0.5, max_waiting=3, execution_ttl=3600)
        self.agent = Agent(directory, self.flux, "w1", kill_grace_sec=0.3, max_output_mb=120)
        self.api = self.flux.api

    def submit(self, name: str, *args: str, key: str = "") -> str:
        status, answer, _ = self.send(name, *args, key=key)
        assert status == 202, answer
        return str(answer["execution_id"])

    def send(self, name: str, *args: str, key: str = "") -> tuple[int, Any, Any]:
        import json

        headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
        body = json.dumps({"args": list(args)}).encode()
        status, answer, got = self.api.request("POST", f"/execute/{name}/async", body, headers)
        return status, json.loads(answer), got

    def output(self, execution_id: str, offset: int = 0) -> bytes:
        status, body, _ = self.api.request("GET", f"/executions/{execution_id}/output?follow=1&offset={offset}")
        assert status == 200, body
        return body


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("life"))
    with made.flux, made.agent:
        made.flux.register(made.agent)
        made.api.deploy({"name": "talk", "handler": "run.sh"}, {"run.sh": TALK})
        made.api.deploy({"name": "chatty", "handler": "run.sh"}, {"run.sh": CHATTY})
        made.api.deploy({"name": "one", "handler": "run.sh", **ONE_AT_A_TIME}, {"run.sh": STAY})
        yield made


def process(program: Program) -> psutil.Process:
    assert program.process is not None
    return psutil.Process(program.process.pid)


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the talker is to say: where any user may read it."""
    import shutil
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="flux-said-"))
    directory.chmod(0o755)
    file = directory / "lines"
    file.touch()
    yield file
    shutil.rmtree(directory)


def test_many_follow_one_and_each_costs_the_agent_one_reader(world: World, said: Path) -> None:
    followers = 24
    execution_id = world.submit("talk", str(said))
    agent = process(world.agent)
    with said.open("a") as file, ThreadPoolExecutor(followers) as pool:
        file.write("first\n")
        file.flush()
        wait_until(lambda: b"first" in world.api.request("GET", f"/executions/{execution_id}/output")[1], "a line")
        descriptors, threads = agent.num_fds(), agent.num_threads()
        offsets = [0, 3, 6] * (followers // 3)
        following = [pool.submit(world.output, execution_id, offset) for offset in offsets]
        # All of them are there before the rest is said.
        wait_until(lambda: agent.num_threads() >= threads + followers - 4, "the readers")
        for number in range(50):
            file.write(f"line {number}\n")
            file.flush()
        wait_until(lambda: b"line 49" in world.api.request("GET", f"/executions/{execution_id}/output")[1], "the last")
        assert agent.num_threads() <= threads + followers + 8
        assert agent.num_fds() <= descriptors + followers
        assert not any(one.done() for one in following), "a follower ended before the execution did"
        file.write("end\n")
        file.flush()
        whole = b"ready\nfirst\n" + b"".join(b"line %d\n" % number for number in range(50))
        assert [one.result(20) for one in following] == [whole[offset:] for offset in offsets]
    assert world.api.ended(execution_id)["status"] == "success"
    # Resumed where somebody stopped, and nothing beyond the end.
    assert world.output(execution_id, len(whole) - 4) == whole[-4:]
    assert world.output(execution_id, len(whole)) == b""
    status, body, _ = world.api.request("GET", f"/executions/{execution_id}/output?offset={len(whole) + 1}")
    assert status == 400, body


@pytest.mark.slow
def test_a_hundred_megabytes_of_short_lines_are_kept_followed_and_fill_nothing(world: World) -> None:
    programs = {program.name: process(program) for program in (world.flux, world.agent)}
    before = {name: one.memory_info().rss for name, one in programs.items()}
    peak = dict(before)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for name, one in programs.items():
                peak[name] = max(peak[name], one.memory_info().rss)

    watcher = threading.Thread(target=watch, name="watch")
    watcher.start()
    try:
        execution_id = world.submit("chatty")
        body = world.output(execution_id)
    finally:
        ended.set()
        watcher.join()
    # Its answer carries the output too, as text: that is not what is measured.
    record = world.api.ended(execution_id, 60)
    assert (record["status"], record["truncated"], record["output_bytes"]) == ("success", False, LINE * LINES)
    assert len(body) == LINE * LINES
    assert [body[at : at + 8] for at in range(0, len(body), LINE)] == [b"%07d " % number for number in range(LINES)]
    grown = {name: (peak[name] - before[name]) // 2**20 for name in programs}
    assert max(grown.values()) < 40, f"MB: {grown}"


def test_at_most_max_waiting_wait(world: World) -> None:
    held = world.submit("one")
    waiting = [world.submit("one") for _ in range(3)]
    status, answer, headers = world.send("one")
    assert (status, "max_waiting" in answer["error"]) == (503, True), answer
    assert int(headers["Retry-After"]) > 0
    status, answer = world.api.execute("one")
    assert status == 503, answer
    # One place is free again when one of them is cancelled.
    assert world.api.call("DELETE", f"/executions/{waiting.pop()}")[0] == 200
    waiting.append(world.submit("one"))
    for execution_id in (*reversed(waiting), held):
        assert world.api.call("DELETE", f"/executions/{execution_id}")[0] == 200


@pytest.mark.leaks("restarts a process of the module's fixture")
def test_a_repeated_submission_is_the_first_one_also_after_a_crash(world: World) -> None:
    first = world.submit("one", "0", key="order-1")
    assert world.submit("one", "0", key="order-1") == first
    assert world.submit("one", "0", key="order-2") != first
    assert world.api.ended(first)["status"] == "success"
    assert world.submit("one", "0", key="order-1") == first
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: world.submit("one", "0", key="order-3"), range(8)))) == 1
    world.flux.kill()
    world.flux.start()
    wait_until(lambda: world.flux.status_of("w1") == "online", "the agent")
    assert world.submit("one", "0", key="order-1") == first


def test_records_and_outputs_expire_on_both_sides(tmp_path: Path) -> None:
    with (
        Flux(tmp_path, execution_ttl=2) as flux,
        Agent(tmp_path, flux, "w1", execution_ttl=2) as agent,
    ):
        flux.register(agent)
        big = "#!/bin/sh\nhead -c 300000 /dev/zero\n"
        flux.api.deploy({"name": "big", "handler": "run.sh"}, {"run.sh": big})
        status, answer = flux.api.execute("big")
        assert status == 200, answer
        ended = time.monotonic()
        path = f"/executions/{answer['execution_id']}"
        outputs = agent.home / "state" / "outputs"
        assert flux.api.call("GET", path)[0] == 200
        assert list(outputs.rglob(f"*{answer['execution_id']}*"))
        wait_until(lambda: flux.api.call("GET", path)[0] == 404, "Flux to forget it", 30)
        assert time.monotonic() - ended > 1.5, "before its time"
        assert not flux.api.call("GET", "/executions")[1]["items"]
        wait_until(lambda: not [path for path in outputs.rglob("*") if path.is_file()], "the agent to remove it", 30)
