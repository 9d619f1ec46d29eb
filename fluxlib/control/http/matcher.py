"""Finds a route without Flask: for the front, and for requests whose body is still on its way."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fluxlib.control.http.route import Route

# What needs no unquoting and no second thought; anything else is Flask's to look at.
_PLAIN = "([A-Za-z0-9._-]+)"


class Matcher:
    def __init__(self, routes: Iterable[Route]) -> None:
        self._by_method: dict[str, list[tuple[re.Pattern[str], Route]]] = {}
        for route in routes:
            pattern = re.compile(re.sub(r"\\\{[a-z_]+\\\}", _PLAIN, re.escape(route.path)))
            self._by_method.setdefault(route.method, []).append((pattern, route))

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route and its parameters, None when the path is not plainly one of them."""
        for pattern, route in self._by_method.get(method, ()):
            match = pattern.fullmatch(path)
            if match is not None:
                return route, dict(zip(route.parameter_names, match.groups(), strict=True))
        return None
