"""The original Go programs themselves in the other side's place, where somebody has them.

``FLUX_ORIGINAL_DIR`` names a directory with ``serverless-flux`` and ``serverless-agent``. Without it these are
skipped, also in CI: the programs are not ours to ship. The contract is held without them by the tests beside this,
whose imitation refuses what the originals refuse.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.need import need_root
from tests.support.original_authority import original_certificate
from tests.support.original_programs import DIRECTORY, OriginalAgent, OriginalFlux
from tests.support.programs import Agent, Api, Flux, make_zip, wait_until
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.skipif(not DIRECTORY, reason="FLUX_ORIGINAL_DIR names no original programs")

MIB = 1024 * 1024
SCRIPT = """#!/bin/sh
case "$1" in
  args) shift; for arg in "$@"; do echo "[$arg]"; done ;;
  env) echo "$GREETING $FLUX_EXECUTION_ID" ;;
  exit) echo before; exit "$2" ;;
  signal) kill -9 $$ ;;
  sleep) echo started; exec sleep "$2" ;;
  child) echo started; sleep "$2"; echo late ;;
  drip) for n in 1 2 3 4 5 6; do echo "line $n"; sleep 0.5; done ;;
  large) head -c "$2" /dev/zero | tr '\\\\0' x ;;
  *) echo "hello $1" ;;
esac
"""
FILES = {"main.sh": SCRIPT}
SPEC: dict[str, Any] = {
    "name": "wired",
    "handler": "main.sh",
    "timeout": 20,
    "max_concurrency": 2,
    "env": {"GREETING": "good day"},
}


class Side:
    """One of the control planes over one of the agents."""

    def __init__(self, api: Api, agent_id: str) -> None:
        self.api, self.agent_id = api, agent_id

    def start(self, name: str, *args: str) -> str:
        status, answer = self.api.call("POST", f"/execute/{name}/async", {"args": list(args)})
        assert status == 202, answer
        return str(answer["execution_id"])

    def record(self, execution_id: str) -> dict[str, Any]:
        status, record = self.api.call("GET", f"/executions/{execution_id}")
        assert status == 200, record
        return dict(record)

    def printed(self, execution_id: str, text: str) -> dict[str, Any]:
        """The record, once this is in its output."""
        return dict(wait_until(lambda: text in (one := self.record(execution_id)).get("output", "") and one, text))

    def cancel(self, execution_id: str) -> tuple[int, Any]:
        status, body, _ = self.api.request("DELETE", f"/executions/{execution_id}")
        # The original's errors are plain text.
        return status, json.loads(body) if status == 200 else body.decode()

    def refusal(self, path: str, *args: str) -> tuple[int, str]:
        status, body, _ = self.api.request("POST", path, json.dumps({"args": args}).encode())
        return status, body.decode()


# -- what both control planes do over the other's agent -------------------------------------------------------------


class Both:
    """Inherited by either way round, whose ``side`` is a fixture."""

    def test_it_is_listed_online(self, side: Side) -> None:
        _, agents = side.api.call("GET", "/agents")
        assert [(agent["id"], agent["status"]) for agent in agents] == [(side.agent_id, "online")]

    def test_it_runs_with_its_arguments_and_environment(self, side: Side) -> None:
        status, answer = side.api.execute("wired", "args", "a b", "", "'\"$HOME`", "é")
        assert (status, answer["output"]) == (200, "[a b]\n[]\n['\"$HOME`]\n[é]\n"), answer
        assert (answer["status"], answer["agent_id"]) == ("success", side.agent_id)
        status, answer = side.api.execute("wired", "env")
        assert answer["output"] == f"good day {answer['execution_id']}\n"

    def test_exit_codes_and_signals(self, side: Side) -> None:
        status, answer = side.api.execute("wired", "exit", "3")
        assert (status, answer["status"], answer["error"]) == (500, "failed", "exit code 3")
        assert answer["output"] == "before\n"
        status, answer = side.api.execute("wired", "signal")
        assert (status, answer["error"]) == (500, "exit code -1")

    def test_a_redeploy_replaces_the_code(self, side: Side) -> None:
        for text in ("first", "second"):
            side.api.deploy({**SPEC, "name": "again"}, {"main.sh": f"#!/bin/sh\necho {text}\n"})
            assert side.api.execute("again")[1]["output"] == f"{text}\n"

    def test_changed_settings_hold_without_a_redeploy(self, side: Side) -> None:
        spec = {**SPEC, "name": "changed"}
        side.api.deploy(spec, {**FILES, "other.sh": "#!/bin/sh\necho other $GREETING\n"})
        changed = {**spec, "handler": "other.sh", "env": {"GREETING": "hi"}, "timeout": 7}
        assert side.api.call("PUT", "/functions", yaml.safe_dump(changed).encode())[0] == 201
        assert side.api.execute("changed")[1]["output"] == "other hi\n"

    def test_a_timeout(self, side: Side) -> None:
        side.api.deploy({**SPEC, "name": "brief", "timeout": 1}, FILES)
        status, answer = side.api.execute("brief", "sleep", "30")
        assert (status, answer["error"]) == (500, "execution timed out after 1s"), answer
        assert answer["output"] == "started\n"
        assert 900 <= answer["duration_ms"] < 10_000
        record = wait_until(
            lambda: (one := self.ended(side, side.start("brief", "sleep", "30")))["status"] == "failed" and one,
            "its end",
        )
        assert record["error"] == "execution timed out after 1s"

    @staticmethod
    def ended(side: Side, execution_id: str) -> dict[str, Any]:
        return side.api.ended(execution_id)

    def test_live_output_and_the_record_of_its_end(self, side: Side) -> None:
        execution_id = side.start("wired", "drip")
        live = side.printed(execution_id, "line 2")
        assert live["status"] == "running"
        assert "line 6" not in live["output"]
        assert not live.get("status_at")
        record = side.api.ended(execution_id)
        assert (record["status"], record["agent_id"], record["function_name"]) == ("success", side.agent_id, "wired")
        assert record["output"] == "".join(f"line {n}\n" for n in range(1, 7))
        assert record["status_at"] > record["started_at"]

    def test_cancel(self, side: Side) -> None:
        execution_id = side.start("wired", "sleep", "60")
        side.printed(execution_id, "started")
        status, answer = side.cancel(execution_id)
        assert (status, answer["status"], answer["execution_id"]) == (200, "cancelled", execution_id), answer
        assert side.api.ended(execution_id)["status"] == "cancelled"

    def test_at_capacity_is_refused_synchronously(self, side: Side) -> None:
        side.api.deploy({**SPEC, "name": "narrow", "max_concurrency": 1}, FILES)
        execution_id = side.start("narrow", "sleep", "60")
        side.printed(execution_id, "started")
        status, text = side.refusal("/execute/narrow", "you")
        assert status == 503, text
        assert "at capacity" in text
        assert side.cancel(execution_id)[0] == 200
        wait_until(lambda: side.api.execute("narrow", "you")[0] == 200, "its slot to be free again")

    def test_at_capacity_waits_where_that_is_asked_for(self, side: Side) -> None:
        side.api.deploy({**SPEC, "name": "queue", "max_concurrency": 1, "max_concurrency_behavior": "wait"}, FILES)
        answers: list[Any] = []
        callers = [
            threading.Thread(target=lambda: answers.append(side.api.execute("queue", "sleep", "0.7"))) for _ in "abc"
        ]
        began = time.monotonic()
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(30)
        assert [status for status, _ in answers] == [200] * 3, answers
        assert time.monotonic() - began > 2

    def test_near_fifty_mebibytes_each_way(self, side: Side) -> None:
        noise = os.urandom(49 * MIB)
        side.api.deploy(
            {**SPEC, "name": "large"}, {"main.sh": "#!/bin/sh\ncat noise\n", "noise": noise.hex()[: 49 * MIB]}
        )
        status, answer = side.api.execute("large", timeout=120)
        assert status == 200, answer
        assert (
            hashlib.sha256(answer["output"].encode()).digest()
            == hashlib.sha256(noise.hex()[: 49 * MIB].encode()).digest()
        )


# -- our control plane over an original agent -----------------------------------------------------------------------


class Ours(Side):
    def __init__(self, flux: Flux, agent: OriginalAgent) -> None:
        super().__init__(flux.api, agent.agent_id)
        self.flux, self.agent = flux, agent


@pytest.fixture(scope="module")
def original_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certs_dir that the original made."""
    need_root()
    directory = tmp_path_factory.mktemp("original-certs")
    with RedisServer(directory) as redis, OriginalFlux(redis.address, directory / "certs"):
        return directory / "certs"


@pytest.fixture(scope="module", params=["tls", "plain"])
def over_original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, original_certs: Path
) -> Iterator[Ours]:
    directory, with_tls = tmp_path_factory.mktemp("over-original"), request.param == "tls"
    tls = original_certificate(original_certs, directory / "tls") if with_tls else None
    settings: dict[str, Any] = {"certs_dir": str(original_certs), "health_interval_sec": 1, "max_archive_mb": 60}
    with Flux(directory, tls=with_tls, **settings) as flux, OriginalAgent("old-1", tls) as agent:
        flux.register_at(agent.address, legacy=True)
        flux.api.deploy(SPEC, FILES)
        yield Ours(flux, agent)


class TestOurFluxOverTheOriginalAgent(Both):
    @pytest.fixture
    def side(self, over_original: Ours) -> Ours:
        return over_original

    def test_at_capacity_is_refused_asynchronously(self, side: Ours) -> None:
        side.api.deploy({**SPEC, "name": "single", "max_concurrency": 1}, FILES)
        execution_id = side.start("single", "sleep", "60")
        status, text = side.refusal("/execute/single/async", "you")
        assert status == 503, text
        assert side.cancel(execution_id)[0] == 200

    def test_an_ended_one_cannot_be_cancelled(self, side: Ours) -> None:
        execution_id = side.start("wired", "you")
        side.api.ended(execution_id)
        assert side.cancel(execution_id)[0] == 409

    def test_a_synchronous_one_is_cancelled(self, side: Ours) -> None:
        answers: list[Any] = []
        caller = threading.Thread(target=lambda: answers.append(side.api.execute("wired", "sleep", "60")))
        caller.start()
        (running,) = wait_until(lambda: side.api.call("GET", "/executions?status=running")[1]["items"], "it to run")
        wait_until(lambda: side.api.call("GET", "/agents")[1][0]["active_count"] == 1, "the agent to run it")
        began = time.monotonic()
        status, answer = side.cancel(running["execution_id"])
        assert status == 200, answer
        assert time.monotonic() - began < 5
        caller.join(10)
        status, answer = answers[0]
        assert (status, answer["status"]) == (500, "cancelled"), answer
        wait_until(
            lambda: side.api.call("GET", "/agents")[1][0]["node_status"]["active_tasks"] == 0, "its process to end"
        )

    def test_output_is_followed(self, side: Ours) -> None:
        execution_id = side.start("wired", "drip")
        status, body, _ = side.api.request("GET", f"/executions/{execution_id}/output?follow=1")
        assert (status, body.decode()) == (200, "".join(f"line {n}\n" for n in range(1, 7)))

    def test_what_it_would_ignore_is_refused(self, side: Ours) -> None:
        status, answer = side.api.execute("wired", "you", input="text")
        assert status >= 400, answer
        assert "original agent" in answer["error"]
        # Such an agent is left alone for two seconds.
        wait_until(lambda: side.api.execute("wired", "you")[0] == 200, "it to be asked again")

    def test_a_grandchild_with_the_output_delays_a_timeout(self, side: Ours) -> None:
        """Known to differ from our agent: the original kills the leader alone, and waits for the rest."""
        side.api.deploy({**SPEC, "name": "late", "timeout": 1}, FILES)
        status, answer = side.api.execute("late", "child", "4")
        assert (status, answer["error"]) == (500, "execution timed out after 1s")
        assert answer["duration_ms"] >= 3900

    def test_more_output_than_a_message_holds_is_told(self, side: Ours) -> None:
        """Synchronously only: of an asynchronous one it writes all output so far again with every 32 KiB that come."""
        status, answer = side.api.execute("wired", "large", str(51 * MIB))
        assert (status, answer["execution_id"] != "") == (502, True), answer
        assert "larger than 50 MB" in answer["error"], answer
        assert side.flux.status_of(side.agent_id) == "online"

    def test_an_archive_too_large_for_it_fails_no_deploy(self, side: Ours) -> None:
        assert side.api.call("PUT", "/functions", yaml.safe_dump({**SPEC, "name": "huge"}).encode())[0] == 201
        archive = make_zip({**FILES, "noise": os.urandom(51 * MIB)})
        status, answer = side.api.call("PUT", "/deploy/huge", archive)
        assert (status, answer["deployed_count"]) == (201, 0), answer
        assert "at most 50 MB" in answer["agents"][0]["message"]

    @pytest.mark.leaks("the agent goes on for the tests after this")
    def test_a_restart_with_its_store(self, side: Ours) -> None:
        execution_id = side.start("wired", "sleep", "60")
        side.printed(execution_id, "started")
        side.agent.kill()
        wait_until(lambda: side.flux.status_of(side.agent_id) == "offline", "it to be offline")
        side.agent.start()
        wait_until(lambda: side.flux.status_of(side.agent_id) == "online", "it to be online again")
        record = side.api.ended(execution_id, 30)
        assert record["status"] == "failed"
        assert "lost" in record["error"]
        assert side.api.execute("wired", "you")[1]["output"] == "hello you\n"

    @pytest.mark.leaks("the agent goes on for the tests after this")
    def test_a_quick_restart_is_noticed(self, side: Ours) -> None:
        wait_until(lambda: side.api.call("GET", "/agents")[1][0]["node_status"]["uptime_seconds"] >= 4, "some uptime")
        execution_id = side.start("wired", "sleep", "60")
        side.printed(execution_id, "started")
        side.agent.kill()
        side.agent.start()
        record = side.api.ended(execution_id, 30)
        assert (record["status"], record["agent_id"]) == ("failed", side.agent_id)


# -- an original control plane over our agent -----------------------------------------------------------------------


class Theirs(Side):
    def __init__(self, flux: OriginalFlux, agent: Agent) -> None:
        super().__init__(flux.api, agent.agent_id)
        self.flux, self.agent = flux, agent


@pytest.fixture(scope="module", params=["tls", "plain"])
def under_original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theirs]:
    need_root()
    directory, with_tls = tmp_path_factory.mktemp("under-original"), request.param == "tls"
    ours = Flux(directory, tls=with_tls)  # for its certificates only: it is never started
    with (
        RedisServer(directory) as redis,
        Agent(directory, ours, "new-1", max_output_mb=60) as agent,
        OriginalFlux(redis.address, ours.certs if with_tls else None) as flux,
    ):
        status, answer = flux.api.call("POST", "/agents/register", {"address": agent.address})
        assert status == 201, answer
        flux.api.deploy(SPEC, FILES)
        yield Theirs(flux, agent)


class TestTheOriginalFluxOverOurAgent(Both):
    @pytest.fixture
    def side(self, under_original: Theirs) -> Theirs:
        return under_original

    def test_at_capacity_asynchronously_is_the_originals_own_fault(self, side: Theirs) -> None:
        """It does not look at the agent's answer: it accepts what then nobody knows."""
        side.api.deploy({**SPEC, "name": "single", "max_concurrency": 1}, FILES)
        execution_id = side.start("single", "sleep", "60")
        lost = side.start("single", "you")
        assert side.api.request("GET", f"/executions/{lost}")[0] == 404
        assert side.cancel(execution_id)[0] == 200

    def test_a_timeout_ends_grandchildren_too(self, side: Theirs) -> None:
        side.api.deploy({**SPEC, "name": "late", "timeout": 1}, FILES)
        status, answer = side.api.execute("late", "child", "30")
        assert (status, answer["error"]) == (500, "execution timed out after 1s")
        assert answer["duration_ms"] < 10_000

    def test_a_caller_that_hangs_up_ends_its_execution(self, side: Theirs) -> None:
        side.api.deploy({**SPEC, "name": "only", "max_concurrency": 1}, FILES)
        with pytest.raises(TimeoutError):
            side.api.execute("only", "sleep", "60", timeout=1)
        wait_until(lambda: side.api.request("POST", "/execute/only", b'{"args": []}')[0] == 200, "its slot to be free")

    @pytest.mark.leaks("the agent goes on for the tests after this")
    def test_a_restart_with_its_store(self, side: Theirs) -> None:
        ended = side.start("wired", "you")
        side.api.ended(ended)
        side.agent.stop()
        side.agent.start()
        wait_until(lambda: side.api.request("POST", "/execute/wired", b'{"args": ["you"]}')[0] == 200, "it to be back")
        assert side.record(ended)["output"] == "hello you\n"
