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
import ctypes
import errno
import os
import signal
from enum import IntEnum

from fluxlib.agent.executor import mounts, prepared, syscalls
from fluxlib.agent.executor.landlock import Landlock
from fluxlib.agent.executor.seccomp import Filter, instructions

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is a tenth of this process
    from collections.abc import Iterator
    from typing import Any, NoReturn

DEFAULT, STRICT, MINIMAL = "default", "strict", "minimal"


class Step(IntEnum):
    """What is done for a run, from OUTPUT on by the child, in this order; a failure is told by its step."""

    OUT_OF_MEMORY_SCORE = 0
    CLONE = 1
    OUTPUT = 2
    SESSION = 3
    CGROUP = 4
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


# By number, the same on both machines (asm-generic/resource.h): the module resource would be one more to clone.
_CORE, _MEMLOCK, _MSGQUEUE, _NICE, _RTPRIO = 4, 8, 12, 13, 14
_LIMITS_OF_ALL = {_CORE: 0, _MEMLOCK: 64 * 1024, _MSGQUEUE: 819_200, _NICE: 0, _RTPRIO: 0}
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

    failed = SetUpFailed

    def __init__(self, profile: str, programs: bytes, hidden: list[bytes]) -> None:
        self._profile = profile
        self._mounts = profile != MINIMAL
        self._programs = programs
        self._failures = _Failures()
        with _step("read the out-of-memory score"):
            self._score = _Expendable()
        with _step("lower the limits"):
            for which, value in _LIMITS_OF_ALL.items():
                prepared.make(prepared.limit(which, value))
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
        # What every child does alike.
        self._first = [(Step.SESSION, *prepared.new_session()), (Step.SESSION, *prepared.unblock_signals())]
        self._read_only = [(Step.MOUNTS, *call) for call in mounts.everything_read_only()]
        self._cgroup_view = [(Step.CGROUP_VIEW, *call) for call in mounts.hide_other_cgroups()]
        self._no_privileges = [
            (Step.USER, *prepared.clear_capabilities()),
            # After the change of user, which clears it. A backup for when this process dies: it misses grandchildren.
            (Step.USER, *prepared.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)),
        ]
        self._last = [
            (Step.SYSTEM_CALL_FILTER, *prepared.install_filter(self._filter.program)),
            (Step.EXEC, *prepared.close_range_on_exec(3)),
        ]

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
        """(process, slot): ask ``failure_of(slot)`` when it has ended. Raises SetUpFailed when there is none."""
        planned = Plan(*plan)
        flags = self._namespaces | (syscalls.CLONE_NEWNET if planned.no_network else 0)
        code, slot, step = -1, self._failures.take(), Step.MOUNTS
        try:
            if self._mounts:
                code = mounts.copy_of_code(planned.code)
            step = Step.EXEC
            calls = self._calls(argv, env, cwd, uid, rlimits, planned, (stdin, output, cgroup), code, flags)
            step = Step.OUT_OF_MEMORY_SCORE
            with self._score:
                step = Step.CLONE
                pid = syscalls.clone3(flags, signal.SIGCHLD, cgroup) if self._atomic else os.fork()
                if pid == 0:
                    self._become(calls, slot)
        except (OSError, ValueError) as error:
            self._failures.give_back(slot)
            raise SetUpFailed(step.words, getattr(error, "errno", None) or errno.EINVAL) from error
        finally:
            if code >= 0:
                os.close(code)
        return pid, slot

    def failure_of(self, slot: int) -> tuple[str, int] | None:
        """(step, errno) when the child never became the program. Gives the slot back."""
        return self._failures.give_back(slot)

    def end_tree(self, cgroup: int) -> None:
        """Kill everything in the cgroup: for when the agent is gone and cannot."""
        with contextlib.suppress(OSError):
            _write("cgroup.kill", b"1", cgroup)

    def _calls(
        self,
        argv: list[bytes],
        env: dict[bytes, bytes],
        cwd: str,
        uid: int,
        rlimits: dict[int, int],
        plan: Plan,
        fds: tuple[int, int, int],
        code: int,
        flags: int,
    ) -> list[tuple[Any, ...]]:
        """(step, function, arguments) of all that a child does. The order matters: each step needs what the
        later ones take away. Raises ValueError for what no program can be given.
        """
        stdin, output, cgroup = fds
        calls: list[tuple[Any, ...]] = [
            (Step.OUTPUT, *prepared.duplicate(stdin, 0)),
            (Step.OUTPUT, *prepared.duplicate(output, 1)),
            (Step.OUTPUT, *prepared.duplicate(output, 2)),
            *self._first,
        ]
        if not self._atomic:
            calls.append((Step.CGROUP, _enter, (cgroup, flags)))
        if self._mounts:
            calls += self._read_only
            calls += [(Step.MOUNTS, *call) for call in mounts.mounts_of_run(code, uid, plan.tmp_bytes)]
        if self._profile == STRICT:
            calls += self._cgroup_view
        calls += [(Step.LIMITS, *prepared.limit(which, value)) for which, value in rlimits.items()]
        calls += [(Step.USER, *call) for call in prepared.become_user(uid)]
        calls += self._no_privileges
        if self._landlock is not None:
            calls.append((Step.LANDLOCK, self._restrict, (plan,)))
        calls.append((Step.CHANGE_DIRECTORY, *prepared.change_directory(cwd)))
        calls += self._last
        if not plan.trial:
            calls.append((Step.EXEC, *prepared.execute(argv, env)))
        return calls

    def _become(self, calls: list[tuple[Any, ...]], slot: int) -> NoReturn:
        """The child's whole life."""
        step = Step.OUTPUT
        try:
            for step, function, arguments in calls:
                if function(*arguments) < 0:
                    self._failures.tell(slot, step, ctypes.get_errno())
                    os._exit(127)
            os._exit(0)  # a trial
        except OSError as error:
            self._failures.tell(slot, step, error.errno or errno.EIO)
        except BaseException:
            self._failures.tell(slot, step, errno.ENOTRECOVERABLE)
        os._exit(127)

    def _restrict(self, plan: Plan) -> int:
        assert self._landlock is not None
        if self._mounts:
            # Mounted anew in this child, so not the directory that was opened beforehand.
            self._landlock.restrict((mounts.CODE.encode(), mounts.CGROUPS), mounts.WRITABLE)
        else:
            code = os.path.join(self._programs, plan.code)
            self._landlock.restrict((code,), (plan.work,) if plan.work else ())
        return 0


class _Failures:
    """Where children that never became a program leave the reason: memory shared with them, gone at exec.

    It costs a run nothing, where a pipe would cost it five system calls.
    """

    def __init__(self, slots: int = 16_384) -> None:
        self._memory = syscalls.shared_numbers(2 * slots)  # step + 1 and errno of each
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
        self._memory[2 * slot + 1] = number
        self._memory[2 * slot] = step + 1

    def give_back(self, slot: int) -> tuple[str, int] | None:
        step = self._memory[2 * slot]
        self._free.append(slot)
        if not step:
            return None
        self._memory[2 * slot] = 0
        return Step(step - 1).words, self._memory[2 * slot + 1]


class _Expendable:
    """While entered, what this process clones is among the first to go when the machine has no memory left.

    Inherited, because a child's own score has to be looked for in /proc, which costs as much as a mount.
    """

    def __init__(self) -> None:
        self._file = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        self._own = os.pread(self._file, 16, 0)

    def __enter__(self) -> None:
        os.pwrite(self._file, _OUT_OF_MEMORY_SCORE, 0)

    def __exit__(self, *_: object) -> None:
        os.pwrite(self._file, self._own, 0)


def _enter(cgroup: int, flags: int) -> int:
    """Where there is no clone3."""
    _write("cgroup.procs", b"0", cgroup)
    if flags:
        syscalls.unshare(flags)
    return 0


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
