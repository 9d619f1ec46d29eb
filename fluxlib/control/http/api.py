"""The API as the server is given it: the hot routes answered here, by the same pipeline but without Flask's cost.

Whatever is not plainly one of them goes on to Flask, which decides about it as if there were no front. Flask itself is
loaded by the first such request: it is a third of what a start takes, and 10 MB that a Flux which only runs functions
and tells how it is never needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

from fluxlib.control.http.auth import FailedAttempts
from fluxlib.control.http.early import EarlyCheck
from fluxlib.control.http.matcher import Matcher
from fluxlib.control.http.pipeline import Pipeline
from fluxlib.control.http.request import without_slash
from fluxlib.control.http.routes import build_routes
from fluxlib.control.services import Services

if TYPE_CHECKING:
    from flask import Flask

StartResponse = Callable[..., Any]
FileWrapper = Callable[[BinaryIO], Iterable[bytes]]


class Api:
    """Every route of the table, refused by default.

    ``front`` answers the hot routes before Flask; without it Flask answers all.
    ``attempts`` remembers wrong keys (tests bring a clock). ``early_check`` is what a
    server may ask about a request whose body is still to come.
    """

    def __init__(self, services: Services, *, front: bool = True, attempts: FailedAttempts | None = None) -> None:
        self.routes = build_routes(services.config)
        self.pipeline = Pipeline(services, attempts)
        self.early_check = EarlyCheck(self.pipeline, self.routes)
        self.hot = tuple(route for route in self.routes if route.hot and front)
        self._matcher = Matcher(self.hot)
        self._flask: Flask | None = None
        self._loading = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"] = without_slash(environ["PATH_INFO"])
        found = self._matcher.find(environ["REQUEST_METHOD"], path)
        if found is None or not _plainly(path, environ):
            return (self._flask or self.flask)(environ, start_response)
        answer = self.pipeline.answer(found[0], environ, found[1])
        write = start_response(answer.status_line, answer.wsgi_headers())
        if answer.file is not None:
            wrapper: FileWrapper = environ.get("wsgi.file_wrapper") or _wrapper()
            return wrapper(answer.file)
        if answer.chunks is None:
            return (answer.body,)
        write(b"")  # the headers: whoever follows an output that is quiet knows that it is there
        return answer.chunks

    @property
    def flask(self) -> Flask:
        """The application behind the front, loaded when it is first asked for."""
        with self._loading:
            if self._flask is None:
                from fluxlib.control.http.application import create_application

                self._flask = create_application(self.pipeline, self.routes)
            return self._flask


def _plainly(path: str, environ: dict[str, Any]) -> bool:
    """The client wrote the path just so; with anything unquoted Flask's side looks closer."""
    uri = str(environ.get("REQUEST_URI") or environ.get("RAW_URI") or path)
    return uri == path or (uri.startswith(path) and uri[len(path) :].partition("?")[0] in ("", "/"))


def _wrapper() -> FileWrapper:
    """For a server without one of its own."""
    from werkzeug.wsgi import FileWrapper

    return FileWrapper
