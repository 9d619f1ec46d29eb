"""Executions as HTTP and the fleet see them: one record from acceptance to end, whichever way it was started."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from fluxlib.control.agents.connection import ConnectionEvents
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.executions.dispatcher import CancelAnswer, Dispatcher
from fluxlib.control.executions.execution import (
    AlreadyKnown,
    Execution,
    OnReply,
    Reply,
    State,
    merge_report,
    new_execution_id,
)
from fluxlib.control.executions.outputs import Outputs
from fluxlib.control.executions.placement import Functions
from fluxlib.control.executions.reconciler import Reconciler
from fluxlib.control.executions.tracker import COMMIT_SECONDS, ExecutionTracker
from fluxlib.control.services import AgentAway, Call, Caller, OutputStream
from fluxlib.errors import AgentError, AgentLost, Conflict, FluxError, InvalidInput, NotFound, Stopping, Unavailable
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.store.base import ControlStore, ExecutionFilter, Lease, Page

# Calls that still run when the time to stop is over are cancelled with this reason, and get so long (seconds) to end.
_SHUTDOWN_CANCEL = "cancelled: Flux is stopping"
_SHUTDOWN_CANCEL_SECONDS = 1.5
_CLIENT_GONE = "cancelled: the client has gone away"
# Seconds beyond the grace that a kill may take until it is certain.
_KILL_MARGIN = 5.0
# No event tells what another Flux does with a submission: it is looked at this often (seconds).
_LOOK_SECONDS = 0.2


class ExecutionService:
    """Implements services.Executions; ``tick`` is to be called about every second.

    ``kill_grace``, ``keep_for`` (how long an ended one can be asked for) are in seconds; at most ``max_records`` ended
    ones are kept. ``shared``: other Flux processes may use the store. ``lease`` answers the leader's lease, None in a
    follower: only the leader expires.
    """

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        functions: Functions,
        timers: Timers,
        session: str,
        *,
        kill_grace: float = 2.0,
        keep_for: float = 3600.0,
        max_records: int = 200_000,
        max_waiting: int = 10_000,
        max_backlog_bytes: int = 1024**3,
        shared: bool = False,
        lease: Callable[[], Lease | None] = lambda: None,
    ) -> None:
        self._store = store
        self._max_records = max_records
        self._fleet = fleet
        self._functions = functions
        self._shared = shared
        self._lease = lease
        self._cancel_timeout = kill_grace + _KILL_MARGIN
        self._tracker = ExecutionTracker(store, session, keep_for, fleet.release)
        self._dispatcher = Dispatcher(fleet, functions, self._tracker, timers, max_waiting, max_backlog_bytes)
        self._reconciler = Reconciler(self._tracker, fleet, self._dispatcher, shared=shared)
        self._outputs = Outputs(self._tracker, fleet, self._dispatcher)
        self._stopping = False

    # -- starting one ------------------------------------------------------------------

    def execute(self, call: Call, caller: Caller) -> ExecutionRecord:
        """See services.Executions. The slot is given back before this returns."""
        waiter = _Waiter()
        execution = self.start_call(call, caller, waiter.reply)
        try:
            record = waiter.wait()
        except AgentLost as error:
            if execution.cancel_reason == _SHUTDOWN_CANCEL:
                raise _stopping(execution, "the call was let go") from error
            raise
        if execution.cancel_reason == _SHUTDOWN_CANCEL and record.status is ExecutionStatus.CANCELLED:
            raise _stopping(execution, "the call was ended")
        return record

    def start_call(self, call: Call, caller: Caller, on_reply: OnReply) -> Execution:
        """Start a synchronous execution; ``on_reply`` gets its final record or an error, on any thread, once.

        Raises what is wrong with the call itself.
        """
        execution = self._execution(call, asynchronous=False, on_reply=on_reply)
        caller.on_gone(lambda: self._client_gone(execution))
        self._dispatcher.start(execution)
        return execution

    def _client_gone(self, execution: Execution) -> None:
        if execution.on_reply is not None:  # else it has its answer
            self._dispatcher.cancel(execution, _CLIENT_GONE)

    def submit(self, call: Call) -> str:
        """See services.Executions. Answers once an agent has accepted it, or once it is queued for good."""
        deadline = Deadline(COMMIT_SECONDS)
        while True:
            try:
                return self._submit(call)
            except AlreadyKnown as known:
                if self._stays(known.execution_id, deadline):
                    return known.execution_id
            # The first one came to nothing: this is the first now.

    def _submit(self, call: Call) -> str:
        """Raises AlreadyKnown."""
        waiter = _Waiter()
        execution = self._execution(call, asynchronous=True, on_reply=waiter.reply)
        execution.idempotency_key = call.idempotency_key
        self._dispatcher.start(execution)
        try:
            waiter.wait()
        except AgentLost as error:
            if self._stopping:
                raise _stopping(execution, "whether an agent has accepted it is not known yet") from error
            raise
        return execution.execution_id

    def _stays(self, execution_id: str, deadline: Deadline) -> bool:
        """Wait until a submission under the same idempotency key is settled: True when its ID can be answered, False
        when it was rejected and forgotten.

        Raises Unavailable when that is not known at the deadline, StoreUnavailable.
        """
        changed = threading.Event()
        # Before the first look: a change after it must not be missed.
        self._tracker.watch(execution_id, changed.set)
        try:
            while True:
                settled = self._settled(execution_id)
                if settled is not None:
                    return settled
                remaining = deadline.remaining()
                if remaining <= 0:
                    text = "the first submission with this Idempotency-Key has not been accepted yet: try again"
                    raise Unavailable(text, retry_after=1)
                changed.wait(min(_LOOK_SECONDS, remaining))
                changed.clear()
        finally:
            self._tracker.unwatch(execution_id, changed.set)

    def _settled(self, execution_id: str) -> bool | None:
        """None: neither yet. In this order: what goes from one place is in the next before."""
        execution = self._tracker.get(execution_id)
        if execution is not None:
            return True if execution.accepted else None
        if self._tracker.is_forgetting(execution_id):
            return None
        entry = self._store.execution(execution_id)
        if entry is None:
            return False
        if entry.owner == self._tracker.session or entry.record.status.ended or entry.record.phase is Phase.QUEUED:
            return True
        # Another Flux has sent it to this agent, which knows what it has accepted. The store is not told of that.
        connection = self._fleet.connection(entry.record.agent_id)
        try:
            found = connection.record(execution_id, with_output=False) if connection is not None else None
        except AgentError:
            return None
        # It also keeps what it had begun to start and could not: that one is sent on, or rejected.
        return True if found is not None and not found.error_kind.nothing_started else None

    def _execution(self, call: Call, *, asynchronous: bool, on_reply: OnReply) -> Execution:
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
        return Execution(call.function_name, request, execution_id, time.time(), on_reply)

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
        execution = self._tracker.get(record.execution_id) if record.phase is Phase.STARTING else None
        sent = execution is not None and execution.state.at_agent
        return replace(record, phase=Phase.RUNNING) if sent else record

    def output(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        return self._outputs.stream(execution_id, offset, follow=follow)

    # -- cancelling --------------------------------------------------------------------

    def cancel(self, execution_id: str) -> ExecutionRecord:
        """See services.Executions. Works on any Flux of the store, whoever started it."""
        execution = self._tracker.get(execution_id)
        if execution is None:
            return self._cancel_elsewhere(execution_id)
        changed = threading.Event()
        answers: list[CancelAnswer] = []

        def answered(answer: CancelAnswer) -> None:
            answers.append(answer)
            changed.set()

        self._tracker.watch(execution_id, changed.set)
        try:
            self._dispatcher.cancel(execution, "cancelled", answered)
            deadline = Deadline(self._cancel_timeout)
            while execution.state is not State.ENDED:
                if not changed.wait(deadline.remaining()):
                    raise self._not_dead(execution.record(Phase.ENDING))
                changed.clear()
                if answers:
                    self._check_cancelled(execution, answers.pop())
        finally:
            self._tracker.unwatch(execution_id, changed.set)
        if execution.final is None:
            # It is not this process's any more: in the store's backlog, or another Flux's.
            return self._cancel_elsewhere(execution_id)
        if execution.commit is not None:
            execution.commit.wait(COMMIT_SECONDS)
        final = self._outputs.entry(execution_id).record
        if final.status is not ExecutionStatus.CANCELLED:
            raise _already_ended(final)
        return final

    def _check_cancelled(self, execution: Execution, answer: CancelAnswer) -> None:
        """What the agent said of it, before its end has come. Raises AgentAway when that will not come soon."""
        if execution.state is State.ENDED:
            return
        if isinstance(answer, FluxError):
            raise self._outputs.away(execution.record(Phase.ENDING), answer.message)
        if answer is ExecutionStatus.RUNNING:
            raise self._not_dead(execution.record(Phase.ENDING))
        if answer is not None and execution.watch is not None:
            # It is dead, and no event will tell its end.
            record = execution.record(Phase.ENDING)
            self._dispatcher.ended(execution, self._end_of(record, answer))

    def _cancel_elsewhere(self, execution_id: str) -> ExecutionRecord:
        """One that is not in flight here: it has ended, waits in the store, or runs for another Flux."""
        record = self._outputs.entry(execution_id).record
        if record.status.ended:
            raise _already_ended(record)
        if not record.agent_id:
            return self._end_elsewhere(record, "cancelled")
        connection = self._outputs.need_connection(record)
        try:
            status = connection.cancel(execution_id, reason="cancelled", timeout=self._cancel_timeout)
            if status is None:
                return self._end_elsewhere(record, "cancelled; its agent knew nothing of it")
            if status is ExecutionStatus.RUNNING:
                raise self._not_dead(record)
            final = merge_report(record, self._end_of(record, status))
        except AgentError as error:
            if isinstance(error, AgentAway):
                raise
            raise self._outputs.away(record, error.message) from error
        return self._write_elsewhere(final)

    def _end_of(self, record: ExecutionRecord, status: ExecutionStatus) -> ExecutionRecord:
        """The agent's report of one that is dead. Raises AgentError."""
        found = self._outputs.need_connection(record).record(record.execution_id, with_output=False)
        if found is not None and found.status.ended:
            return found
        return record.ended(status, at=time.time(), error="cancelled", kind=ErrorKind.CANCELLED)

    def _end_elsewhere(self, record: ExecutionRecord, error: str) -> ExecutionRecord:
        return self._write_elsewhere(
            record.ended(ExecutionStatus.CANCELLED, at=time.time(), error=error, kind=ErrorKind.CANCELLED)
        )

    def _write_elsewhere(self, final: ExecutionRecord) -> ExecutionRecord:
        """Write the end, if nobody was quicker."""
        commit = self._tracker.write_end(final)
        if commit is not None:
            commit.wait(COMMIT_SECONDS)
        written = self._outputs.entry(final.execution_id).record
        if written.status is not ExecutionStatus.CANCELLED:
            raise _already_ended(written)
        return written

    def _not_dead(self, record: ExecutionRecord) -> AgentAway:
        return self._outputs.away(record, f"it was not dead within {self._cancel_timeout:g} s")

    # -- for membership, the leader and the application --------------------------------

    def events(self, agent_id: str) -> ConnectionEvents:
        """What this agent's connection is to call."""
        fleet = self._fleet
        return ConnectionEvents(
            ended=lambda report: self._reconciler.ended(agent_id, report),
            full=lambda function_name: fleet.mark_full(agent_id, function_name),
            freed=lambda function_name: fleet.freed(agent_id, function_name),
            missing=lambda attempt_id: self._reconciler.missing(agent_id, attempt_id),
        )

    def start(self) -> None:
        """Take over what an earlier process left. The agents are asked as they join (``reconcile``)."""
        agents = (agent.agent_id for agent in self._store.agents() if agent.status.takes_work)
        self._dispatcher.placement.await_agents(list(agents))
        self._reconciler.start()

    def adopt(self, dead_session: str, lease: Lease | None) -> int:
        """The leader: what a dead Flux owned is ours from now on. Raises LeaseLost, StoreUnavailable."""
        return self._reconciler.adopt(dead_session, lease)

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None:
        """The agent joined, came back, or restarted. Asks it in the background."""
        self._reconciler.reconcile(agent_id, running)

    def agent_restarted(self, agent_id: str, began: float) -> None:
        """An agent that says nothing of what it runs has restarted, at ``began`` (epoch seconds)."""
        self._reconciler.agent_restarted(agent_id, began)

    def agent_lost(self, agent_id: str, reason: str) -> int:
        """The agent is given up: its open executions have failed for good; how many."""
        return self._reconciler.agent_lost(agent_id, reason)

    def tick(self, now: float) -> None:
        """About every second; ``now`` is epoch seconds."""
        self._tracker.write_again()
        try:
            self._dispatcher.tick()
        finally:
            self._reconciler.tick(now)
        if self._shared:
            # Followers of what another Flux owns: nothing tells us of its changes.
            for execution_id in self._tracker.watched():
                if self._tracker.get(execution_id) is None:
                    self._tracker.changed(execution_id)
        if not self._shared or self._lease() is not None:
            while self._store.expire_executions(self._max_records) >= 1000:
                pass

    def waiting(self) -> Mapping[str, int]:
        """Function → how many executions wait here; at the leader also those that nobody has claimed."""
        return self._dispatcher.backlog.counts(unclaimed=not self._shared or self._lease() is not None)

    def count_open(self, function_name: str) -> int:
        return self._store.count_open(function_name)

    def stop(self, deadline: Deadline) -> None:
        """Refuse new ones, wait for those somebody waits for; queued asynchronous ones stay in the store.

        Calls that still run at the deadline are ended, which takes up to 1.5 s more. A caller whose agent does not
        say so in time is told when its connection closes, and the next life asks the agent for the end.
        """
        self._stopping = True
        self._dispatcher.stop()
        if self._tracker.drain(deadline):
            deadline = Deadline(_SHUTDOWN_CANCEL_SECONDS)
            for execution in self._tracker.all():
                if not execution.asynchronous and execution.on_reply is not None:
                    self._dispatcher.cancel(execution, _SHUTDOWN_CANCEL)
            self._tracker.drain(deadline)
        self._outputs.stop()
        self._dispatcher.close(deadline)
        self._reconciler.close(deadline)
        self._tracker.write_again()


class _Waiter:
    """A thread that waits for the reply to its execution."""

    __slots__ = ("_ready", "_reply")

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._ready = threading.Lock()  # an Event costs twice as much
        self._ready.acquire()

    def reply(self, reply: Reply) -> None:
        self._reply = reply
        self._ready.release()

    def wait(self) -> ExecutionRecord:
        """Raises the error when that is the reply."""
        self._ready.acquire()
        reply = self._reply
        if isinstance(reply, FluxError):
            raise reply
        assert reply is not None
        return reply


def _stopping(execution: Execution, what: str) -> Stopping:
    error = Stopping(f"Flux is stopping; {what}", retry_after=5)
    error.execution_id = execution.execution_id
    return error


def _already_ended(record: ExecutionRecord) -> Conflict:
    error = Conflict(f"execution {record.execution_id} has ended already: {record.status.value}")
    error.status = record.status.value
    return error
