"""Running functions, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from fluxlib.control.http.answers import Answer, Headers, json_answer
from fluxlib.control.http.request import Request
from fluxlib.control.http.spooled import BYTES, pieces, spooled_answer, spooled_output
from fluxlib.control.services import WHOLE_OUTPUT, AgentAway, Call, no_such_execution
from fluxlib.errors import AgentError, Forbidden
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import ExecutionFilter


def execute(request: Request) -> Answer:
    """200 for success; a run that failed or was cancelled is 500 with the same body and its ``error``."""
    call: Call = request.data
    record = request.services.executions.execute(call, request.caller)
    return _answer(200 if record.status is ExecutionStatus.SUCCESS else 500, record, _result)


def submit(request: Request) -> Answer:
    call: Call = request.data
    execution_id = request.services.executions.submit(call)
    return json_answer(202, {"status": "accepted", "execution_id": execution_id})


def _result(record: ExecutionRecord) -> dict[str, Any]:
    """The answer of a synchronous call; ``error`` only where there is one, as scripts ask for it."""
    data: dict[str, Any] = {
        "status": record.status.value,
        "output": (record.output or b"").decode("utf-8", "replace"),
        "duration_ms": record.duration_ms,
        "agent_id": record.agent_id,
        "execution_id": record.execution_id,
        "queue_ms": record.queue_ms,
        "exit_code": record.exit_code,
        "truncated": record.truncated,
    }
    if record.status is not ExecutionStatus.SUCCESS:
        data["error"] = record.error or record.status.value
        data["error_kind"] = record.error_kind.name.lower() if record.error_kind else None
        data["signal"] = record.signal
        data["timed_out"] = record.error_kind is ErrorKind.TIMEOUT
        data["out_of_memory"] = record.error_kind is ErrorKind.OUT_OF_MEMORY
    if record.warnings:
        data["warnings"] = list(record.warnings)
    return data


def get_one(request: Request) -> Answer:
    _check_owner(request)
    record = request.services.executions.get(request.params["execution_id"])
    if record.output is not None or not record.output_bytes:
        return _answer(200, record, ExecutionRecord.to_json)
    stream = request.services.executions.output(record.execution_id, 0, follow=False)
    with closing(stream):
        try:
            return spooled_answer(200, record.to_json(), stream)
        except AgentError as error:
            reason = f"agent {record.agent_id}, which owns this execution, was lost with its output: {error.message}"
            raise AgentAway(reason, record, gone=False) from error


def _answer(status: int, record: ExecutionRecord, view: Callable[[ExecutionRecord], dict[str, Any]]) -> Answer:
    output = record.output or b""
    if len(output) <= WHOLE_OUTPUT:
        return json_answer(status, view(record))
    return spooled_answer(status, view(replace(record, output=None)), pieces(output))


def _check_owner(request: Request) -> None:
    """For a key of some functions the others' executions do not exist.

    Before anything else is asked: what goes wrong later may tell of the execution.
    """
    principal = request.principal
    if principal is None or not principal.functions:
        return
    execution_id = request.params["execution_id"]
    if not principal.may_use(request.services.executions.function_of(execution_id)):
        raise no_such_execution(execution_id)


def get_list(request: Request) -> Answer:
    query, principal = request.query, request.principal
    name = query["function"] or ""
    if principal and principal.functions:
        if not name and len(principal.functions) > 1:
            raise Forbidden(
                f"the key {principal.name} is good for some functions only: name one of them with ?function="
            )
        name = name or next(iter(principal.functions))
        principal.demand_function(name)
    status = query["status"]
    queued = status == "queued"
    where = ExecutionFilter(name, ExecutionStatus(status) if status and not queued else None, queued)
    page = request.services.executions.list(where, query["cursor"], query["limit"])
    items = [entry.record.to_json(with_output=False) for entry in page.entries]
    return json_answer(200, {"items": items, "next": page.next_cursor or None})


def cancel(request: Request) -> Answer:
    _check_owner(request)
    record = request.services.executions.cancel(request.params["execution_id"])
    return json_answer(200, {"status": "cancelled", "execution_id": record.execution_id})


def output(request: Request) -> Answer:
    """The raw bytes. A follower that goes away ends the agent's part even while nothing is written."""
    _check_owner(request)
    query = request.query
    follow = query["follow"] and request.method != "HEAD"
    stream = request.services.executions.output(request.params["execution_id"], query["offset"], follow=follow)
    if follow:
        request.caller.on_gone(stream.close)
        return Answer(200, content_type=BYTES, headers=(*_NO_STORE, *_UNBUFFERED), chunks=stream)
    if request.method != "HEAD":
        with closing(stream):
            return spooled_output(stream).with_headers(_NO_STORE)
    return Answer(200, content_type=BYTES, headers=_NO_STORE, chunks=stream)


# It is another one a moment later; and a proxy that gathers it (nginx does) would not show it as it is written.
_NO_STORE: Headers = (("Cache-Control", "no-store"),)
_UNBUFFERED: Headers = (("X-Accel-Buffering", "no"),)
