"""Executions on this agent: slots, the running table, cancelling.

Requests come from any transport: a unary call, the multiplexed stream, a test.
``start`` answers through a callback, so that no thread waits for a program.

An execution ID is run once: asked again, the answer is the one that is known.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fluxlib.agent.executor.base import Executor, Job, Limits
from fluxlib.agent.executor.supervise import Supervised, Verdict
from fluxlib.agent.outcomes import limits_of, refusal_of, refused
from fluxlib.agent.packages import Installed, Packages
from fluxlib.agent.records import Records, new_record
from fluxlib.errors import FluxError, InvalidInput, Stopping, StoreUnavailable
from fluxlib.lifecycle import Timers
from fluxlib.model import (
    EXECUTION_ID,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    Phase,
)

log = logging.getLogger(__name__)

# How many ended IDs are remembered, so that one asked for again is not run again.
_REMEMBERED = 20_000

Answer = Callable[[ExecutionRecord], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What agent.yaml says about runs."""

    agent_id: str
    max_tasks: int
    kill_grace: float
    defaults: Limits
    environment: dict[str, str]  # the same for every function on this node


@dataclass(slots=True)
class Run:
    """One execution that has a slot."""

    record: ExecutionRecord
    installed: Installed
    owner: str
    supervised: Supervised | None = None
    on_end: list[Answer] = field(default_factory=list)
    ended: bool = False


class Runs:
    """The running table. Safe from any thread."""

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
        self._runs: dict[str, Run] = {}
        self._active: Counter[str] = Counter()
        self._stopping = False
        self._ended_ids: OrderedDict[str, None] = OrderedDict()
        self._freed: list[Callable[[str], None]] = []
        self._anonymous = itertools.count(1)

    # -- asked by transports -------------------------------------------------------

    def start(self, request: ExecutionRequest, on_end: Answer, owner: str = "") -> ExecutionRecord:
        """Accept or refuse at once; ``on_end`` gets the final record of what was accepted.

        The answer is a running record, or a refusal: failed, with an ``error_kind`` that says nothing was
        started. ``owner`` names who it is for (see ``cancel_owned``). A known ID answers what is known
        of it, and ``on_end`` is told its end all the same.
        """
        if not request.execution_id:
            # An original Flux's sync calls need none of their own.
            request = replace(request, execution_id=f"local-{time.time_ns():x}-{next(self._anonymous)}")
        try:
            known = self._join(request.execution_id, on_end)
            if known is not None:
                return known
            run = self._admit(request, on_end, owner)
        except FluxError as error:
            return refusal_of(request, self._settings.agent_id, error)
        except _Refused as refused:
            return refused.record
        try:
            self._launch(run, request)
        except FluxError as error:
            self._give_back(run)
            return refusal_of(request, self._settings.agent_id, error)
        return run.record

    def cancel(self, execution_id: str, reason: str, on_dead: Answer | None = None) -> ExecutionRecord | None:
        """Stop it; ``on_dead`` gets the final record when nothing of it is alive.

        Answers the record as it is now: running (being stopped), ended (then nothing was done and
        ``on_dead`` is not called), or None for an unknown one. Raises StoreUnavailable.
        """
        with self._lock:
            run = self._runs.get(execution_id)
            if run is not None and on_dead is not None:
                run.on_end.append(on_dead)
        if run is None:
            return self._records.get(execution_id, with_output=False)
        run.record = replace(run.record, phase=Phase.ENDING)
        self._records.update(run.record)
        if run.supervised is not None:
            run.supervised.stop(ErrorKind.CANCELLED, reason)
        return run.record

    def cancel_owned(self, owner: str, reason: str) -> int:
        """Stop every synchronous run of an owner that is gone; asynchronous ones go on."""
        with self._lock:
            theirs = [
                run.record.execution_id
                for run in self._runs.values()
                if run.owner == owner and not run.record.asynchronous
            ]
        for execution_id in theirs:
            self.cancel(execution_id, reason)
        return len(theirs)

    def disown(self, owner: str) -> None:
        """Nobody waits for this owner's answers any more; its asynchronous runs go on."""
        with self._lock:
            for run in self._runs.values():
                if run.owner == owner:
                    run.on_end = []

    def on_freed(self, listener: Callable[[str], None]) -> None:
        """``listener(function_name)`` after each end. It must not block."""
        self._freed.append(listener)

    def open_ids(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._runs)

    @property
    def active(self) -> int:
        return len(self._runs)

    def has_room(self, function_name: str) -> bool:
        installed = self._packages.get(function_name)
        if installed is None or len(self._runs) >= self._settings.max_tasks:
            return False
        return self._active[function_name] < installed.spec.max_concurrency

    # -- stopping ------------------------------------------------------------------

    def refuse_new(self) -> None:
        """From now on every start is refused: the agent is stopping."""
        with self._lock:
            self._stopping = True

    def stop(self, finish_by: float, dead_by: float) -> None:
        """Wait for what runs until ``finish_by``, then kill it and wait until ``dead_by`` (time.monotonic)."""
        self.refuse_new()
        with self._lock:
            self._idle.wait_for(lambda: not self._runs, max(0.0, finish_by - time.monotonic()))
            left = list(self._runs.values())
        for run in left:
            if run.supervised is not None:
                run.supervised.stop(ErrorKind.AGENT_STOPPED, "agent stopped", grace=0)
        with self._lock:
            self._idle.wait_for(lambda: not self._runs, max(0.0, dead_by - time.monotonic()))

    # -- one run -------------------------------------------------------------------

    def _join(self, execution_id: str, on_end: Answer) -> ExecutionRecord | None:
        with self._lock:
            run = self._runs.get(execution_id)
            if run is not None:
                run.on_end.append(on_end)
                return run.record
            ended = execution_id in self._ended_ids
        record = self._records.get(execution_id) if ended else None
        if record is not None:
            on_end(record)
        return record

    def _admit(self, request: ExecutionRequest, on_end: Answer, owner: str) -> Run:
        if not EXECUTION_ID.fullmatch(request.execution_id):
            raise InvalidInput("the execution ID is not one: letters, digits and hyphens, at most 64")
        name = request.function_name
        installed = self._packages.acquire(name)
        if installed is None:
            raise _Refused(refused(request, self._settings.agent_id, ErrorKind.NOT_FOUND, "function not found"))
        try:
            if installed.code_dir is None:
                text = f"function {name} has no code on this agent yet"
                raise _Refused(refused(request, self._settings.agent_id, ErrorKind.NO_CODE, text))
            warnings = self._executor.check(installed.spec)
            self._executor.check_args(installed.spec.handler, request.args)
            record = new_record(request.execution_id, name, self._settings.agent_id, request.asynchronous, warnings)
            run = Run(record, installed, owner, on_end=[on_end])
            with self._lock:
                if self._stopping:
                    raise Stopping("the agent is stopping")
                full = self._active[name] >= installed.spec.max_concurrency
                if full or len(self._runs) >= self._settings.max_tasks:
                    text = f"function {name} at capacity"
                    raise _Refused(refused(request, self._settings.agent_id, ErrorKind.AT_CAPACITY, text))
                if request.execution_id in self._runs:
                    raise InvalidInput(f"execution {request.execution_id} was asked for twice at once")
                self._active[name] += 1
                self._runs[request.execution_id] = run
            return run
        except BaseException:
            if installed.code_dir is not None:
                self._packages.release(installed.code_dir)
            raise

    def _launch(self, run: Run, request: ExecutionRequest) -> None:
        spec = run.installed.spec
        assert run.installed.code_dir is not None
        output = self._records.begin(run.record)
        handler = run.installed.code_dir.joinpath(*spec.handler.split("/"))
        job = Job(
            execution_id=request.execution_id,
            argv=(str(handler), *request.args),
            env={
                **self._settings.environment,
                **spec.env,
                "FLUX_EXECUTION_ID": request.execution_id,
                "FLUX_FUNCTION_NAME": spec.name,
            },
            code_dir=run.installed.code_dir,
            stdin=request.stdin,
            limits=limits_of(spec, self._settings.defaults),
            network=spec.network,
            working_directory=spec.working_directory,
        )
        timeout = float(spec.timeout_seconds)
        if request.timeout_seconds:
            # A call may ask for less than its function, never for more.
            timeout = min(request.timeout_seconds, timeout) if timeout else request.timeout_seconds
        supervised = Supervised(
            self._executor,
            self._timers,
            job,
            timeout,
            self._settings.kill_grace,
            lambda verdict: self._ended(run, verdict),
        )
        run.supervised = supervised
        supervised.start(output.append, lambda pid: self._started(run))

    def _started(self, run: Run) -> None:
        now = time.time()
        queue_ms = int((now - run.record.started_at) * 1000)
        run.record = replace(run.record, run_started_at=now, queue_ms=queue_ms)
        self._records.update(run.record)

    def _ended(self, run: Run, verdict: Verdict) -> None:
        now = time.time()
        ended = verdict.exit
        began = run.record.run_started_at or run.record.started_at
        record = replace(
            run.record,
            status=verdict.status,
            phase=Phase.ENDED,
            error=verdict.error,
            error_kind=verdict.kind,
            exit_code=ended.exit_code,
            signal=ended.signal,
            duration_ms=int((now - began) * 1000),
            status_at=now,
            peak_memory_bytes=ended.peak_memory_bytes,
            cpu_seconds=ended.cpu_seconds,
        )
        try:
            record = self._records.end(record)
        except StoreUnavailable as error:
            log.error("the record of %s cannot be kept: %s", record.execution_id, error.message)
        with self._lock:
            run.ended = True
            listeners, run.on_end = run.on_end, []
        self._give_back(run)
        for listener in listeners:
            listener(record)

    def _give_back(self, run: Run) -> None:
        name = run.record.function_name
        with self._lock:
            del self._runs[run.record.execution_id]
            if run.ended:
                self._ended_ids[run.record.execution_id] = None
                if len(self._ended_ids) > _REMEMBERED:
                    self._ended_ids.popitem(last=False)
            self._active[name] -= 1
            if not self._active[name]:
                del self._active[name]
            if not self._runs:
                self._idle.notify_all()
        if not run.ended:
            self._records.forget(run.record.execution_id)
        assert run.installed.code_dir is not None
        self._packages.release(run.installed.code_dir)
        for listener in self._freed:
            listener(name)


class _Refused(Exception):
    """Carries the refusal out of ``_admit``; never leaves this module."""

    def __init__(self, record: ExecutionRecord) -> None:
        super().__init__(record.error)
        self.record = record
