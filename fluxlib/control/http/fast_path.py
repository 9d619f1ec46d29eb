"""The middleware before Flask for calls and for probes of /health: the same pipeline without Flask's cost.

Flask takes 190 µs of CPU for a call, of some 1,300 in all (see docs/performance.md), and 10 MB that a Flux which only
runs functions and says how it is never needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fluxlib.control.http.route import Route

# Needs no unquoting; whatever else stands in a path is for Flask's router.
_PLAIN = "([A-Za-z0-9._-]+)"


class FastPath:
    """Finds the routes that are marked ``fast`` when a request is plainly one of them; Flask's router finds all."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(route for route in routes if route.fast)
        self._patterns = [
            (route.method, re.compile(re.sub(r"\\\{[a-z_]+\\\}", _PLAIN, re.escape(route.path))), route)
            for route in self.routes
        ]

    def find(self, environ: dict[str, Any]) -> tuple[Route, dict[str, str]] | None:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        for its_method, pattern, route in self._patterns:
            if method == its_method and (match := pattern.fullmatch(path)) and _written_plainly(path, environ):
                return route, dict(zip(route.parameter_names, match.groups(), strict=True))
        return None


def _written_plainly(path: str, environ: dict[str, Any]) -> bool:
    """The client wrote the path just so, without anything quoted."""
    uri = str(environ.get("REQUEST_URI") or environ.get("RAW_URI") or path)
    return uri == path or (uri.startswith(path) and uri[len(path) :].partition("?")[0] in ("", "/"))
