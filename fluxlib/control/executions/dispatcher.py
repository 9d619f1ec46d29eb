"""From acceptance to an agent's answer, as events: placed, committed, answered, ended, cancelled, due.

Each event takes an execution one step on and returns: it reserves a slot, hands a write to the store or a request to a
connection, and what comes of that is the next event. Nothing here waits. What must (reading a request or an unknown
function from the store) is done on the dispatcher's own threads; an event on the store's writer thread only enqueues.

Nothing is sent twice: another agent is tried only when the last one answered that it started nothing, or cannot have
seen the request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fluxlib.control.agents.fleet import Fleet, Reservation
from fluxlib.control.executions.backlog import Backlog
from fluxlib.control.executions.execution import (
    AlreadyKnown,
    Cancelled,
    Execution,
    Reply,
    State,
    Watch,
    worth_keeping,
)
from fluxlib.control.executions.placement import Functions, Need, Placement
from fluxlib.control.executions.tracker import COMMIT_SECONDS, ExecutionTracker
from fluxlib.errors import (
    AgentError,
    AgentLost,
    AgentUnreachable,
    Conflict,
    FluxError,
    Internal,
    InvalidInput,
    NotFound,
    Stopping,
    StoreUnavailable,
)
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import Behavior, ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.pool import Pool
from fluxlib.store.base import ExecutionEntry

log = logging.getLogger(__name__)

# A queued execution is tried again after so long when the store was away (seconds).
_STORE_RETRY_SECONDS = 1.0
_THREADS = 8
# A larger standard input is not made into a message on the store's writer thread.
_INLINE_BYTES = 64 * 1024

CancelAnswer = ExecutionStatus | FluxError | None
OnCancelled = Callable[[CancelAnswer], None]


class Dispatcher:
    """Places, sends and cancels. Every method may be called from any thread."""

    def __init__(
        self,
        fleet: Fleet,
        functions: Functions,
        tracker: ExecutionTracker,
        timers: Timers,
        max_waiting: int,
        max_backlog_bytes: int,
    ) -> None:
        self._fleet = fleet
        self._tracker = tracker
        self._timers = timers
        self._stopping = False
        self._pool = Pool("dispatch", _THREADS)
        self.placement = Placement(fleet, functions, timers, self._on_capacity)
        self._claiming: set[str] = set()  # functions whose backlog is being claimed from
        # Whether no agent knows them: asked before what was queued before this process is sent anywhere.
        self.confirm: Callable[[Sequence[Execution]], list[Execution]] = list
        self.backlog = Backlog(
            self._place_waiting,
            self.placement.is_full,
            self._assign,
            self.placement.window,
            max_waiting,
            max_backlog_bytes,
        )
        fleet.on_capacity(self._on_capacity)

    # -- capacity ------------------------------------------------------------------------

    def tick(self) -> None:
        """What no event tells: functions changed or deleted while executions wait, commits that are overdue."""
        now = time.monotonic()
        for execution in self._tracker.all():
            if execution.state in (State.QUEUED, State.ASSIGNED) and 0 < execution.deadline < now:
                self._overdue(execution)
        self.fill_windows()
        self.placement.tidy()

    def _refresh(self, name: str) -> None:
        try:
            self.placement.need(name)
        except NotFound:
            for execution in self.backlog.remove_all(name):
                self._fail(execution, _deleted(name))
        except StoreUnavailable as error:
            log.debug("the backlog of %s is served by what is known of it: %s", name, error.message)

    def _on_capacity(self, agent_id: str, function_name: str | None) -> None:
        self.backlog.capacity(agent_id, function_name)
        for name in self.backlog.unclaimed() if function_name is None else (function_name,):
            self._claim_soon(name)

    def _place_waiting(self, function_name: str, agent_id: str) -> Reservation | None:
        return None if self._stopping else self.placement.place_waiting(function_name, agent_id)

    # -- start: the caller's thread --------------------------------------------------------

    def start(self, execution: Execution) -> None:
        """Take on a new execution; its caller is told the rest. Raises AlreadyKnown (its idempotency key was used).

        Only a submission with an idempotency key waits here, for the store to say whether the key is new.
        """
        try:
            need = self.placement.need(execution.function_name)
            overtakes = self.backlog.has(need.function_name)
            reservation = None if overtakes else self.placement.place(need)
            if reservation is None and execution.idempotency_key:
                self._check_key(execution)
            self._place(execution, need, reservation)
        except FluxError as error:
            self._fail(execution, error)
        except AlreadyKnown:
            raise
        except Exception as error:
            self._broken(execution, error)

    def _check_key(self, execution: Execution) -> None:
        """What was accepted before needs neither a slot nor a place in the backlog. Raises AlreadyKnown."""
        known = self._tracker.store.execution_by_key(execution.function_name, execution.idempotency_key)
        if known is not None and not (known.record.status.ended and known.keep_until <= time.time()):
            raise AlreadyKnown(known.execution_id)

    def queue_again(self, execution: Execution) -> None:
        """One that waited in an earlier process, and no agent has had. Raises StoreUnavailable."""
        self._take_claimed(execution.function_name, [execution])

    # -- claims: the dispatcher's threads ------------------------------------------------------

    def fill_windows(self) -> None:
        """Look what waits in the store, and claim what there is a place for. Raises StoreUnavailable."""
        self.backlog.refresh(self._tracker.store.queued())
        for name in self.backlog.functions():
            self._refresh(name)
            self._claim_soon(name)

    def _claim_soon(self, name: str) -> None:
        """Fill the window from the store's backlog, if there is something to claim."""
        if self.backlog.wanted(name) and not self._stopping and name not in self._claiming:
            self._claiming.add(name)
            if not self._pool.submit(self._claim, name):
                self._claiming.discard(name)

    def _claim(self, name: str) -> None:
        store, session = self._tracker.store, self._tracker.session
        again = False
        try:
            while (asked := self.backlog.wanted(name)) and not self._stopping:
                # Agents that are not connected yet cannot say whether they know them.
                if self.placement.still_connecting():
                    return
                entries = store.claim_executions(session, name, asked)
                self.backlog.claimed(name, len(entries), asked)
                self._take_claimed(name, [Execution.stored(entry) for entry in entries])
            again = True
        except StoreUnavailable as error:
            log.warning("the backlog of %s is claimed from later: %s", name, error.message)
        except Exception:
            log.exception("the backlog of %s cannot be claimed from", name)
        finally:
            self._claiming.discard(name)
        if again:
            # What was taken out of the window meanwhile found a claim on its way.
            self._claim_soon(name)

    def _take_claimed(self, name: str, executions: Sequence[Execution]) -> None:
        """Queue what is ours now. Raises StoreUnavailable."""
        fresh = []
        for execution in executions:
            known = self._tracker.get(execution.execution_id)
            if known is None or (known.state is State.QUEUED and known not in self.backlog):
                fresh.append(execution)
            elif known.state.at_agent:
                # The store has forgotten that: it was restored from a copy, or its replica lagged behind.
                self._tracker.store.assign_attempt(
                    known.execution_id, known.attempt, known.agent_id, self._tracker.session
                )
        try:
            # Before they are in flight: a store that is away leaves them to the next try.
            self.placement.need(name)
        except NotFound:
            for execution in fresh:
                self._tracker.end(execution, execution.failed(_deleted(name)))
            return
        # Meanwhile a take-over may have found in the store that what a claim took is ours, or the other way round.
        waiting = [one for one in self.confirm(fresh) if self._tracker.take(one)]
        for execution in waiting:
            if execution.request is not None and not worth_keeping(execution.request):
                execution.request = None
        self.backlog.add(waiting, waits_for_resources=True)

    def _place(self, execution: Execution, need: Need, reservation: Reservation | None) -> None:
        """``reservation`` was just made for it, or there is none. Raises why it is neither assigned nor queued."""
        try:
            with execution.lock:
                _check_wanted(execution)
        except Cancelled:
            if reservation is not None:
                self.placement.release(reservation)
            raise
        if reservation is not None:
            self._assign(execution, reservation, need)
        else:
            self._queue(execution, need)

    def _assign(self, execution: Execution, reservation: Reservation, need: Need | None = None) -> None:
        """Write who gets it; it is sent once that holds. ``need`` only of a new one."""
        with execution.lock:
            if execution.state is State.ENDED:
                former = None
            else:
                former, execution.state = execution.state, State.ASSIGNED
                execution.agent_id = reservation.agent_id
                execution.reservation = reservation
                execution.deadline = time.monotonic() + COMMIT_SECONDS
        if former is None:
            self.placement.release(reservation)
            return
        committed = partial(self._guarded, self._committed, execution, reservation)
        if former is State.NEW:
            assert need is not None
            may_wait = Behavior.WAIT in (need.when_full, need.when_resources_exhausted)
            keep_request = execution.asynchronous and may_wait
            self._create(execution, Phase.STARTING, self._tracker.session, keep_request, committed)
            return
        self._tracker.changed(execution.execution_id)
        try:
            commit = self._tracker.store.assign_attempt(
                execution.execution_id, execution.attempt, reservation.agent_id, self._tracker.session
            )
        except StoreUnavailable as error:
            self._soon(self._go_on, execution, reservation, error)
            return
        commit.then(committed)

    def _queue(self, execution: Execution, need: Need) -> None:
        """Write that it waits; it looks for a slot once that holds. Raises why it may not wait."""
        refusal = self.placement.refusal(need)
        if not execution.accepted:
            if not refusal.wait:
                raise refusal.error
            if self._stopping:
                raise _stopping()
        # One with a key may be known already, to a submission at the same moment: it is counted once it is written.
        counted_later = bool(execution.idempotency_key) and execution.state is State.NEW
        if counted_later:
            self.backlog.refuse_if_full(execution)
        else:
            self.backlog.admit(execution)
        for_resources = refusal.for_resources or bool(need.memory_mb or need.cpu_millicores)
        claimed = not execution.asynchronous or execution.accepted or self.backlog.takes(execution.function_name)
        queued = partial(self._queue_committed, execution, for_resources if claimed else None)
        with execution.lock:
            former = execution.state
            if former is not State.ENDED:
                execution.state = State.QUEUED
                execution.unclaimed = not claimed
                execution.deadline = time.monotonic() + COMMIT_SECONDS
        try:
            if former is State.ENDED:
                self.backlog.give_up_place(execution)
            elif former is State.NEW:
                owner = self._tracker.session if claimed else ""
                self._create(execution, Phase.QUEUED, owner, execution.asynchronous, queued)
                if counted_later:
                    self.backlog.count(execution)
            elif execution.agent_id:
                store, session = self._tracker.store, self._tracker.session
                store.return_execution(execution.execution_id, execution.attempt, session, claimed=True).then(queued)
            else:
                queued(None)
        except BaseException:
            if not counted_later:
                self.backlog.give_up_place(execution)
            raise

    def _create(
        self,
        execution: Execution,
        phase: Phase,
        owner: str,
        keep_request: bool,
        committed: Callable[[Exception | None], None],
    ) -> None:
        """Write a new execution; nothing may be done about it before that holds. Raises AlreadyKnown."""
        execution_id = execution.execution_id
        self._tracker.add(execution)
        entry = ExecutionEntry(
            execution.record(phase),
            execution.request if keep_request else None,
            owner,
            idempotency_key=execution.idempotency_key,
        )
        try:
            known, commit = self._tracker.store.create_execution(entry, durable=execution.asynchronous)
        except StoreUnavailable as error:
            # Without a key nothing is waited for: what is refused here was not even enqueued.
            error.nothing_written = error.nothing_written or not execution.idempotency_key
            raise
        if known != execution_id:
            self._tracker.let_go(execution)
            raise AlreadyKnown(known)
        commit.then(committed)

    # -- committed: the store's writer thread -----------------------------------------------

    def _committed(self, execution: Execution, reservation: Reservation, error: Exception | None) -> None:
        request = execution.request
        if error is None and request is not None and len(request.stdin) <= _INLINE_BYTES:
            self._send(execution, reservation, request)
        else:
            self._soon(self._go_on, execution, reservation, error)

    def _queue_committed(self, execution: Execution, for_resources: bool | None, error: Exception | None) -> None:
        self._soon(self._queued, execution, for_resources, error)

    # -- what follows a commit, and may wait: the dispatcher's threads -----------------------

    def _queued(self, execution: Execution, for_resources: bool | None, error: Exception | None) -> None:
        """``for_resources`` None: it is in the store's backlog, and nobody's."""
        if error is not None:
            self.backlog.give_up_place(execution)
            self._write_failed(execution, error)
            return
        with execution.lock:
            ended = execution.state is not State.QUEUED
            execution.deadline = 0.0
            execution.agent_id = ""  # not before the store says so: who returns it must know
            request, reply = execution.request, None
            if not ended and execution.asynchronous:
                if request is not None and not worth_keeping(request):
                    execution.request = None
                reply, execution.on_reply = execution.on_reply, None
        if ended:
            self.backlog.give_up_place(execution)
            return
        if reply is not None:
            reply(execution.record(Phase.QUEUED))
        self._tracker.changed(execution.execution_id)
        if for_resources is None:
            self.backlog.stored(execution.function_name)
            self._tracker.let_go(execution)
            self._claim_soon(execution.function_name)
            return
        self.backlog.add([execution], waits_for_resources=for_resources)
        if execution.cancel_reason and self.backlog.remove(execution):
            # Cancelled before it was in the backlog: whoever cancelled it could not take it out.
            self._fail(execution, Cancelled(execution.cancel_reason))
        elif self._stopping and not execution.accepted and self.backlog.remove(execution):
            # It came after ``stop`` had told everybody there.
            self._fail(execution, _stopping())

    def _go_on(self, execution: Execution, reservation: Reservation, error: Exception | None) -> None:
        if error is None:
            try:
                request = self._tracker.request_of(execution)
            except StoreUnavailable as unavailable:
                self._write_failed(execution, unavailable)
            else:
                if request is None:
                    self._fail(execution, NotFound("its request is no longer in the store"))
                else:
                    self._send(execution, reservation, request)
        else:
            self._write_failed(execution, error)

    def _write_failed(self, execution: Execution, error: Exception) -> None:
        if isinstance(error, Conflict):
            self.ended_elsewhere(execution)
        elif isinstance(error, FluxError):
            self._fail(execution, error)
        else:
            self._fail(execution, Internal(f"{type(error).__name__}: {error}"))

    def ended_elsewhere(self, execution: Execution) -> None:
        """Another Flux cancelled it or failed its agent before an agent had it, or took it over: we were frozen."""
        try:
            entry = self._tracker.entry(execution.execution_id)
        except StoreUnavailable as error:
            self._fail(execution, error)
            return
        if entry is None:
            reply: Reply = NotFound(f"execution {execution.execution_id} is gone from the store")
        elif entry.record.status.ended:
            reply = entry.record
        else:
            # Whoever has it now writes its end, which this caller can ask for.
            reply = _lost(execution, "this Flux was away for too long: another one has taken the call over")
        self._tracker.let_go(execution, reply)

    # -- sending ---------------------------------------------------------------------------

    def _send(self, execution: Execution, reservation: Reservation, request: ExecutionRequest) -> None:
        """Hand it to the agent's connection, which only enqueues it."""
        connection = reservation.agent.connection
        with execution.lock:
            if execution.state is not State.ASSIGNED or execution.reservation is not reservation:
                return
            cancelled = execution.cancel_reason
            if not cancelled and connection is not None:
                execution.state = State.SENT
                execution.deadline = 0.0
                execution.waited_ms = execution.age_ms()
        if cancelled:
            self._soon(self._fail, execution, Cancelled(cancelled))
            return
        if connection is None:
            error = AgentUnreachable(f"agent {reservation.agent_id} has just left")
            self._soon(self._rejected, execution, reservation, error)
            return
        if execution.attempt > 1:
            request = replace(request, execution_id=execution.attempt_id)
        calling = True

        def answered(answer: ExecutionRecord | FluxError) -> None:
            if calling:
                # The connection refused it at once: not on this thread, which may be the store's writer.
                self._soon(self._answered, execution, reservation, answer)
            else:
                self._guarded(self._answered, execution, reservation, answer)

        connection.execute(request, answered)
        calling = False
        if execution.cancel_reason and execution.state is State.SENT:
            # It may have been cancelled before the request was on its way, and unknown to the agent then.
            self._cancel_at_agent(execution)

    # -- answered: a thread of the connection ------------------------------------------------

    def _answered(self, execution: Execution, reservation: Reservation, answer: ExecutionRecord | FluxError) -> None:
        """The agent's answer to this one request; one that comes too late changes nothing."""
        if isinstance(answer, AgentUnreachable) or (
            isinstance(answer, ExecutionRecord) and answer.error_kind.nothing_started
        ):
            self._rejected(execution, reservation, answer)
            return
        if isinstance(answer, FluxError):
            self._lost(execution, reservation, answer)
            return
        self.placement.succeeded(reservation.agent_id)
        if answer.status.ended:
            if execution.reservation is reservation:
                self._tracker.end(execution, execution.merged(answer))
            return
        connection = reservation.agent.connection
        with execution.lock:
            if execution.state is not State.SENT or execution.reservation is not reservation:
                return
            execution.state = State.RUNNING
            if connection is not None and connection.original:
                execution.watch = Watch()
            reply, execution.on_reply = execution.on_reply, None
        if reply is not None:
            reply(answer)
        self._tracker.changed(execution.execution_id)

    def _rejected(self, execution: Execution, reservation: Reservation, answer: ExecutionRecord | FluxError) -> None:
        """Nothing was started there. The slot is given back at once, so that the next one starts."""
        with execution.lock:
            mine = execution.reservation is reservation
            if mine:
                execution.reservation = None
                execution.state = State.ASSIGNED
        if not mine:
            return
        if isinstance(answer, ExecutionRecord):
            self.placement.rejected(reservation, answer)
        else:
            self.placement.unusable(reservation, answer)
        if not self._soon(self._place_again, execution, answer):
            self._return(execution)

    def _place_again(self, execution: Execution, answer: ExecutionRecord | FluxError | None = None) -> None:
        """Try the next agent, or queue it. ``answer`` is the last agent's."""
        if self._stopping and execution.accepted:
            self._return(execution)
            return
        try:
            with execution.lock:
                if execution.state is State.ENDED:
                    return
                _check_wanted(execution)
            if isinstance(answer, ExecutionRecord) and answer.error_kind is ErrorKind.INVALID:
                raise InvalidInput(answer.error or "the agent cannot take these arguments")
            need = self.placement.need(execution.function_name)
            self._place(execution, need, self.placement.place(need))
        except FluxError as error:
            self._fail(execution, error)

    def _lost(self, execution: Execution, reservation: Reservation | None, error: FluxError) -> None:
        """It may have been started: it stays open until its agent says its end or is given up."""
        with execution.lock:
            if execution.reservation is not reservation or not execution.state.at_agent:
                return
            execution.reservation = None
            execution.state = State.RUNNING
            execution.watch = Watch()
            reply, execution.on_reply = execution.on_reply, None
        if reservation is not None:
            self.placement.release(reservation)
        if reply is not None:
            # An error of its own, which names it: a broken stream says one and the same to all its calls.
            reply(_lost(execution, error.message))
        else:
            log.info("execution %s: %s", execution.execution_id, error.message)
        self._tracker.changed(execution.execution_id)

    # -- ends --------------------------------------------------------------------------------

    def ended(self, execution: Execution, report: ExecutionRecord) -> bool:
        """Its agent says that it has ended. False: it had ended already."""
        return self._tracker.end(execution, execution.merged(report))

    def _fail(self, execution: Execution, error: FluxError) -> None:
        """End it without an agent; one that was not accepted is forgotten, since nobody knows its ID."""
        if isinstance(error, StoreUnavailable) and execution.accepted:
            log.warning("execution %s goes on waiting: %s", execution.execution_id, error.message)
            self._retry_later(execution)
        elif isinstance(error, Cancelled) or execution.accepted:
            self._tracker.end(execution, execution.failed(error))
        else:
            self._tracker.reject(execution, error)

    def _retry_later(self, execution: Execution) -> None:
        with execution.lock:
            if execution.state is State.ENDED:
                return
            reservation, execution.reservation = execution.reservation, None
            execution.deadline = 0.0
        if reservation is not None:
            self.placement.release(reservation)
        self._timers.after(_STORE_RETRY_SECONDS, lambda: self._soon(self._place_again, execution))

    def _overdue(self, execution: Execution) -> None:
        """The store has not committed in time what would move it on. What it commits later moves nothing."""
        error = StoreUnavailable(f"the store did not commit the write within {COMMIT_SECONDS:g} s")
        if execution.accepted:
            execution.deadline = 0.0  # it is in the store, and goes on when that answers
        else:
            self._tracker.reject(execution, error)

    # -- cancelled ---------------------------------------------------------------------------

    def cancel(self, execution: Execution, reason: str, on_cancelled: OnCancelled = lambda answer: None) -> None:
        """End it, wherever it is, without waiting. ``on_cancelled`` is told what its agent says, if one has it."""
        with execution.lock:
            if execution.state is State.ENDED:
                return
            execution.cancel_reason = execution.cancel_reason or reason
            state = execution.state
        if state is State.QUEUED and self.backlog.remove(execution):
            self._fail(execution, Cancelled(reason))
        elif state.at_agent:
            self._cancel_at_agent(execution, on_cancelled)

    def _cancel_at_agent(self, execution: Execution, on_cancelled: OnCancelled = lambda answer: None) -> None:
        connection = self._fleet.connection(execution.agent_id)
        if connection is None:
            on_cancelled(AgentUnreachable("try again later"))
            return

        def cancelled(answer: CancelAnswer) -> None:
            if answer is None and execution.state is State.RUNNING:
                self._tracker.end(execution, execution.failed(Cancelled("cancelled; its agent knew nothing of it")))
            elif isinstance(answer, AgentError):
                log.warning("cancelling %s at %s: %s", execution.execution_id, execution.agent_id, answer.message)
            on_cancelled(answer)

        connection.request_cancel(execution.attempt_id, reason=execution.cancel_reason, on_answer=cancelled)

    # -- stopping ----------------------------------------------------------------------------

    def stop(self) -> None:
        """Send nothing more. Waiting callers are told; what was accepted stays queued in the store."""
        self._stopping = True
        for execution in self.backlog.remove_all():
            if not execution.accepted:
                self._fail(execution, _stopping())

    def close(self, deadline: Deadline) -> None:
        """After ``stop``: what was assigned and not sent goes back to the backlog in the store."""
        self._pool.stop(deadline)
        for execution in self._tracker.all():
            if execution.state in (State.QUEUED, State.ASSIGNED):
                self._return(execution)

    def _return(self, execution: Execution) -> None:
        """No agent has it and none will be sent it by this process: any other may claim it."""
        if not execution.accepted:
            return
        store, session = self._tracker.store, self._tracker.session
        try:
            store.return_execution(execution.execution_id, execution.attempt, session)
        except StoreUnavailable as error:
            log.warning("execution %s cannot be returned to the backlog: %s", execution.execution_id, error.message)

    def _soon(self, event: Callable[..., None], execution: Execution, *arguments: object) -> bool:
        """Do it on a dispatch thread. False: it will not be done, Flux stops."""
        return self._pool.submit(self._guarded, event, execution, *arguments)

    def _guarded(self, event: Callable[..., None], execution: Execution, *arguments: object) -> None:
        """A fault of ours ends the execution it met: its caller must not wait for ever."""
        try:
            event(execution, *arguments)
        except Exception as error:
            self._broken(execution, error)

    def _broken(self, execution: Execution, error: Exception) -> None:
        log.exception("execution %s cannot be dispatched", execution.execution_id)
        if execution.state.at_agent:
            self._lost(execution, execution.reservation, Internal(f"{type(error).__name__}: {error}"))
        else:
            self._fail(execution, Internal(f"{type(error).__name__}: {error}"))


def _check_wanted(execution: Execution) -> None:
    """Raises Cancelled when it was cancelled."""
    if execution.cancel_reason:
        raise Cancelled(execution.cancel_reason)


def _lost(execution: Execution, reason: str) -> AgentLost:
    error = AgentLost(reason)
    error.execution_id = execution.execution_id
    return error


def _deleted(function_name: str) -> NotFound:
    return NotFound(f"function {function_name} was deleted while this waited for it")


def _stopping() -> Stopping:
    return Stopping("Flux is stopping", retry_after=5)
