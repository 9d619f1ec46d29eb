"""The stream to one agent of ours: many executions and cancels over one call, batched into frames.

Nothing is sent twice that may have been run. When the stream breaks, what was
never written goes back as AgentUnreachable; what may have been is kept until a
new stream says what the agent knows, or until there is no more hope (AgentLost).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fluxlib.control.agents.client.calls import Asked, OpenCalls, tell_cancelled
from fluxlib.control.agents.client.channels import Lines
from fluxlib.control.agents.connection import ConnectionEvents, OnAnswer, OnCancelled
from fluxlib.errors import AgentLost, AgentUnreachable, FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import ExecutionRecord, ExecutionRequest
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.pace import Pace
from fluxlib.rpc.status import nobody_listens, reason_of

log = logging.getLogger(__name__)

# One frame at most; a large request travels alone.
_FRAME_BYTES = 4 * 1024 * 1024
_FRAME_EXECUTIONS = 256
# Acks ride along with requests. When there are none they wait this long (seconds) for company,
# unless there are many or the agent keeps much for their sake.
_ACK_DELAY, _ACK_COUNT, _ACK_BYTES = 0.5, 64, 1024 * 1024
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
# Callers are told of a lost agent within 20 s of its last sign of life: keepalive takes up to 15 of them to notice.
_HOPE = 4.0
# A refused connection says that the process is gone; a single one may be a proxy's.
_REFUSALS = 4


class _Attachment:
    """One life of the stream. Its fields are guarded by the stream's lock."""

    __slots__ = ("call", "dozing", "gathering", "greeted", "over", "planned")

    def __init__(self) -> None:
        self.call: Any = None
        self.greeted = False
        self.over = False
        self.planned = False  # ended by us, for a new channel
        # Of its writer, which may be slow to notice that the next attachment has another.
        self.dozing = False  # it waits until it is told
        self.gathering = False  # it has a frame to send, and waits for more to put in


class AgentStream:
    """Attached by a thread of its own for as long as the connection lives.

    ``session`` names this life of Flux. The rest: see OpenCalls.
    """

    def __init__(
        self,
        agent_id: str,
        session: str,
        lines: Lines,
        events: ConnectionEvents,
        fetch: Callable[[str], ExecutionRecord | None],
    ) -> None:
        self._agent_id = agent_id
        self._session = session
        self._lines = lines
        self._events = events
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # for the writer
        self._change = threading.Condition(self._lock)  # for the thread that attaches
        self._calls = OpenCalls(agent_id, self._lock, events, fetch)
        self._outbox: deque[pb.ExecutionRequest] = deque()
        self._cancels: deque[pb.CancelExecutionRequest] = deque()
        self._acks: list[str] = []
        self._acked_bytes = 0
        self._pace = Pace()
        self._attachment: _Attachment | None = None
        self._attached = False
        self._instance_id = ""
        self._closing = False
        self._stopped = False
        self._hurry = False
        self._thread = threading.Thread(target=self._run, name=f"attach-{agent_id}", daemon=True)
        self._thread.start()

    # -- asked by Flux ---------------------------------------------------------------

    def execute(self, request: ExecutionRequest, message: pb.ExecutionRequest, on_answer: OnAnswer) -> None:
        """Queue ``message`` (which is ``request``); what cannot be sent now is answered at once."""
        with self._lock:
            error = self._cannot_send() or self._calls.add(request, on_answer)
            if error is None:
                self._outbox.append(message)
                if self._attachment is None or not self._attachment.gathering:
                    self._work.notify()
        if error is not None:
            on_answer(error)

    def cancel(self, execution_id: str, reason: str, on_answer: OnCancelled) -> bool:
        """Have it killed; ``on_answer`` is told once it is dead. False: not attached, and nothing was done.

        It is told again on every new attachment until the agent has answered.
        """
        with self._lock:
            if self._cannot_send() is not None:
                return False
            self._calls.add_cancel(execution_id, reason, on_answer)
            self._cancels.append(pb.CancelExecutionRequest(execution_id=execution_id, reason=reason))
            self._work.notify()
        return True

    @property
    def attached(self) -> bool:
        return self._attached

    def fail(self, reason: str) -> None:
        """What was sent and waits for an answer ends as AgentLost, what was not as AgentUnreachable."""
        with self._lock:
            unsent = self._take_unsent()
            lost = self._calls.take_unanswered()
            unconfirmed = self._calls.take_cancels()
        self._answer(unsent, AgentUnreachable(f"agent {self._agent_id} cannot be reached: {reason}"))
        self._answer(lost, AgentLost(f"agent {self._agent_id} was lost: {reason}"))
        for on_answer in unconfirmed:
            text = f"agent {self._agent_id} was lost before it confirmed the cancel: {reason}"
            tell_cancelled(on_answer, AgentLost(text))

    def wake(self) -> None:
        """The agent was just seen alive: attach now rather than after a pause."""
        with self._lock:
            if self._attachment is None:
                self._hurry = True
                self._change.notify()

    def switch(self) -> None:
        """Move to the channel there is now. What waits to be sent waits a little longer."""
        with self._lock:
            self._hurry = True
            self._change.notify()
            if self._attachment is not None:
                self._attachment.planned = True
                self._work.notify()

    def close(self, deadline: Deadline) -> None:
        with self._lock:
            self._closing = True
            self._calls.wait_idle(deadline.remaining())
        self.fail("Flux closed the connection")
        with self._lock:
            self._stopped = True
            call = self._attachment.call if self._attachment is not None else None
            self._work.notify()
            self._change.notify()
        if call is not None:
            call.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join(max(1.0, deadline.remaining()))

    def _cannot_send(self) -> FluxError | None:
        if self._closing:
            return AgentUnreachable(f"the connection to agent {self._agent_id} is closed")
        if not self._attached:
            return AgentUnreachable(f"agent {self._agent_id} is not attached now")
        return None

    # -- the thread that attaches and reads --------------------------------------------

    def _run(self) -> None:
        pause, refusals, since = 0.0, 0, time.monotonic()
        while self._wait(pause):
            attachment = _Attachment()
            reason, refused = self._serve(attachment)
            if attachment.greeted:
                pause, refusals, since = 0.0, 0, time.monotonic()
            refusals = refusals + 1 if refused else 0
            self._broken(attachment, reason)
            # An attachment that we ended ourselves says nothing about the agent, however long it took.
            if refusals >= _REFUSALS or (not attachment.planned and time.monotonic() - since > _HOPE):
                self.fail(reason)
            pause = min(max(_FIRST_PAUSE, pause * 2), _LONGEST_PAUSE)

    def _wait(self, pause: float) -> bool:
        with self._lock:
            self._change.wait_for(lambda: self._stopped or self._hurry, pause)
            self._hurry = False
            return not self._stopped

    def _serve(self, attachment: _Attachment) -> tuple[str, bool]:
        """Attach and read until the stream ends: (why it ended, whether the connection was refused)."""
        with self._lock:
            # Before the channel is chosen: a switch that comes later finds what to end.
            self._attachment = attachment
        try:
            with self._lines.call() as stub:
                call = stub.Attach(self._frames(attachment))
                with self._lock:
                    attachment.call = call
                    if self._stopped:
                        call.cancel()
                try:
                    for frame in call:
                        if not attachment.greeted:
                            self._greeted(attachment, frame)
                        self._take(frame)
                except grpc.RpcError as error:
                    return reason_of(error), nobody_listens(error)
                return "it ended the stream", False
        except FluxError as error:
            return error.message, False
        except Exception as error:
            log.exception("the stream to agent %s failed", self._agent_id)
            return f"{type(error).__name__}: {error}", False

    def _greeted(self, attachment: _Attachment, frame: pb.AgentFrame) -> None:
        with self._lock:
            same = frame.instance_id == self._instance_id
            self._instance_id = frame.instance_id
            answers = self._calls.reconcile(set(frame.known), same=same)
            waiting = {one.execution_id for one in self._cancels}
            self._cancels.extend(
                pb.CancelExecutionRequest(execution_id=execution_id, reason=why)
                for execution_id, why in self._calls.cancels()
                if execution_id not in waiting
            )
            attachment.greeted = True
            news = not self._attached
            self._attached = True
            self._work.notify()
        for answer in answers:
            answer()
        self._events.greeted(frame.instance_id)
        if news:
            self._events.attached(True)

    def _broken(self, attachment: _Attachment, reason: str) -> None:
        with self._lock:
            self._attachment = None
            attachment.over = True
            self._work.notify()  # its writer must end
            # Greeted or not: a second change may come before the first is through.
            kept = attachment.planned and not self._stopped
            unsent = [] if kept else self._take_unsent()
            news = self._attached and not kept
            self._attached = self._attached and kept
            if not kept:
                self._cancels.clear()
        self._answer(unsent, AgentUnreachable(f"agent {self._agent_id} cannot be reached: {reason}"))
        if news:
            if not self._closing:
                log.warning("the stream to agent %s broke: %s", self._agent_id, reason)
            self._events.attached(False)

    def _take(self, frame: pb.AgentFrame) -> None:
        for executed in frame.executed:
            self._calls.answered(executed)
            if executed.final:
                self._acknowledge(executed)
        for cancelled in frame.cancelled:
            self._calls.cancel_answered(cancelled)
        for name in frame.freed:
            self._events.freed(name)
        if frame.stopping:
            self._events.stopping()

    def _acknowledge(self, answer: pb.ExecutionAnswer) -> None:
        with self._lock:
            self._acks.append(answer.execution_id)
            self._acked_bytes += len(answer.response.output)
            dozing = self._attachment is not None and self._attachment.dozing
            if dozing or len(self._acks) >= _ACK_COUNT or self._acked_bytes >= _ACK_BYTES:
                self._work.notify()

    # -- the writer: gRPC's own thread pulls these -------------------------------------

    def _frames(self, attachment: _Attachment) -> Iterator[pb.ControlFrame]:
        yield pb.ControlFrame(hello=pb.ControlHello(session=self._session))
        while (frame := self._next_frame(attachment)) is not None:
            yield frame

    def _next_frame(self, attachment: _Attachment) -> pb.ControlFrame | None:
        """Everything that waits; None when this attachment's time is over.

        While one frame is on its way the next requests gather, so busy streams batch by themselves.
        """
        due = False
        with self._lock:
            while True:
                if attachment.over or attachment.planned or self._stopped:
                    return None
                if attachment.greeted:
                    urgent = len(self._acks) >= _ACK_COUNT or self._acked_bytes >= _ACK_BYTES
                    if self._outbox or self._cancels or urgent or (due and self._acks):
                        if self._gather(attachment):
                            continue
                        return self._frame()
                # With nothing in flight no ack can come up, and none is left: no need to look again.
                attachment.dozing = not attachment.greeted or not (self._acks or len(self._calls))
                due = not self._work.wait(None if attachment.dozing else _ACK_DELAY)
                attachment.dozing = False

    def _gather(self, attachment: _Attachment) -> bool:
        """Whether it has waited for more to send, and must look again."""
        now = time.monotonic()
        left = self._pace.left(len(self._calls), now)
        if left <= 0 or self._cancels:
            self._pace.went(now)
            return False
        attachment.gathering = True
        self._work.wait(left)
        attachment.gathering = False
        return True

    def _frame(self) -> pb.ControlFrame:
        frame = pb.ControlFrame(received=self._acks, cancel=self._cancels)
        self._acks, self._acked_bytes = [], 0
        # A cancel must not overtake the execution it is for: all of them go, or the cancels wait.
        size = 0
        while self._outbox and len(frame.execute) < _FRAME_EXECUTIONS and size < _FRAME_BYTES:
            message = self._outbox.popleft()
            size += message.ByteSize()
            frame.execute.append(message)
            self._calls.sent(message.execution_id)
        if self._outbox:
            del frame.cancel[:]
        else:
            self._cancels.clear()
        return frame

    # -- under the lock ------------------------------------------------------------------

    def _take_unsent(self) -> list[Asked]:
        taken = [self._calls.take(message.execution_id) for message in self._outbox]
        self._outbox.clear()
        return [entry for entry in taken if entry is not None]

    def _answer(self, entries: list[Asked], error: FluxError) -> None:
        for entry in entries:
            entry.answer(error)
