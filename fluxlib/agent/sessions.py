"""The multiplexed stream: many executions over one call, answers batched into frames.

A session is one process of one Flux. When its stream breaks, its answers wait and
its synchronous executions go on for a grace period. A Flux that attaches again under the same
name gets what it missed; one that does not has its synchronous executions cancelled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fluxlib.agent.executions import Answer, Executions, rejection_record, sendable
from fluxlib.agent.health import StallDetector
from fluxlib.errors import AtCapacity, FluxError, Stopping, StoreUnavailable
from fluxlib.lifecycle import Timer, Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.pace import Pace

log = logging.getLogger(__name__)

# Answers that travel in one frame at most; a large output travels alone.
_BATCH = 64
_BATCH_BYTES = 1024 * 1024
# Outputs held in memory for a Flux that does not fetch them; more work is refused until it does.
_PENDING_BYTES = 64 * 1024 * 1024
_PENDING_ANSWERS = 20_000


@dataclass(frozen=True, slots=True)
class PendingReply:
    """One answer, not yet encoded: that is done by the stream's thread, not by the one that ends executions."""

    record: ExecutionRecord
    final: bool
    with_output: bool = False

    @property
    def size(self) -> int:
        return len(self.record.output or b"") if self.with_output else 0


class Session:
    """One process of one Flux. Pushed to from any thread, drained by the stream that is attached.

    ``fetch`` completes a record whose output lies in a file; only while its frame is made, so that large
    outputs do not wait in memory. ``running`` tells how many executions there are now.
    """

    def __init__(
        self, name: str, fetch: Callable[[ExecutionRecord], ExecutionRecord], running: Callable[[], int]
    ) -> None:
        self.name = name
        self.condition = threading.Condition()
        self.generation = 0  # of the stream attached last; an older one must end
        self.grace: Timer | None = None
        self.refused: set[str] = set()  # functions refused at capacity since they last had room
        self._fetch = fetch
        self._running = running
        self._gathering = False  # the stream has something to bring, and waits for more
        self._pace = Pace()
        self._answers: deque[PendingReply] = deque()
        self._cancelled: deque[pb.CancelAnswer] = deque()
        self._freed: set[str] = set()
        self._stopping = False
        self._finishing = False
        self._last_of = 0  # the generation whose stream brings what waits, and ends
        self._unacknowledged: dict[str, PendingReply] = {}
        self._pending_bytes = 0

    def answer(self, pending: PendingReply) -> None:
        with self.condition:
            if pending.final:
                self._forget(pending.record.execution_id)
                self._unacknowledged[pending.record.execution_id] = pending
                self._pending_bytes += pending.size
            self._answers.append(pending)
            if not self._gathering:
                self.condition.notify()

    def cancel_answered(self, answer: pb.CancelAnswer) -> None:
        with self.condition:
            self._cancelled.append(answer)
            self.condition.notify()

    def freed(self, names: Iterable[str]) -> None:
        with self.condition:
            self.refused.difference_update(names)
            self._freed.update(names)
            self.condition.notify()

    def announce_stopping(self) -> None:
        with self.condition:
            self._stopping = True
            self.condition.notify()

    def acknowledge(self, execution_ids: Iterable[str]) -> None:
        with self.condition:
            for execution_id in execution_ids:
                self._forget(execution_id)

    @property
    def backlog_full(self) -> bool:
        """Whether this Flux leaves too many answers unfetched to be given more work."""
        return self._pending_bytes > _PENDING_BYTES or len(self._unacknowledged) > _PENDING_ANSWERS

    def resume(self) -> list[str]:
        """A new stream: what the last one may not have brought is sent again; a second time does no harm.

        Answers the IDs of what is pending. Call it with the condition held.
        """
        waiting = {pending.record.execution_id for pending in self._answers if pending.final}
        self._answers.extend(pending for one, pending in self._unacknowledged.items() if one not in waiting)
        return list(self._unacknowledged)

    def next_frame(self, generation: int) -> pb.AgentFrame | None:
        """Everything that waits, as one frame; None when this stream's time is over."""
        with self.condition:
            while self.generation == generation:
                if self._answers or self._cancelled or self._freed or self._stopping:
                    if self._gather():
                        continue
                    batch = self._batch()
                    break
                if self._finishing or self._last_of == generation:
                    return None
                self.condition.wait()
            else:
                return None
            frame = pb.AgentFrame(stopping=self._stopping, cancelled=self._cancelled, freed=self._freed)
            self._cancelled.clear()
            self._freed.clear()
            self._stopping = False
        frame.executed.extend(self._encoded(pending) for pending in batch)
        return frame

    def _gather(self) -> bool:
        """Whether it has waited for more to bring, and must look again. With the condition held."""
        now = time.monotonic()
        left = self._pace.left(self._running(), now)
        if left <= 0 or self._cancelled or self._freed or self._stopping or self._finishing:
            self._pace.went(now)
            return False
        self._gathering = True
        self.condition.wait(left)
        self._gathering = False
        return True

    def finish(self) -> None:
        """The stream attached now brings what waits, and ends. Call it with the condition held."""
        self._finishing = True
        self.condition.notify_all()

    def finish_stream(self, generation: int) -> None:
        """As ``finish``, for this stream alone: another may follow."""
        with self.condition:
            self._last_of = generation
            self.condition.notify_all()

    def end_streams(self) -> None:
        """The stream attached now ends. Call it with the condition held."""
        self.generation += 1
        self.condition.notify_all()

    def _batch(self) -> list[PendingReply]:
        batch: list[PendingReply] = []
        size = 0
        while self._answers and len(batch) < _BATCH:
            size += self._answers[0].record.output_bytes if self._answers[0].with_output else 0
            if batch and size > _BATCH_BYTES:
                break
            batch.append(self._answers.popleft())
        return batch

    def _encoded(self, pending: PendingReply) -> pb.ExecutionAnswer:
        record = pending.record
        if not pending.final:
            return pb.ExecutionAnswer(execution_id=record.execution_id, response=pb.ExecutionResponse())
        if pending.with_output:
            record = sendable(self._fetch(record))
        response = codec.response_from_record(record, with_output=pending.with_output)
        return pb.ExecutionAnswer(execution_id=record.execution_id, final=True, response=response)

    def _forget(self, execution_id: str) -> None:
        pending = self._unacknowledged.pop(execution_id, None)
        if pending is not None:
            self._pending_bytes -= pending.size


class Sessions:
    """The sessions of every Flux this agent works for. ``grace`` is in seconds.

    ``stalls`` says when synchronous requests may be stale.
    """

    def __init__(
        self, executions: Executions, timers: Timers, stalls: StallDetector, instance_id: str, grace: float
    ) -> None:
        self._executions = executions
        self._stalls = stalls
        self._timers = timers
        self._instance_id = instance_id
        self._grace = grace
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._closed = False
        executions.on_freed(self._on_freed)

    def serve(self, requests: Iterator[Any], is_active: Callable[[], bool], end: Callable[[], None]) -> Iterator[Any]:
        """The frames of one attached stream. ``requests`` are its ControlFrames; ``end`` breaks the call off."""
        try:
            first = next(requests, None)
        except Exception:
            return  # it broke before it began
        if first is None or not first.hello.session:
            return
        attached = self._attach(first.hello.session)
        if attached is None:
            return
        session, generation, greeting = attached
        reader = threading.Thread(
            target=self._read,
            args=(session, generation, first, requests, end),
            name=f"attach-{generation}",
            daemon=True,
        )
        try:
            reader.start()
            yield greeting
            while is_active() and (frame := session.next_frame(generation)) is not None:
                yield frame
        finally:
            self._detach(session, generation)

    def announce_stopping(self) -> None:
        """No further work is taken: every Flux is told, so that it asks elsewhere."""
        for session in self._all():
            session.announce_stopping()

    def close(self) -> None:
        """Every stream ends once it has brought what waits; no new one begins."""
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                with session.condition:
                    session.finish()

    def notify_capacity_changed(self, function_name: str) -> None:
        """The function has changed: it may have room now without anything having ended."""
        self._on_freed(function_name)

    # -- attaching -----------------------------------------------------------------

    def _attach(self, name: str) -> tuple[Session, int, pb.AgentFrame] | None:
        with self._lock:
            if self._closed:
                return None
            session = self._sessions.get(name)
            if session is None:
                session = self._sessions[name] = Session(
                    name, self._executions.with_output, lambda: self._executions.active
                )
                # It may have been detached before: its asynchronous executions went on.
                made = session
                self._executions.reattach_owner(name, lambda asynchronous: _final(made, with_output=not asynchronous))
            with session.condition:
                if session.grace is not None:
                    session.grace.cancel()
                    session.grace = None
                session.end_streams()
                generation = session.generation
                pending = session.resume()
                # Under the condition: what ends from now on is pushed behind the greeting.
                known = sorted({*pending, *self._executions.expected_by(name)})
            return session, generation, pb.AgentFrame(instance_id=self._instance_id, known=known)

    def _detach(self, session: Session, generation: int) -> None:
        with self._lock, session.condition:
            if session.generation != generation:
                return  # a newer stream has taken over
            session.end_streams()
            if not self._closed:
                since = session.generation
                session.grace = self._timers.after(self._grace, lambda: self._vanished(session, since))

    def _vanished(self, session: Session, since: int) -> None:
        with self._lock:
            # It may have come back while this waited for the lock, and be gone again: then another grace has begun.
            if session.generation != since or self._sessions.get(session.name) is not session:
                return
            del self._sessions[session.name]
            # Under the lock: one that attaches anew now and asks for its executions again must not be detached too.
            self._executions.detach_owner(session.name)
        count = self._executions.cancel_owned(session.name, "cancelled: the Flux that waited for it has vanished")
        if count:
            log.warning(
                "session %s did not reconnect within %d s; cancelled its %d synchronous executions",
                session.name,
                self._grace,
                count,
            )

    def _all(self) -> list[Session]:
        return list(self._sessions.values())

    # -- what Flux sends -----------------------------------------------------------

    def _read(
        self, session: Session, generation: int, first: Any, requests: Iterator[Any], end: Callable[[], None]
    ) -> None:
        try:
            self._take(session, first)
            for frame in requests:
                self._take(session, frame)
            # Flux ends it in order, for another channel: what waits is brought first. Freed slots are told only once.
            session.finish_stream(generation)
        except Exception as error:
            # gRPC ends a broken request stream with an exception of its own.
            log.debug("the stream of %s ended: %s", session.name, error)
            self._detach(session, generation)
            end()

    def _take(self, session: Session, frame: Any) -> None:
        if frame.received:
            session.acknowledge(list(frame.received))
        for message in frame.execute:
            self._execute(session, codec.request_from_message(message))
        for message in frame.cancel:
            self._cancel(session, message)

    def _execute(self, session: Session, request: ExecutionRequest) -> None:
        refused = self._reject_reason(session, request)
        if refused is not None:
            session.answer(PendingReply(rejection_record(request, "", refused), final=True))
            return
        if request.asynchronous:
            record, accepted = self._start_asynchronous(session, request)
        else:
            record, accepted = self._executions.start(request, _final(session, with_output=True), session.name)
        if accepted:
            return
        if record.error_kind is ErrorKind.AT_CAPACITY:
            with session.condition:
                session.refused.add(request.function_name)
        session.answer(PendingReply(record, final=True))
        # A slot may have freed between the refusal and these lines.
        if record.error_kind is ErrorKind.AT_CAPACITY and self._executions.has_capacity(request.function_name):
            session.freed([request.function_name])

    def _reject_reason(self, session: Session, request: ExecutionRequest) -> FluxError | None:
        """Why it is not even looked at."""
        if session.backlog_full:
            return AtCapacity(f"function {request.function_name} at capacity: answers wait to be fetched")
        if not request.asynchronous and self._stalls.recently_stalled:
            # Its caller may have given up on it and called again. One that still waits is sent to another agent.
            return Stopping("the agent was suspended for a while and rejects synchronous requests that may be stale")
        return None

    def _start_asynchronous(self, session: Session, request: ExecutionRequest) -> tuple[ExecutionRecord, bool]:
        """As Executions.start; a run that ends at once is answered behind its acceptance all the same."""
        held: list[ExecutionRecord] = []
        told = False

        def ended(record: ExecutionRecord) -> None:
            with session.condition:
                if told:
                    session.answer(PendingReply(record, final=True))
                else:
                    held.append(record)

        record, accepted = self._executions.start(request, ended, session.name)
        if accepted:
            with session.condition:
                told = True
                if not record.status.ended:
                    session.answer(PendingReply(record, final=False))
                for final in held:
                    session.answer(PendingReply(final, final=True))
        return record, accepted

    def _cancel(self, session: Session, message: Any) -> None:
        execution_id = message.execution_id

        def answer(record: ExecutionRecord | None, in_time: bool = True) -> None:
            response = cancel_response(record, in_time=in_time)
            session.cancel_answered(pb.CancelAnswer(execution_id=execution_id, response=response))

        on_dead = None if message.no_wait else answer
        try:
            record = self._executions.cancel(execution_id, message.reason or "cancelled", on_dead)
        except (StoreUnavailable, OSError) as error:
            # One that this machine cannot stop now must not end everybody's stream.
            response = pb.CancelExecutionResponse(message=str(error), error_kind=pb.ERROR_KIND_INTERNAL)
            session.cancel_answered(pb.CancelAnswer(execution_id=execution_id, response=response))
            return
        if record is None or record.status.ended:
            answer(record, in_time=False)
        elif message.no_wait:
            answer(record)

    # -- freed slots -----------------------------------------------------------------

    def _on_freed(self, function_name: str) -> None:
        for session in self._all():
            if not session.refused:
                continue
            with session.condition:
                refused = list(session.refused)
            # The others too: they may have been refused because max_tasks was reached.
            names = [name for name in refused if self._executions.has_capacity(name)]
            if names:
                session.freed(names)


def _final(session: Session, *, with_output: bool) -> Answer:
    return lambda record: session.answer(PendingReply(record, final=True, with_output=with_output))


def cancel_response(record: ExecutionRecord | None, *, in_time: bool) -> pb.CancelExecutionResponse:
    """The answer to a cancel: ``record`` is the execution's now, None for an unknown one.

    ``in_time``: it ran when the cancel came. It may have ended of itself all the same; running = it is dying.
    """
    if record is None:
        return pb.CancelExecutionResponse(message="execution not found", error_kind=pb.ERROR_KIND_NOT_FOUND)
    status = record.status.value
    if not in_time or record.status not in (ExecutionStatus.RUNNING, ExecutionStatus.CANCELLED):
        return pb.CancelExecutionResponse(message=f"execution already ended: {status}", status=status)
    return pb.CancelExecutionResponse(success=True, message="cancelled", status=status)
