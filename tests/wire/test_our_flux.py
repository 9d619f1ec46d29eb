"""Our control plane over an original agent: nothing beyond the contract's table is used, TLS on and off."""

from __future__ import annotations

import io
import os
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.original_authority import original_certificate, original_directory
from tests.support.programs import Agent, Flux, free_port, wait_until

SCRIPT = """#!/bin/sh
case "$1" in
  exit) exit "$2" ;;
  signal) kill -9 $$ ;;
  sleep) echo started; exec sleep "$2" ;;
  *) echo "hello $1" ;;
esac
"""
SPEC = {"name": "wired", "handler": "main.sh", "timeout": 20, "max_concurrency": 2}


class Rig:
    def __init__(self, flux: Flux, process: subprocess.Popen[str], address: str) -> None:
        self.flux, self.process, self.address, self.api = flux, process, address, flux.api

    def tasks(self) -> int:
        """What the agent runs, by its own last report."""
        _, agents = self.api.call("GET", "/agents")
        return int(agents[0]["node_status"]["active_tasks"])


@pytest.fixture(scope="module", params=["tls", "plain"])
def rig(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, original_agent: Callable[..., Any]
) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("rig")
    with_tls = request.param == "tls"
    certs, tls = directory / "certs", None
    if with_tls:
        original_directory(certs)
        tls = original_certificate(certs, directory / "tls")
    with (
        Flux(directory, tls=with_tls, certs_dir=str(certs), health_interval_sec=1, max_archive_mb=60) as flux,
        original_agent("old-1", tls=tls) as (process, address),
    ):
        if with_tls:
            # Without an ID in its certificate it is only taken when said to be legacy.
            status, answer = flux.api.call("POST", "/agents/register", {"address": address})
            assert status == 502, answer
            assert "legacy" in answer["error"]
        flux_answer = flux.api.call("POST", "/agents/register", {"address": address, "legacy": True, "tls": True})
        assert flux_answer[0] == 201, flux_answer
        flux.api.deploy(SPEC, {"main.sh": SCRIPT})
        yield Rig(flux, process, address)


def test_it_is_listed_as_it_is(rig: Rig) -> None:
    _, agents = rig.api.call("GET", "/agents")
    assert [(agent["id"], agent["address"], agent["status"]) for agent in agents] == [("old-1", rig.address, "online")]


def test_an_agent_of_ours_enrolled_from_the_originals_ca_is_taken(rig: Rig, tmp_path: Path) -> None:
    with Agent(tmp_path, rig.flux, "new-1") as agent:
        rig.flux.register(agent)
        assert rig.api.call("DELETE", "/agents/new-1")[0] == 200


def test_sync_answers(rig: Rig) -> None:
    status, answer = rig.api.execute("wired", "you")
    assert (status, answer["status"], answer["output"]) == (200, "success", "hello you\n")
    assert answer["agent_id"] == "old-1"
    status, answer = rig.api.execute("wired", "exit", "3")
    assert (status, answer["status"], answer["error"]) == (500, "failed", "exit code 3")
    status, answer = rig.api.execute("wired", "signal")
    assert (status, answer["status"]) == (500, "failed")


def test_at_capacity_with_status_ok_is_never_a_202(rig: Rig) -> None:
    rig.api.deploy({**SPEC, "name": "narrow", "max_concurrency": 1}, {"main.sh": SCRIPT})
    status, first = rig.api.call("POST", "/execute/narrow/async", {"args": ["sleep", "30"]})
    assert status == 202, first
    status, second = rig.api.call("POST", "/execute/narrow/async", {"args": ["sleep", "30"]})
    assert status == 503, second
    assert second["error"]
    status, cancelled = rig.api.call("DELETE", f"/executions/{first['execution_id']}")
    assert status == 200, cancelled
    assert cancelled["status"] == "cancelled"
    status, again = rig.api.call("DELETE", f"/executions/{first['execution_id']}")
    assert status == 409, again


def test_an_async_end_is_learnt(rig: Rig) -> None:
    status, answer = rig.api.call("POST", "/execute/wired/async", {"args": ["you"]})
    assert status == 202, answer

    def listed() -> list[str]:
        return [one["execution_id"] for one in rig.api.call("GET", "/executions?status=success")[1]["items"]]

    # The list does not ask the agent: Flux has learnt it by itself.
    wait_until(lambda: answer["execution_id"] in listed(), "its end")
    record = rig.api.ended(answer["execution_id"])
    assert (record["status"], record["output"], record["agent_id"]) == ("success", "hello you\n", "old-1")


def test_a_sync_call_is_cancelled(rig: Rig) -> None:
    """The original has no record of it, and its CancelExecution does not find it."""
    rig.api.deploy({**SPEC, "name": "waited"}, {"main.sh": SCRIPT})
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(rig.api.execute("waited", "sleep", "60")))
    caller.start()
    (running,) = wait_until(lambda: rig.api.call("GET", "/executions?function=waited")[1]["items"], "it to run")
    wait_until(lambda: rig.tasks() == 1, "its program to run")
    status, answer = rig.api.call("DELETE", f"/executions/{running['execution_id']}")
    assert (status, answer["status"]) == (200, "cancelled"), answer
    caller.join(10)
    status, answer = answers[0]
    assert (status, answer["status"]) == (500, "cancelled"), answer
    wait_until(lambda: rig.tasks() == 0, "its program to be killed")


def test_output_and_end_of_an_async_one_that_fits_no_message(rig: Rig) -> None:
    """It says nothing of it any more, and must neither stay open for ever nor hide the others."""
    if rig.flux.tls:
        pytest.skip("once is enough")
    rig.api.deploy({**SPEC, "name": "large"}, {"main.sh": "#!/bin/sh\nhead -c 53000000 /dev/zero | tr '\\0' x\n"})
    status, large = rig.api.call("POST", "/execute/large/async", {"args": []})
    assert status == 202, large
    status, small = rig.api.call("POST", "/execute/wired/async", {"args": ["sleep", "1"]})
    assert status == 202, small
    assert rig.api.ended(small["execution_id"])["status"] == "success"
    record = rig.api.ended(large["execution_id"], 40)
    assert record["status"] == "failed"
    assert "larger than 50 MB" in record["error"]


def test_an_archive_too_large_for_it_fails_no_deploy(rig: Rig) -> None:
    """It takes messages of 50 MiB, so a larger archive is not sent at all: TLS or not is the same to that."""
    if rig.flux.tls:
        pytest.skip("once is enough")
    status, answer = rig.api.call("PUT", "/functions", yaml.safe_dump({**SPEC, "name": "huge"}).encode())
    assert status == 201, answer
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("main.sh", SCRIPT)
        archive.writestr("noise", os.urandom(50 << 20))
    status, answer = rig.api.call("PUT", "/deploy/huge", buffer.getvalue())
    assert status == 201, answer
    assert (answer["deployed_count"], answer["agents"][0]["status"]) == (0, "failed")
    assert "at most 50 MB" in answer["agents"][0]["message"]
    assert rig.api.execute("wired", "you")[0] == 200


@pytest.mark.slow
def test_it_is_not_pinged_into_a_goaway(rig: Rig) -> None:
    """Go's default policy answers the third early ping with GOAWAY: pings 10 s apart would end within 40 s."""
    deadline = time.monotonic() + 60
    wait_until(lambda: time.monotonic() > deadline, "some quiet time", 100)
    assert rig.flux.status_of("old-1") == "online"
    status, _ = rig.api.execute("wired", "you")
    assert status == 200
    assert "GOAWAY" not in rig.flux.log.read_text()


def test_a_lost_original_is_a_502_with_the_execution(tmp_path: Path, original_agent: Callable[..., Any]) -> None:
    with (
        Flux(tmp_path, tls=False, health_interval_sec=1) as flux,
        original_agent("old-2") as (process, address),
    ):
        assert flux.api.call("POST", "/agents/register", {"address": address})[0] == 201
        flux.api.deploy(SPEC, {"main.sh": SCRIPT})
        answers: list[Any] = []
        caller = threading.Thread(target=lambda: answers.append(flux.api.execute("wired", "sleep", "30")))
        caller.start()
        wait_until(lambda: flux.api.call("GET", "/executions?status=running")[1]["items"], "it to run")
        process.kill()
        caller.join(30)
        status, answer = answers[0]
        assert status == 502, answer
        assert answer["execution_id"]


@pytest.mark.parametrize("quick", [True, False])
def test_what_an_original_ran_before_its_restart_is_lost(
    tmp_path: Path, original_agent: Callable[..., Any], quick: bool
) -> None:
    """Its record of it says for an hour that it runs."""
    agent: dict[str, Any] = {"home": tmp_path / "old", "port": free_port()}
    with Flux(tmp_path, tls=False, health_interval_sec=0.5) as flux:
        with original_agent("old-3", **agent) as (process, address):
            flux.register_at(address)
            flux.api.deploy(SPEC, {"main.sh": SCRIPT})
            ended = flux.api.call("POST", "/execute/wired/async", {"args": ["you"]})[1]["execution_id"]
            flux.api.ended(ended)
            wait_until(lambda: flux.api.call("GET", "/agents")[1][0]["node_status"]["uptime_seconds"] >= 4, "its age")
            running = flux.api.call("POST", "/execute/wired/async", {"args": ["sleep", "8"]})[1]["execution_id"]
            wait_until(lambda: flux.api.call("GET", f"/executions/{running}")[1]["output"], "it to run")
            process.kill()
            if not quick:
                wait_until(lambda: flux.status_of("old-3") == "offline", "it to be offline")
        with original_agent("old-3", **agent):
            record = flux.api.ended(running)
            assert (record["status"], record["agent_id"]) == ("failed", "old-3"), record
            assert "restarted" in record["error"]
            wait_until(lambda: flux.api.execute("wired", "you")[0] == 200, "it to take work again")
            record = flux.api.ended(ended)
            assert record["output"] == "hello you\n", record
