"""Records with their output, and output as a stream: the agents keep it, the store does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from fluxlib.control.agents.connection import AgentConnection
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.executions.dispatcher import Dispatcher
from fluxlib.control.executions.execution import State, merge_report
from fluxlib.control.executions.tracker import ExecutionTracker
from fluxlib.control.services import AgentAway, Nothing, OutputStream, no_such_execution
from fluxlib.errors import AgentError, InvalidInput, NotFound, Stopping, StoreUnavailable
from fluxlib.model import ExecutionRecord
from fluxlib.store.base import ExecutionEntry

# Between an agent's being asked and its knowing of it: a synchronous one announces nothing until its end.
_ARRIVAL = 0.05


class Outputs:
    """Reads from the agents. Every method may be called from any thread."""

    def __init__(self, tracker: ExecutionTracker, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._tracker = tracker
        self._fleet = fleet
        self._dispatcher = dispatcher
        self.stopping = False

    def stop(self) -> None:
        """Nothing begins any more: whoever follows what has not begun is let go."""
        self.stopping = True
        for execution_id in self._tracker.watched():
            self._tracker.changed(execution_id)

    def entry(self, execution_id: str) -> ExecutionEntry:
        """Raises NotFound."""
        entry = self._tracker.entry(execution_id)
        if entry is None:
            raise no_such_execution(execution_id)
        return entry

    def record(self, execution_id: str) -> ExecutionRecord:
        """The record with its output so far. Raises NotFound, AgentAway."""
        record = self.entry(execution_id).record
        if not record.agent_id or (record.status.ended and not record.output_bytes):
            return replace(record, output=b"")
        if record.status.ended and self._fleet.get(record.agent_id) is None:
            # The end is certain and stays; only what was printed went with the agent.
            warning = f"its output is lost: agent {record.agent_id} is gone"
            return replace(record, output=b"", warnings=(*record.warnings, warning))
        connection = self.need_connection(record)
        try:
            found = connection.record(execution_id, with_output=True)
        except AgentError as error:
            raise self.away(record, error.message) from error
        if record.status.ended:
            if found is None:
                warning = f"its output is no longer kept by agent {record.agent_id}"
                return replace(record, output=b"", warnings=(*record.warnings, warning))
            return replace(record, output=found.output)
        if found is None or found.error_kind.nothing_started:
            return replace(record, output=b"")  # on its way there, or on to another agent
        if not found.status.ended:
            return merge_report(record, found)
        # The agent's word reached us here before it did by itself.
        execution = self._tracker.get(execution_id)
        if execution is None:
            final = merge_report(record, found)
            self._tracker.write_end(final)
            return final
        if execution.state is State.RUNNING:
            self._dispatcher.ended(execution, found)
        return execution.merged(found)

    def stream(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        """Raises NotFound, AgentAway, InvalidInput (an offset beyond the end of an ended one)."""
        record = self.entry(execution_id).record
        if record.status.ended:
            if offset > record.output_bytes:
                raise InvalidInput(f"offset {offset} lies beyond the end: there are {record.output_bytes} bytes")
            if offset == record.output_bytes or not record.agent_id:
                return Nothing()
            return self._open(record, offset, follow=follow)
        if follow:
            return LiveOutput(self, self._tracker, execution_id, offset)
        if not record.agent_id:
            return Nothing()
        try:
            return self._open(record, offset, follow=False)
        except NotFound:
            return Nothing()

    def when_started(self, execution_id: str, offset: int) -> OutputStream | None:
        """The agent's stream, as soon as there is one; None while it waits or is on its way."""
        record = self.entry(execution_id).record
        if record.status.ended:
            short = offset >= record.output_bytes or not record.agent_id
            return Nothing() if short else self._open(record, offset, follow=True)
        if not record.agent_id:
            return None
        try:
            return self._open(record, offset, follow=True)
        except NotFound:
            return None

    def _open(self, record: ExecutionRecord, offset: int, *, follow: bool) -> OutputStream:
        connection = self.need_connection(record)
        try:
            return connection.output(record.execution_id, offset, follow=follow)
        except AgentError as error:
            raise self.away(record, error.message) from error

    # -- agents --------------------------------------------------------------------------

    def need_connection(self, record: ExecutionRecord) -> AgentConnection:
        """Raises AgentAway."""
        connection = self._fleet.connection(record.agent_id)
        if connection is None:
            raise self.away(record)
        return connection

    def away(self, record: ExecutionRecord, reason: str = "") -> AgentAway:
        """The agent that runs it cannot be asked; ``gone``: it is in no fleet any more."""
        agent_id = record.agent_id
        why = reason or "try again later"
        if self._fleet.get(agent_id) is None:
            if self._has_left(agent_id):
                return AgentAway(f"agent {agent_id}, which runs this execution, is gone", record, gone=True)
            why = "this Flux has not heard of it yet, try again in a moment"
        return AgentAway(f"agent {agent_id}, which runs this execution, is unreachable: {why}", record, gone=False)

    def _has_left(self, agent_id: str) -> bool:
        """Another Flux may have taken it in a moment ago."""
        try:
            return self._tracker.store.agent(agent_id) is None
        except StoreUnavailable:
            return False


class LiveOutput:
    """The output of one that runs, or waits yet: begins when it begins.

    Opened at once where possible, so that an agent that is away is an answer and no broken stream.
    """

    def __init__(self, outputs: Outputs, tracker: ExecutionTracker, execution_id: str, offset: int) -> None:
        self._outputs = outputs
        self._tracker = tracker
        self._execution_id = execution_id
        self._offset = offset
        self._changed = threading.Event()
        self._closed = False
        # Before the first look: a change after it must not be missed.
        tracker.watch(execution_id, self._changed.set)
        try:
            self._stream = outputs.when_started(execution_id, offset)
        except BaseException:
            tracker.unwatch(execution_id, self._changed.set)
            raise

    def __iter__(self) -> Iterator[bytes]:
        try:
            while self._stream is None and not self._closed:
                if self._outputs.stopping:
                    raise Stopping("Flux is stopping, and this has not begun")
                execution = self._tracker.get(self._execution_id)
                # Written to be there is enough: no event tells when it is sent.
                on_its_way = execution is not None and bool(execution.agent_id) and not execution.asynchronous
                self._changed.wait(_ARRIVAL if on_its_way else None)
                self._changed.clear()
                if not self._closed:
                    self._stream = self._outputs.when_started(self._execution_id, self._offset)
            if self._stream is not None and not self._closed:
                yield from self._stream
        finally:
            self.close()

    def close(self) -> None:
        self._closed = True
        self._tracker.unwatch(self._execution_id, self._changed.set)
        self._changed.set()
        if self._stream is not None:
            self._stream.close()
