"""Executions on this agent: their slots, their states, and how each ends.

Requests come from any transport: a unary call, the multiplexed stream, a test.
``Executions.start`` answers through a callback, so that no thread waits for a program.

An execution ID runs once, also across restarts of the agent: a repeated request
gets the answer that is known.

Locks: the table's first, then one execution's. Callbacks and the executor are called under neither.
"""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from fluxlib.agent.executor.base import Executor, Exit, Job, Limits, Sandbox
from fluxlib.agent.packages import Installed, Packages
from fluxlib.agent.records import Records, new_record
from fluxlib.errors import (
    AtCapacity,
    CannotStart,
    Conflict,
    FluxError,
    Internal,
    InvalidInput,
    NotFound,
    Stopping,
    StoreUnavailable,
    Unenforceable,
)
from fluxlib.lifecycle import Timer, Timers
from fluxlib.model import (
    EXECUTION_ID,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    FunctionSpec,
    Phase,
    kind_of,
)

log = logging.getLogger(__name__)

_MB = 1024 * 1024
# What an answer may carry beside its record: a legacy Flux's limit is 50 MiB with everything around it.
_SENDABLE = 50 * _MB - 256 * 1024

Answer = Callable[[ExecutionRecord], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What agent.yaml says about executions."""

    agent_id: str
    max_tasks: int
    kill_grace: float
    defaults: Limits
    environment: dict[str, str]  # the same for every function on this node
    timeout: float = 0.0  # the most that an execution gets, 0 = no such limit


class State(Enum):
    """ENDED is final; every other state may become STOPPING, which leads to ENDED alone."""

    ACCEPTED = "accepted"  # its ID is taken; it may still be rejected
    STARTING = "starting"  # the executor was asked for the program
    RUNNING = "running"
    STOPPING = "stopping"  # also before there is a program: it is stopped as soon as there is one
    ENDED = "ended"  # nothing of its process tree is alive


class Execution:
    """One execution, from the moment its ID is taken until its end was announced.

    It owns its record, its sandbox, its deadline and its kill timer, and ``lock`` guards all of them. ``grace`` is the
    seconds between asking the process tree to stop and killing it. ``on_end`` is called once with the final record,
    ``on_start`` when the program has started.
    """

    __slots__ = (
        *("_deadline", "_executor", "_grace", "_job", "_kill_at", "_kill_timer", "_on_end", "_on_start", "_sandbox"),
        *("_started_at", "_stop_kind", "_stop_reason", "_timeout", "_timers", "installed", "listeners", "lock"),
        *("owner", "record", "recorded", "state"),
    )

    def __init__(
        self,
        record: ExecutionRecord,
        executor: Executor,
        timers: Timers,
        grace: float,
        on_start: Callable[[Execution], object],
        on_end: Callable[[Execution, ExecutionRecord], object],
        owner: str = "",
    ) -> None:
        self.lock = threading.Lock()
        self.state = State.ACCEPTED
        self.record = record
        self.recorded = False  # the store was told of it
        self.owner = owner
        self.listeners: list[tuple[str, Answer]] = []  # with the owner each belongs to
        self.installed: Installed | None = None  # set while it has a slot
        self._executor = executor
        self._timers = timers
        self._on_start = on_start
        self._on_end = on_end
        self._job: Job | None = None
        self._sandbox: Sandbox | None = None
        self._timeout = 0.0
        self._started_at: float | None = None  # by time.monotonic
        self._deadline: Timer | None = None
        self._grace = grace
        self._kill_timer: Timer | None = None
        self._kill_at: float | None = None  # by time.monotonic, once its process tree was asked to stop
        self._stop_kind = ErrorKind.NONE
        self._stop_reason = ""

    def launch(self, job: Job, timeout: float, on_output: Callable[[bytes], object]) -> None:
        """``timeout`` is the seconds the program may run, 0 = no limit.

        Raises what Executor.start raises; then ``on_end`` is never called.
        """
        with self.lock:
            self._job, self._timeout = job, timeout
            if self.state is State.ACCEPTED:
                self.state = State.STARTING
        sandbox = self._executor.start(job, on_output, self._exited, self._started)
        with self.lock:
            self._sandbox = sandbox
            stopping = self.state is State.STOPPING
            if timeout and self.state is not State.ENDED:
                self._deadline = self._timers.after(timeout, self._timed_out)
        if stopping:
            self._end_tree(sandbox)

    def stop(self, kind: ErrorKind, reason: str, *, grace: float | None = None) -> None:
        """SIGTERM to its process tree, SIGKILL after the grace. The first reason given is the one it ends with.

        One that is stopping already is killed sooner when ``grace`` ends before its own.
        """
        with self.lock:
            if self.state is State.ENDED:
                return
            if self.state is State.STOPPING:
                left = self._grace if self._kill_at is None else self._kill_at - time.monotonic()
                if grace is None or grace >= left:
                    return
            else:
                self.state = State.STOPPING
                self._stop_kind, self._stop_reason = kind, reason
            if grace is not None:
                self._grace = grace
            sandbox = self._sandbox
        if sandbox is not None:
            self._end_tree(sandbox)

    def _started(self, pid: int, ago: float) -> None:
        at = time.time() - ago
        with self.lock:
            if self.state is State.STARTING:
                self.state = State.RUNNING
            self._started_at = time.monotonic() - ago
            queue_ms = int((at - self.record.started_at) * 1000)
            self.record = replace(self.record, run_started_at=at, queue_ms=queue_ms)
        self._on_start(self)

    def _timed_out(self) -> None:
        # Counted from the program's own start, which a busy machine may have delayed.
        left = self._timeout - (time.monotonic() - self._started_at) if self._started_at is not None else 0.0
        if left > 0:
            with self.lock:
                if self.state is not State.ENDED:
                    self._deadline = self._timers.after(left, self._timed_out)
            return
        self.stop(ErrorKind.TIMEOUT, f"execution timed out after {self._timeout:g}s")

    def _end_tree(self, sandbox: Sandbox) -> None:
        with self.lock:
            if self.state is State.ENDED:
                return
            grace, asked = self._grace, self._kill_at is not None
            self._kill_at = time.monotonic() + grace
            if self._kill_timer is not None:
                self._kill_timer.cancel()
            if grace > 0:
                self._kill_timer = self._timers.after(grace, sandbox.kill)
        if grace <= 0:
            sandbox.kill()
        elif not asked:  # to many programs a second SIGTERM says that they should not clean up
            sandbox.terminate()

    def _exited(self, ended: Exit) -> None:
        with self.lock:
            self.state = State.ENDED
            record = self._final_record(ended)
            timers = (self._deadline, self._kill_timer)
        for timer in timers:
            if timer is not None:
                timer.cancel()
        self._on_end(self, record)

    def _final_record(self, ended: Exit) -> ExecutionRecord:
        status, error, kind = self._outcome(ended)
        now = time.time()
        began = self.record.run_started_at or self.record.started_at
        return replace(
            self.record,
            status=status,
            phase=Phase.ENDED,
            error=error,
            error_kind=kind,
            exit_code=ended.exit_code,
            signal=ended.signal,
            duration_ms=int((now - began) * 1000),
            status_at=now,
            peak_memory_bytes=ended.peak_memory_bytes,
            cpu_seconds=ended.cpu_seconds,
        )

    def _outcome(self, ended: Exit) -> tuple[ExecutionStatus, str, ErrorKind]:
        """Status, error and kind. A stop outweighs how the program then ended."""
        failed = ExecutionStatus.FAILED
        if self._stop_kind is ErrorKind.CANCELLED:
            return ExecutionStatus.CANCELLED, self._stop_reason, ErrorKind.CANCELLED
        if self._stop_kind is not ErrorKind.NONE:
            return failed, self._stop_reason, self._stop_kind
        if ended.start_error:
            kind = ErrorKind.MACHINE_FAULT if ended.host_at_fault else ErrorKind.CANNOT_START
            return failed, f"cannot start: {ended.start_error}", kind
        if ended.out_of_memory:
            # Also when the first process exited with 0: the kernel killed something it had started.
            limit = self._job.limits.memory_bytes if self._job is not None else None
            why = f"limit {limit // 1024**2} MB" if limit else "the machine had none left"
            return failed, f"out of memory: {why}", ErrorKind.OUT_OF_MEMORY
        if ended.lost:
            return failed, "internal error: the spawner died while this execution was running", ErrorKind.INTERNAL
        if ended.signal is not None:
            return failed, f"ended by {_signal_name(ended.signal)}", ErrorKind.SIGNAL
        if ended.exit_code:
            return failed, f"exit code {ended.exit_code}", ErrorKind.EXIT_CODE
        return ExecutionStatus.SUCCESS, "", ErrorKind.NONE


class Executions:
    """The running executions and their slots. Safe from any thread."""

    def __init__(
        self, settings: Settings, packages: Packages, records: Records, executor: Executor, timers: Timers
    ) -> None:
        self._settings = settings
        self._packages = packages
        self._records = records
        self._executor = executor
        self._timers = timers
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._announcing: list[tuple[str, list[str]]] = []  # out of the table: execution ID, owners still to be told
        self._executions: dict[str, Execution] = {}
        self._slots: Counter[str] = Counter()
        self._taken = 0
        self._stopping = False
        self._on_freed: list[Callable[[str], None]] = []
        self._anonymous = itertools.count(1)

    # -- for transports ------------------------------------------------------------

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        """Warnings. Raises Unenforceable, InvalidInput for a function that cannot run here as it asks to."""
        check_limits(spec, self._settings)
        return self._executor.check(spec)

    def start(self, request: ExecutionRequest, on_end: Answer, owner: str = "") -> tuple[ExecutionRecord, bool]:
        """(record, accepted), at once; ``on_end`` gets the final record of an accepted one, maybe before that.

        A rejection is a failed record whose ``error_kind`` says why; nothing was started then and ``on_end`` is
        not called. ``owner`` names the session it is for (see ``cancel_owned``). A known ID is accepted: the record
        is the known one, and ``on_end`` gets its end.
        """
        anonymous = not request.execution_id
        if anonymous:
            # A legacy Flux's synchronous calls have no ID.
            request = replace(request, execution_id=f"local-{time.time_ns():x}-{next(self._anonymous)}")
        execution_id = request.execution_id
        agent_id = self._settings.agent_id
        if not EXECUTION_ID.fullmatch(execution_id):
            error = InvalidInput("invalid execution ID: use 1 to 64 letters, digits or hyphens")
            return rejection_record(request, agent_id, error), False
        record = new_record(execution_id, request.function_name, agent_id, request.asynchronous, ())
        grace = self._settings.kill_grace
        execution = Execution(record, self._executor, self._timers, grace, self._started, self._ended, owner)
        with self._lock:
            other = self._executions.get(execution_id)
            if other is not None:
                with other.lock:
                    other.listeners.append((owner, on_end))
                return other.record, True
            # From here on the ID is taken; a repeated request waits for this one's end.
            self._executions[execution_id] = execution
        try:
            known = None if anonymous else self._records.known(execution_id)
            if known is not None:
                return self._answer_known(execution, known, on_end), True
            self._admit(execution, request)
            self._launch(execution, request, (owner, on_end))
        except FluxError as error:
            return self._reject(execution, rejection_record(request, agent_id, error)), False
        except OSError as error:
            fault = CannotStart(f"the agent's machine cannot: {error.strerror or error}")
            return self._reject(execution, rejection_record(request, agent_id, fault)), False
        except Exception as error:
            log.exception("starting %s failed", execution_id)
            return self._reject(execution, rejection_record(request, agent_id, Internal(str(error)))), False
        return execution.record, True

    def cancel(self, execution_id: str, reason: str, on_dead: Answer | None = None) -> ExecutionRecord | None:
        """Stop it; ``on_dead`` gets the final record when nothing of it is alive.

        Answers the record as it is now: running (being stopped), ended (then nothing was done and
        ``on_dead`` is not called), or None for an unknown one. Raises StoreUnavailable.
        """
        with self._lock:
            execution = self._executions.get(execution_id)
            if execution is not None:
                with execution.lock:
                    if on_dead is not None:
                        execution.listeners.append(("", on_dead))
                    execution.record = record = replace(execution.record, phase=Phase.ENDING)
        if execution is None:
            return self._records.get(execution_id, with_output=False)
        self._records.update(record)
        execution.stop(ErrorKind.CANCELLED, reason)
        return record

    def cancel_owned(self, owner: str, reason: str) -> int:
        """Cancel every synchronous execution of an owner that is gone; how many. Asynchronous ones go on."""
        with self._lock:
            owned = [
                execution.record.execution_id
                for execution in self._executions.values()
                if execution.owner == owner and not execution.record.asynchronous
            ]
        for execution_id in owned:
            self.cancel(execution_id, reason)
        return len(owned)

    def detach_owner(self, owner: str) -> None:
        """Forget this owner's listeners; its asynchronous executions go on."""
        with self._lock:
            for execution in self._executions.values():
                with execution.lock:
                    execution.listeners = [one for one in execution.listeners if one[0] != owner]

    def reattach_owner(self, owner: str, on_end: Callable[[bool], Answer]) -> None:
        """An owner that was detached is back: it gets the ends of its executions that still run.

        ``on_end(asynchronous)`` makes the listener for one execution.
        """
        with self._lock:
            for execution in self._executions.values():
                with execution.lock:
                    if execution.owner == owner and not any(name == owner for name, _ in execution.listeners):
                        execution.listeners.append((owner, on_end(execution.record.asynchronous)))

    def on_freed(self, listener: Callable[[str], None]) -> None:
        """``listener(function_name)`` after each end. It must not block."""
        self._on_freed.append(listener)

    def open_ids(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._executions)

    def expected_by(self, owner: str) -> tuple[str, ...]:
        """The running executions, and the ended ones whose answer is still on its way to this owner."""
        with self._lock:
            return (*self._executions, *(ended for ended, owners in self._announcing if owner in owners))

    @property
    def active(self) -> int:
        return self._taken

    def has_capacity(self, function_name: str) -> bool:
        installed = self._packages.get(function_name)
        if installed is None or self._taken >= self._settings.max_tasks:
            return False
        return self._slots[function_name] < installed.spec.max_concurrency

    def with_output(self, record: ExecutionRecord) -> ExecutionRecord:
        """A final record given to ``on_end``, with the output that lies in a file."""
        return self._records.with_output(record)

    # -- stopping ------------------------------------------------------------------

    def refuse_new(self) -> None:
        """From now on every start is rejected: the agent is stopping."""
        with self._lock:
            self._stopping = True

    def stop(self, finish_by: float, dead_by: float) -> None:
        """Let executions finish until ``finish_by``, then kill them and wait until ``dead_by`` (time.monotonic)."""
        self.refuse_new()
        with self._lock:
            self._idle.wait_for(self._all_announced, max(0.0, finish_by - time.monotonic()))
            left = list(self._executions.values())
        for execution in left:
            execution.stop(ErrorKind.AGENT_STOPPED, "agent stopped", grace=0)
        with self._lock:
            self._idle.wait_for(self._all_announced, max(0.0, dead_by - time.monotonic()))

    def _all_announced(self) -> bool:
        # The streams are closed next: the last answers must be on them by then.
        return not self._executions and not self._announcing

    # -- one execution -------------------------------------------------------------

    def _answer_known(self, execution: Execution, known: ExecutionRecord, on_end: Answer) -> ExecutionRecord:
        if not known.status.ended:
            # Not in the table and not ended: its end could not be stored (a full disk).
            lost = "result lost: the agent could not write it to disk"
            known = known.ended(ExecutionStatus.FAILED, at=time.time(), error=lost, kind=ErrorKind.INTERNAL)
        with execution.lock:
            execution.listeners.append(("", on_end))
        self._close(execution, known)
        return known

    def _admit(self, execution: Execution, request: ExecutionRequest) -> None:
        """Give it a slot and hold its code. Raises FluxError; then it has neither."""
        name = request.function_name
        installed = self._packages.acquire(name)
        if installed is None:
            raise NotFound("function not found")
        if installed.code_dir is None:
            raise Conflict(f"function {name} has no code on this agent yet")
        try:
            warnings = self.check(installed.spec)
            self._executor.check_args(installed.spec.handler, request.args)
            with self._lock:
                if self._stopping:
                    raise Stopping("the agent is stopping")
                if self._slots[name] >= installed.spec.max_concurrency or self._taken >= self._settings.max_tasks:
                    raise AtCapacity(f"function {name} at capacity")
                self._slots[name] += 1
                self._taken += 1
                execution.installed = installed
        except BaseException:
            self._packages.release(installed)
            raise
        if warnings:
            with execution.lock:
                execution.record = replace(execution.record, warnings=warnings)

    def _launch(self, execution: Execution, request: ExecutionRequest, listener: tuple[str, Answer]) -> None:
        installed = execution.installed
        assert installed is not None
        output = self._records.begin(execution.record)
        execution.recorded = True
        with execution.lock:
            execution.listeners.append(listener)
        timeout = effective_timeout(request, installed.spec, self._settings.timeout)
        try:
            execution.launch(build_job(request, installed, self._settings), timeout, output.append)
        except BaseException:
            with execution.lock:
                execution.listeners.remove(listener)
            raise

    def _started(self, execution: Execution) -> None:
        self._records.update(execution.record)

    def _ended(self, execution: Execution, record: ExecutionRecord) -> None:
        try:
            record = self._records.end(record)
        except Exception:
            log.exception("the end of %s could not be recorded", record.execution_id)
        self._close(execution, record)

    def _reject(self, execution: Execution, record: ExecutionRecord) -> ExecutionRecord:
        if execution.recorded:
            self._records.refuse(record)
        self._close(execution, record)
        return record

    def _close(self, execution: Execution, record: ExecutionRecord) -> None:
        """Remove it from the table, free its slot and its code, then tell every listener."""
        installed, name = execution.installed, record.function_name
        with self._lock, execution.lock:
            # In one step with the removal: a listener added until now is called, a later request finds the record.
            execution.state = State.ENDED
            listeners, execution.listeners = execution.listeners, []
            del self._executions[record.execution_id]
            if installed is not None:
                self._taken -= 1
                self._slots[name] -= 1
                if not self._slots[name]:
                    del self._slots[name]
            announcing = (record.execution_id, [owner for owner, _ in listeners])
            self._announcing.append(announcing)
        if installed is not None:
            self._packages.release(installed)
            for freed in self._on_freed:
                _call(freed, name)
        for _, listener in listeners:
            _call(listener, record)
        with self._lock:
            self._announcing.remove(announcing)
            if not self._executions and not self._announcing:
                self._idle.notify_all()


# -- from a request to a program ---------------------------------------------------


def build_job(request: ExecutionRequest, installed: Installed, settings: Settings) -> Job:
    """The program to run. Its environment holds nothing of the agent's own."""
    spec, code_dir = installed.spec, installed.code_dir
    if code_dir is None:
        raise ValueError(f"{spec.name} has no code")
    return Job(
        execution_id=request.execution_id,
        argv=(f"{code_dir}/{spec.handler}", *request.args),
        env={
            **_without_overruled(settings.environment, spec.env),
            **spec.env,
            "FLUX_EXECUTION_ID": request.execution_id,
            "FLUX_FUNCTION_NAME": spec.name,
        },
        code_dir=code_dir,
        stdin=request.stdin,
        limits=effective_limits(spec, settings.defaults),
        network=spec.network,
        working_directory=spec.working_directory,
    )


def _without_overruled(environment: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The node's variables. LC_ALL would outweigh a locale that the function names by LANG or one of LC_*."""
    chosen = any(name == "LANG" or name.startswith("LC_") for name in own)
    return {name: value for name, value in environment.items() if not (chosen and name == "LC_ALL")}


def check_limits(spec: FunctionSpec, settings: Settings) -> None:
    """Raises Unenforceable for a function that asks for more than agent.yaml gives one execution."""
    defaults = settings.defaults
    asked = (
        ("resources.memory", spec.memory_mb, (defaults.memory_bytes or 0) // _MB, "MB", "limits.memory"),
        ("resources.cpu", spec.cpu_millicores, defaults.cpu_millicores or 0, "millicores", "limits.cpu"),
        ("timeout", spec.timeout_seconds, settings.timeout, "s", "limits.timeout"),
    )
    faults = [
        f"{name} is {wanted} and this agent gives at most {most:g} {unit} ({setting} in its agent.yaml)"
        for name, wanted, most, unit, setting in asked
        if most and wanted > most
    ]
    if faults:
        raise Unenforceable("; ".join(faults))


def effective_timeout(request: ExecutionRequest, spec: FunctionSpec, most: float = 0.0) -> float:
    """Seconds, 0 = none. A call may ask for less than its function and the agent allow, never for more."""
    asked = (request.timeout_seconds, float(spec.timeout_seconds), most)
    return min((seconds for seconds in asked if seconds), default=0.0)


def effective_limits(spec: FunctionSpec, defaults: Limits) -> Limits:
    """The function's limits, the agent's where it sets none.

    Of processes, files and /tmp a function may ask for less than the agent's default or for more; more memory or CPU
    than agent.yaml gives was refused (``check_limits``).
    """
    return Limits(
        memory_bytes=spec.memory_mb * _MB or defaults.memory_bytes,
        cpu_millicores=spec.cpu_millicores or defaults.cpu_millicores,
        processes=spec.max_processes or defaults.processes,
        open_files=spec.max_open_files or defaults.open_files,
        file_size_bytes=spec.max_file_size_mb * _MB or defaults.file_size_bytes,
        tmp_bytes=spec.tmp_size_mb * _MB or defaults.tmp_bytes,
    )


# -- answers -----------------------------------------------------------------------


def rejection_record(request: ExecutionRequest, agent_id: str, error: FluxError) -> ExecutionRecord:
    """The record of a request that failed before anything was started."""
    kind = kind_of(error, ErrorKind.CANNOT_START)
    if isinstance(error, Conflict):  # registered, and never deployed
        kind = ErrorKind.NO_CODE
    elif isinstance(error, (CannotStart, StoreUnavailable)):
        # The program was not tried yet, so another agent may well start it.
        kind = ErrorKind.MACHINE_FAULT
    now = time.time()
    return ExecutionRecord(
        request.execution_id,
        request.function_name,
        agent_id,
        status=ExecutionStatus.FAILED,
        phase=Phase.ENDED,
        asynchronous=request.asynchronous,
        error=error.message,
        error_kind=kind,
        started_at=now,
        status_at=now,
    )


def sendable(record: ExecutionRecord, limit: int = _SENDABLE) -> ExecutionRecord:
    """The record with as much of its output as fits into one message; the rest can be read piece by piece."""
    if record.output is None or len(record.output) <= limit:
        return record
    return replace(record, output=record.output[:limit], truncated=True)


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"


def _call(listener: Callable[..., None], argument: object) -> None:
    """A listener that fails holds up neither the next one nor the executor."""
    try:
        listener(argument)
    except Exception:
        log.exception("a listener of an execution's end failed")
