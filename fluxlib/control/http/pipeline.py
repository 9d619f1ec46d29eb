"""The one way every request takes, through Flask or the fast path: authentication, checks, budget, handler, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fluxlib.control.http import audit
from fluxlib.control.http.answers import Answer, Chunks
from fluxlib.control.http.auth import Authenticator, FailedAttempts, Keys, presented
from fluxlib.control.http.bodies import read_body
from fluxlib.control.http.budget import Bodies, Budget, Waits, blocking_limit
from fluxlib.control.http.cors import Cors
from fluxlib.control.http.fields import PARAMS, take
from fluxlib.control.http.problems import problem
from fluxlib.control.http.request import Request
from fluxlib.control.http.route import Route
from fluxlib.control.services import Services
from fluxlib.errors import FluxError, Forbidden, InvalidInput, Unauthenticated
from fluxlib.log import one_line


class Pipeline:
    """Answers any route of the table."""

    def __init__(self, services: Services, attempts: FailedAttempts | None = None) -> None:
        self._services = services
        self.keys = Keys(services.config)
        self._authenticator = Authenticator(self.keys, attempts or FailedAttempts())
        self.budget = Budget(blocking_limit(services.config.max_blocking))
        self.bodies = Bodies(services.config.max_bodies_mb * 2**20)
        self.cors = Cors(services.config.cors_origins)

    def answer(self, route: Route, environ: Mapping[str, Any], params: Mapping[str, str]) -> Answer:
        """Never raises: whatever happens is an answer."""
        request = Request(environ, self._services, params)
        try:
            self._admit(route, request)
            answer = self._served(route, request)
        except Exception as error:
            answer = problem(error, f"{request.method} {request.path}")
            self._note(request, error, answer)
        if route.changes and request.principal is not None:
            audit.changed(request, answer.status)
        return answer.with_headers(self.cors.headers(environ))

    def refusal(self, route: Route, environ: Mapping[str, Any], params: Mapping[str, str]) -> Answer | None:
        """What ``answer`` would say for want of a right key; None when the request is let in."""
        request = Request(environ, self._services, params)
        try:
            self._admit(route, request)
        except FluxError as error:
            answer = self.failed(error, environ)
            self._note(request, error, answer)
            return answer
        return None

    def failed(self, error: FluxError, environ: Mapping[str, Any]) -> Answer:
        """The answer to what was found wrong before there was a whole request."""
        return problem(error, "").with_headers(self.cors.headers(environ))

    @staticmethod
    def _note(request: Request, error: Exception, answer: Answer) -> None:
        # Not who shows no key or guesses on while refused: strangers must not fill the log.
        wrong_key = isinstance(error, Unauthenticated) and presented(request.environ) is not None
        if wrong_key or isinstance(error, Forbidden):
            audit.refused(request, answer.status, str(error))

    def _admit(self, route: Route, request: Request) -> None:
        if route.public:
            request.principal = self._authenticator.optional(request.environ)
            return
        principal = self._authenticator.require(request.environ, route.role)
        if "name" in request.params:
            principal.demand_function(request.params["name"])
        request.principal = principal

    def _served(self, route: Route, request: Request) -> Answer:
        self._check(route, request)
        # Before the body is read: who finds no place must not cost its memory.
        leave = self._enter(route, request)
        handed_on = False
        try:
            request.data = read_body(route.body, request)
            answer = route.handler(request)
            if request.method == "HEAD":
                return answer.without_body()
            if answer.chunks is None:
                return answer
            handed_on = True
            return replace(answer, chunks=_Guarded(answer.chunks, leave, request))
        finally:
            if not handed_on:
                request.answered = True
                leave()

    def _enter(self, route: Route, request: Request) -> Callable[[], None]:
        """A place for the request and room for its body; what it answers gives both back. Raises Unavailable."""
        leave = self.budget.enter(Waits.FOLLOW if request.query.get("follow") else route.waits)
        size = request.body_size
        if not size:
            return leave
        try:
            forget = self.bodies.take(min(size, route.body.limit))
        except FluxError:
            leave()
            raise

        def both() -> None:
            forget()
            leave()

        return both

    @staticmethod
    def _check(route: Route, request: Request) -> None:
        """Path and query by their declarations. Raises InvalidInput and its like."""
        for name, value in request.params.items():
            try:
                PARAMS[name].read(value)
            except ValueError as error:
                raise InvalidInput(f"{name.replace('_', ' ')} in the path: {error}") from error
        pairs = request.query_pairs()
        if route.query or pairs:
            values = dict(pairs)
            if len(values) != len(pairs):
                raise InvalidInput("a name appears twice in the query string")
            request.query = take(route.query, values, "the query string")


class _Guarded:
    """Chunks that give their place back at the end, and end a broken stream as broken.

    An error after the headers cannot become a status. OSError makes the server
    drop the connection, so that the client sees a body cut short and not a complete one.
    """

    def __init__(self, chunks: Chunks, leave: Callable[[], None], request: Request) -> None:
        self._chunks = chunks
        self._leave: Callable[[], None] | None = leave
        self._what = f"{request.method} {request.path}"

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._chunks
        except FluxError as error:
            audit.log.warning("%s ended early: %s", one_line(self._what), one_line(error.message))
            raise ConnectionAbortedError(error.message) from error

    def close(self) -> None:
        leave, self._leave = self._leave, None
        try:
            self._chunks.close()
        finally:
            if leave is not None:
                leave()
