"""The multiplexed stream: many executions over one call, answers batched into frames.

A session is one life of one Flux. When its stream breaks, its answers wait and
its synchronous runs go on for a grace; a Flux that attaches again under the same
name gets what it missed, one that does not has vanished, and what only it
waited for is cancelled.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from fluxlib.agent.runs import Runs
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Timer, Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb

log = logging.getLogger(__name__)

# Answers that travel in one frame at most; a large output travels alone.
_BATCH = 64
_BATCH_BYTES = 4 * 1024 * 1024
# What is larger is fetched by ReadOutput: one answer must not hold up all others, nor pass the message limit.
_INLINE_OUTPUT = 4 * 1024 * 1024


class Session:
    """What one Flux is owed. Pushed to from any thread, drained by the stream that is attached."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.condition = threading.Condition()
        self.answers: deque[Any] = deque()
        self.cancelled: deque[Any] = deque()
        self.freed: set[str] = set()
        self.refused: set[str] = set()
        self.unacknowledged: dict[str, Any] = {}
        self.generation = 0  # of the stream attached last; an older one must end
        self.grace: Timer | None = None
        self.stopping = False

    def answer(self, answer: Any) -> None:
        with self.condition:
            if answer.final:
                self.unacknowledged[answer.execution_id] = answer
            self.answers.append(answer)
            self.condition.notify()

    def cancel_answered(self, answer: Any) -> None:
        with self.condition:
            self.cancelled.append(answer)
            self.condition.notify()

    def acknowledge(self, execution_ids: list[str]) -> None:
        with self.condition:
            for execution_id in execution_ids:
                self.unacknowledged.pop(execution_id, None)

    def next_frame(self, generation: int) -> Any | None:
        """Everything that waits, as one frame; None when this stream's time is over."""
        with self.condition:
            while self.generation == generation:
                if self.answers or self.cancelled or self.freed or self.stopping:
                    return self._frame()
                self.condition.wait()
        return None

    def _frame(self) -> Any:
        frame = pb.AgentFrame(stopping=self.stopping)
        size = 0
        while self.answers and len(frame.executed) < _BATCH and size < _BATCH_BYTES:
            answer = self.answers.popleft()
            size += len(answer.response.output)
            frame.executed.append(answer)
        frame.cancelled.extend(self.cancelled)
        frame.freed.extend(self.freed)
        self.cancelled.clear()
        self.freed.clear()
        self.stopping = False
        return frame


class Sessions:
    """Every Flux this agent works for. ``grace`` is in seconds."""

    def __init__(self, runs: Runs, timers: Timers, instance_id: str, grace: float) -> None:
        self._runs = runs
        self._timers = timers
        self._instance_id = instance_id
        self._grace = grace
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._closed = False
        runs.on_freed(self._on_freed)

    def serve(self, requests: Iterator[Any], is_active: Callable[[], bool], end: Callable[[], None]) -> Iterator[Any]:
        """The frames of one attached stream. ``requests`` are its ControlFrames; ``end`` breaks the call off."""
        try:
            first = next(requests, None)
        except Exception:
            return  # it broke before it began
        if first is None or not first.hello.session:
            return
        session, generation, greeting = self._attach(first.hello.session)
        reader = threading.Thread(
            target=self._read,
            args=(session, generation, first, requests, end),
            name=f"attach-{generation}",
            daemon=True,
        )
        reader.start()
        try:
            yield greeting
            while is_active() and (frame := session.next_frame(generation)) is not None:
                yield frame
        finally:
            self._detach(session, generation)

    def say_stopping(self) -> None:
        """No further work is taken: every Flux is told, so that it asks elsewhere."""
        for session in self._all():
            with session.condition:
                session.stopping = True
                session.condition.notify()

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            self._closed = True
        for session in self._all():
            with session.condition:
                session.generation += 1
                session.condition.notify_all()

    # -- attaching -----------------------------------------------------------------

    def _attach(self, name: str) -> tuple[Session, int, Any]:
        with self._lock:
            resumed = name in self._sessions
            session = self._sessions.setdefault(name, Session(name))
            with session.condition:
                if session.grace is not None:
                    session.grace.cancel()
                    session.grace = None
                session.generation += 1
                session.condition.notify_all()
                generation = session.generation
                # What was sent over the broken stream may not have arrived; a second time does no harm.
                waiting = {answer.execution_id for answer in session.answers if answer.final}
                for execution_id, answer in session.unacknowledged.items():
                    if execution_id not in waiting:
                        session.answers.append(answer)
                known = {*session.unacknowledged, *self._runs.open_ids()}
            greeting = pb.AgentFrame(instance_id=self._instance_id, known=sorted(known), resumed=resumed)
            return session, generation, greeting

    def _detach(self, session: Session, generation: int) -> None:
        with self._lock, session.condition:
            if session.generation != generation:
                return  # a newer stream has taken over
            session.generation += 1
            session.condition.notify_all()
            if not self._closed:
                session.grace = self._timers.after(self._grace, lambda: self._vanished(session))

    def _vanished(self, session: Session) -> None:
        with self._lock:
            if session.grace is None or self._sessions.get(session.name) is not session:
                return
            del self._sessions[session.name]
            # Under the lock: one that attaches anew now and asks for its runs again must not be disowned too.
            self._runs.disown(session.name)
        count = self._runs.cancel_owned(session.name, "cancelled: the Flux that waited for it has vanished")
        if count:
            log.warning("a Flux vanished %d s ago: %d runs that only it waited for are cancelled", self._grace, count)

    def _all(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    # -- what Flux sends -----------------------------------------------------------

    def _read(
        self, session: Session, generation: int, first: Any, requests: Iterator[Any], end: Callable[[], None]
    ) -> None:
        try:
            self._take(session, first)
            for frame in requests:
                self._take(session, frame)
        except Exception as error:
            # gRPC ends a broken request stream with an exception of its own.
            log.debug("the stream of %s ended: %s", session.name, error)
        finally:
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
        def ended(record: ExecutionRecord) -> None:
            inline = not request.asynchronous and record.output_bytes <= _INLINE_OUTPUT
            response = codec.response_from_record(record, with_output=inline)
            session.answer(pb.ExecutionAnswer(execution_id=record.execution_id, final=True, response=response))

        record = self._runs.start(request, ended, session.name)
        refused = record.status.ended and record.error_kind.nothing_started
        cannot = record.status.ended and record.error_kind is ErrorKind.CANNOT_START and not record.run_started_at
        if refused or cannot:
            session.answer(
                pb.ExecutionAnswer(
                    execution_id=request.execution_id, final=True, response=codec.response_from_record(record)
                )
            )
        elif request.asynchronous and not record.status.ended:
            accepted = pb.ExecutionAnswer(execution_id=request.execution_id, response=pb.ExecutionResponse())
            session.answer(accepted)
        if record.error_kind is ErrorKind.AT_CAPACITY:
            # After the answer: "freed" must not overtake the refusal it takes back.
            session.refused.add(request.function_name)
            # A slot may have freed between the refusal and this line.
            if self._runs.has_room(request.function_name):
                self._tell_freed(session, [request.function_name])

    def _cancel(self, session: Session, message: Any) -> None:
        execution_id = message.execution_id

        def answer(record: ExecutionRecord | None, stopped: bool) -> None:
            session.cancel_answered(
                pb.CancelAnswer(execution_id=execution_id, response=cancel_response(record, stopped))
            )

        try:
            record = self._runs.cancel(execution_id, message.reason or "cancelled", lambda final: answer(final, True))
        except StoreUnavailable:
            record = None
        if record is None or record.status.ended:
            answer(record, False)

    # -- freed slots -----------------------------------------------------------------

    def _on_freed(self, function_name: str) -> None:
        for session in list(self._sessions.values()):
            if session.refused:
                names = [name for name in session.refused if name == function_name or self._runs.has_room(name)]
                if names:
                    self._tell_freed(session, names)

    def _tell_freed(self, session: Session, names: list[str]) -> None:
        with session.condition:
            session.refused.difference_update(names)
            session.freed.update(names)
            session.condition.notify()


def cancel_response(record: ExecutionRecord | None, stopped: bool) -> pb.CancelExecutionResponse:
    """The answer to a cancel: ``record`` is the execution's now, None for an unknown one."""
    if record is None:
        return pb.CancelExecutionResponse(message="execution not found", error_kind=pb.ERROR_KIND_NOT_FOUND)
    status = record.status.value
    if not stopped:
        return pb.CancelExecutionResponse(message=f"execution already ended: {status}", status=status)
    return pb.CancelExecutionResponse(success=True, message="cancelled", status=status)
