"""Bad neighbours under the default profile: each is held to its limits, ended whole, and told what happened."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fluxlib.model import Network, WorkingDirectory
from tests.support.programs import wait_until
from tests.vm.rig import GuestAgent


@pytest.fixture(scope="module")
def default(agent: GuestAgent) -> GuestAgent:
    agent.configure("default")
    agent.deploy("hog", "hog.py")
    return agent


@pytest.fixture(autouse=True)
def _nothing_is_left(default: GuestAgent) -> Iterator[None]:
    yield
    wait_until(lambda: not default.groups(), f"cgroups to be gone: {default.groups()}", 20)
    assert default.processes_of_functions() == []


def test_a_fork_bomb_is_held_to_its_processes(default: GuestAgent) -> None:
    default.deploy("bomb", "hog.py", max_processes=40)
    record = default.run("bomb", "fork_bomb")
    assert record["status"] == "success"
    # The process itself counts.
    assert record["output"] == "started 39\n"


def test_a_memory_hog_is_out_of_memory_and_says_so(default: GuestAgent) -> None:
    default.deploy("hungry", "hog.py", memory_mb=48)
    record = default.run("hungry", "memory")
    assert record["error"] == "out of memory: limit 48 MB"
    assert record["error_kind"] == "out_of_memory"
    assert record["out_of_memory"] is True
    assert 40 * 1024**2 <= record["peak_memory_bytes"] <= 48 * 1024**2


def test_a_child_out_of_memory_takes_the_whole_tree(default: GuestAgent) -> None:
    default.deploy("hungry", "hog.py", memory_mb=48)
    record = default.run("hungry", "child_memory")
    assert record["error"] == "out of memory: limit 48 MB"


def test_a_daemonised_grandchild_does_not_outlive_its_function(default: GuestAgent) -> None:
    record = default.run("hog", "daemon")
    assert (record["status"], record["output"]) == ("success", "left\n")
    assert default.processes_of_functions() == []


def test_a_grandchild_that_writes_for_ever_ends_with_its_function(default: GuestAgent) -> None:
    record = default.run("hog", "chatty_daemon")
    assert record["status"] == "success"
    assert record["output_bytes"] > 0


def test_a_deaf_function_is_killed_after_the_grace(default: GuestAgent) -> None:
    identifier = default.start("hog", "deaf")
    default.said(identifier, "deaf")
    started = time.monotonic()
    default.cancel(identifier)
    assert default.ended(identifier)["status"] == "cancelled"
    assert time.monotonic() - started >= 0.5  # kill_grace_sec


def test_a_polite_function_is_asked_first(default: GuestAgent) -> None:
    identifier = default.start("hog", "polite")
    default.said(identifier, "ready")
    default.cancel(identifier)
    assert default.ended(identifier)["output"] == "ready\nstopping\n"


def test_a_cancel_reaches_what_left_the_process_group(default: GuestAgent) -> None:
    default.deploy_files(
        "nest", "main.sh", {"main.sh": b"#!/bin/sh\nsetsid sh -c 'setsid sleep 600 & sleep 600' &\necho up\nwait\n"}
    )
    identifier = default.start("nest")
    default.said(identifier, "up")
    wait_until(lambda: len(default.processes_of_functions()) >= 3, "its processes")
    default.cancel(identifier)
    default.ended(identifier)
    assert default.processes_of_functions() == []


@pytest.mark.parametrize("directory", ["/tmp", "/run/flux/work", "/dev/shm"])
def test_a_disk_filler_fills_its_own_and_no_more(default: GuestAgent, directory: str) -> None:
    before = _free_mb(default)
    default.deploy("filler", "hog.py", tmp_size_mb=24)
    record = default.run("filler", "fill", directory)
    written, number = record["output"].split()
    assert int(number) == 28, "ENOSPC"
    assert 20 <= int(written) <= 24
    assert abs(_free_mb(default) - before) < 20, "on the machine's disk"


def test_files_count_as_memory(default: GuestAgent) -> None:
    default.deploy("filler", "hog.py", tmp_size_mb=200, memory_mb=64)
    assert default.run("filler", "fill", "/tmp")["error"] == "out of memory: limit 64 MB"


def test_file_size_and_open_files(default: GuestAgent) -> None:
    default.deploy("strictly", "hog.py", max_file_size_mb=4, max_open_files=64)
    assert default.run("strictly", "big_file")["output"] == "27\n"  # EFBIG
    opened, number = default.run("strictly", "files")["output"].split()
    assert int(number) == 24, "EMFILE"
    assert int(opened) <= 61


def test_no_network_when_none_was_asked_for(default: GuestAgent) -> None:
    assert default.run("hog", "network")["output"] == "works\n"
    default.deploy("alone", "hog.py", network=Network.NONE)
    assert default.run("alone", "network")["output"].strip() == "111", "refused: its own loopback has no such port"
    assert default.run("alone", "loopback")["output"] == "works\n"


def test_output_past_its_cap_costs_the_agent_next_to_nothing(default: GuestAgent) -> None:
    identifier = default.start("hog", "flood")

    def kept() -> bool:
        return int(default.record(identifier)["output_bytes"]) >= 10 * 1024**2

    def ticks() -> int:
        pid = default.machine.run("systemctl show -P MainPID flux-agent").strip()
        fields = default.machine.run(f"cat /proc/{pid}/stat").rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    wait_until(kept, "its output to be full", 60)
    before, began = ticks(), time.monotonic()
    threading.Event().wait(5)
    spent = (ticks() - before) / 100 / (time.monotonic() - began)
    default.cancel(identifier)
    assert default.ended(identifier)["truncated"] is True
    assert spent < 0.2, f"{spent:.2f} of a processor"


def test_a_cpu_hog_leaves_its_victim_its_share(default: GuestAgent) -> None:
    """Four hogs on two processors: held to a tenth each they leave a victim nearly a whole one, unlimited half.

    Measured as the victim's processor time by the machine's clock, which the load of the host does not change.
    """
    default.deploy("victim", "hog.py")
    default.deploy("spinner", "hog.py", cpu_millicores=100)
    default.deploy("unlimited", "hog.py")
    beside_limited, hogs = _share_beside(default, "spinner")
    for record in hogs:
        # One period's worth may be over, and what the kernel hands out in slices.
        assert record["cpu_seconds"] <= 0.13 * record["duration_ms"] / 1000 + 0.3, record
    beside_unlimited, _ = _share_beside(default, "unlimited")
    assert beside_limited > 0.75
    assert beside_unlimited < 0.65


def _share_beside(agent: GuestAgent, hog: str) -> tuple[float, list[dict[str, Any]]]:
    """The part of 3 s that a victim computed beside four of ``hog``; the hogs' records."""
    hogs = [agent.start(hog, "spin", "60") for _ in range(4)]
    for identifier in hogs:
        agent.said(identifier, "spinning")
    _, count, seconds = agent.run("victim", "spin", "3")["output"].split()
    print(f"beside {hog}: {int(count) / 3:.0f} rounds a second, {float(seconds) / 3:.0%} of a processor")
    for identifier in hogs:
        agent.cancel(identifier)
    return float(seconds) / 3, [agent.ended(identifier) for identifier in hogs]


def test_a_function_may_start_in_its_work_directory(default: GuestAgent) -> None:
    default.deploy("worker", "hog.py", working_directory=WorkingDirectory.WORK)
    identifier = default.start("worker", "sleep")
    _, home, tmp, cwd, _ = default.said(identifier, "\n").split()
    assert (home, tmp, cwd) == ("/run/flux/work", "/tmp", "/run/flux/work")
    default.cancel(identifier)
    identifier = default.start("hog", "sleep")
    assert default.said(identifier, "\n").split()[3] == "/run/flux/code"
    default.cancel(identifier)


def test_what_cannot_be_enforced_is_refused(default: GuestAgent) -> None:
    kind, words = default.refusal("sliver", "hog.py", cpu_millicores=5)
    assert kind == "unenforceable"
    assert "10 millicores" in words


def test_many_at_once_have_users_of_their_own(default: GuestAgent) -> None:
    default.deploy("hog", "hog.py")
    running = [default.start("hog", "sleep") for _ in range(12)]
    users = {default.said(identifier, "\n").split()[4] for identifier in running}
    assert len(users) == 12
    threads = [threading.Thread(target=default.cancel, args=(identifier,)) for identifier in running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _free_mb(agent: GuestAgent) -> int:
    return int(agent.machine.run("df -m --output=avail /var/lib | tail -1"))
