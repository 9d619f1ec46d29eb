"""Control groups (version 2): where functions run among the machine's, what one is held to, how its tree is ended, what
it used.

Under systemd the agent's unit is delegated to it:

    <unit>/agent           the agent and its spawner, moved here first: a group with members cannot give limits
    <unit>/fn/<run>        one per execution, made for it and removed after it

Without systemd the same is done below /sys/fs/cgroup/flux/<agent>; then only the agent ends what it started.

A group is never used twice: after cgroup.kill kernel 6.1 kills whatever is cloned into it. Files: Linux's
Documentation/admin-guide/cgroup-v2.rst and systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fluxlib.agent.executor import ports
from fluxlib.agent.executor.base import Figures, Limits
from fluxlib.errors import CannotStart, Unenforceable

log = logging.getLogger(__name__)

CPU_PERIOD_US = 100_000
# The kernel refuses quotas under a millisecond.
MIN_MILLICORES = 10
# Each look at the members takes as long as they are many, and everybody's timeouts may wait for this.
_TOGETHER = 64
# What functions leave to the machine at least, and what the agent with its spawner may take, in bytes.
_RESERVE = 512 * 1024**2
_AGENT_MEMORY = 1024**3
_AGENT_WEIGHT = 1000  # of a processor's time, where all executions together have 100
_PART = 2048  # the kernel gives a file a page at a time, which is some 500 processes: less than half of one is its end


class RunGroup:
    """One execution's group. ``fd`` is its directory: what it is cloned into.

    ``signal``, ``kill`` and ``close`` may be called from any thread, also after ``close``.
    """

    __slots__ = ("_lock", "fd", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        # A closed descriptor's number may be another group's by the time it is written to.
        self._lock = threading.Lock()
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def limit(self, limits: Limits) -> None:
        if limits.memory_bytes is not None:
            self._set("memory.max", limits.memory_bytes)
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                self._set("memory.swap.max", 0)
        # All or nothing: a function with one of its processes killed would go on half dead.
        self._set("memory.oom.group", 1)
        if limits.processes is not None:
            self._set("pids.max", limits.processes)
        if limits.cpu_millicores is not None:
            self._set("cpu.max", f"{limits.cpu_millicores * CPU_PERIOD_US // 1000} {CPU_PERIOD_US}")

    def processes(self) -> list[int]:
        try:
            return [int(pid) for pid in self._get("cgroup.procs").split()]
        except OSError:
            return []

    def signal(self, number: int) -> None:
        """To every process that is a member now. What is forked meanwhile may miss it."""
        with self._lock:
            if self.fd >= 0:
                self._signal(number)

    def _signal(self, number: int) -> None:
        told = self.processes()
        for first in range(0, len(told), _TOGETHER):
            opened: dict[int, int] = {}
            try:
                for pid in told[first : first + _TOGETHER]:
                    with contextlib.suppress(OSError):
                        opened[pid] = os.pidfd_open(pid)
                # The number may have become another process's before it was opened: a member still is this one.
                members = set(self.processes())
                for pid, process in opened.items():
                    if pid in members:
                        with contextlib.suppress(OSError):
                            signal.pidfd_send_signal(process, number)
            finally:
                for process in opened.values():
                    os.close(process)

    def kill(self) -> None:
        """SIGKILL to every member and to what they fork meanwhile."""
        with self._lock:
            if self.fd >= 0:
                self._kill()

    def _kill(self) -> None:
        try:
            self._set("cgroup.kill", 1)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def figures(self) -> Figures:
        """Final once the group is empty."""
        peak = seconds = None
        with contextlib.suppress(OSError):
            peak = int(self._get("memory.peak"))
        with contextlib.suppress(OSError):
            seconds = _field(self._get("cpu.stat"), b"usage_usec") / 1e6
        killed = 0
        with contextlib.suppress(OSError):
            killed = _field(self._get("memory.events"), b"oom_kill")
        return Figures(peak, seconds, killed > 0)

    def events(self) -> int:
        """A descriptor that reports (POLLPRI) when ``is_empty`` may have changed."""
        return os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)

    def wait_until_empty(self, seconds: float) -> bool:
        events = self.events()
        try:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            while not is_empty(events):
                if not poller.poll(seconds * 1000):
                    return is_empty(events)
            return True
        finally:
            os.close(events)

    def remove(self) -> bool:
        """Whether it is gone; False while it has members."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def close(self) -> None:
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1

    def _set(self, name: str, value: int | str) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)

    def _get(self, name: str) -> bytes:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            text = piece = os.read(fd, 65536)
            while len(piece) >= _PART:
                piece = os.read(fd, 65536)
                text += piece
            return text
        finally:
            os.close(fd)


def is_empty(events: int) -> bool:
    """Reads what ``RunGroup.events`` gave; a group that was removed is empty."""
    try:
        return _field(os.pread(events, 4096, 0), b"populated") == 0
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return True


def _field(text: bytes, name: bytes) -> int:
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    return 0


# -- the agent's groups ---------------------------------------------------------------------

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


@dataclass(frozen=True, slots=True)
class Machine:
    """How much there is to share out: bytes of memory, threads."""

    memory: int
    threads: int

    @classmethod
    def here(cls) -> Machine:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        kernel = Path("/proc/sys/kernel")
        return cls(memory, min(int((kernel / name).read_text()) for name in ("pid_max", "threads-max")))


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

    def set_up(self, reserve: int = 0) -> int:
        """Move this process, enable the controllers, end what the previous run left; how many executions that were.

        ``reserve`` is the memory in bytes that all executions together leave to the machine, 0 = by its size.

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
            if not (self.functions / "cgroup.kill").exists():
                raise Unenforceable(
                    "this kernel has no cgroup.kill, which Linux 5.14 brought: take a newer kernel, or set"
                    " `isolation: off` in agent.yaml for trying things out"
                )
            # A function finds its own group, to read its limits, and cannot list the others'.
            self.functions.chmod(0o711)
            self.bound(Machine.here(), reserve)
        except OSError as error:
            raise Unenforceable(f"cgroups cannot be used at {self.base}: {error}") from error
        if not (self.functions / "memory.swap.max").exists() and _has_swap():
            self.warnings.append("swap is not accounted for here (swapaccount=1): memory limits do not hold for it")
        return self._end_leftovers()

    def bound(self, machine: Machine, reserve: int) -> None:
        """Limit the sum of all executions, and the agent itself, so that neither takes the machine along.

        Executions do not swap: a machine that thrashes answers nobody.
        """
        memory = min(machine.memory, _number(self.base / "memory.max") or machine.memory)
        reserve = min(reserve or max(_RESERVE, memory // 10), memory // 2)
        _write(self.functions / "memory.max", str(memory - reserve))
        with contextlib.suppress(FileNotFoundError):  # a kernel without swap
            _write(self.functions / "memory.swap.max", "0")
        _write(self.functions / "pids.max", str(machine.threads // 2))
        if (self.base / "agent").is_dir():
            # Idle connections, for one, are memory of the agent's: systemd starts it again when they take all of this.
            _write(self.base / "agent/memory.max", str(min(max(_AGENT_MEMORY, reserve), memory // 2)))
            # It ends what runs too long, reads all output and tells Flux that it lives, whatever functions compute.
            _write(self.base / "agent/cpu.weight", str(_AGENT_WEIGHT))

    def close_ports(self, *, listen: Collection[int], connect: Collection[int]) -> None:
        """Keep these ports from all executions; a warning where that cannot be done."""
        try:
            group = os.open(self.functions, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                ports.close_ports(group, listen=listen, connect=connect)
            finally:
                os.close(group)
        except OSError as error:
            self.warnings.append(
                f"functions can listen on ports {', '.join(map(str, sorted(listen)))} of this machine while nobody"
                f" else does, and connect to the agent's: BPF programs of cgroups cannot be used ({error.strerror})"
            )

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
                log.error("what the previous run left in %s cannot be killed", group.path)
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


def _number(path: Path) -> int:
    """0 when it says ``max`` or is not there."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdigit() else 0


def _has_swap() -> bool:
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False
