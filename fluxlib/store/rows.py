"""Requests and records as text and back, the same for every backend.

Everything is stored by name, so that versions may differ: what is unknown is ignored, what is missing has its default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fluxlib.errors import Conflict, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionRequest, Phase, positional

T = TypeVar("T")

_ENCODER = json.JSONEncoder(separators=(",", ":"))


def dump(data: Any) -> str:
    return _ENCODER.encode(data)


def request_to_bytes(request: ExecutionRequest) -> bytes:
    """Its fields as JSON, then a newline (JSON has none of its own), then standard input as it is."""
    return dump({"args": request.args, "timeout_seconds": request.timeout_seconds}).encode() + b"\n" + request.stdin


def request_from_bytes(data: bytes, execution_id: str, function_name: str, asynchronous: bool) -> ExecutionRequest:
    head, _, stdin = bytes(data).partition(b"\n")
    fields = json.loads(head)
    return ExecutionRequest(
        execution_id,
        function_name,
        tuple(fields.get("args", ())),
        stdin,
        fields.get("timeout_seconds", 0.0),
        asynchronous,
    )


def record_to_text(record: ExecutionRecord) -> str:
    """Without output."""
    return record.to_text()


def record_from_text(text: str | bytes) -> ExecutionRecord:
    """Raises StoreUnavailable for what was damaged."""
    return load(text, ExecutionRecord.from_fields)


def load(text: str | bytes, read: Callable[[Mapping[str, Any]], T]) -> T:
    """What ``read`` makes of the fields in ``text``. Raises StoreUnavailable for what was damaged."""
    try:
        return read(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreUnavailable(f"an entry of the store is damaged: {error!r}") from error


def open_record(
    execution_id: str,
    function_name: str,
    agent_id: str,
    phase: str,
    asynchronous: bool,
    started_at: float,
    attempt: int,
) -> ExecutionRecord:
    """A record that has not ended, from the few columns it needs."""
    return ExecutionRecord(
        execution_id,
        function_name,
        agent_id,
        phase=Phase(phase),
        asynchronous=asynchronous,
        started_at=started_at,
        attempt=attempt,
    )


def not_current(execution_id: str) -> Conflict:
    """Why a step of an execution was refused."""
    return Conflict(f"execution {execution_id} has ended, was taken over by another Flux, or is at another attempt")


# -- what the first schema kept by position, migrated once


def named_record(text: str | bytes) -> str:
    """The record of the first schema by name; one that is so already stays as it is."""
    value = json.loads(text)
    return record_to_text(positional.from_list(value)) if isinstance(value, list) else dump(value)


def named_request(data: bytes) -> bytes:
    head, _, stdin = bytes(data).partition(b"\n")
    value = json.loads(head)
    if isinstance(value, list):
        value = {"args": value[0], "timeout_seconds": value[1]}
    return dump(value).encode() + b"\n" + stdin
