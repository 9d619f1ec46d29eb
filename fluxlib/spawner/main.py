"""The spawner's loop: takes requests, starts programs, reaps them, and sends what happened.

Forking from the agent would cost more the bigger it grows and would copy locks of its threads. This process has one
thread, imports next to nothing, and is alone allowed to fork.

Where there are cgroups the agent ends what a program leaves behind, through the cgroup. Elsewhere (profile off) this
process does: it knows a tree by its process group and its environment, and reports an exit when nothing of the tree is
left. It runs from source and inside the frozen program alike (``agent.executor.link``).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import marshal
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time

from fluxlib.spawner import MAX_FDS, MAX_MESSAGE, VERSION, linux
from fluxlib.spawner.sandbox import Sandbox, SetUpFailed

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is a tenth of this process
    from collections.abc import Collection
    from typing import Any

_INTS = struct.Struct("i")
_FDS_SIZE = socket.CMSG_SPACE(MAX_FDS * _INTS.size)
_START_DELAY_MS = 2  # how long the report of a start is held back for batching
_SIGSET_BYTES = 128
# Python ignores the first two, and exec would keep that; a handler it resets. Ctrl-C in a terminal goes to the whole
# foreground group, and stopping is the agent's to say.
_HANDLED = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD]
_SWEEPS = 200
_PART = 2048  # the kernel gives a file a page at a time: less than half of one is its end


class Child:
    """A running program: its first process. ``cgroup`` is its cgroup's directory, -1 when it has none.

    ``slot`` is where the sandbox finds why it did not become the program.
    """

    __slots__ = ("cgroup", "execution", "identifier", "pid", "slot")

    def __init__(self, identifier: int, pid: int, execution: bytes, cgroup: int, slot: int) -> None:
        self.identifier = identifier
        self.pid = pid
        self.execution = execution
        self.cgroup = cgroup
        self.slot = slot


class Spawner:
    """The loop."""

    def __init__(self, control: socket.socket, sandbox: Sandbox) -> None:
        self._control = control
        self._sandbox = sandbox
        # Shared with children, which become programs soon: pages that were never used cost a clone nothing.
        self._buffer = memoryview(mmap.mmap(-1, MAX_MESSAGE))
        self._running: dict[int, Child] = {}  # by process
        self._pids: dict[int, int] = {}  # process by identifier
        self._starts: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._trees = False  # whether some program has no cgroup, so that its tree is ended here
        self._orphans = Orphans(self._running)
        self._ended = ends_of_children()

    def run(self) -> None:
        """Until the agent closes its end or says stop; what still runs then is killed."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._ended, select.POLLIN)
        held = False
        while True:
            ready = poller.poll(_START_DELAY_MS if held else None)
            for fd, _ in ready:
                if fd == self._ended:
                    os.read(fd, 4096)
                    self._reap()
                elif not self._take():
                    self._end_all()
                    return
            # Most programs are so short that their start and their end can travel together, which spares
            # the agent a wake-up. Nothing but a start may wait, and never for more than one round.
            held = not held and not self._events and bool(self._starts and ready)
            if held or not (self._starts or self._events):
                continue
            events = self._starts + self._events
            self._starts, self._events = [], []
            try:
                self._control.send(marshal.dumps(events))
            except OSError:  # the agent died before its end could be read here
                self._end_all()
                return

    def _end_all(self) -> None:
        running = list(self._running.values())
        for child in running:
            self._signal(child, signal.SIGKILL)
        for child in running:
            if child.cgroup < 0:
                # Its children are orphans, which a sweep finds, only once it is dead. A signal takes a moment.
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, 0)
                self._orphans.sweep(child.execution)

    def _take(self) -> bool:
        try:
            size, ancillary, _, _ = self._control.recvmsg_into([self._buffer], _FDS_SIZE, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:  # the agent died before it had read every event
            return False
        if not size:
            return False
        fds = [
            fd
            for level, kind, data in ancillary
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
            for (fd,) in _INTS.iter_unpack(data[: len(data) - len(data) % _INTS.size])
        ]
        request = marshal.loads(self._buffer[:size])
        try:
            if request["do"] == "large":
                with open(fds.pop(0), "rb", buffering=0) as file:
                    request = marshal.loads(self._buffer[: file.readinto(self._buffer)])
            if request["do"] == "run":
                self._start(request, fds)
            elif request["do"] == "signal":
                pid = self._pids.get(request["id"])
                if pid is not None:
                    self._signal(self._running[pid], request["signal"])
            elif request["do"] == "ping":
                self._events.append({"event": "pong", "id": request["id"]})
            else:
                return False
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _start(self, request: dict[str, Any], fds: list[int]) -> None:
        identifier = request["id"]
        try:
            named = dict(zip(request["fds"], fds, strict=True))
            cgroup = named.get("cgroup", -1)
            # From before the clone, after which this process may wait while the program already runs.
            at = time.monotonic()
            pid, slot = self._sandbox.start(request, named)
        except SetUpFailed as failed:
            self._events.append({"event": "failed", "id": identifier, "step": failed.step, "errno": failed.number})
            return
        except Exception:  # whatever it is, all other programs go on
            sys.excepthook(*sys.exc_info())  # the traceback module is a fifth of this process
            self._events.append({"event": "failed", "id": identifier, "step": "start", "errno": errno.EINVAL})
            return
        if cgroup >= 0:
            fds.remove(cgroup)  # kept, so that the tree can be ended when the agent is gone
        else:
            self._trees = True
        self._running[pid] = Child(identifier, pid, request["execution"], cgroup, slot)
        self._pids[identifier] = pid
        self._starts.append({"event": "started", "id": identifier, "pid": pid, "at": at})

    # -- ending ------------------------------------------------------------------

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while self._reap_one():
                pass

    def _reap_one(self) -> bool:
        if not self._trees:
            pid, status, _ = os.wait4(-1, os.WNOHANG)
            child = self._running.get(pid)  # None: an adopted orphan
            if child is not None:
                self._ended_with(child, status, None)
            return pid != 0
        # WNOWAIT: while the leader is a zombie no other process can get its number or its group's.
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return False
        child = self._running.get(found.si_pid)
        if child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        _, status, usage = os.wait4(found.si_pid, 0)
        if child is not None:
            self._ended_with(child, status, usage.ru_utime + usage.ru_stime)
        return True

    def _ended_with(self, child: Child, status: int, seconds: float | None) -> None:
        del self._running[child.pid]
        del self._pids[child.identifier]
        if child.cgroup >= 0:
            os.close(child.cgroup)
        else:
            self._orphans.sweep(child.execution)
        failure = self._sandbox.failure_of(child.slot)
        if failure is not None:
            step, number = failure
            self._events.append({"event": "failed", "id": child.identifier, "step": step, "errno": number})
            return
        self._events.append({"event": "exit", "id": child.identifier, "status": status, "cpu_seconds": seconds})

    def _signal(self, child: Child, number: int) -> None:
        """To the program and everything it has started; in a cgroup only SIGKILL, the rest is the agent's."""
        if child.cgroup >= 0:
            with contextlib.suppress(OSError):
                fd = os.open("cgroup.kill", os.O_WRONLY | os.O_CLOEXEC, dir_fd=child.cgroup)
                os.write(fd, b"1")
                os.close(fd)
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        kill(self._orphans.of(child.execution), number)


class Orphans:
    """What left its program's process group: as a subreaper, this process becomes its parent."""

    def __init__(self, programs: dict[int, Child]) -> None:
        self._programs = programs
        self._file = f"/proc/self/task/{os.getpid()}/children"
        self._children = -1

    def of(self, execution: bytes) -> list[int]:
        """Those of this execution, or of none that still runs (their environment was wiped)."""
        adopted = [pid for pid in self._listed() if pid not in self._programs]
        if not adopted:
            return []
        running = {program.execution for program in self._programs.values()}
        return [pid for pid in adopted if (owner := _execution_of(pid)) == execution or owner not in running]

    def sweep(self, execution: bytes) -> None:
        """Kill them and wait for it. Each round's dead hand their own children over, until there are none."""
        for _ in range(_SWEEPS):
            orphans = self.of(execution)
            if not orphans:
                return
            kill(orphans, signal.SIGKILL)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _listed(self) -> list[int]:
        try:
            if self._children < 0:
                self._children = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            # From its beginning each time, which makes the kernel write it anew.
            listed = piece = os.pread(self._children, 65536, 0)
            while len(piece) >= _PART:
                piece = os.pread(self._children, 65536, len(listed))
                listed += piece
        except OSError:
            return []  # /proc is hidden: the process group has to do
        return [int(pid) for pid in listed.split()]


def kill(processes: Collection[int], number: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _execution_of(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            for item in file.read().split(b"\0"):
                if item.startswith(b"FLUX_EXECUTION_ID="):
                    return item.partition(b"=")[2]
    except OSError:
        pass
    return b""


def ends_of_children() -> int:
    """A descriptor that can be read after a child has ended. Takes this process's signals over. Raises OSError.

    By signalfd: a handler of Python's interrupts poll, writes to a pipe and is called later, at a twentieth of what
    starting a program costs. SIGCHLD is blocked from then on, also in a child until it sets its own mask.
    """
    others = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    # Also what the agent's starter made it ignore: nohup, or a script that ends a line with &.
    for number in {*_HANDLED, *(number for number in others if signal.getsignal(number) is signal.SIG_IGN)}:
        signal.signal(number, lambda *_: None)
    wanted = (ctypes.c_uint64 * (_SIGSET_BYTES // 8))(1 << (signal.SIGCHLD - 1))
    # The flags are those of open on every Linux.
    fd = int(ctypes.CDLL(None, use_errno=True).signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    return fd


def main(fd: int, arguments: list[str]) -> None:
    """Serve the socket ``fd`` until it closes. Ends the process.

    ``arguments``: the profile, the programs directory, the first of the functions' users and their number, and the
    directories to hide.
    """
    control = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    # A child gets a listening socket as descriptor 3: nothing else that it needs may have that number.
    placeholder = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    if placeholder > 3:
        os.close(placeholder)
    with contextlib.suppress(OSError):
        linux.make(linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1))
    if os.geteuid() == 0:
        os.setgroups([])
    profile, programs, first, count, *hidden = arguments
    users = range(int(first), int(first) + int(count))
    try:
        sandbox = Sandbox(profile, os.fsencode(programs), [os.fsencode(path) for path in hidden], users)
    except SetUpFailed as failed:
        control.send(marshal.dumps({"refused": failed.step, "errno": failed.number, "version": VERSION}))
        os._exit(1)
    spawner = Spawner(control, sandbox)
    # Nothing made from here on lives in a cycle; collections would only cost.
    gc.collect()
    gc.freeze()
    gc.disable()
    with contextlib.suppress(AttributeError):  # glibc's: what the start needed goes back to the kernel
        ctypes.CDLL(None).malloc_trim(0)
    control.send(marshal.dumps({"ready": VERSION, "notes": sandbox.notes}))
    spawner.run()
    os._exit(0)
