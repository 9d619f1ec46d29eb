"""One line for every change that was asked for: who, what, which, result."""

from __future__ import annotations

import logging

from fluxlib.control.http.request import Request
from fluxlib.log import one_line

log = logging.getLogger("fluxlib.audit")


def changed(request: Request, status: int) -> None:
    """A change that was made, or refused after the key was known."""
    who = request.principal.name if request.principal else "-"
    what = one_line(f"{request.method} {request.path}", 200)
    subject = f" {one_line(request.subject, 200)}" if request.subject else ""
    log.info("%s from %s: %s%s: %d", who, request.environ.get("REMOTE_ADDR", "-"), what, subject, status)


def refused(request: Request, status: int, reason: str) -> None:
    """A key that did not do; who guesses is slowed to ten lines a minute by that."""
    what = one_line(f"{request.method} {request.path}", 200)
    log.warning("refused from %s: %s: %d %s", request.environ.get("REMOTE_ADDR", "-"), what, status, one_line(reason))
