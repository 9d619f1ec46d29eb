"""Windows: every execution in a Job Object of its own.

One thread waits at one completion port for what programs write and for what
happens in their jobs. Microsoft does not promise that a job's notices arrive
("delivery of messages to the completion port is not guaranteed"), so whatever
runs is also looked at every half second.
"""

from __future__ import annotations

import contextlib
import logging
import msvcrt
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

from fluxlib.agent.executor import windows_commands as commands
from fluxlib.agent.executor.base import Exit, Figures, Isolation, Job, Limits
from fluxlib.agent.executor.directories import WorkDirectories
from fluxlib.config.agent import AgentConfig
from fluxlib.config.environment import windows_basics
from fluxlib.errors import CannotStart, Stopping
from fluxlib.model import FunctionSpec, WorkingDirectory

assert sys.platform == "win32"

from fluxlib.agent.executor import winapi
from fluxlib.agent.executor.jobobject import JobObject, exit_code
from fluxlib.agent.executor.windows_job import WindowsJob
from fluxlib.agent.executor.windows_process import (
    CompletionPort,
    NotStarted,
    OutputPipe,
    create_suspended,
    inheritable_copy,
    open_nul,
)
from fluxlib.agent.executor.windows_profile import check_limits, probe

log = logging.getLogger(__name__)

_LOOK_EVERY = 0.5
# A program outside the job may hold the output open (one started through a service): it is not waited for.
_LINGER = 1.0
# When a console window is closed its programs are ended newest first, the agent last: its
# own stop must have the chance to say why they ended.
_CONSOLE_GOODBYE = 1.0
_PIPE_NOTICE = 1  # the lowest bit of a key: from the pipe, not from the job


class WindowsExecutor:
    """See the module. Profiles: ``default``, and ``off`` (the jobs without their limits)."""

    def __init__(self, config: AgentConfig, state_dir: Path) -> None:
        self._isolation = probe(config.isolation)
        # Inherited by every program: a missing DLL is an exit code, not a dialog on nobody's screen.
        winapi.SetErrorMode(winapi.SEM_FAILCRITICALERRORS | winapi.SEM_NOGPFAULTERRORBOX)
        self._wine = winapi.is_wine()
        self._port = CompletionPort()
        # With a console programs share it and CTRL_BREAK asks their group to stop; a service has none to share.
        self.console = winapi.has_console()
        self._flags = winapi.CREATE_NEW_PROCESS_GROUP | (0 if self.console else winapi.CREATE_NO_WINDOW)
        self._state_dir = state_dir
        self._basics = windows_basics()
        self._directories = WorkDirectories(state_dir / "work")
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._jobs: dict[int, WindowsJob] = {}
        self._given_up: dict[int, OutputPipe] = {}  # their last read is still on its way
        self._calls: deque[Callable[[], None]] = deque()
        self._next = 0
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="programs", daemon=True)
        self._thread.start()

    @property
    def isolation(self) -> Isolation:
        return self._isolation

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        commands.check_handler(spec.handler)
        return check_limits(self._isolation, spec)

    def check_args(self, handler: str, args: tuple[str, ...]) -> None:
        commands.check_arguments(handler, args)

    @property
    def problem(self) -> str:
        return ""

    def create(self, job: Job) -> WindowsJob:
        return self._reserve(job, keep=True)

    def start(
        self,
        job: Job,
        on_output: Callable[[bytes], object],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
        on_error_output: Callable[[bytes], object] | None = None,
    ) -> WindowsJob:
        run = self._reserve(job, keep=False)
        run.invoke(job, on_output, on_exit, on_started, on_error_output)
        return run

    def _reserve(self, job: Job, *, keep: bool) -> WindowsJob:
        with self._lock:
            if self._stopping:
                raise Stopping("the agent is stopping")
            self._next += 1
            identifier = self._next
        return WindowsJob(self, identifier, job, self._directories.make(-1, -1), keep=keep)

    def invoke(
        self,
        run: WindowsJob,
        on_output: Callable[[bytes], object],
        on_started: Callable[[int, float], None] | None,
    ) -> None:
        """See Sandbox.invoke. Both outputs are one here, and a sandbox takes one invocation."""
        try:
            program, line = commands.command_line(run.job.argv, self._basics["SystemRoot"])
            self._create(run, program, line, on_output)
        except NotStarted as error:
            run.start_error = str(error)
            self._abandon(run)
            self._add(run)
            self._call(lambda: self._finish(run))
        except OSError as error:
            self._abandon(run)
            raise CannotStart(f"the program cannot be started: {error}") from error
        except BaseException:
            self._abandon(run)
            raise
        else:
            self._begin(run, on_started)

    def destroy(self, run: WindowsJob) -> None:
        run.keep = False
        if run.identifier in self._jobs:
            run.kill()
        else:
            self._directories.remove(run.directory)

    def ask_to_stop(self, run: WindowsJob) -> None:
        """CTRL_BREAK to its process group; without a console there is nothing to ask with, so it is ended."""
        run.asked_to_stop = True
        if self.console:
            with run.lock:
                if run.process is None or run.leader_ended:
                    return
                # The handle is open, so the number is still this process's.
                with contextlib.suppress(OSError):
                    winapi.GenerateConsoleCtrlEvent(winapi.CTRL_BREAK_EVENT, run.pid)
                    return
        run.end_tree()

    def recover_previous_run(self, execution_ids: Collection[str]) -> int:
        """Nothing to do: the jobs' handles died with that process, and the jobs with their handles."""
        return 0

    def stop(self, deadline: float) -> None:
        with self._lock:
            self._stopping = True
            left = list(self._jobs.values())
        for run in left:
            run.kill()
        with self._lock:
            self._idle.wait_for(lambda: not self._jobs, max(0.0, deadline - time.monotonic()))
        self._ended = True
        self._port.wake()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        if not self._thread.is_alive():
            self._port.close()
        self._directories.stop(max(0.1, deadline - time.monotonic()))

    # -- starting one --------------------------------------------------------------------

    def _create(self, run: WindowsJob, program: str, line: str, on_output: Callable[[bytes], object]) -> None:
        """The job, the pipe and the suspended process inside it. Raises OSError; the caller abandons then."""
        job = run.job
        limits = Limits() if self._isolation.profile == "off" else job.limits
        key = run.identifier << 1
        run.object = JobObject(limits, self._port.handle, key)
        run.pipe = OutputPipe(self._port.handle, key | _PIPE_NOTICE, on_output)
        stdin = self._standard_input(job)
        try:
            cwd = run.directory if job.working_directory is WorkingDirectory.WORK else os.fspath(job.code_dir)
            block = commands.environment_block(self._environment(run))
            assert run.pipe.writer is not None
            run.process = create_suspended(program, line, block, cwd, stdin, run.pipe.writer, self._flags)
        finally:
            winapi.CloseHandle(stdin)
            run.pipe.close_writer()
        run.pid = run.process.pid
        run.object.assign(run.process.handle)

    def _begin(self, run: WindowsJob, on_started: Callable[[int, float], None] | None) -> None:
        assert run.process is not None
        assert run.pipe is not None
        assert run.pid is not None
        self._add(run)
        if on_started is not None:
            on_started(run.pid, 0.0)  # before it runs, so that no end can be told before
        run.pipe.read()
        with run.lock:
            try:
                if run.process is not None:
                    run.process.resume()
            except OSError as error:
                run.start_error = f"resume: {error}"
        if run.start_error:
            run.end_tree()

    def _environment(self, run: WindowsJob) -> dict[str, str]:
        own = ("TEMP", "TMP", "HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA")
        return commands.merge_environments(self._basics, dict.fromkeys(own, run.directory), run.job.env)

    def _standard_input(self, job: Job) -> int:
        """A file nobody has to feed; it is gone when the last handle of it is closed."""
        if not job.stdin:
            return open_nul()
        path = self._state_dir / "work" / f"{job.execution_id}.stdin"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_BINARY | os.O_TEMPORARY | os.O_NOINHERIT
        with os.fdopen(os.open(path, flags), "w+b") as file:
            file.write(job.stdin)
            file.seek(0)
            return inheritable_copy(msvcrt.get_osfhandle(file.fileno()))

    def _abandon(self, run: WindowsJob) -> None:
        """Nothing has run: close what was made. A suspended process dies with its job, or by hand outside it."""
        if run.process is not None:
            with contextlib.suppress(OSError):
                winapi.TerminateProcess(run.process.handle, 1)
        run.close()
        if run.pipe is not None:
            run.pipe.close()
            run.pipe = None
        if not run.keep:
            self._directories.remove(run.directory)

    def _add(self, run: WindowsJob) -> None:
        with self._lock:
            self._jobs[run.identifier] = run
            stopping = self._stopping
        if stopping:
            run.kill()

    # -- the thread ------------------------------------------------------------------------

    def _call(self, function: Callable[[], None]) -> None:
        self._calls.append(function)
        self._port.wake()

    def _run(self) -> None:
        look_at = time.monotonic() + _LOOK_EVERY
        while not self._ended:
            notice = self._port.wait(max(0, int((look_at - time.monotonic()) * 1000) + 1))
            try:
                if notice is not None:
                    self._on_notice(*notice)
                while self._calls:
                    self._calls.popleft()()
                if time.monotonic() >= look_at:
                    look_at = time.monotonic() + _LOOK_EVERY
                    for run in list(self._jobs.values()):
                        self._look(run)
            except Exception:
                log.exception("handling what a program did failed")

    def _on_notice(self, key: int, succeeded: bool, number: int, address: int) -> None:
        run = self._jobs.get(key >> 1)
        if key & _PIPE_NOTICE:
            pipe = self._given_up.pop(key >> 1, None)
            if pipe is not None:
                pipe.close()
            elif run is not None and run.pipe is not None:
                run.pipe.completed(succeeded, number)
                self._advance(run)
        elif run is not None and run.process is not None:
            if number in (winapi.JOB_OBJECT_MSG_EXIT_PROCESS, winapi.JOB_OBJECT_MSG_ABNORMAL_EXIT_PROCESS):
                if address == run.pid:
                    self._leader_ended(run)
            elif number == winapi.JOB_OBJECT_MSG_JOB_MEMORY_LIMIT:
                run.memory_refused = True
            elif number == winapi.JOB_OBJECT_MSG_ACTIVE_PROCESS_ZERO:
                run.dead_at = run.dead_at or time.monotonic()
            self._advance(run)

    def _look(self, run: WindowsJob) -> None:
        """What a lost notice would have told."""
        if run.process is None or run.object is None:
            return
        if run.process.ended():
            self._leader_ended(run)
        if run.leader_ended and not run.object.usage().active:
            run.dead_at = run.dead_at or time.monotonic()
        self._advance(run)

    def _leader_ended(self, run: WindowsJob) -> None:
        if not run.leader_ended:
            run.leader_ended = True
            run.end_tree()  # what it left behind

    def _advance(self, run: WindowsJob) -> None:
        if run.dead_at is None or run.process is None or run.pipe is None:
            return
        now = time.monotonic()
        if not run.pipe.ended and now < run.dead_at + _LINGER:
            return
        if not run.hold_until:
            code = exit_code(run.process.handle) if run.process.ended(5.0) else None
            by_console = self.console and code == winapi.STATUS_CONTROL_C_EXIT and not run.asked_to_stop
            run.hold_until = now + _CONSOLE_GOODBYE if by_console else now
        if run.asked_to_stop or now >= run.hold_until:
            self._finish(run)

    def _finish(self, run: WindowsJob) -> None:
        ended = self._exit_of(run)
        run.used = Figures(ended.peak_memory_bytes, ended.cpu_seconds, ended.out_of_memory)
        run.close()
        if run.pipe is not None and run.pipe.pending:
            self._given_up[run.identifier] = run.pipe
            run.pipe.cancel()
        elif run.pipe is not None:
            run.pipe.close()
        if not run.keep:
            self._directories.remove(run.directory)
        try:
            run.on_exit(ended)
        finally:
            with self._lock:
                # Last, so that a shutdown that waits for every end has been told of it.
                del self._jobs[run.identifier]
                if not self._jobs:
                    self._idle.notify_all()

    def _exit_of(self, run: WindowsJob) -> Exit:
        if run.process is None or run.object is None or run.start_error:
            return Exit(start_error=run.start_error or "create process: it was never made")
        code = exit_code(run.process.handle)
        try:
            usage = None if self._wine else run.object.usage()  # Wine keeps no figures of jobs
        except OSError as error:
            log.warning("the memory and CPU time of %s cannot be read: %s", run.job.execution_id, error)
            usage = None
        # Windows refuses memory and lets the program go on: only one that then failed ran out of it.
        return Exit(
            exit_code=code,
            out_of_memory=run.memory_refused and code != 0,
            peak_memory_bytes=usage.peak_memory_bytes if usage else None,
            cpu_seconds=usage.cpu_seconds if usage else None,
        )
