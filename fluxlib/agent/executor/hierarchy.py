"""Where functions run among the machine's control groups, version 2.

Under systemd the agent's unit is delegated to it:

    <unit>/agent           the agent and its spawner, moved here first: a group with members cannot give limits
    <unit>/fn/<run>        one per execution, made for it and removed after it

Without systemd the same is done below /sys/fs/cgroup/flux/<agent>; then nothing
but the agent ends what it started.

Rules: Linux's Documentation/admin-guide/cgroup-v2.rst and systemd's
CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from fluxlib.agent.executor.base import Limits
from fluxlib.agent.executor.cgroup import RunGroup
from fluxlib.errors import CannotStart, Unenforceable

log = logging.getLogger(__name__)

ROOT = Path("/sys/fs/cgroup")
CONTROLLERS = ("cpu", "memory", "pids")
_DELEGATED = "user.delegate"


def own_group(root: Path = ROOT, membership: Path = Path("/proc/self/cgroup")) -> Path | None:
    """This process's group in the unified hierarchy, None when there is none."""
    if not (root / "cgroup.controllers").exists():
        return None
    for line in membership.read_text().splitlines():
        if line.startswith("0::"):
            return root / line[3:].lstrip("/")
    return None


def is_delegated(group: Path) -> bool:
    """Whether systemd leaves this group to us: otherwise it takes limits away at the next daemon-reload."""
    try:
        return os.getxattr(group, _DELEGATED) == b"1"
    except OSError:
        return False


class Hierarchy:
    """The groups of one agent. ``base`` is delegated to it, or below /sys/fs/cgroup/flux."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.functions = base / "fn"
        self._functions = os.fspath(self.functions)
        self.warnings: list[str] = []

    @classmethod
    def find(cls, agent_id: str, root: Path = ROOT, *, systemd: bool | None = None) -> Hierarchy:
        """Raises Unenforceable when this machine offers no place."""
        group = own_group(root)
        if group is None:
            raise Unenforceable(
                "this machine has no cgroup v2 at /sys/fs/cgroup: boot with systemd.unified_cgroup_hierarchy=1,"
                " or set `isolation: off` in agent.yaml for trying things out"
            )
        for candidate in (group, group.parent):
            # The parent: this process was moved below it before it was executed again.
            if is_delegated(candidate) and (candidate == group or group.name == "agent"):
                return cls(candidate)
        if Path("/run/systemd/system").is_dir() if systemd is None else systemd:
            raise Unenforceable(
                f"the cgroup {group} is not delegated, so systemd would take functions' limits away:"
                " put `Delegate=cpu memory pids` into the agent's unit, or start it by"
                " `systemd-run -p Delegate='cpu memory pids' …`"
            )
        return cls(root / "flux" / agent_id)

    def set_up(self) -> int:
        """Move this process, enable the controllers, end what an earlier life left; how many runs that were.

        Raises Unenforceable with what is missing.
        """
        delegated = is_delegated(self.base)
        try:
            self.base.mkdir(parents=True, exist_ok=True)
            if delegated:
                (self.base / "agent").mkdir(exist_ok=True)
                _write(self.base / "agent/cgroup.procs", "0")
            else:
                for above in reversed([parent for parent in self.base.parents if _is_group(parent)]):
                    _enable(above)
            self._check_controllers()
            _enable(self.base)
            self.functions.mkdir(exist_ok=True)
            _enable(self.functions)
            # A function finds its own group, to read its limits, and cannot list the others'.
            self.functions.chmod(0o711)
        except OSError as error:
            raise Unenforceable(f"cgroups cannot be used at {self.base}: {error}") from error
        if not (self.functions / "memory.swap.max").exists() and _has_swap():
            self.warnings.append("swap is not accounted for here (swapaccount=1): memory limits do not hold for it")
        return self._end_leftovers()

    def _check_controllers(self) -> None:
        there = (self.base / "cgroup.controllers").read_text().split()
        missing = [name for name in CONTROLLERS if name not in there]
        if missing:
            raise Unenforceable(
                f"the cgroup {self.base} lacks the controllers {', '.join(missing)}: put"
                f" `Delegate={' '.join(CONTROLLERS)}` into the agent's unit, and enable them in what lies above"
            )

    def _end_leftovers(self) -> int:
        left = [RunGroup(os.fspath(entry)) for entry in self.functions.iterdir() if entry.is_dir()]
        for group in left:
            group.kill()
        ended = 0
        for group in left:
            if group.wait_until_empty(5.0):
                group.remove()
                ended += 1
            else:
                log.error("what an earlier life left in %s cannot be killed", group.path)
            group.close()
        return ended

    def make(self, name: str, limits: Limits) -> RunGroup:
        """A new group with its limits in force. Raises CannotStart."""
        path = f"{self._functions}/{name}"
        try:
            os.mkdir(path)
        except OSError as error:
            raise CannotStart(f"cgroup: {path}: {error.strerror}") from error
        try:
            group = RunGroup(path)
        except OSError as error:
            # Nobody else removes it before the next start, and until then its name is taken.
            os.rmdir(path)
            raise CannotStart(f"cgroup: {path}: {error.strerror}") from error
        try:
            os.fchmod(group.fd, 0o755)  # the agent's umask leaves it to root alone
            group.limit(limits)
        except OSError as error:
            group.remove()
            group.close()
            raise CannotStart(f"cgroup: limits of {path}: {error.strerror}") from error
        return group


def _is_group(path: Path) -> bool:
    return (path / "cgroup.controllers").exists()


def _enable(group: Path) -> None:
    _write(group / "cgroup.subtree_control", " ".join(f"+{name}" for name in CONTROLLERS))


def _write(path: Path, text: str) -> None:
    # Not write_text: cgroup files know no truncation, and one write is one command.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _has_swap() -> bool:
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False
