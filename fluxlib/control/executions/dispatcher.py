"""From an accepted execution to an agent's answer: place, write, send, and go on to the next agent when refused.

:meth:`Dispatcher.drive` does this for every execution. A call somebody waits
for is driven by its own thread; one that was accepted and queued by a thread of
the pool, and only while there is something to do.

Nothing is sent twice: another agent is asked only when the last one answered
that it started nothing, or cannot have seen the request.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fluxlib.control.agents.registry import Registry, Reservation
from fluxlib.control.executions.asking import Asking, check_wanted
from fluxlib.control.executions.backlog import WaitingRoom
from fluxlib.control.executions.execution import AlreadyKnown, Execution, Outcome, Stage, Withdrawn, worth_keeping
from fluxlib.control.executions.placement import Need
from fluxlib.control.executions.slots import Lookup, Slots
from fluxlib.control.executions.tracker import COMMIT_PATIENCE, Ledger
from fluxlib.errors import (
    AgentLost,
    AgentUnreachable,
    AtCapacity,
    Conflict,
    FluxError,
    Internal,
    InvalidInput,
    NotFound,
    Stopping,
    StoreUnavailable,
)
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ErrorKind, ExecutionRecord, Phase
from fluxlib.pool import Pool

log = logging.getLogger(__name__)

# A queued execution is tried again after so long when the store was away (seconds).
_STORE_PAUSE = 1.0
_DISPATCH_THREADS = 8


class Dispatcher:
    """Places, sends and waits.

    ``cancel(execution, reason)`` ends a run at its agent without blocking. ``on_capacity`` of the
    registry is taken here.
    """

    def __init__(
        self,
        registry: Registry,
        functions: Lookup,
        ledger: Ledger,
        timers: Timers,
        cancel: Callable[[Execution, str], None],
        max_waiting: int,
    ) -> None:
        self._ledger = ledger
        self._timers = timers
        self._cancel = cancel
        self._stopping = False
        # The agent may have come back before its call was found to be lost: then nobody else asks for its end.
        self.on_lost: Callable[[ExecutionRecord], None] = lambda record: None
        self._pool = Pool("dispatch", _DISPATCH_THREADS)
        self._lock = threading.Lock()
        self._paused: dict[str, Execution] = {}  # the store was away when they were to go on
        self.slots = Slots(registry, functions, timers, self._on_capacity)
        self._asking = Asking(self.slots, ledger, cancel, self._answered)
        self.room = WaitingRoom(self._place_waiting, self._on_slot, max_waiting)
        registry.on_capacity(self._on_capacity)

    # -- slots -------------------------------------------------------------------------

    def take(self, need: Need) -> Reservation | None:
        """A slot for a newcomer; None when there is none, or when others wait for it already."""
        return None if self.room.has(need.function_name) else self.slots.place(need)

    def tick(self) -> None:
        """What no announcement tells: functions changed or deleted while executions wait for them."""
        for name in self.room.counts():
            self._refresh(name)
        self.slots.tidy()

    def _on_capacity(self, agent_id: str, function_name: str | None) -> None:
        if function_name is not None and self.room.has(function_name):
            self._refresh(function_name)
        self.room.capacity(agent_id, function_name)

    def _refresh(self, name: str) -> None:
        try:
            self.slots.need(name)
        except NotFound:
            for execution in self.room.leave_all(name):
                self._turn_away(execution, NotFound(f"function {name} was deleted while this waited for it"))
        except StoreUnavailable as error:
            log.debug("the queue of %s is served by what is known of it: %s", name, error.message)

    def _turn_away(self, execution: Execution, error: FluxError) -> None:
        if execution.detached:
            self.give_up(execution, error)
        else:
            execution.deliver(error)

    def _place_waiting(self, function_name: str, agent_id: str) -> Reservation | None:
        return None if self._stopping else self.slots.place_waiting(function_name, agent_id)

    def _on_slot(self, execution: Execution, reservation: Reservation) -> None:
        if execution.detached:
            self._drive_soon(execution, reservation, None)
        else:
            execution.deliver(reservation)

    # -- driving -----------------------------------------------------------------------

    def drive(
        self, execution: Execution, reservation: Reservation | None, turned_down: Outcome | None = None
    ) -> ExecutionRecord | None:
        """Take it to its end (synchronous) or to an agent that accepts it (asynchronous).

        ``turned_down`` is the answer of an agent that was asked before. Answers the record; None for an
        asynchronous one that waits, detached from its caller, or whose answer comes later. Raises what its caller
        is to be told: it was not accepted then, except with AgentLost. AlreadyKnown: its idempotency key was
        used before.
        """
        try:
            while True:
                if turned_down is not None:
                    self._raise_unless_another_may_be_asked(execution, turned_down)
                    reservation = self.slots.place(self.slots.need(execution.function_name))
                if reservation is None:
                    reservation = self._wait_for_slot(execution)
                    if reservation is None:
                        return None
                answer = self._asking.ask(execution, reservation)
                if answer is None:
                    return None
                if isinstance(answer, ExecutionRecord) and not answer.error_kind.nothing_started:
                    return self.finish(execution, answer) if answer.status.ended else answer
                turned_down = answer
        except Withdrawn as reason:
            return self.give_up(execution, reason)
        except Conflict:
            return self._ended_elsewhere(execution)
        except AgentLost as error:
            # It may be running: its record stays open until the agent says its end or is given up.
            error.execution_id = execution.execution_id
            self._ledger.drop(execution.execution_id)
            self._ledger.changed(execution.execution_id)
            self.on_lost(execution.record(Phase.STARTING))
            raise
        except FluxError as error:
            if not (execution.detached and isinstance(error, StoreUnavailable)):
                self.give_up(execution, error)
            raise
        except AlreadyKnown:
            raise
        except Exception as error:
            self.give_up(execution, Internal(f"{type(error).__name__}: {error}"))
            raise

    def _ended_elsewhere(self, execution: Execution) -> ExecutionRecord | None:
        """Another Flux cancelled it or gave its agent up before an agent had it, or took it over: we were frozen."""
        self._ledger.drop(execution.execution_id)
        entry = self._ledger.entry(execution.execution_id)
        if entry is not None and not entry.record.status.ended and not execution.asynchronous:
            # Whoever has it now writes its end, which this caller can ask for.
            error = AgentLost("this Flux was away for too long: another one has taken the call over")
            error.execution_id = execution.execution_id
            raise error
        return entry.record if entry is not None else None

    def drive_detached(
        self, execution: Execution, reservation: Reservation | None, turned_down: Outcome | None = None
    ) -> None:
        """``drive`` for one that was accepted before: whatever happens is written, and told to nobody."""
        try:
            self.drive(execution, reservation, turned_down)
        except StoreUnavailable as error:
            log.warning("execution %s goes on waiting: %s", execution.execution_id, error.message)
            self._pause(execution)
        except FluxError as error:
            log.info("execution %s: %s", execution.execution_id, error.message)
        except Exception:
            log.exception("execution %s cannot be dispatched", execution.execution_id)

    def _drive_soon(self, execution: Execution, reservation: Reservation | None, turned_down: Outcome | None) -> None:
        if not self._pool.submit(self.drive_detached, execution, reservation, turned_down):
            self._put_back(execution)

    def _pause(self, execution: Execution) -> None:
        with self._lock:
            self._paused[execution.execution_id] = execution
        self._timers.after(_STORE_PAUSE, lambda: self._resume(execution))

    def _resume(self, execution: Execution) -> None:
        with self._lock:
            mine = self._paused.pop(execution.execution_id, None) is not None
        if mine:
            self._drive_soon(execution, None, None)

    def _put_back(self, execution: Execution) -> None:
        """Nobody has it and nobody will send it in this life: the next one must not look for it at an agent."""
        if execution.agent_id:
            self._ledger.put_back(execution)

    def _wait_for_slot(self, execution: Execution) -> Reservation | None:
        """A slot, or None: it waits without a thread (asynchronous). Raises why it may not wait."""
        accepted = execution.detached
        need = self.slots.need(execution.function_name)
        refused = self.slots.refusal(need)
        if not accepted:
            if not refused.wait:
                raise refused.error
            self.room.refuse_if_full(execution.function_name)
        check_wanted(execution)
        if not execution.created:
            self._ledger.create(execution, queued=True, keep_request=execution.asynchronous).wait(COMMIT_PATIENCE)
        elif execution.agent_id:
            self._ledger.requeue(execution)
        execution.agent_id = ""
        if execution.request is not None and execution.asynchronous and not worth_keeping(execution.request):
            execution.request = None
        execution.detached = execution.asynchronous
        self._ledger.changed(execution.execution_id)
        try:
            pressed = refused.pressed or bool(need.memory_mb or need.cpu_millicores)
            # One with a key was perhaps answered for already, to a repeated submission: it has its place.
            self.room.join(execution, pressed=pressed, invited=accepted or bool(execution.idempotency_key))
        except AtCapacity:
            execution.detached = accepted
            raise
        if execution.stop_reason and self.room.leave(execution):
            # Told to stop before it was in the room: whoever told could not take it out.
            raise Withdrawn(execution.stop_reason)
        if execution.detached:
            return None
        if self._stopping and self.room.leave(execution):
            # It came after ``stop`` had told everybody there.
            raise _stopping()
        outcome = execution.wait()
        if isinstance(outcome, Reservation):
            return outcome
        assert isinstance(outcome, FluxError)
        raise outcome

    def _answered(self, execution: Execution, reservation: Reservation, answer: ExecutionRecord | FluxError) -> None:
        """On a thread of the connection: give the slot back at once, so that the next one starts."""
        taken = answer if isinstance(answer, ExecutionRecord) and not answer.error_kind.nothing_started else None
        execution.stage = Stage.HERE if taken is None else Stage.ANSWERED
        self._give_back(reservation, answer)
        if not execution.detached:
            execution.deliver(answer)
            if execution.accepted:
                self._ledger.changed(execution.execution_id)
        elif taken is not None and taken.status.ended:
            self.finish(execution, taken)
        elif taken is not None:
            self._ledger.changed(execution.execution_id)
        elif self._stopping:
            self._put_back(execution)
        else:
            self._drive_soon(execution, None, answer)

    def _give_back(self, reservation: Reservation, answer: ExecutionRecord | FluxError) -> None:
        """The slot, unless the agent has accepted the execution and keeps it."""
        if isinstance(answer, AgentUnreachable):
            self.slots.unusable(reservation, answer)
        elif isinstance(answer, FluxError):
            self.slots.release(reservation)
        elif answer.error_kind.nothing_started:
            self.slots.refused(reservation, answer)
        elif answer.status.ended:
            self.slots.release(reservation)

    def _raise_unless_another_may_be_asked(self, execution: Execution, answer: Outcome) -> None:
        if isinstance(answer, ExecutionRecord):
            if answer.error_kind is ErrorKind.INVALID:
                raise InvalidInput(answer.error or "the agent cannot take these arguments")
        elif isinstance(answer, FluxError) and not isinstance(answer, AgentUnreachable):
            # Whatever else a connection says, it may have been started. An error of its own, which names it: a
            # stream that breaks says one and the same to all whose answers went down with it.
            raise answer if isinstance(answer, (Withdrawn, NotFound)) else AgentLost(answer.message)
        check_wanted(execution)

    # -- ends ----------------------------------------------------------------------------

    def finish(self, execution: Execution, record: ExecutionRecord) -> ExecutionRecord:
        """Write the end an agent reported; the record as callers see it."""
        final = execution.merged(record)
        self._ledger.drop(execution.execution_id)
        self._ledger.end(final)
        return final

    def give_up(self, execution: Execution, error: FluxError) -> ExecutionRecord:
        """Write an end that no agent had a part in. Unaccepted ones are forgotten: nobody knows their ID."""
        execution.over = True
        record = execution.given_up(error)
        if execution.created and not execution.detached and not isinstance(error, Withdrawn):
            self._ledger.forget(execution)
            return record
        self._ledger.drop(execution.execution_id)
        if execution.created:
            self._ledger.end(record)
        return record

    def withdraw(self, execution: Execution, reason: str, *, at_agent: bool = True) -> bool:
        """Stop it, whatever it is doing; does not block. True: it was waiting, and no agent has it.

        ``at_agent=False``: the caller asks the agent itself.
        """
        if execution.over:
            return False
        execution.stop_reason = reason
        if self.room.leave(execution):
            self._turn_away(execution, Withdrawn(reason))
            return True
        if execution.sent and at_agent:
            self._cancel(execution, reason)
        return False

    def stop(self) -> None:
        """Send nothing more. Waiting callers are told; what was accepted stays queued in the store."""
        self._stopping = True
        for execution in self.room.leave_all():
            if not execution.detached:
                execution.deliver(_stopping())

    def close(self, deadline: Deadline) -> None:
        """After ``stop``: what was to be driven on and was not begun goes back to the queue in the store."""
        left = [execution for execution, *_ in self._pool.stop(deadline)]
        with self._lock:
            left += self._paused.values()
            self._paused.clear()
        for execution in left:
            self._put_back(execution)


def _stopping() -> Stopping:
    return Stopping("Flux is stopping", retry_after=5)
