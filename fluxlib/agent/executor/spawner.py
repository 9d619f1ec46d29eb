"""The process that starts every program: small, single-threaded, and alone allowed to fork.

Forking from the agent would cost more the bigger it grows and would copy locks of its threads. This process imports
next to nothing, is fed over a SEQPACKET socket and answers there (``spawner_protocol``).

Without a plan (profile off) this process knows a tree by its process group and its environment, and tells an exit when
nothing of it is left. With one, a cgroup holds the tree; that is the agent's, which ends it after the exit of the first
process. It runs from source and inside the frozen program alike (``spawner_link``), so it imports only the standard
library and neighbours that do the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import marshal
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time

from fluxlib.agent.executor.child import Child
from fluxlib.agent.executor.child_signals import ends_of_children
from fluxlib.agent.executor.orphans import Orphans, kill
from fluxlib.agent.executor.spawner_protocol import MAX_FDS, MAX_MESSAGE

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is a tenth of this process
    from typing import Any

    from fluxlib.agent.executor.borrowed import Borrowed
    from fluxlib.agent.executor.launcher import Launcher

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_INTS = struct.Struct("i")
_FDS_SIZE = socket.CMSG_SPACE(MAX_FDS * _INTS.size)
_WITHOUT_PLAN = 9  # the parts of a request
_COMPANY_MS = 2  # what the news of a start waits for company
# Absent on macOS.
_CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Spawner:
    """The loop. ``launcher`` starts what has a plan, ``borrowed`` what has none."""

    def __init__(self, control: socket.socket, launcher: Launcher | None, borrowed: Borrowed | None) -> None:
        self._control = control
        self._launcher = launcher
        self._borrowed = borrowed
        # Shared with children, which become programs soon: pages that were never used cost a clone nothing.
        self._buffer = memoryview(mmap.mmap(-1, MAX_MESSAGE))
        self._running: dict[int, Child] = {}  # by process
        self._pids: dict[int, int] = {}  # process by identifier
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._starts: list[tuple[Any, ...]] = []
        self._answers: list[tuple[Any, ...]] = []
        self._orphans = Orphans(self._running)
        self._ended = ends_of_children()

    def run(self) -> None:
        """Until the agent closes its end or says stop; what still runs then is killed."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._ended, select.POLLIN)
        held = False
        while True:
            events = poller.poll(_COMPANY_MS if held else None)
            for fd, _ in events:
                if fd == self._ended:
                    os.read(fd, 4096)
                    self._reap()
                elif not self._take():
                    self._end_all()
                    return
            # Most programs are so short that their start and their end can travel together, which spares
            # the agent a wake-up. Nothing but a start may wait, and never for more than one round.
            held = not held and not self._answers and bool(self._starts and events)
            if held or not (self._starts or self._answers):
                continue
            answers = self._starts + self._answers
            self._starts, self._answers = [], []
            try:
                self._control.send(marshal.dumps(answers))
            except OSError:  # the agent died before its end could be read here
                self._end_all()
                return

    def _end_all(self) -> None:
        running = list(self._running.values())
        for child in running:
            self._kill(child, signal.SIGKILL)
        for child in running:
            if child.cgroup < 0:
                # Its children are orphans, which a sweep finds, only once it is dead. A signal takes a moment.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)
                self._orphans.sweep(child.execution_id)

    def _take(self) -> bool:
        try:
            size, ancillary, _, _ = self._control.recvmsg_into([self._buffer], _FDS_SIZE, _CLOSED_ON_EXEC)
        except ConnectionError:  # the agent died before it had read every answer
            return False
        if not size:
            return False
        fds = [
            fd
            for level, kind, data in ancillary
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
            for (fd,) in _INTS.iter_unpack(data[: len(data) - len(data) % _INTS.size])
        ]
        if not _CLOSED_ON_EXEC:
            for fd in fds:
                os.set_inheritable(fd, False)
        request = marshal.loads(self._buffer[:size])
        if request[0] == "large":
            with open(fds.pop(0), "rb", buffering=0) as file:
                request = marshal.loads(self._buffer[: file.readinto(self._buffer)])
        try:
            if request[0] == "run":
                try:
                    self._start(request, fds)
                except Exception:  # whatever it is, everybody else's programs go on
                    sys.excepthook(*sys.exc_info())  # the traceback module is a fifth of this process
                    self._answers.append(("failed", request[1], "start", errno.EIO))
            elif request[0] == "kill":
                pid = self._pids.get(request[1])
                if pid is not None:
                    self._kill(self._running[pid], request[2])
            else:
                return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _start(self, request: tuple[Any, ...], fds: list[int]) -> None:
        if len(request) > _WITHOUT_PLAN:
            self._launch(request, fds)
            return
        assert self._borrowed is not None
        _, identifier, argv, env, cwd, uid, gid, rlimits, execution_id = request
        stdin = fds[1] if len(fds) > 1 else -1
        at = time.monotonic()
        try:
            pid = self._borrowed.spawn(argv, env, cwd, uid, gid, rlimits, stdin, fds[0])
        except OSError as error:
            step = "change directory" if error.filename == cwd and cwd != argv[0] else "exec"
            self._answers.append(("failed", identifier, step, error.errno or 0))
            return
        except ValueError:  # a NUL, an = in a variable's name: one bad request must not end everybody's programs
            self._answers.append(("failed", identifier, "exec", errno.EINVAL))
            return
        self._add(Child(identifier, pid, execution_id), at)

    def _launch(self, request: tuple[Any, ...], fds: list[int]) -> None:
        """By the launcher, in the cgroup that came along."""
        assert self._launcher is not None
        _, identifier, argv, env, cwd, uid, _, rlimits, execution_id, plan = request
        output, cgroup, stdin = fds[0], fds[1], fds[2] if len(fds) > 2 else self._null
        at = time.monotonic()
        try:
            pid, slot = self._launcher.start(argv, env, cwd, uid, rlimits, plan, stdin, output, cgroup)
        except self._launcher.failed as failed:
            self._answers.append(("failed", identifier, failed.step, failed.number))
            return
        fds.remove(cgroup)  # kept, so that the tree can be ended when the agent is gone
        self._add(Child(identifier, pid, execution_id, cgroup, slot), at)

    def _add(self, child: Child, at: float) -> None:
        """``at``: from before the call, after which this process may wait while the program already runs."""
        self._running[child.pid] = child
        self._pids[child.identifier] = child.pid
        self._starts.append(("started", child.identifier, child.pid, at))

    # -- ending ------------------------------------------------------------------

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while self._reap_one() if self._launcher is None else self._reap_launched():
                pass

    def _reap_launched(self) -> bool:
        pid, status = os.waitpid(-1, os.WNOHANG)
        child = self._running.pop(pid, None)  # None: an adopted orphan
        if child is not None:
            del self._pids[child.identifier]
            failure = self._forget(child)
            if failure is not None:
                self._answers.append(("failed", child.identifier, *failure))
            else:  # its cgroup knows the seconds of all that it started
                self._answers.append(("exit", child.identifier, status, None))
        return pid != 0

    def _reap_one(self) -> bool:
        # WNOWAIT: while the leader is a zombie nobody else can get its number or its group's.
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return False
        child = self._running.get(found.si_pid)
        if child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        _, status, usage = os.wait4(found.si_pid, 0)
        if child is not None:
            del self._running[child.pid]
            del self._pids[child.identifier]
            self._orphans.sweep(child.execution_id)
            self._answers.append(("exit", child.identifier, status, usage.ru_utime + usage.ru_stime))
        return True

    def _forget(self, child: Child) -> tuple[str, int] | None:
        assert self._launcher is not None
        os.close(child.cgroup)
        return self._launcher.failure_of(child.slot)

    def _kill(self, child: Child, number: int) -> None:
        if child.cgroup >= 0:
            assert self._launcher is not None
            self._launcher.end_tree(child.cgroup)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        kill(self._orphans.of(child.execution_id), number)


def main(fd: int, arguments: list[str]) -> None:
    """Serve the socket ``fd`` until it closes. Ends the process.

    ``arguments`` are none for profile off, otherwise the profile, the programs directory and the directories
    to hide.
    """
    control = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    with contextlib.suppress(OSError, AttributeError, ValueError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
    launcher, borrowed = None, None
    if arguments:
        from fluxlib.agent.executor.launcher import Launcher, SetUpFailed

        try:
            launcher = Launcher(arguments[0], os.fsencode(arguments[1]), [os.fsencode(path) for path in arguments[2:]])
        except SetUpFailed as failed:
            control.send(marshal.dumps([("refused", failed.step, failed.number)]))
            os._exit(1)
    else:
        from fluxlib.agent.executor.borrowed import Borrowed

        _lower_this_process()
        borrowed = Borrowed()
    spawner = Spawner(control, launcher, borrowed)
    # Nothing made from here on lives in a cycle; collections would only cost.
    gc.collect()
    gc.freeze()
    gc.disable()
    with contextlib.suppress(AttributeError):  # glibc's: what the start needed goes back to the kernel
        ctypes.CDLL(None).malloc_trim(0)
    control.send(marshal.dumps([("ready", launcher.notes if launcher is not None else [])]))
    spawner.run()
    os._exit(0)


def _lower_this_process() -> None:
    os.umask(0o077)
    with contextlib.suppress(OSError, AttributeError, ValueError):
        # Not only as root: what became root from somebody else's program could not be killed, and a sweep waits for it.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
