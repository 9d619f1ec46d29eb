"""The hot routes before Flask: matched by the table, answered by the same pipeline, without Flask's cost.

Whatever is not plainly one of them goes on to Flask, which decides about it as
if there were no front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from werkzeug.wsgi import FileWrapper

from fluxlib.control.http.matcher import Matcher
from fluxlib.control.http.pipeline import Pipeline
from fluxlib.control.http.route import Route

StartResponse = Callable[..., Any]
Wsgi = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class Front:
    """A WSGI application around another one."""

    def __init__(self, behind: Wsgi, pipeline: Pipeline, routes: Sequence[Route]) -> None:
        self._behind = behind
        self._pipeline = pipeline
        self.routes = tuple(route for route in routes if route.hot)
        self._matcher = Matcher(self.routes)

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        found = self._matcher.find(environ["REQUEST_METHOD"], path)
        if found is None or not _plainly(path, environ):
            return self._behind(environ, start_response)
        answer = self._pipeline.answer(found[0], environ, found[1])
        start_response(answer.status_line, answer.wsgi_headers())
        if answer.file is not None:
            file: Iterable[bytes] = environ.get("wsgi.file_wrapper", FileWrapper)(answer.file)
            return file
        return answer.chunks if answer.chunks is not None else (answer.body,)


def _plainly(path: str, environ: dict[str, Any]) -> bool:
    """The client wrote the path just so; with anything unquoted Flask's side looks closer."""
    uri = str(environ.get("REQUEST_URI") or environ.get("RAW_URI") or path)
    return uri == path or (uri.startswith(path) and uri[len(path)] == "?")
