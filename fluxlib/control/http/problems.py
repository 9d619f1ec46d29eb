"""The one place that turns what was raised into a response."""

from __future__ import annotations

import logging
import secrets
from typing import Any

from fluxlib.control.http.answers import Answer, Headers, json_answer
from fluxlib.control.services import AgentAway
from fluxlib.errors import (
    AtCapacity,
    Conflict,
    FluxError,
    InvalidInput,
    Refused,
    Stopping,
    StoreUnavailable,
    Unauthenticated,
    Unenforceable,
)
from fluxlib.log import one_line

log = logging.getLogger(__name__)

# What soon passes: the header that tells clients when to come back, when the error does not say.
_PASSES_SOON = (AtCapacity, Refused, Stopping, StoreUnavailable, Unenforceable)
_RETRY_AFTER = 1


def problem(error: Exception, what: str) -> Answer:
    """``error`` as JSON; ``what`` names the request in the log when the fault is ours."""
    if isinstance(error, FluxError):
        return _deliberate(error)
    error_id = secrets.token_hex(8)
    log.error("error %s in %s", error_id, one_line(what), exc_info=error)
    return json_answer(
        500, {"error": f"an unexpected fault of Flux; the log has it as {error_id}", "error_id": error_id}
    )


def simple(status: int, message: str, headers: Headers = ()) -> Answer:
    """An error that was no exception of ours: Flask's 404 and 405, the server's own."""
    return json_answer(status, {"error": message}, headers)


def _deliberate(error: FluxError) -> Answer:
    data: dict[str, Any] = {"error": error.message}
    if isinstance(error, InvalidInput) and error.faults:
        data["faults"] = list(error.faults)
    if isinstance(error, Conflict) and error.status:
        data["status"] = error.status
    execution_id = getattr(error, "execution_id", "")
    if execution_id:
        data["execution_id"] = execution_id
    if isinstance(error, AgentAway):
        data["execution_id"] = error.record.execution_id
        data["record"] = error.record.to_json(with_output=error.record.output is not None)
    headers: list[tuple[str, str]] = []
    retry_after = error.retry_after
    if retry_after is None and isinstance(error, _PASSES_SOON):
        retry_after = _RETRY_AFTER
    if retry_after is not None:
        headers.append(("Retry-After", str(max(1, retry_after))))
    if isinstance(error, Unauthenticated):
        headers.append(("WWW-Authenticate", "Bearer"))
    return json_answer(error.http_status, data, tuple(headers))
