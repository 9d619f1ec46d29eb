"""Browsers on other origins: none may ask unless flux.yaml names theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fluxlib.control.http.answers import Headers

_ALLOWED_HEADERS = "Authorization, Content-Type, Idempotency-Key, X-API-Key"
_PREFLIGHT_SECONDS = "600"


class Cors:
    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    @property
    def enabled(self) -> bool:
        return bool(self._origins)

    def headers(self, environ: Mapping[str, Any]) -> Headers:
        """What an answer carries for the origin that asked."""
        if not self._origins:
            return ()
        origin = str(environ.get("HTTP_ORIGIN", ""))
        # Caches must not give one origin's answer to another.
        vary = ("Vary", "Origin")
        if origin in self._origins:
            return (vary, ("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", "Retry-After"))
        if "*" in self._origins:
            return (("Access-Control-Allow-Origin", "*"), ("Access-Control-Expose-Headers", "Retry-After"))
        return (vary,)

    def preflight(self, environ: Mapping[str, Any], methods: Sequence[str]) -> Headers:
        """The answer to OPTIONS on a path with these methods."""
        return (
            *self.headers(environ),
            ("Access-Control-Allow-Methods", ", ".join(methods)),
            ("Access-Control-Allow-Headers", _ALLOWED_HEADERS),
            ("Access-Control-Max-Age", _PREFLIGHT_SECONDS),
        )
