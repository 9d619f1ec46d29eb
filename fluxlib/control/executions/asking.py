"""One execution to one agent: written first, sent when that holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from fluxlib.control.agents.registry import Reservation
from fluxlib.control.executions.execution import Execution, NotWritten, Outcome, Stage, Withdrawn
from fluxlib.control.executions.slots import Slots
from fluxlib.control.executions.tracker import COMMIT_PATIENCE, Ledger
from fluxlib.errors import AgentUnreachable, FluxError, NotFound, StoreUnavailable
from fluxlib.model import Behavior, ExecutionRecord

log = logging.getLogger(__name__)

Answered = Callable[[Execution, Reservation, ExecutionRecord | FluxError], None]


class Asking:
    """Asks agents. ``cancel`` and ``answered`` are the dispatcher's; ``answered`` delivers to those who wait."""

    def __init__(
        self, slots: Slots, ledger: Ledger, cancel: Callable[[Execution, str], None], answered: Answered
    ) -> None:
        self._slots = slots
        self._ledger = ledger
        self._cancel = cancel
        self._answered = answered

    def ask(self, execution: Execution, reservation: Reservation) -> Outcome | None:
        """The agent's answer; None when nobody waits for it here. Raises what kept the agent from being asked.

        The slot is given back in that case, and by ``answered`` in every other.
        """
        if not execution.created:
            return self._create_and_send(execution, reservation)
        self._assign(execution, reservation)
        self._send(execution, reservation)
        return None if execution.detached else execution.wait()

    def _assign(self, execution: Execution, reservation: Reservation) -> None:
        """Write who gets it; the slot is given back when that fails."""
        execution.agent_id = reservation.agent_id
        try:
            check_wanted(execution)
            self._ledger.assign(execution)
        except BaseException:
            self._slots.release(reservation)
            raise

    def _create_and_send(self, execution: Execution, reservation: Reservation) -> Outcome:
        """Write a new one with who gets it, and ask that agent once it holds; the agent's answer.

        The store's writer asks, so that the caller's thread is woken once and what was written together travels
        together.
        """
        execution.agent_id = reservation.agent_id
        try:
            check_wanted(execution)
            need = self._slots.last_need(execution.function_name)
            may_wait = Behavior.WAIT in (need.when_full, need.when_pressed)
            commit = self._ledger.create(execution, queued=False, keep_request=execution.asynchronous and may_wait)
        except BaseException:
            self._slots.release(reservation)
            raise
        commit.then(partial(self._created, execution, reservation))
        answer = execution.wait_for(COMMIT_PATIENCE)
        if answer is None and execution.decide():
            self._slots.release(reservation)
            raise StoreUnavailable("the store is too slow: a write did not hold in time")
        answer = answer or execution.wait()
        if isinstance(answer, NotWritten):
            raise answer.error
        return answer

    def _created(self, execution: Execution, reservation: Reservation, error: Exception | None) -> None:
        if not execution.decide():
            return
        if error is None:
            try:
                self._send(execution, reservation)
                return
            except Exception as trouble:
                log.exception("execution %s cannot be sent", execution.execution_id)
                error = trouble
        self._slots.release(reservation)
        execution.deliver(NotWritten(error))

    def _send(self, execution: Execution, reservation: Reservation) -> None:
        """Ask the agent. Its answer is delivered, or driven on by the pool when nobody waits."""
        request = execution.request
        if request is None:
            try:
                request = self._ledger.request_of(execution)
            except StoreUnavailable:
                self._slots.release(reservation)
                raise
        connection = reservation.agent.connection
        execution.reservation = reservation
        execution.waited_ms = int((time.time() - execution.accepted_at) * 1000)
        execution.stage = Stage.ASKED
        answered = partial(self._answered, execution, reservation)
        # After the stage: from here on whoever stops it asks the agent.
        stopped = execution.stop_reason
        if stopped:
            answered(Withdrawn(stopped))
        elif request is None:
            answered(NotFound("its request is no longer in the store"))
        elif connection is None:
            answered(AgentUnreachable(f"agent {reservation.agent_id} has just left"))
        else:
            connection.execute(request, answered)
            stopped = execution.stop_reason
            if stopped and execution.stage is Stage.ASKED:
                # It may have been stopped before the request was on its way, and unknown to the agent then.
                self._cancel(execution, stopped)


def check_wanted(execution: Execution) -> None:
    """Raises Withdrawn when it was stopped."""
    if execution.stop_reason:
        raise Withdrawn(execution.stop_reason)
