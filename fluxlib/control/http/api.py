"""The API as the server is given it: Flask with every route of the table, and the fast path before it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fluxlib.control.http.answers import StartResponse
from fluxlib.control.http.auth import FailedAttempts
from fluxlib.control.http.early import EarlyCheck
from fluxlib.control.http.fast_path import FastPath
from fluxlib.control.http.pipeline import Pipeline
from fluxlib.control.http.request import without_slash
from fluxlib.control.http.route import Route
from fluxlib.control.http.routes import build_routes
from fluxlib.control.services import Services

if TYPE_CHECKING:
    from flask import Flask


class Api:
    """Every route of the table, refused by default.

    ``fast`` = calls and probes do not go through Flask, which is loaded by the first other request: it is a third of
    what a start takes. ``attempts`` remembers wrong keys (tests bring a clock). ``early_check`` is what a server may
    ask about a request whose body is still to come.
    """

    def __init__(self, services: Services, *, fast: bool = True, attempts: FailedAttempts | None = None) -> None:
        self.routes = build_routes(services.config)
        self.pipeline = Pipeline(services, attempts)
        self.early_check = EarlyCheck(self.pipeline, self.find)
        self.fast_path = FastPath(self.routes if fast else ())
        self._flask: Flask | None = None
        self._loading = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = without_slash(environ["PATH_INFO"])
        found = self.fast_path.find(environ)
        if found is None:
            return self.flask(environ, start_response)
        return self.pipeline.answer(found[0], environ, found[1]).send(environ, start_response)

    def find(self, environ: Mapping[str, Any]) -> tuple[Route, Mapping[str, str]] | None:
        """The route and its parameters by Flask's router; None for what no route answers."""
        from fluxlib.control.http.application import find

        return find(self.flask, self.routes, environ)

    @property
    def flask(self) -> Flask:
        """The application, loaded when it is first asked for."""
        if self._flask is not None:
            return self._flask
        with self._loading:
            if self._flask is None:
                from fluxlib.control.http.application import create_application

                self._flask = create_application(self.pipeline, self.routes)
            return self._flask
