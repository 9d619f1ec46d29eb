"""The Flask application: rules made from the table, errors of Flask's own as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from fluxlib.control.http.answers import Answer, StartResponse
from fluxlib.control.http.pipeline import Pipeline
from fluxlib.control.http.problems import problem, simple
from fluxlib.control.http.request import check_path, without_slash
from fluxlib.control.http.route import Route
from fluxlib.errors import FluxError


def create_application(pipeline: Pipeline, routes: Sequence[Route]) -> Flask:
    """Every route of the table, answered by ``pipeline``, and nothing else."""
    app = Flask("fluxlib.control.http", static_folder=None)
    # One way to write each path: no redirects, no merged slashes.
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False
    app.config["PROPAGATE_EXCEPTIONS"] = False
    literal: dict[str, list[str]] = {}
    for route in routes:
        if not route.parameter_names:
            literal.setdefault(route.path, []).extend(["GET", "HEAD"] if route.method == "GET" else [route.method])
        _add(app, route, pipeline)
    app.before_request(lambda: _before(pipeline, literal))
    app.register_error_handler(Exception, lambda error: _failed(error, pipeline))
    return app


def find(app: Flask, routes: Sequence[Route], environ: Mapping[str, Any]) -> tuple[Route, Mapping[str, str]] | None:
    """The route of a request whose body is still to come, and its parameters; None for what no route answers."""
    try:
        name, params = app.url_map.bind("flux").match(without_slash(environ["PATH_INFO"]), environ["REQUEST_METHOD"])
    except HTTPException:
        return None
    return next(route for route in routes if route.name == name), params


def _add(app: Flask, route: Route, pipeline: Pipeline) -> None:
    def view(**params: str) -> Response:
        return _Answered(pipeline.answer(route, request.environ, params))

    app.add_url_rule(
        route.path.replace("{", "<").replace("}", ">"),
        route.name,
        view,
        methods=[route.method],
        provide_automatic_options=False,
    )


def _before(pipeline: Pipeline, literal: Mapping[str, list[str]]) -> Response | None:
    """What is settled before a view is called. ``literal``: the methods of each path without parameters."""
    try:
        check_path(request.environ)
    except FluxError as error:
        return _Answered(problem(error, request.path).with_headers(pipeline.cors.headers(request.environ)))
    # DELETE /agents/register is not about an agent called register: there can be none.
    methods = sorted(literal.get(request.path, ())) or _methods(request.routing_exception)
    if request.method == "OPTIONS" and pipeline.cors.enabled and methods:
        return _Answered(Answer(204, headers=pipeline.cors.preflight(request.environ, methods)))
    if request.path in literal and request.method not in methods:
        raise MethodNotAllowed(valid_methods=methods)
    return None


def _methods(error: Any) -> list[str]:
    return sorted(error.valid_methods or ()) if isinstance(error, MethodNotAllowed) else []


def _failed(error: Exception, pipeline: Pipeline) -> Response:
    """What Flask itself finds wrong, and what went wrong in it."""
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(_methods(error))
        answer = simple(405, f"{request.method} is not taken here, only {allowed}", (("Allow", allowed),))
    elif isinstance(error, HTTPException) and error.code is not None and error.code < 500:
        about = "there is no such path: GET /openapi.json lists them" if error.code == 404 else str(error.description)
        answer = simple(error.code, about)
    else:
        answer = problem(error, f"{request.method} {request.path}")
    return _Answered(answer.with_headers(pipeline.cors.headers(request.environ)))


class _Answered(Response):
    """An Answer on its way through Flask, sent as the fast path sends its own."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(status=answer.status)
        self._answer = answer

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        return self._answer.send(environ, start_response)
