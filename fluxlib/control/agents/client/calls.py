"""What one agent was asked to do over its stream and has not finished: who waits, and for what.

Every execution's ``on_answer`` is called exactly once: whoever takes it out of
the calls (or accepts it) under the lock calls it afterwards, without the lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from fluxlib.control.agents.connection import ConnectionEvents, OnAnswer, OnCancelled
from fluxlib.errors import AgentError, AgentLost, Conflict, FluxError
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb

log = logging.getLogger(__name__)


class Asked:
    """One execution. Asynchronous ones stay after they were accepted, until their end."""

    __slots__ = ("accepted", "fetching", "on_answer", "request", "sent")

    def __init__(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        # The message to send has its own reference to what may be megabytes.
        self.request = replace(request, stdin=b"") if request.stdin else request
        self.on_answer = on_answer
        self.sent = False
        self.accepted = False
        self.fetching = False

    def answer(self, answer: ExecutionRecord | FluxError) -> None:
        try:
            self.on_answer(answer)
        except Exception:
            log.exception("the answer to %s could not be taken", self.request.execution_id)


def guarded(events: ConnectionEvents) -> ConnectionEvents:
    """The same callbacks; one that fails is logged, and neither breaks the stream nor an answer behind it."""

    def guard(call: Callable[..., None]) -> Callable[..., None]:
        def guarded_call(*arguments: object) -> None:
            try:
                call(*arguments)
            except Exception:
                log.exception("an event of an agent's connection could not be taken")

        return guarded_call

    return ConnectionEvents(
        guard(events.ended),
        guard(events.missing),
        guard(events.full),
        guard(events.freed),
        guard(events.greeted),
        guard(events.attached),
        guard(events.stopping),
    )


def tell_cancelled(on_answer: OnCancelled, answer: ExecutionStatus | FluxError | None) -> None:
    try:
        on_answer(answer)
    except Exception:
        log.exception("the answer to a cancel could not be taken")


class OpenCalls:
    """Executions and cancels under way at one agent.

    ``lock`` is the stream's: methods under "with the lock held" expect it. ``fetch`` reads a record whose output was
    too large for the stream (blocking, raises AgentError).
    """

    def __init__(
        self,
        agent_id: str,
        lock: threading.Lock,
        events: ConnectionEvents,
        fetch: Callable[[str], ExecutionRecord | None],
    ) -> None:
        self._agent_id = agent_id
        self._lock = lock
        self._idle = threading.Condition(lock)
        self._events = events
        self._fetch_record = fetch
        self._asked: dict[str, Asked] = {}
        self._cancels: dict[str, tuple[str, list[OnCancelled]]] = {}  # the reason, and who is told

    # -- with the lock held ------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._asked)

    def add(self, request: ExecutionRequest, on_answer: OnAnswer) -> FluxError | None:
        """None, or why not."""
        if request.execution_id in self._asked:
            return Conflict(f"execution {request.execution_id} is with agent {self._agent_id} already")
        self._asked[request.execution_id] = Asked(request, on_answer)
        return None

    def sent(self, execution_id: str) -> None:
        """From now on the agent may have started it."""
        entry = self._asked.get(execution_id)
        if entry is not None:
            entry.sent = True

    def take(self, execution_id: str) -> Asked | None:
        self._idle.notify_all()
        return self._asked.pop(execution_id, None)

    def take_unanswered(self) -> list[Asked]:
        """What was sent and never answered. Accepted ones stay: they go on at the agent, seen or not."""
        found = [entry for entry in self._asked.values() if entry.sent and not entry.accepted]
        for entry in found:
            self.take(entry.request.execution_id)
        return found

    def wait_idle(self, timeout: float) -> None:
        """Until nobody waits for an answer. Lets the lock go meanwhile."""
        self._idle.wait_for(lambda: all(entry.accepted for entry in self._asked.values()), timeout)

    def reconcile(self, known: set[str], *, same: bool) -> list[Callable[[], None]]:
        """After a new attachment: what is to be called without the lock.

        ``known``: what the agent runs, or has ended and not told yet; it will. ``same``: it is the process that was
        attached before; another one knows nothing of what was sent to it.
        """
        calls: list[Callable[[], None]] = []
        for execution_id, entry in list(self._asked.items()):
            if not entry.sent or entry.fetching:
                continue  # never told, or told in full but for the output, which another thread reads
            there = same and execution_id in known
            if not there and not entry.accepted:
                calls.append(self._lose(entry))
                continue
            if entry.request.asynchronous and not entry.accepted:
                # The acceptance went down with the old stream.
                calls.append(self._accept(entry))
            if not there:
                # It ended while nobody listened, or the agent has lost it: its record says which.
                self.take(execution_id)
                calls.append(partial(self._events.missing, execution_id))
        return calls

    def add_cancel(self, execution_id: str, reason: str, on_answer: OnCancelled) -> None:
        self._cancels.setdefault(execution_id, (reason, []))[1].append(on_answer)

    def cancels(self) -> Iterable[tuple[str, str]]:
        """(execution ID, reason) of what is not known to be dead."""
        return [(execution_id, reason) for execution_id, (reason, _) in self._cancels.items()]

    def take_cancels(self) -> list[OnCancelled]:
        """Nobody will confirm them any more."""
        taken = [on_answer for _, waiting in self._cancels.values() for on_answer in waiting]
        self._cancels.clear()
        return taken

    # -- without the lock ----------------------------------------------------------------

    def answered(self, answer: pb.ExecutionAnswer) -> None:
        """An answer of the agent's; one that comes a second time or too late changes nothing."""
        with self._lock:
            entry = self._asked.get(answer.execution_id)
            if entry is not None and (entry.fetching or (not answer.final and entry.accepted)):
                return
            accepted = entry is not None and entry.accepted
        record = self._read(answer, entry)
        if entry is None:
            if isinstance(record, ExecutionRecord) and record.asynchronous and answer.response.record:
                self._events.ended(record)
            return
        if isinstance(record, ExecutionRecord) and not record.asynchronous and answer.final:
            missing = record.output_bytes > len(record.output or b"")
            if missing and not record.error_kind.nothing_started:
                self._fetch(entry, record)
                return
        with self._lock:
            if answer.final:
                if self.take(answer.execution_id) is not entry:
                    return
            else:
                entry.accepted = True
                self._idle.notify_all()
        self._tell(entry, record, final=answer.final, accepted=accepted)

    def cancel_answered(self, answer: pb.CancelAnswer) -> None:
        with self._lock:
            _, waiting = self._cancels.pop(answer.execution_id, ("", []))
        status = answer.response.status
        for on_answer in waiting:
            tell_cancelled(on_answer, ExecutionStatus(status) if status else None)

    def _read(self, answer: pb.ExecutionAnswer, entry: Asked | None) -> ExecutionRecord | FluxError:
        request = entry.request if entry is not None else ExecutionRequest(answer.execution_id, "")
        try:
            return codec.record_from_response(answer.response, request, self._agent_id, time.time())
        except ValueError as error:
            return AgentLost(f"agent {self._agent_id} answered what cannot be read: {error}")

    def _tell(self, entry: Asked, record: ExecutionRecord | FluxError, *, final: bool, accepted: bool) -> None:
        request = entry.request
        if isinstance(record, FluxError):
            if not accepted:
                entry.answer(record)
            return
        refused = final and record.error_kind.nothing_started
        if refused and not accepted:
            if record.error_kind is ErrorKind.AT_CAPACITY:
                self._events.full(request.function_name)
            entry.answer(record)
        elif not request.asynchronous or not final:
            entry.answer(record)
        else:
            if not accepted:
                # Its acceptance was lost with a stream, or it ended too soon for one.
                entry.answer(self._accepted(request))
            self._events.ended(self._gone(request) if refused else replace(record, output=None))

    def _fetch(self, entry: Asked, record: ExecutionRecord) -> None:
        """The answer waits for its output, in a thread of its own: the stream must go on."""
        with self._lock:
            entry.fetching = True

        def fetch() -> None:
            try:
                # The record again too: this one counts what did not fit into the answer as cut off.
                whole = self._fetch_record(record.execution_id)
                why = "the agent has forgotten it"
            except AgentError as error:
                whole, why = None, error.message
            self._fetched(entry, whole if whole is not None and whole.status.ended else _cut_off(record, why))

        try:
            threading.Thread(target=fetch, name=f"output-{record.execution_id}", daemon=True).start()
        except RuntimeError as error:  # the machine has no thread left: nobody else would answer it
            self._fetched(entry, _cut_off(record, str(error)))

    def _fetched(self, entry: Asked, record: ExecutionRecord) -> None:
        with self._lock:
            mine = self.take(entry.request.execution_id) is entry
        if mine:
            entry.answer(record)

    # -- after a new attachment ------------------------------------------------------------

    def _lose(self, entry: Asked) -> Callable[[], None]:
        self.take(entry.request.execution_id)
        error = AgentLost(f"agent {self._agent_id} was lost for a while, and does not know the execution any more")
        return lambda: entry.answer(error)

    def _accept(self, entry: Asked) -> Callable[[], None]:
        entry.accepted = True
        return lambda: entry.answer(self._accepted(entry.request))

    def _accepted(self, request: ExecutionRequest) -> ExecutionRecord:
        return ExecutionRecord(
            request.execution_id, request.function_name, self._agent_id, asynchronous=True, started_at=time.time()
        )

    def _gone(self, request: ExecutionRequest) -> ExecutionRecord:
        lost = f"agent {self._agent_id} does not know the execution any more"
        return self._accepted(request).ended(
            ExecutionStatus.FAILED, at=time.time(), error=lost, kind=ErrorKind.AGENT_LOST
        )


def _cut_off(record: ExecutionRecord, why: str) -> ExecutionRecord:
    """With what came of its output, and a word about the rest."""
    return replace(record, truncated=True, warnings=(*record.warnings, f"the rest of the output was lost: {why}"))
