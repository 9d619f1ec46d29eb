"""Executions as unary calls: the only way to an original agent. No thread waits for an answer."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from fluxlib.control.agents.client.channels import Lines
from fluxlib.control.agents.connection import ConnectionEvents, OnAnswer, refusal
from fluxlib.errors import AgentLost, AgentUnreachable, Conflict, FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus
from fluxlib.rpc import codec


@dataclass(slots=True)
class _Call:
    request: ExecutionRequest
    on_answer: OnAnswer
    future: Any = None
    cancelled: bool = False


class UnaryExecutions:
    """What one agent was asked to run and has not answered yet."""

    def __init__(self, agent_id: str, lines: Lines, events: ConnectionEvents) -> None:
        self._agent_id = agent_id
        self._lines = lines
        self._events = events
        self._condition = threading.Condition()
        self._calls: dict[str, _Call] = {}
        self._closed = False

    def execute(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        if request.stdin or request.timeout_seconds:
            # It would ignore both without a word.
            text = f"{self._agent_id} is an original agent: it takes neither standard input nor a call's own timeout"
            on_answer(refusal(request, self._agent_id, ErrorKind.UNENFORCEABLE, text, time.time()))
            return
        call = _Call(request, on_answer)
        with self._condition:
            closed, known = self._closed, request.execution_id in self._calls
            if not closed and not known:
                self._calls[request.execution_id] = call
        if closed or known:
            on_answer(
                AgentUnreachable(f"the connection to agent {self._agent_id} is closed")
                if closed
                else Conflict(f"execution {request.execution_id} is with agent {self._agent_id} already")
            )
            return
        message = codec.request_to_message(request)
        call.future = self._lines.future(
            lambda stub: stub.ExecuteFunction.future(message), lambda answer: self._answered(call, answer)
        )
        if call.future is not None and self._calls.get(request.execution_id) is not call:
            # ``fail`` may have answered it while there was nothing to cancel yet; one that has ended takes no harm.
            call.future.cancel()

    def cancelling(self, execution_id: str, yes: bool) -> bool:
        """Whether a failure of this call is the doing of a cancel. False when no such call is open.

        Said before the agent is asked: the killed program's answer may overtake the cancel's.
        """
        with self._condition:
            call = self._calls.get(execution_id)
            if call is not None:
                call.cancelled = yes
            return call is not None

    def hang_up(self, execution_id: str) -> bool:
        """Cancel a synchronous call by ending it: an original kills what nobody waits for, and knows no other way.

        False when no such call is open.
        """
        with self._condition:
            call = self._calls.get(execution_id)
        if call is None or call.request.asynchronous:
            return False
        now = time.time()
        record = ExecutionRecord(execution_id, call.request.function_name, self._agent_id, started_at=now)
        self._settle(call, record.ended(ExecutionStatus.CANCELLED, at=now, error="cancelled", kind=ErrorKind.CANCELLED))
        if call.future is not None:
            call.future.cancel()
        return True

    def wait(self, execution_id: str, timeout: float) -> None:
        """Until its call is answered."""
        with self._condition:
            self._condition.wait_for(lambda: execution_id not in self._calls, timeout)

    def fail(self, reason: str) -> None:
        """Every call in flight ends as AgentLost now."""
        with self._condition:
            calls = list(self._calls.values())
        for call in calls:
            self._settle(call, AgentLost(f"agent {self._agent_id} was lost: {reason}"))
            if call.future is not None:
                # An original kills what nobody waits for any more.
                call.future.cancel()

    def close(self, deadline: Deadline) -> None:
        """Take no more, wait for what is in flight until the deadline."""
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: not self._calls, deadline.remaining())
        self.fail("Flux closed the connection")

    def _answered(self, call: _Call, answer: Any | FluxError) -> None:
        result: ExecutionRecord | FluxError
        if isinstance(answer, FluxError):
            result = answer
        else:
            try:
                result = codec.record_from_response(answer, call.request, self._agent_id, time.time())
            except ValueError as error:
                result = AgentLost(f"agent {self._agent_id} answered what cannot be read: {error}")
        self._settle(call, result)

    def _settle(self, call: _Call, result: ExecutionRecord | FluxError) -> None:
        with self._condition:
            # Whoever takes it out answers: a failed call's own end comes later and is too late.
            if self._calls.get(call.request.execution_id) is not call:
                return
            del self._calls[call.request.execution_id]
            self._condition.notify_all()
        if isinstance(result, ExecutionRecord):
            if result.error_kind is ErrorKind.AT_CAPACITY:
                self._events.full(call.request.function_name)
            elif call.cancelled and result.status is ExecutionStatus.FAILED:
                # It only says that a signal ended the program.
                result = replace(
                    result, status=ExecutionStatus.CANCELLED, error="cancelled", error_kind=ErrorKind.CANCELLED
                )
        call.on_answer(result)
