"""What every Unix profile has in common: programs started by the spawner, output read by the reactor.

A profile says how a job is launched (``prepare``) and what its end needs
(``finish``); this class owns the threads, the pipes and the table of what runs.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxlib.agent.executor.base import Exit, Isolation, Job
from fluxlib.agent.executor.directories import WorkDirectories
from fluxlib.agent.executor.leftovers import kill_execution
from fluxlib.agent.executor.reactor import OutputPipe, Reactor
from fluxlib.agent.executor.spawner_link import SpawnerLink
from fluxlib.errors import CannotStart, InvalidInput, Stopping
from fluxlib.model import FunctionSpec

log = logging.getLogger(__name__)

_FIRST_RETRY = 0.2


@dataclass
class Launch:
    """One job as the spawner is asked for it. ``plan`` is the profile's own."""

    uid: int = -1
    gid: int = -1
    cwd: str = "/"
    rlimits: dict[int, int] = field(default_factory=dict)
    fds: tuple[int, ...] = ()  # closed after they are handed over
    plan: Any = None


class Spawned:
    """A job that runs; the RunningJob of the contract."""

    __slots__ = ("_owner", "directory", "identifier", "job", "launch", "on_exit", "on_started", "pid", "pipe")

    def __init__(self, owner: SpawningExecutor, identifier: int, job: Job, launch: Launch, pipe: OutputPipe) -> None:
        self._owner = owner
        self.identifier = identifier
        self.job = job
        self.launch = launch
        self.pipe = pipe
        self.directory = ""
        self.pid: int | None = None
        self.on_exit: Callable[[Exit], None] = lambda ended: None
        self.on_started: Callable[[int], None] | None = None

    def terminate(self) -> None:
        self._owner.signal(self, signal.SIGTERM)

    def kill(self) -> None:
        self._owner.signal(self, signal.SIGKILL)


class SpawningExecutor(ABC):
    """Executor for Unix. Subclasses are profiles."""

    def __init__(self, state_dir: Path, isolation: Isolation, *spawner_arguments: str) -> None:
        self._isolation = isolation
        self._spawner_arguments = spawner_arguments
        self._directories = WorkDirectories(state_dir / "work")
        self._lock = threading.Lock()
        self._jobs: dict[int, Spawned] = {}
        self._next = 0
        self._stopping = False
        self._idle = threading.Condition(self._lock)
        self._reactor = Reactor("programs-output")
        self._link = self._connect()
        self._reactor.start()

    @property
    def isolation(self) -> Isolation:
        return self._isolation

    @abstractmethod
    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        """See Executor.check."""

    @abstractmethod
    def prepare(self, job: Job, directory: str) -> Launch:
        """How this job is started; ``directory`` is its private work directory. Raises CannotStart."""

    @abstractmethod
    def finish(self, launch: Launch, ended: Exit, then: Callable[[Exit], None]) -> None:
        """Add what only the profile knows to the end, free what ``prepare`` took, then call ``then`` once."""

    @abstractmethod
    def work_owner(self) -> tuple[int, int]:
        """(uid, gid) of the work directory about to be made, -1 for the agent's own."""

    def check_handler(self, handler: str) -> None:
        """Raises InvalidInput for programs of another system."""
        if handler.lower().endswith((".exe", ".bat", ".cmd", ".ps1")):
            raise InvalidInput(f"handler {handler} is a Windows program, and this agent runs on Unix")

    def check_args(self, handler: str, args: tuple[str, ...]) -> None:
        if any("\0" in arg for arg in args):
            raise InvalidInput("an argument contains NUL, which no program can be given")

    def start(
        self,
        job: Job,
        on_output: Callable[[bytes], None],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int], None] | None = None,
    ) -> Spawned:
        directory = self._directories.make(job.execution_id, *self.work_owner())
        opened: list[int] = []
        launch: Launch | None = None
        try:
            launch = self.prepare(job, directory)
            output, written = os.pipe2(os.O_CLOEXEC)
            opened.append(written)
            pipe = OutputPipe(output, on_output)
            stdin = [_as_file(job.stdin)] if job.stdin else []
            opened += stdin
            with self._lock:
                if self._stopping:
                    os.close(output)
                    raise Stopping("the agent is stopping")
                self._next += 1
                spawned = Spawned(self, self._next, job, launch, pipe)
                spawned.directory, spawned.on_exit, spawned.on_started = directory, on_exit, on_started
                self._jobs[spawned.identifier] = spawned
            self._reactor.add_pipe(pipe)
            self._ask(spawned, [written, *stdin, *launch.fds])
            return spawned
        except BaseException:
            if launch is not None:
                self.finish(launch, Exit(start_error="never asked for"), lambda ended: None)
            self._directories.remove(directory)
            raise
        finally:
            for fd in opened:
                os.close(fd)
            if launch is not None:
                for fd in launch.fds:
                    os.close(fd)

    def signal(self, spawned: Spawned, number: int) -> None:
        """To the whole tree; nothing when it has ended."""
        if spawned.identifier in self._jobs:
            try:
                self._link.send(("kill", spawned.identifier, int(number)))
            except OSError:
                log.debug("the spawner is gone; what it started is being ended")

    def clean_up_former_life(self) -> int:
        return 0

    def stop(self, deadline: float) -> None:
        with self._lock:
            self._stopping = True
            left = list(self._jobs.values())
        for spawned in left:
            spawned.kill()
        with self._lock:
            self._idle.wait_for(lambda: not self._jobs, max(0.0, deadline - time.monotonic()))
        self._reactor.forget(self._link.fileno())
        self._reactor.stop(max(0.1, deadline - time.monotonic()))
        self._link.close(max(0.1, deadline - time.monotonic()))
        self._directories.stop(max(0.1, deadline - time.monotonic()))

    # -- between the spawner and the callbacks ---------------------------------------

    def _ask(self, spawned: Spawned, fds: list[int]) -> None:
        job, launch = spawned.job, spawned.launch
        request = (
            "run",
            spawned.identifier,
            [os.fsencode(word) for word in job.argv],
            {os.fsencode(name): os.fsencode(value) for name, value in self._environment(spawned).items()},
            launch.cwd,
            launch.uid,
            launch.gid,
            launch.rlimits,
            job.execution_id.encode(),
            *((launch.plan,) if launch.plan is not None else ()),
        )
        try:
            self._link.send(request, fds)
        except InvalidInput:
            self._abandon(spawned)
            raise
        except OSError as error:
            self._abandon(spawned)
            raise CannotStart(f"the spawner cannot be asked: {error}") from error

    def _environment(self, spawned: Spawned) -> dict[str, str]:
        return {"HOME": spawned.directory, "TMPDIR": "/tmp", "PWD": spawned.launch.cwd, **spawned.job.env}

    def _abandon(self, spawned: Spawned) -> None:
        with self._lock:
            self._jobs.pop(spawned.identifier, None)
            self._idle.notify_all()
        self._reactor.call(lambda: self._reactor.drain(spawned.pipe))

    def _connect(self) -> SpawnerLink:
        link = SpawnerLink(*self._spawner_arguments)
        self._reactor.watch(link.fileno(), self._on_answers)
        return link

    def _on_answers(self) -> None:
        answers = self._link.receive()
        if not answers:
            self._on_spawner_gone()
            return
        for answer in answers:
            spawned = self._jobs.get(answer[1])
            if spawned is None:
                continue
            if answer[0] == "started":
                spawned.pid = answer[2]
                if spawned.on_started is not None:
                    spawned.on_started(answer[2])
            elif answer[0] == "failed":
                self._end(spawned, Exit(start_error=explain(answer[2], answer[3], spawned.job.argv[0])))
            else:
                self._end(spawned, exit_of(answer[2], answer[3]))

    def _end(self, spawned: Spawned, ended: Exit) -> None:
        self._reactor.drain(spawned.pipe)
        self.finish(spawned.launch, ended, lambda final: self._ended(spawned, final))

    def _ended(self, spawned: Spawned, ended: Exit) -> None:
        with self._lock:
            self._jobs.pop(spawned.identifier, None)
            if not self._jobs:
                self._idle.notify_all()
        self._directories.remove(spawned.directory, lambda: self.released(spawned.launch))
        spawned.on_exit(ended)

    @abstractmethod
    def released(self, launch: Launch) -> None:
        """Nothing of the job is left, its files included: its user may be used again."""

    def _on_spawner_gone(self) -> None:
        self._reactor.forget(self._link.fileno())
        with self._lock:
            stopping, lost = self._stopping, list(self._jobs.values())
        self._link.close()
        if not stopping:
            log.error("the spawner died with %d running programs: they are ended, and it is started again", len(lost))
        for spawned in lost:
            self.end_tree(spawned)
            self._end(spawned, Exit(lost=True))
        pause = _FIRST_RETRY
        while not self._stopping:
            try:
                self._link = self._connect()
                return
            except CannotStart as error:
                log.error("%s; trying again in %.1f s", error.message, pause)
                threading.Event().wait(pause)
                pause = min(pause * 2, 5.0)

    def end_tree(self, spawned: Spawned) -> None:
        """Kill what a dead spawner left running of one job."""
        if spawned.pid is not None:
            for target in (os.killpg, os.kill):
                try:
                    target(spawned.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    continue
        kill_execution(spawned.job.execution_id)


def exit_of(status: int, cpu_seconds: float) -> Exit:
    """A wait status as the contract's Exit."""
    if os.WIFSIGNALED(status):
        return Exit(signal=os.WTERMSIG(status), cpu_seconds=cpu_seconds)
    return Exit(exit_code=os.WEXITSTATUS(status), cpu_seconds=cpu_seconds)


def explain(step: str, number: int, program: str) -> str:
    """Why a program could not be started, in words."""
    name = os.path.basename(program)
    if step == "exec":
        reasons = {
            errno.ENOENT: f"{name} is not there, or the interpreter its first line names is not on this machine",
            errno.EACCES: f"{name} may not be executed",
            errno.ENOEXEC: f"{name} is neither a program of this machine nor a script with a #! line",
            errno.E2BIG: "its arguments and environment are too large",
            errno.ETXTBSY: f"{name} is still being written",
        }
        if number in reasons:
            return f"{step}: {reasons[number]}"
    return f"{step}: {os.strerror(number)}"


def _as_file(data: bytes) -> int:
    """Standard input as a file of its own: nothing has to be fed, so nothing can block."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
