"""Executions as HTTP and the fleet see them: one record with one life, whichever way it was started."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from fluxlib.control.agents.connection import ConnectionEvents
from fluxlib.control.agents.registry import Registry
from fluxlib.control.executions.agent_calls import AgentCalls
from fluxlib.control.executions.cancelling import Cancelling
from fluxlib.control.executions.dispatcher import Dispatcher
from fluxlib.control.executions.execution import AlreadyKnown, Execution, new_execution_id
from fluxlib.control.executions.outputs import Outputs
from fluxlib.control.executions.reconciler import Recovery
from fluxlib.control.executions.repeated import Repeated
from fluxlib.control.executions.slots import Lookup
from fluxlib.control.executions.tracker import COMMIT_PATIENCE, Ledger
from fluxlib.control.services import Call, Caller, OutputStream
from fluxlib.errors import AgentLost, InvalidInput, NotFound, Stopping
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.store.base import ControlStore, ExecutionFilter, Lease, Page

# What those are ended with that are still waited for when the time to stop is over, and how long (seconds) they get.
_FAREWELL = "cancelled: Flux is stopping"
_FAREWELL_SECONDS = 1.5


class ExecutionService:
    """Implements services.Executions; ``tick`` is to be called about every second.

    ``kill_grace``, ``keep_for`` (how long an ended one can be asked for) are in seconds. ``shared``: other
    Flux processes may use the store. ``lease`` answers the leader's lease, None in a follower: only the leader expires.
    """

    def __init__(
        self,
        store: ControlStore,
        registry: Registry,
        functions: Lookup,
        timers: Timers,
        session: str,
        *,
        kill_grace: float = 2.0,
        keep_for: float = 3600.0,
        max_waiting: int = 10_000,
        shared: bool = False,
        lease: Callable[[], Lease | None] = lambda: None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._functions = functions
        self._shared = shared
        self._lease = lease
        self._ledger = Ledger(store, session, keep_for)
        self._calls = AgentCalls(registry, kill_grace, store.agent)
        self._dispatcher = Dispatcher(registry, functions, self._ledger, timers, self._calls.cancel_soon, max_waiting)
        self._recovery = Recovery(self._ledger, registry, self._dispatcher, self._calls, shared=shared)
        self._outputs = Outputs(self._ledger, self._calls, self._recovery)
        self._repeated = Repeated(self._ledger, self._calls)
        self._cancelling = Cancelling(self._ledger, self._dispatcher, self._calls, self._recovery, self._outputs)
        self._stopping = False

    # -- starting one ------------------------------------------------------------------

    def execute(self, call: Call, caller: Caller) -> ExecutionRecord:
        """See services.Executions. The slot is given back before this returns."""
        execution = self._execution(call, asynchronous=False)
        caller.on_gone(lambda: _discard(self._dispatcher.withdraw(execution, "cancelled: the client has gone away")))
        try:
            reservation = self._dispatcher.take(self._dispatcher.slots.need(call.function_name))
            record = self._dispatcher.drive(execution, reservation)
        except AgentLost as error:
            if execution.stop_reason == _FAREWELL:
                raise _stopping(execution, "the call was let go") from error
            raise
        finally:
            execution.over = True  # a client that leaves from now on has its answer
        if execution.stop_reason == _FAREWELL and record is not None and record.status is ExecutionStatus.CANCELLED:
            raise _stopping(execution, "the call was ended")
        if record is None:
            raise NotFound(f"execution {execution.execution_id} is gone from the store")
        return record

    def submit(self, call: Call) -> str:
        """See services.Executions. Answers once an agent has accepted it, or once it is queued for good."""
        deadline = Deadline(COMMIT_PATIENCE)
        while True:
            try:
                return self._submit(call)
            except AlreadyKnown as known:
                if self._repeated.stays(known.execution_id, deadline):
                    return known.execution_id
            # The first one came to nothing: this is the first now.

    def _submit(self, call: Call) -> str:
        """Raises AlreadyKnown."""
        execution = self._execution(call, asynchronous=True)
        execution.idempotency_key = call.idempotency_key
        reservation = self._dispatcher.take(self._dispatcher.slots.need(call.function_name))
        if reservation is None and call.idempotency_key:
            # What was accepted before is no matter of room.
            known = self._store.execution_by_key(call.function_name, call.idempotency_key)
            if known is not None and not (known.record.status.ended and known.keep_until <= time.time()):
                raise AlreadyKnown(known.execution_id)
        try:
            self._dispatcher.drive(execution, reservation)
        except AgentLost as error:
            if self._stopping:
                raise _stopping(execution, "whether an agent has accepted it is not known yet") from error
            raise
        return execution.execution_id

    def _execution(self, call: Call, *, asynchronous: bool) -> Execution:
        if self._stopping:
            raise Stopping("Flux is stopping", retry_after=5)
        function = self._functions.lookup(call.function_name)
        spec = function.spec
        if not function.code_digest:
            raise NotFound(f"function {spec.name} has no code yet: deploy a zip with PUT /deploy/{spec.name}")
        if call.timeout_seconds and spec.timeout_seconds and call.timeout_seconds > spec.timeout_seconds:
            raise InvalidInput(
                f"timeout: {call.timeout_seconds:g} s is more than the function's own {spec.timeout_seconds} s"
            )
        execution_id = new_execution_id()
        request = ExecutionRequest(
            execution_id, call.function_name, call.args, call.stdin, call.timeout_seconds, asynchronous
        )
        return Execution(call.function_name, request, execution_id, time.time())

    # -- reading -----------------------------------------------------------------------

    def get(self, execution_id: str) -> ExecutionRecord:
        return self._outputs.record(execution_id)

    def function_of(self, execution_id: str) -> str:
        return self._outputs.entry(execution_id).record.function_name

    def list(self, where: ExecutionFilter, cursor: str, limit: int) -> Page:
        try:
            page = self._store.executions(where, cursor, limit)
        except (ValueError, OverflowError) as error:
            raise InvalidInput("cursor: is not the `next` of a page of executions") from error
        entries = tuple(replace(entry, record=self._phased(entry.record)) for entry in page.entries)
        return replace(page, entries=entries)

    def _phased(self, record: ExecutionRecord) -> ExecutionRecord:
        # "running" is no write of its own: it would cost one more for each execution.
        held = self._ledger.get(record.execution_id) if record.phase is Phase.STARTING else None
        return replace(record, phase=Phase.RUNNING) if held is not None and held.sent else record

    def output(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        return self._outputs.stream(execution_id, offset, follow=follow)

    def cancel(self, execution_id: str) -> ExecutionRecord:
        """See services.Executions. Works on any Flux of the store, whoever started it."""
        return self._cancelling.cancel(execution_id)

    # -- for membership, the leader and the application --------------------------------

    def events(self, agent_id: str) -> ConnectionEvents:
        """What this agent's connection is to call."""
        registry = self._registry
        return ConnectionEvents(
            ended=lambda record: self._recovery.ended_at(agent_id, record),
            full=lambda function_name: registry.mark_full(agent_id, function_name),
            freed=lambda function_name: registry.freed(agent_id, function_name),
            attached=lambda yes: _discard(registry.update(agent_id, reachable=yes)),
            stopping=lambda: _discard(registry.update(agent_id, reachable=False)),
        )

    def start(self) -> None:
        """Take over what a former life left. The agents are asked as they join (``reconcile``)."""
        self._recovery.start()

    def adopt(self, dead_session: str, lease: Lease | None) -> int:
        """The leader: what a dead Flux owned is ours from now on. Raises LeaseLost, StoreUnavailable."""
        return self._recovery.adopt(dead_session, lease)

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None:
        """The agent joined, came back, or began a new life. Asks it in the background."""
        self._recovery.reconcile(agent_id, running)

    def agent_restarted(self, agent_id: str, began: float) -> None:
        """An agent that says nothing of what it runs has restarted, at ``began`` (epoch seconds)."""
        self._recovery.agent_restarted(agent_id, began)

    def agent_lost(self, agent_id: str, reason: str) -> int:
        """The agent is given up: its open executions have failed for good; how many."""
        return self._recovery.agent_lost(agent_id, reason)

    def tick(self, now: float) -> None:
        """About every second; ``now`` is epoch seconds."""
        self._ledger.settle()
        self._dispatcher.tick()
        self._recovery.tick(now)
        if self._shared:
            # Followers of what another Flux owns: nothing tells us of its changes.
            for execution_id in self._ledger.watched():
                if self._ledger.get(execution_id) is None:
                    self._ledger.changed(execution_id)
        if not self._shared or self._lease() is not None:
            while self._store.expire_executions() >= 1000:
                pass

    def waiting(self) -> Mapping[str, int]:
        """Function → how many executions wait here."""
        return self._dispatcher.room.counts()

    def count_open(self, function_name: str) -> int:
        return self._store.count_open(function_name)

    def stop(self, deadline: Deadline) -> None:
        """Refuse new ones, wait for those somebody waits for; queued asynchronous ones stay in the store.

        Calls that still run at the deadline are ended, which takes up to 1.5 s more. A caller whose agent does not
        say so in time is told when its connection closes, and the next life asks the agent for the end.
        """
        self._stopping = True
        self._dispatcher.stop()
        if self._ledger.drain(deadline):
            deadline = Deadline(_FAREWELL_SECONDS)
            for execution in self._ledger.all():
                if not execution.asynchronous:
                    self._dispatcher.withdraw(execution, _FAREWELL, at_agent=False)
                    if execution.sent:
                        self._calls.cancel_soon(execution, _FAREWELL, wait=False)
            self._ledger.drain(deadline)
        self._outputs.stop()
        self._dispatcher.close(deadline)
        self._calls.close(deadline)
        self._ledger.settle(deadline.remaining())


def _stopping(execution: Execution, what: str) -> Stopping:
    error = Stopping(f"Flux is stopping; {what}", retry_after=5)
    error.execution_id = execution.execution_id
    return error


def _discard(_result: object) -> None:
    return
