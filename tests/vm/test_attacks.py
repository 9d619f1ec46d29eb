"""Every attack of docs/isolation.md's table, tried by a real function beside a real victim, under each profile.

Profile ``off`` is the control: what it lets through shows that the attack itself works.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.machine import Machine
from tests.vm.bait import Victim, lay
from tests.vm.rig import GuestAgent

PROFILES = ("off", "default", "strict", "minimal")
WORKS = "works"
NONE = "StopIteration"  # nothing was found

# attack: what comes of it under off, default, strict, minimal
EXPECTED: dict[str, tuple[str, str, str, str]] = {
    "see another's process": (WORKS, "ENOENT", "ENOENT", "ENOENT"),
    "read another's environment": (WORKS, "ENOENT", "ENOENT", "ENOENT"),
    "read another's memory": (WORKS, "ENOENT", "ENOENT", "ENOENT"),
    "trace another": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "kill another": (WORKS, "EPERM", "EPERM", "EPERM"),
    "see the agent": ("ENOENT", "ENOENT", "ENOENT", "ENOENT"),
    "kill the agent": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "read another's code": (WORKS, "ENOENT", "ENOENT", "EACCES"),
    "read another's work": (WORKS, "ENOENT", "ENOENT", "EACCES"),
    "read the agent's store": ("EACCES", "ENOENT", "ENOENT", "EACCES"),
    "read the agent's configuration": ("EACCES", "ENOENT", "ENOENT", "EACCES"),
    "read a world-readable file in /srv": (WORKS, "ENOENT", "ENOENT", "EACCES"),
    "connect to a socket in /run": (WORKS, "ENOENT", "ENOENT", WORKS),
    "connect to an abstract socket": (WORKS, WORKS, WORKS, WORKS),
    "connect to a local port": (WORKS, WORKS, WORKS, WORKS),
    "connect to the agent's port": (WORKS, "EPERM", "EPERM", "EPERM"),
    "listen on Flux's port": (WORKS, "EPERM", "EPERM", "EPERM"),
    "listen on Flux's port by IPv6": (WORKS, "EPERM", "EPERM", "EPERM"),
    "open a raw network socket": ("EAFNOSUPPORT", "EAFNOSUPPORT", "EAFNOSUPPORT", "EAFNOSUPPORT"),
    "attach to another's SysV memory": (WORKS, "ENOENT", "ENOENT", "EPERM"),
    # Where it works it has a namespace of its own: see below what is left of it.
    "leave SysV memory behind": (WORKS, WORKS, WORKS, "EPERM"),
    "change its own code": ("EACCES", "EROFS", "EROFS", "EACCES"),
    "add to its own code": ("EACCES", "EROFS", "EROFS", "EACCES"),
    "write to /usr": ("EROFS", "EROFS", "EROFS", "EROFS"),
    "write to /var/tmp": (WORKS, "ENOENT", "ENOENT", "EACCES"),
    # What it meets is the directory below the disk.
    "write to a disk mounted later": (WORKS, "EROFS", "EROFS", "EACCES"),
    # Landlock knows files, not sockets.
    "connect to a socket in /var/lib": (WORKS, "ENOENT", "ENOENT", WORKS),
    "write to a FIFO in /var/lib": (WORKS, "ENOENT", "ENOENT", "EACCES"),
    "take the machine's terminals": (WORKS, "ENOSPC", "ENOSPC", "EACCES"),
    "fill netlink queues": (WORKS, "EPROTONOSUPPORT", "EPROTONOSUPPORT", "EPROTONOSUPPORT"),
    "list the machine's sockets": (WORKS, "EPROTONOSUPPORT", "EPROTONOSUPPORT", "EPROTONOSUPPORT"),
    "use up the memory for compiled filters": (WORKS, "EPERM", "EPERM", "EPERM"),
    "take a share of fs.aio-max-nr": (WORKS, "ENOSYS", "ENOSYS", "ENOSYS"),
    "change its limit of core dumps": (WORKS, "EPERM", "EPERM", "EPERM"),
    "have root handle its crash": (WORKS, "EPERM", "EPERM", "EPERM"),
    "say it is root's login": (WORKS, "EPERM", "EACCES", "EACCES"),
    "be spared when memory runs out": (WORKS, "EACCES", "EACCES", "EACCES"),
    "share its standard input with others": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "lock a file of the machine": (WORKS, WORKS, WORKS, WORKS),
    "count processes by their numbers": (WORKS, WORKS, WORKS, WORKS),
    "hand memory on to others": (WORKS, WORKS, WORKS, WORKS),
    "leave its cgroup": ("ENOENT", "EACCES", "ENOENT", "EACCES"),
    "see other cgroups": ("ENOENT", "ENOENT", "ENOENT", "ENOENT"),
    "read a disk": ("ENOENT", "ENOENT", "ENOENT", "ENOENT"),
    "set the clock": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "become root": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "read the kernel's log": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "set up io_uring": (WORKS, "ENOSYS", "ENOSYS", "ENOSYS"),
    "load a BPF program": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "use a set-user-ID program": ("EPERM", "EPERM", "EPERM", "EPERM"),
    "open a user namespace": (WORKS, "EPERM", "EPERM", "EPERM"),
    "open a mount namespace": (WORKS, "EPERM", "EPERM", "EPERM"),
    "inherit a descriptor": (NONE, NONE, NONE, NONE),
    "HONEST write to /tmp": (WORKS, WORKS, WORKS, "EACCES"),
    "HONEST write to TMPDIR": (WORKS, WORKS, WORKS, WORKS),
    "HONEST write to HOME": (WORKS, WORKS, WORKS, WORKS),
    "HONEST write to /dev/null": (WORKS, WORKS, WORKS, WORKS),
    "HONEST use shared memory": (WORKS, WORKS, WORKS, "EACCES"),
    "HONEST run a program": (WORKS, WORKS, WORKS, WORKS),
    "HONEST start a thread": (WORKS, WORKS, WORKS, WORKS),
    "HONEST resolve a name": (WORKS, WORKS, WORKS, WORKS),
    "HONEST read its limits": (WORKS, WORKS, WORKS, WORKS),
    "HONEST read its memory limit": (WORKS, WORKS, WORKS, WORKS),
    "HONEST write to /dev/stdout": (WORKS, WORKS, WORKS, WORKS),
    "HONEST write to /dev/stderr": (WORKS, WORKS, WORKS, WORKS),
    "HONEST tee to /dev/stdout and /dev/stderr": (WORKS, WORKS, WORKS, WORKS),
    "HONEST read standard input in an event loop": (WORKS, WORKS, WORKS, WORKS),
    "HONEST know who it is": (WORKS, WORKS, WORKS, "ENOENT"),
    "HONEST ask whoami": (WORKS, WORKS, WORKS, "CalledProcessError"),
    "HONEST run ssh": (WORKS, WORKS, WORKS, "CalledProcessError"),
    "HONEST use a terminal": (WORKS, WORKS, WORKS, "EACCES"),
    "HONEST ask for its personality": (WORKS, WORKS, WORKS, WORKS),
    "HONEST list network interfaces": (WORKS, WORKS, WORKS, WORKS),
}


@dataclass(frozen=True)
class Seen:
    profile: str
    results: dict[str, Any]
    victim_uid: int
    left_of_sysv: bool


@pytest.fixture(scope="module")
def bait(machine: Machine) -> None:
    lay(machine)


@pytest.fixture(scope="module", params=PROFILES)
def seen(request: pytest.FixtureRequest, bait: None, agent: GuestAgent) -> Seen:
    """What the probe found under one profile."""
    agent.configure(request.param)
    agent.machine.run("mkdir -p /opt/lab-disk && mount -t tmpfs -o mode=1777 none /opt/lab-disk")
    agent.deploy("probe", "probe.py")
    victim = Victim(agent)
    record = agent.run("probe", victim.described())
    left = "0x000002ab" in agent.machine.run("ipcs -m 2>/dev/null || cat /proc/sysvipc/shm") or (
        " 683 " in agent.machine.run("cat /proc/sysvipc/shm")  # 0x2AB
    )
    victim.end()
    agent.machine.run("umount /opt/lab-disk")
    agent.machine.run("ipcrm -M 0x2ab 2>/dev/null; rm -f /tmp/mine /dev/shm/mine /var/tmp/lab", check=False)
    assert record["status"] == "success", record
    return Seen(request.param, json.loads(record["output"]), int(victim.uid), left)


def test_each_attack_has_the_outcome_of_the_table(seen: Seen) -> None:
    at = PROFILES.index(seen.profile)
    found = {name: seen.results[name] for name in EXPECTED}
    assert found == {name: outcomes[at] for name, outcomes in EXPECTED.items()}


def test_it_has_no_privilege_to_lose(seen: Seen) -> None:
    assert seen.results["capabilities"] == 0
    assert seen.results["groups"] == []
    assert seen.results["no new privileges"] == 1
    if seen.profile != "off":
        assert seen.results["bounding set"] == 0


def test_each_run_has_a_user_of_its_own(seen: Seen) -> None:
    uid = seen.results["uid"]
    assert uid > 0
    if seen.profile == "off":
        assert uid == seen.victim_uid
    else:
        assert uid != seen.victim_uid
        assert uid in range(1879048192, 1879048192 + 256)


def test_nothing_of_it_meets_the_next_user_of_its_number(seen: Seen) -> None:
    assert seen.left_of_sysv is (seen.profile == "off")
    if seen.profile in ("default", "strict"):
        assert seen.results["found in /tmp"] == []


def test_the_agent_says_what_it_holds_functions_to(seen: Seen, agent: GuestAgent) -> None:
    inventory = agent.inventory()
    assert inventory.isolation == seen.profile
    held = set(inventory.enforces)
    assert held >= {"open_files", "file_size"}
    assert ("memory" in held) is (seen.profile != "off")
    assert ("network_none" in held) is (seen.profile in ("default", "strict"))
    assert ("tmp_size" in held) is (seen.profile in ("default", "strict"))
