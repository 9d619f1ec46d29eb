"""Refusing a large body before it is sent, or while it is where its size is not told.

The server reads a body to its end before the application sees the request:
without this, strangers could fill the disk with uploads that are refused later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxlib.control.http.answers import Answer
from fluxlib.control.http.pipeline import Pipeline
from fluxlib.control.http.problems import simple
from fluxlib.control.http.request import too_large
from fluxlib.control.http.route import Route

# Bodies up to this are simply read: they are not worth the look.
UNQUESTIONED = 64 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """So many bytes may be sent, 0 = none and no request without any either; ``beyond`` is the answer to more."""

    limit: int
    beyond: Answer


class EarlyCheck:
    """What the server asks when a head announces more than ``UNQUESTIONED`` bytes, or does not say how many.

    Whose limit is more than that has shown a key: no public route takes as much.
    """

    def __init__(
        self, pipeline: Pipeline, find: Callable[[Mapping[str, Any]], tuple[Route, Mapping[str, str]] | None]
    ) -> None:
        self._pipeline = pipeline
        self._find = find

    def __call__(self, environ: Mapping[str, Any]) -> Verdict:
        """``environ`` has the method, the path, the address and the headers."""
        found = self._find(environ)
        if found is None:
            return Verdict(0, simple(404, "there is no such path that takes a body: GET /openapi.json lists them"))
        route, params = found
        refusal = self._pipeline.refusal(route, environ, params)
        if refusal is not None:
            return Verdict(0, refusal)
        limit = min(route.body.limit, UNQUESTIONED) if route.public else route.body.limit
        return Verdict(limit, self._pipeline.failed(too_large(limit), environ))
