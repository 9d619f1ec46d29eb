"""A machine that cannot do what the profile promises: the agent does not start, and says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.machine import Machine
from tests.support.programs import wait_until
from tests.vm.rig import GuestAgent

_RANGE_FIRST = 1879048192
_DROP_IN = "/etc/systemd/system/flux-agent.service.d/poorer.conf"


@contextmanager
def _poorer(machine: Machine, line: str) -> Iterator[None]:
    """The unit with one line changed."""
    machine.write(_DROP_IN, f"[Service]\n{line}\n")
    machine.run("systemctl daemon-reload")
    try:
        yield
    finally:
        machine.run(f"rm {_DROP_IN}; systemctl daemon-reload; systemctl stop flux-agent")


def _refuses(agent: GuestAgent, isolation: str, words: str) -> None:
    agent.configure(isolation, wait=False)
    journal = "journalctl -u flux-agent -o cat -n 30 --no-pager"
    wait_until(lambda: words in agent.machine.run(journal), f"the refusal: {words}", 60)


def test_users_that_are_somebody(agent: GuestAgent) -> None:
    agent.machine.run(f"useradd --no-create-home --uid {_RANGE_FIRST + 7} intruder")
    try:
        _refuses(agent, "default", f"overlaps the user intruder ({_RANGE_FIRST + 7}): choose another `uid_range`")
    finally:
        agent.machine.run("userdel intruder; systemctl stop flux-agent")


def test_a_unit_without_delegation(agent: GuestAgent) -> None:
    with _poorer(agent.machine, "Delegate=no"):
        _refuses(agent, "default", "put `Delegate=cpu memory pids` into the agent's unit")


def test_a_unit_without_namespaces_has_minimal(agent: GuestAgent) -> None:
    with _poorer(agent.machine, "CapabilityBoundingSet=~CAP_SYS_ADMIN"):
        words = "CAP_SYS_ADMIN is missing, so there are no namespaces: grant it, or choose `isolation: minimal`"
        _refuses(agent, "default", words)
        agent.configure("minimal")
        agent.deploy("hog", "hog.py")
        assert agent.run("hog", "network")["status"] == "success"


def test_a_unit_that_hides_clone3(agent: GuestAgent) -> None:
    with _poorer(agent.machine, "RestrictNamespaces=ipc mnt pid uts net cgroup"):
        _refuses(
            agent, "default", "(clone3): Function not implemented: take RestrictNamespaces= out of the agent's unit"
        )
