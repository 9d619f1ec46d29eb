"""How the spawner starts a program under a profile with cgroups: default, strict, minimal.

Once: this process gives up what no program may have, and takes the view of the
file system that all get. Per run: a child is born inside its cgroup and its
namespaces, lowers itself step by step, and becomes the program.

Runs inside the spawner, so it imports the standard library and its neighbours
that do the same. Everything is imported before the first child: in a child /tmp
is covered, and a frozen program's modules may lie there.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import resource
import signal
import struct
from enum import IntEnum

from fluxlib.agent.executor import mounts, syscalls
from fluxlib.agent.executor.landlock import Landlock
from fluxlib.agent.executor.seccomp import Filter, instructions

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is a tenth of this process
    from collections.abc import Iterator
    from typing import Any, NoReturn

DEFAULT, STRICT, MINIMAL = "default", "strict", "minimal"


class Step(IntEnum):
    """What a child does, in this order; a failure is told by its step."""

    CLONE = 0
    OUTPUT = 1
    SESSION = 2
    CGROUP = 3
    OUT_OF_MEMORY_SCORE = 4
    MOUNTS = 5
    CGROUP_VIEW = 6
    LIMITS = 7
    USER = 8
    LANDLOCK = 9
    CHANGE_DIRECTORY = 10
    SYSTEM_CALL_FILTER = 11
    EXEC = 12

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")


_LIMITS_OF_ALL = {
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 64 * 1024,
    resource.RLIMIT_NICE: 0,
    resource.RLIMIT_RTPRIO: 0,
    resource.RLIMIT_MSGQUEUE: 819_200,
}
# Functions go first when the machine itself has no memory left; an inherited -1000 would make their own OOM hang.
_OUT_OF_MEMORY_SCORE = b"500"


class Plan:
    """What a run needs beyond its program; travels as the tuple of its parts.

    ``code`` is relative to the programs directory. ``work`` is the work directory on disk, empty = memory
    of its own. ``trial`` takes every step but the last, to see whether this machine lets it.
    """

    __slots__ = ("code", "no_network", "tmp_bytes", "trial", "work")

    def __init__(self, code: bytes, work: bytes, tmp_bytes: int, no_network: bool, trial: bool = False) -> None:
        self.code = code
        self.work = work
        self.tmp_bytes = tmp_bytes
        self.no_network = no_network
        self.trial = trial

    def parts(self) -> tuple[bytes, bytes, int, bool, bool]:
        return self.code, self.work, self.tmp_bytes, self.no_network, self.trial


class SetUpFailed(Exception):
    """``step`` in words, and the errno of the call."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(step, number)
        self.step = step
        self.number = number


class Launcher:
    """Starts programs under one profile. Owns this process: build it once, before anything is started."""

    def __init__(self, profile: str, programs: bytes, hidden: list[bytes]) -> None:
        self._profile = profile
        self._mounts = profile != MINIMAL
        self._programs = programs
        self._failures = _Failures()
        with _step("lower the limits"):
            for which, value in _LIMITS_OF_ALL.items():
                resource.setrlimit(which, (value, value))
        with _step("give up privileges"):
            syscalls.drop_bounding_set()
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        self._atomic = syscalls.clone3_is_there()
        with _step("assemble the system call filter"):
            self._filter = Filter(instructions(syscalls.MACHINE, deny_lasting_ipc=not self._mounts))
        if self._mounts:
            with _step("make a mount namespace"):
                mounts.prepare_namespace(programs, hidden)
        else:
            os.chdir(programs)
        with _step("prepare Landlock"):
            self._landlock = Landlock(syscalls.landlock_version()) if profile != DEFAULT else None
        os.umask(0o077)
        self._namespaces = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC if self._mounts else 0

    @property
    def notes(self) -> list[str]:
        """What is done in a worse way than could be, for people."""
        if self._atomic:
            return []
        return ["clone3 is not to be had here: programs enter their cgroup just after they were forked"]

    def start(
        self,
        argv: list[bytes],
        env: dict[bytes, bytes],
        cwd: str,
        uid: int,
        rlimits: dict[int, int],
        plan: tuple[Any, ...],
        stdin: int,
        output: int,
        cgroup: int,
    ) -> tuple[int, int]:
        """(process, slot): ask ``failure_of(slot)`` when it has ended. Raises OSError when it could not be cloned."""
        slot = self._failures.take()
        planned = Plan(*plan)
        flags = self._namespaces | (syscalls.CLONE_NEWNET if planned.no_network else 0)
        try:
            pid = syscalls.clone3(flags, signal.SIGCHLD, cgroup) if self._atomic else os.fork()
        except OSError:
            self._failures.give_back(slot)
            raise
        if pid == 0:
            self._become(argv, env, cwd, uid, rlimits, planned, (stdin, output, cgroup), flags, slot)
        return pid, slot

    def failure_of(self, slot: int) -> tuple[str, int] | None:
        """(step, errno) when the child never became the program. Gives the slot back."""
        return self._failures.give_back(slot)

    def end_tree(self, cgroup: int) -> None:
        """Kill everything in the cgroup: for when the agent is gone and cannot."""
        with contextlib.suppress(OSError):
            _write("cgroup.kill", b"1", cgroup)

    def _become(
        self,
        argv: list[bytes],
        env: dict[bytes, bytes],
        cwd: str,
        uid: int,
        rlimits: dict[int, int],
        plan: Plan,
        fds: tuple[int, int, int],
        flags: int,
        slot: int,
    ) -> NoReturn:
        """The child's whole life. The order matters: each step needs what the later ones take away."""
        step = Step.OUTPUT
        try:
            stdin, output, cgroup = fds
            os.dup2(stdin, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            step = Step.SESSION
            os.setsid()
            step = Step.CGROUP
            if not self._atomic:
                _write("cgroup.procs", b"0", cgroup)
                if flags:
                    syscalls.unshare(flags)
            step = Step.OUT_OF_MEMORY_SCORE
            _write("/proc/self/oom_score_adj", _OUT_OF_MEMORY_SCORE)
            step = Step.MOUNTS
            if self._mounts:
                mounts.mount_run(plan.code, uid, plan.tmp_bytes)
            step = Step.CGROUP_VIEW
            if self._profile == STRICT:
                mounts.hide_other_cgroups()
            step = Step.LIMITS
            for which, value in rlimits.items():
                resource.setrlimit(which, (value, value))
            step = Step.USER
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            syscalls.clear_capabilities()
            # After the change of user, which clears it. A backup for when this process dies: it misses grandchildren.
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            step = Step.LANDLOCK
            if self._landlock is not None:
                self._restrict(plan)
            step = Step.CHANGE_DIRECTORY
            os.chdir(cwd)
            step = Step.SYSTEM_CALL_FILTER
            syscalls.install_filter(self._filter.program)
            step = Step.EXEC
            if plan.trial:
                os._exit(0)
            syscalls.close_range_on_exec(3)
            os.execve(argv[0], argv, env)
        except OSError as error:
            self._failures.tell(slot, step, error.errno or errno.EIO)
        except ValueError:
            # What setrlimit raises for a limit that may not be raised.
            self._failures.tell(slot, step, errno.EPERM)
        except BaseException:
            self._failures.tell(slot, step, errno.ENOTRECOVERABLE)
        os._exit(127)

    def _restrict(self, plan: Plan) -> None:
        assert self._landlock is not None
        if self._mounts:
            # Mounted anew in this child, so not the directory that was opened beforehand.
            self._landlock.restrict((mounts.CODE.encode(), mounts.CGROUPS), mounts.WRITABLE)
        else:
            code = os.path.join(self._programs, plan.code)
            self._landlock.restrict((code,), (plan.work,) if plan.work else ())


class _Failures:
    """Where children that never became a program leave the reason: memory shared with them, gone at exec.

    It costs a run nothing, where a pipe would cost it five system calls.
    """

    _ENTRY = struct.Struct("HH")

    def __init__(self, slots: int = 16_384) -> None:
        self._memory = mmap.mmap(-1, slots * self._ENTRY.size)
        self._slots = slots
        self._used = 0
        # Grows with use: every page of this process is paid for by each clone.
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._used == self._slots:
            raise OSError(errno.EAGAIN, "too many programs at a time")
        self._used += 1
        return self._used - 1

    def tell(self, slot: int, step: int, number: int) -> None:
        self._ENTRY.pack_into(self._memory, slot * self._ENTRY.size, step + 1, number)

    def give_back(self, slot: int) -> tuple[str, int] | None:
        step, number = self._ENTRY.unpack_from(self._memory, slot * self._ENTRY.size)
        self._free.append(slot)
        if not step:
            return None
        self._ENTRY.pack_into(self._memory, slot * self._ENTRY.size, 0, 0)
        return Step(step - 1).words, number


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SetUpFailed(f"{name}: {error.strerror}", error.errno or 0) from error


def _write(path: str, data: bytes, directory: int | None = None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    os.write(fd, data)
    os.close(fd)
