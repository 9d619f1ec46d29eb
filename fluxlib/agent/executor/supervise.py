"""One execution under watch: its timeout, its cancel, its output cap, and what its end is called.

No thread of its own: the executor's callbacks and one shared timer thread move
it along. However it ends, ``on_end`` is called exactly once, when nothing of
its tree is alive.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fluxlib.agent.executor.base import Executor, Exit, Job, Sandbox
from fluxlib.lifecycle import Timer, Timers
from fluxlib.model import ErrorKind, ExecutionStatus


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an execution ended, in the record's terms."""

    status: ExecutionStatus
    error: str
    kind: ErrorKind
    exit: Exit


class Supervised:
    """A job with its limits of time.

    ``timeout`` is the seconds the program may run (0 = none), ``grace`` those between asking the tree to stop and
    killing it.
    """

    __slots__ = (
        "_end",
        "_executor",
        "_grace",
        "_job",
        "_kill_at",
        "_kill_timer",
        "_lock",
        "_on_end",
        "_reason",
        "_running",
        "_started_at",
        "_timeout",
        "_timeout_timer",
        "_timers",
        "_why",
    )

    def __init__(
        self,
        executor: Executor,
        timers: Timers,
        job: Job,
        timeout: float,
        grace: float,
        on_end: Callable[[Verdict], None],
    ) -> None:
        self._executor = executor
        self._timers = timers
        self._job = job
        self._timeout = timeout
        self._grace = grace
        self._on_end = on_end
        self._lock = threading.Lock()
        self._running: Sandbox | None = None
        self._started_at: float | None = None
        self._timeout_timer: Timer | None = None
        self._kill_timer: Timer | None = None
        self._kill_at: float | None = None  # by time.monotonic, once it has been asked to stop
        self._why = ErrorKind.NONE
        self._reason = ""
        self._end = False

    def start(self, on_output: Callable[[bytes], object], on_started: Callable[[int, float], None]) -> None:
        """Raises what Executor.start raises; then ``on_end`` is never called."""

        def started(pid: int, ago: float) -> None:
            self._started_at = time.monotonic() - ago
            on_started(pid, ago)

        running = self._executor.start(self._job, on_output, self._exited, started)
        with self._lock:
            self._running = running
            stopping = self._why is not ErrorKind.NONE
            if self._timeout and not self._end:
                self._timeout_timer = self._timers.after(self._timeout, self._timed_out)
        if stopping:
            self._ask_to_stop(running)

    def stop(self, why: ErrorKind, reason: str, *, grace: float | None = None) -> None:
        """End it: TERM to the tree, after the grace KILL. The first reason given is the one it ends with.

        One that is being stopped is killed sooner when ``grace`` ends before what is left of its own.
        """
        with self._lock:
            if self._end:
                return
            if self._why is not ErrorKind.NONE:
                left = self._grace if self._kill_at is None else self._kill_at - time.monotonic()
                if grace is None or grace >= left:
                    return
            else:
                self._why, self._reason = why, reason
            if grace is not None:
                self._grace = grace  # also for a start that has not returned yet
            running = self._running
        if running is not None:
            self._ask_to_stop(running)

    def _timed_out(self) -> None:
        # Counted from its own start, which a busy machine may have delayed; a start that never comes ends too.
        left = self._timeout - (time.monotonic() - self._started_at) if self._started_at is not None else 0.0
        if left > 0:
            with self._lock:
                if not self._end:
                    self._timeout_timer = self._timers.after(left, self._timed_out)
            return
        self.stop(ErrorKind.TIMEOUT, f"execution timed out after {self._timeout:g}s")

    def _ask_to_stop(self, running: Sandbox) -> None:
        with self._lock:
            if self._end:
                return
            grace, told = self._grace, self._kill_at is not None
            self._kill_at = time.monotonic() + grace
            if self._kill_timer is not None:
                self._kill_timer.cancel()
            if grace > 0:
                self._kill_timer = self._timers.after(grace, running.kill)
        if grace <= 0:
            running.kill()
        elif not told:  # to many programs a second TERM says that they should not clean up
            running.terminate()

    def _exited(self, ended: Exit) -> None:
        with self._lock:
            self._end = True
            why, reason = self._why, self._reason
            timers = (self._timeout_timer, self._kill_timer)
        for timer in timers:
            if timer is not None:
                timer.cancel()
        self._on_end(judge(ended, why, reason, self._job))


def judge(ended: Exit, why: ErrorKind, reason: str, job: Job) -> Verdict:
    """The end in words. Being told to stop outweighs how the program then went."""
    if ended.start_error and why is ErrorKind.NONE:
        kind = ErrorKind.MACHINE_FAULT if ended.host_at_fault else ErrorKind.CANNOT_START
        return Verdict(ExecutionStatus.FAILED, f"cannot start: {ended.start_error}", kind, ended)
    if why is ErrorKind.CANCELLED:
        return Verdict(ExecutionStatus.CANCELLED, reason, why, ended)
    if why is not ErrorKind.NONE:
        return Verdict(ExecutionStatus.FAILED, reason, why, ended)
    if ended.out_of_memory:
        # Also when the leader exited with 0: the kernel killed something it had started.
        limit = job.limits.memory_bytes
        words = f"out of memory: limit {limit // 1024**2} MB" if limit else "out of memory: the machine had none left"
        return Verdict(ExecutionStatus.FAILED, words, ErrorKind.OUT_OF_MEMORY, ended)
    if ended.lost:
        words = "the agent lost the process that ran it"
        return Verdict(ExecutionStatus.FAILED, words, ErrorKind.INTERNAL, ended)
    if ended.signal is not None:
        return Verdict(ExecutionStatus.FAILED, f"ended by {_signal_name(ended.signal)}", ErrorKind.SIGNAL, ended)
    if ended.exit_code:
        return Verdict(ExecutionStatus.FAILED, f"exit code {ended.exit_code}", ErrorKind.EXIT_CODE, ended)
    return Verdict(ExecutionStatus.SUCCESS, "", ErrorKind.NONE, ended)


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
