"""Promises that faults in the field broke once: each with real processes, and the account of what was accepted."""

from __future__ import annotations

import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from tests.faults.rig import FINAL, Marks, account, alive, deploy, known, settle
from tests.faults.test_table import _FAST, Redis, World
from tests.support.programs import Agent, Flux, wait_until

pytestmark = pytest.mark.faults


def test_an_agent_that_can_start_nothing_takes_no_calls(tmp_path: Path) -> None:
    """It failed fastest, and so had always the most room (F1)."""
    with Marks() as marks, Flux(tmp_path, **_FAST) as flux, ExitStack() as stack:
        # Where functions' users may enter: else the agent keeps its code and work directories elsewhere.
        well, ill = (stack.enter_context(Agent(marks.path.parent, flux, name)) for name in ("well", "ill"))
        flux.register(well)
        flux.register(ill)
        deploy(flux, marks, "job", max_concurrency=20, max_concurrency_behavior="wait")
        world = World(flux, well, None, marks)
        for _ in range(8):
            world.submit("plain", "1")
        before = settle(flux.api, "job")
        assert {record["agent_id"] for record in before.values()} == {"well", "ill"}
        shutil.rmtree(ill.home / "state", ignore_errors=True)  # it may write there meanwhile
        for _ in range(40):
            world.submit("plain", "1")

        def problem_of(agent_id: str) -> str:
            agents = flux.api.call("GET", "/agents")[1]
            return next(str(agent["problem"]) for agent in agents if agent["id"] == agent_id)

        wait_until(lambda: problem_of("ill"), "the ill agent to be shown")
        assert not problem_of("well")
        records = settle(flux.api, "job")
        account(records, world.accepted, marks)
        failed = [one for one in records.values() if one["status"] != "success"]
        # Those that had one of the work directories that the agent makes in advance, which are gone with the others.
        assert len(failed) <= 4, failed
        after = [record["agent_id"] for identifier, record in records.items() if identifier not in before]
        assert after.count("well") >= 36


@pytest.mark.parametrize("kind", ["backup of the embedded store", "older append-only file of Redis"])
def test_a_store_that_comes_back_older_starts_nothing_twice(tmp_path: Path, kind: str) -> None:
    """It says that executions wait which agents have had (F2)."""
    server = Redis(tmp_path / "redis") if "Redis" in kind else None
    if server is not None:
        server.start()
    settings = {"redis_addr": server.address} if server is not None else {}
    try:
        with (
            Marks() as marks,
            Flux(tmp_path, **_FAST, **settings) as flux,
            Agent(tmp_path, flux, "worker-1") as first,
            Agent(tmp_path, flux, "worker-2") as second,
        ):
            flux.register(first)
            flux.register(second)
            deploy(flux, marks, "job", max_concurrency=1, max_concurrency_behavior="wait")
            world = World(flux, first, server, marks)
            for _ in range(10):
                world.submit("plain", "1")
            wait_until(lambda: world.running(2), "two to run")
            directory, keeper = (server.directory, server) if server is not None else (flux.home / "state", flux)
            keeper.signal(signal.SIGSTOP)
            shutil.copytree(directory, tmp_path / "copy")
            keeper.signal(signal.SIGCONT)
            settle(flux.api, "job")
            if server is not None:
                server.kill()
            else:
                flux.stop()
            shutil.rmtree(directory)
            shutil.copytree(tmp_path / "copy", directory)
            keeper.start()
            records = settle(flux.api, "job")
            account(records, world.accepted, marks)
            assert {record["status"] for record in records.values()} == {"success"}
    finally:
        if server is not None:
            server.signal(signal.SIGCONT)
            server.kill()


def test_all_ends_are_written_at_once_when_the_store_is_back(tmp_path: Path) -> None:
    """They were written one a second (F3), behind one more for each call that was refused meanwhile (F4)."""
    with Marks() as marks, Redis(tmp_path / "redis") as server:
        flux = Flux(tmp_path, redis_addr=server.address, **_FAST)
        with flux, Agent(tmp_path, flux, "worker-1") as agent:
            flux.register(agent)
            deploy(flux, marks, "job", max_concurrency=40)
            world = World(flux, agent, server, marks)
            for _ in range(30):
                world.submit("plain", "2")
            wait_until(lambda: world.running(30), "all to run")
            server.kill()
            refused = {flux.api.call("POST", "/execute/job/async", {"args": ["plain", "0"]})[0] for _ in range(200)}
            assert refused == {503}
            wait_until(lambda: not alive(world.accepted), "all to end at the agent")
            server.start()
            back = time.monotonic()

            def listed() -> bool:
                try:
                    return all(record["status"] in FINAL for record in known(flux.api, "job"))
                except (OSError, AssertionError):
                    return False

            wait_until(listed, "every end to be written")
            # 31 s at one a second; a Redis that starts is noticed within a few.
            assert time.monotonic() - back < 15
            account({one["execution_id"]: one for one in known(flux.api, "job")}, world.accepted, marks)


def test_a_full_redis_becomes_less_full_by_itself(tmp_path: Path) -> None:
    """With `noeviction` nobody could lead, and so no record expired (F6)."""
    with Marks() as marks, Redis(tmp_path / "redis") as server:
        flux = Flux(tmp_path, redis_addr=server.address, execution_ttl=8, **_FAST)
        with flux, Agent(tmp_path, flux, "worker-1") as agent:
            flux.register(agent)
            deploy(flux, marks, "job", max_concurrency=40, max_concurrency_behavior="wait")
            world = World(flux, agent, server, marks)
            for _ in range(150):
                world.submit("plain", "0")
            with redis.Redis("127.0.0.1", server.port) as client:
                used = int(client.info("memory")["used_memory"])  # type: ignore[index, arg-type]
                client.config_set("maxmemory-policy", "noeviction")
                client.config_set("maxmemory", used - 64 * 1024)
            wait_until(lambda: flux.api.call("GET", "/health")[0] == 503, "/health to say so")
            assert flux.api.call("POST", "/execute/job/async", {"args": ["plain", "0"]})[0] == 503
            wait_until(lambda: flux.api.execute("job", "plain", "0")[0] == 200, "records to expire", 40)
            wait_until(lambda: flux.api.call("GET", "/health")[0] == 200, "/health to say so")


def test_a_store_whose_file_was_removed_accepts_nothing(tmp_path: Path) -> None:
    """Everything was answered 202, and gone after the next start (F7)."""
    with Marks() as marks, Flux(tmp_path, **_FAST) as flux, Agent(tmp_path, flux, "worker-1") as agent:
        flux.register(agent)
        deploy(flux, marks, "job")
        world = World(flux, agent, None, marks)
        accepted = world.submit("plain", "0")
        assert flux.api.ended(accepted)["status"] == "success"
        for path in (flux.home / "state").glob("flux.db*"):
            path.unlink()
        status, answer = flux.api.call("POST", "/execute/job/async", {"args": ["plain", "0"]})
        assert (status, "removed or replaced" in answer["error"]) == (503, True), answer
        wait_until(lambda: flux.api.call("GET", "/health")[0] == 503, "/health to say so")
