"""What every Unix profile has in common: programs started by the spawner, output read by the reactor.

A profile says how a job is launched (``prepare``) and what its end needs
(``finish``); this class owns the threads, the pipes and the table of what runs.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from fluxlib.agent.executor.base import Exit, Isolation, Job
from fluxlib.agent.executor.directories import WorkDirectories
from fluxlib.agent.executor.endings import exit_of, explain
from fluxlib.agent.executor.launch import Launch, as_file, user_name
from fluxlib.agent.executor.reactor import OutputPipe, Reactor
from fluxlib.agent.executor.spawner_link import SpawnerLink
from fluxlib.errors import CannotStart, InvalidInput, Stopping
from fluxlib.model import FunctionSpec

log = logging.getLogger(__name__)

_FIRST_RETRY = 0.2
_LAST_RETRY = 5.0
# How long a start waits for a new spawner; it takes a tenth of that.
_REPLACED_WITHIN = 5.0


class Spawned:
    """A job that runs; the RunningJob of the contract."""

    __slots__ = ("_owner", "ending", "identifier", "job", "launch", "on_exit", "on_started", "pid", "pipe", "told")

    def __init__(self, owner: SpawningExecutor, identifier: int, job: Job, launch: Launch, pipe: OutputPipe) -> None:
        self._owner = owner
        self.identifier = identifier
        self.job = job
        self.launch = launch
        self.pipe = pipe
        self.pid: int | None = None
        self.ending = False
        self.told: int | None = None  # a signal that came before the program was there
        self.on_exit: Callable[[Exit], None] = lambda ended: None
        self.on_started: Callable[[int, float], None] | None = None

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
        self._stopping = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._connected = threading.Event()
        self._retries: threading.Thread | None = None
        self._reactor = Reactor("programs-output")
        try:
            self._connect()
        except BaseException:
            self._reactor.stop(0.1)
            self._directories.stop(2.0)
            raise
        self._reactor.start()

    @property
    def isolation(self) -> Isolation:
        return self._isolation

    @abstractmethod
    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        """See Executor.check."""

    @abstractmethod
    def new_launch(self) -> Launch:
        """A launch with its user. Raises AtCapacity."""

    @abstractmethod
    def prepare(self, launch: Launch, job: Job) -> None:
        """Fill in how this job is started. Raises CannotStart; ``finish`` is called all the same."""

    @abstractmethod
    def finish(self, launch: Launch, ended: Exit, then: Callable[[Exit], None]) -> None:
        """End what is left of the tree, add what only the profile knows, free what ``prepare`` took,
        then call ``then`` once, on the reactor's thread or at once.
        """

    @abstractmethod
    def released(self, launch: Launch) -> None:
        """Nothing of the job is left, its files included: its user may be used again."""

    @abstractmethod
    def end_trees(self, lost: list[Spawned]) -> None:
        """Kill what a dead spawner left running."""

    def needs_directory(self) -> bool:
        """Whether work directories are on disk."""
        return True

    def greet(self, link: SpawnerLink) -> None:
        """Called with every new spawner before it gets work. Raises what keeps it from being used."""
        return

    def check_args(self, handler: str, args: tuple[str, ...]) -> None:
        if any("\0" in arg for arg in args):
            raise InvalidInput("an argument contains NUL, which no program can be given")

    def start(
        self,
        job: Job,
        on_output: Callable[[bytes], None],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
    ) -> Spawned:
        if not self._connected.is_set() and not self._reactor.is_here():
            self._connected.wait(_REPLACED_WITHIN)
        launch = self.new_launch()
        opened: list[int] = []
        try:
            if self.needs_directory():
                launch.directory = self._directories.make(launch.uid, launch.gid)
            self.prepare(launch, job)
            stdin = [as_file(job.stdin)] if job.stdin else []
            opened += stdin
            # The reading end is the reactor's to close: between here and there nothing may fail.
            output, written = os.pipe2(os.O_CLOEXEC)
            opened.append(written)
            # Before anybody knows of it: it is drained as soon as the spawner dies, while ``written`` is still open.
            os.set_blocking(output, False)
            pipe = OutputPipe(output, on_output)
            with self._lock:
                if self._stopping.is_set():
                    os.close(output)
                    raise Stopping("the agent is stopping")
                self._next += 1
                spawned = Spawned(self, self._next, job, launch, pipe)
                spawned.on_exit, spawned.on_started = on_exit, on_started
                self._jobs[spawned.identifier] = spawned
            self._reactor.add_pipe(pipe)
            self._ask(spawned, [written, *launch.fds, *stdin])
            return spawned
        except BaseException:
            self.finish(launch, Exit(start_error="never asked for"), lambda ended: self._clear(launch))
            raise
        finally:
            for fd in opened:
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
            if self._stopping.is_set():
                return
            self._stopping.set()
            left = list(self._jobs.values())
        for spawned in left:
            spawned.kill()
        with self._lock:
            self._idle.wait_for(lambda: not self._jobs, max(0.0, deadline - time.monotonic()))
        if self._retries is not None:
            self._retries.join(max(0.1, deadline - time.monotonic()))
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
            [os.fsencode(launch.program or job.argv[0]), *(os.fsencode(word) for word in job.argv[1:])],
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
        except (InvalidInput, OSError) as error:
            if not self._claim(spawned):
                return  # the spawner died with it: its end is told as that of all it had
            self._reactor.call(lambda: self._reactor.drain(spawned.pipe))
            self._forget(spawned)
            if isinstance(error, InvalidInput):
                raise
            raise CannotStart(f"the spawner cannot be asked: {error}") from error

    def _environment(self, spawned: Spawned) -> dict[str, str]:
        launch = spawned.launch
        user = user_name(launch.uid)
        own = {"HOME": launch.home, "USER": user, "LOGNAME": user, "TMPDIR": launch.tmp, "PWD": launch.cwd}
        return {**own, **spawned.job.env}

    def _claim(self, spawned: Spawned) -> bool:
        """Whether the caller is the one who ends it."""
        with self._lock:
            first, spawned.ending = not spawned.ending, True
        return first

    def _forget(self, spawned: Spawned) -> None:
        with self._lock:
            self._jobs.pop(spawned.identifier, None)
            if not self._jobs:
                self._idle.notify_all()

    def _clear(self, launch: Launch) -> None:
        if launch.directory:
            self._directories.remove(launch.directory, lambda: self.released(launch))
        else:
            self.released(launch)

    def _connect(self) -> None:
        link = SpawnerLink(*self._spawner_arguments)
        try:
            self.greet(link)
            with self._lock:
                if self._stopping.is_set():
                    raise Stopping("the agent is stopping")
                self._link = link
                # Before it is watched: its death is to undo this.
                self._connected.set()
                self._reactor.watch(link.fileno(), self._on_answers)
        except BaseException:
            self._connected.clear()
            self._reactor.forget(link.fileno())
            link.close()
            raise

    def _on_answers(self) -> None:
        answers = self._link.receive()
        if not answers:
            self._on_spawner_gone()
            return
        for answer in answers:
            spawned = self._jobs.get(answer[1])
            if spawned is None:
                if answer[0] == "started":
                    # Asked of this spawner by a start that its predecessor's death had already ended.
                    self._link.send(("kill", answer[1], int(signal.SIGKILL)))
                continue
            if answer[0] == "started":
                self._on_start(spawned, answer[2])
                if spawned.on_started is not None:
                    # Told late on purpose, by a clock that is the same for both processes.
                    spawned.on_started(answer[2], time.monotonic() - answer[3])
            elif answer[0] == "failed":
                self._end(
                    spawned, Exit(start_error=explain(answer[2], answer[3], spawned.job.argv[0], spawned.job.code_dir))
                )
            else:
                self._end(spawned, exit_of(answer[2], answer[3]))

    def _on_start(self, spawned: Spawned, pid: int) -> None:
        with self._lock:
            spawned.pid = pid
            told = spawned.told
        if told is not None:
            self.signal(spawned, told)

    def _end(self, spawned: Spawned, ended: Exit) -> None:
        if self._claim(spawned):
            self.finish(spawned.launch, ended, lambda final: self._ended(spawned, final))

    def _ended(self, spawned: Spawned, ended: Exit) -> None:
        # Only now: what still lived could write for ever.
        self._reactor.drain(spawned.pipe)
        self._forget(spawned)
        self._clear(spawned.launch)
        spawned.on_exit(ended)

    def _on_spawner_gone(self) -> None:
        self._connected.clear()
        self._reactor.forget(self._link.fileno())
        with self._lock:
            stopping, lost = self._stopping.is_set(), list(self._jobs.values())
        self._link.close()
        if not stopping:
            log.error("the spawner died with %d running programs: they are ended, and it is started again", len(lost))
        if lost:
            try:
                self.end_trees(lost)
            except Exception:
                log.exception("what the spawner left running cannot be ended")
        # First the new one: whoever hears of an end may start something at once.
        connected = stopping or self._reconnect()
        for spawned in lost:
            try:
                self._end(spawned, Exit(lost=True))
            except Exception:
                log.exception("the end of %s cannot be told", spawned.job.execution_id)
        if not connected:
            # Elsewhere: the ends of the lost may need this thread.
            retries = threading.Thread(target=self._retry, name="spawner-retries", daemon=True)
            with self._lock:
                if not self._stopping.is_set():
                    retries.start()
                    self._retries = retries

    def _retry(self) -> None:
        pause = _FIRST_RETRY
        while not self._stopping.wait(pause) and not self._reconnect():
            pause = min(pause * 2, _LAST_RETRY)

    def _reconnect(self) -> bool:
        try:
            self._connect()
        except Stopping:
            return True
        except CannotStart as error:
            log.error("%s; trying again", error.message)
            return False
        except Exception:
            log.exception("the spawner cannot be started; trying again")
            return False
        return True
