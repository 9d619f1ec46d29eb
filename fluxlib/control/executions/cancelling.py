"""Ending an execution because somebody asks for it: answered when it is dead, wherever it is and whoever owns it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from fluxlib.control.executions.agent_calls import AgentCalls
from fluxlib.control.executions.dispatcher import Dispatcher
from fluxlib.control.executions.execution import merged
from fluxlib.control.executions.outputs import Outputs
from fluxlib.control.executions.reconciler import Recovery
from fluxlib.control.executions.tracker import Ledger
from fluxlib.errors import Conflict
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus

# How often one is looked at again that was between two states.
_LOOKS = 20


class Cancelling:
    def __init__(
        self, ledger: Ledger, dispatcher: Dispatcher, calls: AgentCalls, recovery: Recovery, outputs: Outputs
    ) -> None:
        self._ledger = ledger
        self._dispatcher = dispatcher
        self._calls = calls
        self._recovery = recovery
        self._outputs = outputs

    def cancel(self, execution_id: str) -> ExecutionRecord:
        """The record once it is dead. Raises NotFound, Conflict (it has ended already), AgentAway."""
        changed = threading.Event()
        self._ledger.watch(execution_id, changed.set)
        try:
            deadline = Deadline(self._calls.cancel_timeout)
            for _ in range(_LOOKS):
                record = self._outputs.entry(execution_id).record
                if record.status.ended:
                    raise _already_ended(record)
                done = self._cancel_now(record)
                if done is not None:
                    return done
                # It is between two states: whoever moves it sees that it was stopped.
                if not changed.wait(deadline.remaining()):
                    break
                changed.clear()
                final = self._outputs.entry(execution_id).record
                if final.status is ExecutionStatus.CANCELLED:
                    return final
            raise self._calls.away(record, "it is not dead yet")
        finally:
            self._ledger.unwatch(execution_id, changed.set)

    def _cancel_now(self, record: ExecutionRecord) -> ExecutionRecord | None:
        """The record once it is dead; None when its own thread has been told, and will end it."""
        held = self._ledger.get(record.execution_id)
        if held is not None:
            waiting = self._dispatcher.withdraw(held, "cancelled", at_agent=False)
            if waiting or not held.sent:
                # The end of one nobody waits for is on its way: this one comes behind it.
                return self._end(record, "cancelled") if waiting and held.detached else None
            record = replace(record, agent_id=held.agent_id)
        elif not record.agent_id:
            # Another Flux's queue: it finds it ended when its turn comes.
            return self._end(record, "cancelled")
        status = self._calls.cancel(record, "cancelled")
        if status is None:
            return self._end(record, "cancelled; its agent knew nothing of it")
        if status is ExecutionStatus.RUNNING:
            raise self._calls.away(record, f"it was not dead within {self._calls.cancel_timeout:g} s")
        found = self._calls.need_connection(record).record(record.execution_id, with_output=False)
        if found is None or not found.status.ended:
            found = record.ended(status, at=time.time(), error="cancelled", kind=ErrorKind.CANCELLED)
        final = held.merged(found) if held is not None else merged(record, found)
        if held is None or held.accepted:
            self._recovery.ended(found if held is not None else final)
        if status is not ExecutionStatus.CANCELLED:
            raise _already_ended(final)
        commit = self._ledger.end(final)
        if commit is not None:
            commit.wait()
        return final

    def _end(self, record: ExecutionRecord, error: str) -> ExecutionRecord:
        """End one that no agent has, if nobody was quicker."""
        ended = record.ended(ExecutionStatus.CANCELLED, at=time.time(), error=error, kind=ErrorKind.CANCELLED)
        commit = self._ledger.end(ended)
        if commit is not None:
            commit.wait()
        final = self._outputs.entry(record.execution_id).record
        if final.status is not ExecutionStatus.CANCELLED:
            raise _already_ended(final)
        return final


def _already_ended(record: ExecutionRecord) -> Conflict:
    error = Conflict(f"execution {record.execution_id} has ended already: {record.status.value}")
    error.status = record.status.value
    return error
