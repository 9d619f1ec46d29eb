"""Executions on this agent: slots, the running table, cancelling.

Requests come from any transport: a unary call, the multiplexed stream, a test.
``start`` answers through a callback, so that no thread waits for a program.

An execution ID is run once, also across restarts of the agent: asked again, the
answer is the one that is known.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fluxlib.agent.executor.base import Executor
from fluxlib.agent.executor.supervise import Supervised, Verdict
from fluxlib.agent.jobs import Settings, check_limits, job_of, timeout_of
from fluxlib.agent.outcomes import no_longer_known, refusal_of
from fluxlib.agent.packages import Installed, Packages
from fluxlib.agent.records import Records, new_record
from fluxlib.errors import AtCapacity, CannotStart, Conflict, FluxError, Internal, InvalidInput, NotFound, Stopping
from fluxlib.lifecycle import Timers
from fluxlib.model import EXECUTION_ID, ErrorKind, ExecutionRecord, ExecutionRequest, FunctionSpec, Phase

log = logging.getLogger(__name__)

Answer = Callable[[ExecutionRecord], None]


@dataclass(slots=True)
class Run:
    """One execution from the moment its ID is taken. ``installed`` is set while it has a slot."""

    record: ExecutionRecord
    owner: str
    on_end: list[tuple[str, Answer]] = field(default_factory=list)  # with whom it is told
    installed: Installed | None = None
    begun: bool = False  # the store knows it
    supervised: Supervised | None = None
    stops: list[tuple[ErrorKind, str, float | None]] = field(default_factory=list)  # before there was anything to stop


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
        self._telling: list[tuple[str, list[str]]] = []  # out of the table, not yet told: execution ID, to whom
        self._runs: dict[str, Run] = {}
        self._slots: Counter[str] = Counter()
        self._taken = 0
        self._stopping = False
        self._freed: list[Callable[[str], None]] = []
        self._anonymous = itertools.count(1)

    # -- asked by transports -------------------------------------------------------

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        """Warnings. Raises Unenforceable, InvalidInput for a function that cannot run here as it asks to."""
        check_limits(spec, self._settings)
        return self._executor.check(spec)

    def start(self, request: ExecutionRequest, on_end: Answer, owner: str = "") -> tuple[ExecutionRecord, bool]:
        """(record, accepted), at once; ``on_end`` gets the final record of what was accepted, maybe before that.

        A refusal is a failed record whose ``error_kind`` says why; nothing was started then and ``on_end`` is
        not called. ``owner`` names who it is for (see ``cancel_owned``). A known ID is accepted: the record
        is the known one, and ``on_end`` is told its end.
        """
        anonymous = not request.execution_id
        if anonymous:
            # An original Flux's sync calls need none of their own.
            request = replace(request, execution_id=f"local-{time.time_ns():x}-{next(self._anonymous)}")
        execution_id = request.execution_id
        if not EXECUTION_ID.fullmatch(execution_id):
            error = InvalidInput("the execution ID is not one: letters, digits and hyphens, at most 64")
            return refusal_of(request, self._settings.agent_id, error), False
        record = new_record(execution_id, request.function_name, self._settings.agent_id, request.asynchronous, ())
        run = Run(record, owner)
        with self._lock:
            other = self._runs.get(execution_id)
            if other is not None:
                other.on_end.append((owner, on_end))
                return other.record, True
            # From here on the ID is taken; who asks for it again waits for this one's end.
            self._runs[execution_id] = run
        try:
            known = None if anonymous else self._records.known(execution_id)
            if known is not None:
                return self._answer_known(run, known, on_end), True
            self._admit(run, request)
            self._launch(run, request, (owner, on_end))
        except FluxError as error:
            return self._refuse(run, refusal_of(request, self._settings.agent_id, error)), False
        except OSError as error:
            trouble = CannotStart(f"the agent's machine cannot: {error.strerror or error}")
            return self._refuse(run, refusal_of(request, self._settings.agent_id, trouble)), False
        except Exception as error:
            log.exception("starting %s failed", execution_id)
            return self._refuse(run, refusal_of(request, self._settings.agent_id, Internal(str(error)))), False
        return run.record, True

    def cancel(self, execution_id: str, reason: str, on_dead: Answer | None = None) -> ExecutionRecord | None:
        """Stop it; ``on_dead`` gets the final record when nothing of it is alive.

        Answers the record as it is now: running (being stopped), ended (then nothing was done and
        ``on_dead`` is not called), or None for an unknown one. Raises StoreUnavailable.
        """
        with self._lock:
            run = self._runs.get(execution_id)
            if run is not None:
                if on_dead is not None:
                    run.on_end.append(("", on_dead))
                run.record = replace(run.record, phase=Phase.ENDING)
                record = run.record
        if run is None:
            return self._records.get(execution_id, with_output=False)
        self._records.update(record)
        self._stop(run, ErrorKind.CANCELLED, reason, None)
        return record

    def cancel_owned(self, owner: str, reason: str) -> int:
        """Stop every synchronous run of an owner that is gone; asynchronous ones go on. How many were stopped."""
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
                run.on_end = [one for one in run.on_end if one[0] != owner]

    def own_again(self, owner: str, on_end: Callable[[bool], Answer]) -> None:
        """An owner that had been given up is back: it is told the ends of what still runs for it.

        ``on_end(asynchronous)`` makes the callback for one run.
        """
        with self._lock:
            for run in self._runs.values():
                if run.owner == owner and not any(name == owner for name, _ in run.on_end):
                    run.on_end.append((owner, on_end(run.record.asynchronous)))

    def on_freed(self, listener: Callable[[str], None]) -> None:
        """``listener(function_name)`` after each end. It must not block."""
        self._freed.append(listener)

    def open_ids(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._runs)

    def expected_by(self, owner: str) -> tuple[str, ...]:
        """What runs, and what has ended with the answer still on its way to this owner."""
        with self._lock:
            return (*self._runs, *(execution_id for execution_id, owners in self._telling if owner in owners))

    @property
    def active(self) -> int:
        return self._taken

    def has_room(self, function_name: str) -> bool:
        installed = self._packages.get(function_name)
        if installed is None or self._taken >= self._settings.max_tasks:
            return False
        return self._slots[function_name] < installed.spec.max_concurrency

    def with_output(self, record: ExecutionRecord) -> ExecutionRecord:
        """A final record given to ``on_end``, with the output that lies in a file."""
        return self._records.with_output(record)

    # -- stopping ------------------------------------------------------------------

    def refuse_new(self) -> None:
        """From now on every start is refused: the agent is stopping."""
        with self._lock:
            self._stopping = True

    def stop(self, finish_by: float, dead_by: float) -> None:
        """Wait for what runs until ``finish_by``, then kill it and wait until ``dead_by`` (time.monotonic)."""
        self.refuse_new()
        with self._lock:
            self._idle.wait_for(self._all_told, max(0.0, finish_by - time.monotonic()))
            left = list(self._runs.values())
        for run in left:
            self._stop(run, ErrorKind.AGENT_STOPPED, "agent stopped", 0)
        with self._lock:
            self._idle.wait_for(self._all_told, max(0.0, dead_by - time.monotonic()))

    def _all_told(self) -> bool:
        # Whoever stops takes the streams away next: the last answers must be on them by then.
        return not self._runs and not self._telling

    # -- one run -------------------------------------------------------------------

    def _answer_known(self, run: Run, known: ExecutionRecord, on_end: Answer) -> ExecutionRecord:
        if not known.status.ended:
            # Not in the table and not ended: the store could not be told its end.
            known = no_longer_known(known)
        self._close(run, known, [("", on_end)])
        return known

    def _admit(self, run: Run, request: ExecutionRequest) -> None:
        """Give the run a slot and hold its code. Raises FluxError; then it has neither."""
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
                run.installed = installed
                if warnings:
                    run.record = replace(run.record, warnings=warnings)
        except BaseException:
            self._packages.release(installed)
            raise

    def _launch(self, run: Run, request: ExecutionRequest, on_end: tuple[str, Answer]) -> None:
        assert run.installed is not None
        output = self._records.begin(run.record)
        run.begun = True
        spec = run.installed.spec
        supervised = Supervised(
            self._executor,
            self._timers,
            job_of(request, run.installed, self._settings),
            timeout_of(request, spec, self._settings.timeout),
            self._settings.kill_grace,
            lambda verdict: self._ended(run, verdict),
        )
        with self._lock:
            run.on_end.append(on_end)
            run.supervised = supervised
            stops = list(run.stops)
        for why, reason, grace in stops:
            supervised.stop(why, reason, grace=grace)
        try:
            supervised.start(output.append, lambda pid, ago: self._started(run, ago))
        except BaseException:
            with self._lock:
                run.on_end.remove(on_end)
            raise

    def _stop(self, run: Run, why: ErrorKind, reason: str, grace: float | None) -> None:
        with self._lock:
            supervised = run.supervised
            if supervised is None:
                run.stops.append((why, reason, grace))
                return
        supervised.stop(why, reason, grace=grace)

    def _started(self, run: Run, ago: float) -> None:
        at = time.time() - ago
        with self._lock:
            queue_ms = int((at - run.record.started_at) * 1000)
            run.record = record = replace(run.record, run_started_at=at, queue_ms=queue_ms)
        self._records.update(record)

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
        except Exception:
            log.exception("the end of %s cannot be recorded", record.execution_id)
        self._close(run, record, [])

    def _refuse(self, run: Run, record: ExecutionRecord) -> ExecutionRecord:
        if run.begun:
            self._records.refuse(record)
        self._close(run, record, [])
        return record

    def _close(self, run: Run, record: ExecutionRecord, more: list[tuple[str, Answer]]) -> None:
        """The way out of the table, whatever happened: slot, code, then everybody who waits."""
        installed = run.installed
        with self._lock:
            # In one step with the removal: who joins or cancels until now is told, who comes later finds the record.
            listeners = [*run.on_end, *more]
            run.on_end = []
            del self._runs[run.record.execution_id]
            if installed is not None:
                name = run.record.function_name
                self._taken -= 1
                self._slots[name] -= 1
                if not self._slots[name]:
                    del self._slots[name]
            telling = (run.record.execution_id, [owner for owner, _ in listeners])
            self._telling.append(telling)
        if installed is not None:
            self._packages.release(installed)
            for freed in self._freed:
                _call(freed, run.record.function_name)
        for _, listener in listeners:
            _call(listener, record)
        with self._lock:
            self._telling.remove(telling)
            if not self._runs and not self._telling:
                self._idle.notify_all()


def _call(listener: Callable[..., None], argument: object) -> None:
    """One listener's failure is not the next one's, nor the executor's."""
    try:
        listener(argument)
    except Exception:
        log.exception("telling the end of an execution failed")
