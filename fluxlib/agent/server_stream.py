"""The multiplexed stream: many executions over one call, answers batched into frames.

A session is one life of one Flux. When its stream breaks, its answers wait and
its synchronous runs go on for a grace; a Flux that attaches again under the same
name gets what it missed, one that does not has vanished, and what only it
waited for is cancelled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from fluxlib.agent.outcomes import refusal_of
from fluxlib.agent.pulse import Pulse
from fluxlib.agent.runs import Answer, Runs
from fluxlib.agent.session import Owed, Session
from fluxlib.errors import AtCapacity, FluxError, Stopping, StoreUnavailable
from fluxlib.lifecycle import Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb

log = logging.getLogger(__name__)


class Sessions:
    """Every Flux this agent works for. ``grace`` is in seconds. ``pulse`` tells what may be asked too late."""

    def __init__(self, runs: Runs, timers: Timers, pulse: Pulse, instance_id: str, grace: float) -> None:
        self._runs = runs
        self._pulse = pulse
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

    def say_stopping(self) -> None:
        """No further work is taken: every Flux is told, so that it asks elsewhere."""
        for session in self._all():
            session.say_stopping()

    def close(self) -> None:
        """Every stream ends once it has brought what waits; no new one begins."""
        with self._lock:
            self._closed = True
            for session in self._sessions.values():
                with session.condition:
                    session.finish()

    def look_again(self, function_name: str) -> None:
        """The function has changed: it may have room now without anything having ended."""
        self._on_freed(function_name)

    # -- attaching -----------------------------------------------------------------

    def _attach(self, name: str) -> tuple[Session, int, pb.AgentFrame] | None:
        with self._lock:
            if self._closed:
                return None
            session = self._sessions.get(name)
            if session is None:
                session = self._sessions[name] = Session(name, self._runs.with_output, lambda: self._runs.active)
                # It may have been given up before: its asynchronous runs go on all the while.
                made = session
                self._runs.own_again(name, lambda asynchronous: _final(made, with_output=not asynchronous))
            with session.condition:
                if session.grace is not None:
                    session.grace.cancel()
                    session.grace = None
                session.end_streams()
                generation = session.generation
                owed = session.resume()
                # Under the condition: what ends from now on is pushed behind the greeting.
                known = sorted({*owed, *self._runs.expected_by(name)})
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
            # Under the lock: one that attaches anew now and asks for its runs again must not be disowned too.
            self._runs.disown(session.name)
        count = self._runs.cancel_owned(session.name, "cancelled: the Flux that waited for it has vanished")
        if count:
            log.warning("a Flux vanished %d s ago: %d runs that only it waited for are cancelled", self._grace, count)

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
        refused = self._turned_down(session, request)
        if refused is not None:
            session.answer(Owed(refusal_of(request, "", refused), final=True))
            return
        if request.asynchronous:
            record, accepted = self._start_asynchronous(session, request)
        else:
            record, accepted = self._runs.start(request, _final(session, with_output=True), session.name)
        if accepted:
            return
        if record.error_kind is ErrorKind.AT_CAPACITY:
            with session.condition:
                session.refused.add(request.function_name)
        session.answer(Owed(record, final=True))
        # A slot may have freed between the refusal and these lines.
        if record.error_kind is ErrorKind.AT_CAPACITY and self._runs.has_room(request.function_name):
            session.freed([request.function_name])

    def _turned_down(self, session: Session, request: ExecutionRequest) -> FluxError | None:
        """Why it is not even looked at."""
        if session.overdue:
            return AtCapacity(f"function {request.function_name} at capacity: answers wait to be fetched")
        if not request.asynchronous and self._pulse.stood_still:
            # Its caller may have been told that it is lost, and have called again. Whoever still waits asks elsewhere.
            return Stopping("the agent stood still for a while, and starts nothing that was sent before")
        return None

    def _start_asynchronous(self, session: Session, request: ExecutionRequest) -> tuple[ExecutionRecord, bool]:
        """As Runs.start; a run that ends at once is answered behind its acceptance all the same."""
        held: list[ExecutionRecord] = []
        told = False

        def ended(record: ExecutionRecord) -> None:
            with session.condition:
                if told:
                    session.answer(Owed(record, final=True))
                else:
                    held.append(record)

        record, accepted = self._runs.start(request, ended, session.name)
        if accepted:
            with session.condition:
                told = True
                if not record.status.ended:
                    session.answer(Owed(record, final=False))
                for final in held:
                    session.answer(Owed(final, final=True))
        return record, accepted

    def _cancel(self, session: Session, message: Any) -> None:
        execution_id = message.execution_id

        def answer(record: ExecutionRecord | None, in_time: bool = True) -> None:
            response = cancel_response(record, in_time=in_time)
            session.cancel_answered(pb.CancelAnswer(execution_id=execution_id, response=response))

        on_dead = None if message.no_wait else answer
        try:
            record = self._runs.cancel(execution_id, message.reason or "cancelled", on_dead)
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
            names = [name for name in refused if self._runs.has_room(name)]
            if names:
                session.freed(names)


def _final(session: Session, *, with_output: bool) -> Answer:
    return lambda record: session.answer(Owed(record, final=True, with_output=with_output))


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
