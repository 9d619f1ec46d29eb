"""How this process is."""

from __future__ import annotations

from typing import Any

import fluxlib
from fluxlib.control.http.answers import Answer, json_answer
from fluxlib.control.http.request import Request
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import LoopReport


def get(request: Request) -> Answer:
    """503 when the store is away, the process is stopping, or it has just started and has not reached its agents yet.

    A balancer sends its requests elsewhere then.

    Warnings and errors in words only with a key: they tell strangers what is weak here.
    """
    status = request.services.status
    error = ""
    try:
        status.check_store()
    except StoreUnavailable as fault:
        error = fault.message
    stopping = status.stopping()
    connecting = list(status.connecting())
    warnings = list(status.warnings())
    with_all = request.may_see_all
    data: dict[str, Any] = {
        "status": "store unreachable" if error else "stopping" if stopping else "connecting" if connecting else "ok",
        "version": fluxlib.__version__,
        "store": "unreachable" if error else "ok",
        "stopping": stopping,
        "leader": status.leads(),
        "warning_count": len(warnings),
        "loops": [_loop(report, with_all) for report in status.loops()],
    }
    if error:
        data["error"] = f"the store cannot be reached: {error}" if with_all else "the store cannot be reached"
    elif stopping:
        data["error"] = "this Flux is stopping"
    elif connecting:
        data["error"] = f"this Flux has just started and is still connecting to {len(connecting)} agents"
    if with_all:
        data["warnings"] = warnings
    headers: tuple[tuple[str, str], ...] = (("Cache-Control", "no-store"),)
    if connecting:
        headers += (("Retry-After", "1"),)
    return json_answer(503 if error or stopping or connecting else 200, data, headers)


def _loop(report: LoopReport, with_all: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"name": report.name, "alive": report.alive, "crashes": report.crashes}
    if with_all and report.last_error:
        data["last_error"] = report.last_error
    return data
