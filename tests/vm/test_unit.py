"""The agent as a systemd service: what it leaves behind, and what becomes of runs when something under them dies."""

from __future__ import annotations

import pytest

from tests.support.lab import TOP
from tests.support.machine import GUEST_TREE
from tests.support.programs import wait_until
from tests.vm.rig import SPAWNER, STATE, UNIT, GuestAgent


@pytest.fixture(params=["default", "minimal"], scope="module")
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ready(agent: GuestAgent, profile: str) -> GuestAgent:
    agent.configure(profile)
    agent.deploy("hog", "hog.py", max_concurrency=64, memory_mb=128, cpu_millicores=500)
    agent.deploy_files("quick", "main.sh", {"main.sh": b"#!/bin/sh\necho x > $HOME/file; mkdir $HOME/d; sleep 600 &\n"})
    return agent


def test_two_hundred_runs_leave_nothing(ready: GuestAgent) -> None:
    machine = ready.machine
    ready.run("quick")
    before = _census(ready)
    for _ in range(4):
        for identifier in [ready.start("quick") for _ in range(50)]:
            ready.ended(identifier, 120)
    wait_until(lambda: not ready.groups(), "cgroups to go")
    assert _census(ready) == before
    assert ready.processes_of_functions() == []
    # An empty one may be kept for its user's next run.
    assert machine.run(f"find {STATE}/work -mindepth 2") == ""


def _census(agent: GuestAgent) -> dict[str, int]:
    """What could pile up, counted."""
    commands = {
        "groups": f"find {UNIT} -type d | wc -l",
        "mounts": "cat /proc/self/mountinfo | wc -l",
        "spawner's mounts": f"cat /proc/{SPAWNER}/mountinfo | wc -l",
        "spawner's descriptors": f"ls /proc/{SPAWNER}/fd | wc -l",
        "agent's descriptors": "ls /proc/$(systemctl show -P MainPID flux-agent)/fd | wc -l",
        "mount namespaces": "lsns -n -t mnt | wc -l",
        "IPC namespaces": "lsns -n -t ipc | wc -l",
        "files": f"(find {STATE}/work -mindepth 2; find /tmp /var/tmp /dev/shm) | wc -l",
        "zombies": "ps -eo stat --no-headers | grep -c ^Z || true",
    }
    script = "; ".join(f"echo $({command})" for command in commands.values())
    return dict(zip(commands, map(int, agent.machine.run(script).split()), strict=True))


def test_a_spawner_that_hangs_is_replaced_and_what_it_ran_is_accounted_for(ready: GuestAgent) -> None:
    identifiers = [ready.start("hog", "sleep") for _ in range(3)]
    for identifier in identifiers:
        ready.said(identifier, "\n")
    spawner = ready.machine.run(f"echo {SPAWNER}").strip()
    ready.machine.run(f"kill -STOP {spawner}")
    for identifier in identifiers:
        record = ready.ended(identifier, 60)
        assert (record["status"], record["error_kind"]) == ("failed", "internal")
    assert ready.processes_of_functions() == []
    assert ready.machine.run(f"echo {SPAWNER}").strip() != spawner
    assert ready.run("quick")["status"] == "success"


def test_limits_outlive_a_daemon_reload(ready: GuestAgent) -> None:
    identifier = ready.start("hog", "sleep")
    ready.said(identifier, "\n")
    group = f"{UNIT}/fn/{identifier}"
    look = f"cd {group} && cat memory.max memory.swap.max memory.oom.group cpu.max pids.max"
    before = ready.machine.run(look)
    assert before.split() == ["134217728", "0", "1", "50000", "100000", "512"]
    ready.machine.run("systemctl daemon-reload && systemd-run -q --wait true && systemctl daemon-reload")
    assert ready.machine.run(look) == before
    ready.cancel(identifier)


def test_a_dead_spawner_is_replaced_and_its_runs_are_accounted_for(ready: GuestAgent) -> None:
    running = [ready.start("hog", "sleep"), ready.start("hog", "daemon"), ready.start("hog", "deaf")]
    ready.said(running[0], "\n")
    ready.said(running[2], "deaf")
    ready.machine.run(f"kill -9 {SPAWNER}")
    for identifier in (running[0], running[2]):
        record = ready.ended(identifier)
        assert record["error"] == "internal error: the spawner died while this execution was running"
    assert ready.ended(running[1])["status"] == "success"
    assert ready.processes_of_functions() == []
    assert ready.run("hog", "network")["status"] == "success"


def test_a_restart_kills_what_ran_and_accounts_for_it(ready: GuestAgent) -> None:
    running = [ready.start("hog", "sleep"), ready.start("hog", "deaf")]
    ready.said(running[1], "deaf")
    ready.machine.run("systemctl restart flux-agent")
    assert ready.processes_of_functions() == []
    ready.connect()
    for identifier in running:
        record = ready.record(identifier)
        assert (record["status"], record["error"]) == ("failed", "agent stopped")
    assert ready.groups() == []
    assert ready.run("hog", "network")["status"] == "success"


def test_a_crash_of_the_agent_kills_what_ran_and_accounts_for_it(ready: GuestAgent) -> None:
    running = [ready.start("hog", "sleep"), ready.start("hog", "deaf")]
    ready.said(running[1], "deaf")
    agent = ready.machine.run("systemctl show -P MainPID flux-agent").strip()
    ready.machine.run(f"kill -9 {agent}")
    wait_until(lambda: not ready.processes_of_functions(), "functions to die with their agent", 20)
    ready.connect()
    for identifier in running:
        record = ready.record(identifier)
        assert (record["status"], record["error_kind"]) == ("failed", "agent_stopped")
        assert "agent restarted while it ran" in record["error"]


def test_the_documented_line_starts_an_agent_without_the_package(agent: GuestAgent) -> None:
    """A transient service starts in /, with systemd's PATH: what the line names must not be relative to a shell."""
    text = (TOP / "docs/isolation.md").read_text().partition("To try a profile by hand")[2]
    line = text.split("\n\n")[1]
    assert "systemd-run" in line
    machine, clone = agent.machine, "/root/clone"
    machine.run(f"mkdir -p {clone}/.venv/bin && ln -s {GUEST_TREE}/flux.py {GUEST_TREE}/fluxlib {clone}")
    python = f'#!/bin/sh\nPYTHONPATH={GUEST_TREE}:/opt/site exec /usr/bin/python3 "$@"\n'
    machine.write(f"{clone}/.venv/bin/python", python, 0o755)
    settings = "port: 50053\nisolation: default\nstate_dir: /var/lib/flux-try\ntls: {enabled: false}\ninsecure: true\n"
    machine.write(f"{clone}/agent.yaml", f"agent_id: try\n{settings}", 0o600)
    machine.write(f"{clone}/line", f"cd {clone}\n{line}\n", 0o755)
    machine.run(f"sh {clone}/line >{clone}/said 2>&1 </dev/null &")
    up = f"grep -q 'listens on.*isolation default' {clone}/said"
    machine.run(f"for i in $(seq 300); do {up} && break; sleep 0.1; done; cat {clone}/said; {up}")
    machine.run("systemctl stop flux-try")
