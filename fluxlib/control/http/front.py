"""The hot routes before Flask: matched by the table, answered by the same pipeline, without Flask's cost.

Whatever is not plainly one of them goes on to Flask, which decides about it as
if there were no front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fluxlib.control.http.pipeline import Pipeline
from fluxlib.control.http.route import Route

StartResponse = Callable[..., Any]
Wsgi = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]
# What needs no unquoting and no second thought.
_PLAIN = "([A-Za-z0-9._-]+)"


class Front:
    """A WSGI application around another one."""

    def __init__(self, behind: Wsgi, pipeline: Pipeline, routes: Sequence[Route]) -> None:
        self._behind = behind
        self._pipeline = pipeline
        self.routes = tuple(route for route in routes if route.hot)
        self._by_method: dict[str, list[tuple[re.Pattern[str], Route]]] = {}
        for route in self.routes:
            pattern = re.compile(re.sub(r"\\\{[a-z_]+\\\}", _PLAIN, re.escape(route.path)))
            self._by_method.setdefault(route.method, []).append((pattern, route))

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        for pattern, route in self._by_method.get(environ["REQUEST_METHOD"], ()):
            match = pattern.fullmatch(path)
            if match is None or not _plainly(path, environ):
                continue
            answer = self._pipeline.answer(
                route, environ, dict(zip(route.parameter_names, match.groups(), strict=True))
            )
            start_response(answer.status_line, answer.wsgi_headers())
            return answer.chunks if answer.chunks is not None else (answer.body,)
        return self._behind(environ, start_response)


def _plainly(path: str, environ: dict[str, Any]) -> bool:
    """The client wrote the path just so; with anything unquoted Flask's side looks closer."""
    uri = str(environ.get("REQUEST_URI") or environ.get("RAW_URI") or path)
    return uri == path or (uri.startswith(path) and uri[len(path)] == "?")
