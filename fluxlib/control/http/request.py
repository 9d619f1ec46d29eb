"""A request as handlers see it: the same object whichever way it came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from fluxlib.control.http.auth import Principal
from fluxlib.control.services import Services
from fluxlib.errors import InvalidInput, TooLarge

_MAX_QUERY = 4096
_FORBIDDEN = ("%2f", "%5c", "%00", "%2e")


class NobodyWaiting:
    """The Caller of a server that cannot tell when a client goes away (Flask's test client)."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        return


class Channel:
    """The Caller behind a connection: the server tells when it closes.

    It does so until its own end of serving the request; a client may have its
    answer and be gone before. ``answered`` is asked, so that this is no going away.
    """

    __slots__ = ("_answered", "_on_gone")

    def __init__(self, on_gone: Callable[[Callable[[], None]], None], answered: Callable[[], bool]) -> None:
        self._on_gone = on_gone
        self._answered = answered

    def on_gone(self, callback: Callable[[], None]) -> None:
        self._on_gone(lambda: None if self._answered() else callback())


class Request:
    """``params``, ``query`` and ``data`` have been read and checked by what the route declares.

    ``subject`` is what the audit log names beside the path, set by a body's reader or a handler.
    """

    __slots__ = ("answered", "data", "environ", "method", "params", "path", "principal", "query", "services", "subject")

    def __init__(self, environ: Mapping[str, Any], services: Services, params: Mapping[str, str]) -> None:
        self.environ = environ
        self.services = services
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ["PATH_INFO"]
        self.params = params
        self.query: Mapping[str, Any] = {}
        self.data: Any = None
        self.principal: Principal | None = None
        self.subject = ""
        self.answered = False  # the answer is made; only sending it is left

    def header(self, name: str) -> str:
        """A header by its WSGI name without HTTP_, empty when absent."""
        return str(self.environ.get(f"HTTP_{name}", ""))

    def has_header(self, name: str) -> bool:
        return f"HTTP_{name}" in self.environ

    @property
    def media_type(self) -> str:
        return str(self.environ.get("CONTENT_TYPE", "")).partition(";")[0].strip().lower()

    @property
    def caller(self) -> Channel | NobodyWaiting:
        on_gone = self.environ.get("flux.on_gone")
        return Channel(on_gone, lambda: self.answered) if on_gone is not None else NobodyWaiting()

    @property
    def may_see_all(self) -> bool:
        """A key was shown: what strangers need not know may be said."""
        return self.principal is not None

    @property
    def body_size(self) -> int:
        """Of the body as announced, in bytes; 0 for none and for what is no number (``body`` refuses that)."""
        length = str(self.environ.get("CONTENT_LENGTH") or "0")
        return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0

    def body(self, limit: int) -> bytes:
        """The whole body. Raises TooLarge before reading more than ``limit`` bytes."""
        length = str(self.environ.get("CONTENT_LENGTH") or "0")
        if length == "0" and "HTTP_TRANSFER_ENCODING" not in self.environ:
            return b""
        if not length.isascii() or not length.isdigit():
            raise InvalidInput("Content-Length is no number")
        if int(length) <= limit:
            data: bytes = self.environ["wsgi.input"].read(limit + 1)
            if len(data) <= limit:
                return data
        raise too_large(limit)

    def query_pairs(self) -> list[tuple[str, str]]:
        """The query string as it stands. Raises InvalidInput for what is no such string."""
        text = str(self.environ.get("QUERY_STRING", ""))
        if not text:
            return []
        if len(text) > _MAX_QUERY:
            raise InvalidInput(f"the query string is longer than {_MAX_QUERY} characters")
        try:
            # The server gives the raw bytes as latin-1; they must be UTF-8 once unquoted.
            return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=50)
        except ValueError as error:
            raise InvalidInput(f"the query string cannot be read: {error}") from error


def raw_path(environ: Mapping[str, Any]) -> str:
    """The path as the client wrote it, before any unquoting."""
    uri = str(environ.get("REQUEST_URI") or environ.get("RAW_URI") or environ["PATH_INFO"])
    if not uri.startswith("/"):
        # GET http://host/path, as a proxy is asked.
        _, separator, rest = uri.partition("://")
        uri = f"/{rest.partition('/')[2]}" if separator else uri
    return uri.partition("?")[0]


def without_slash(path: str) -> str:
    """``/functions/`` is ``/functions``: clients that join paths add one slash. Two are refused (``check_path``)."""
    return path[:-1] if len(path) > 1 and path.endswith("/") and not path.endswith("//") else path


def check_path(environ: Mapping[str, Any]) -> None:
    """Raises InvalidInput for what two readers of a path might read differently."""
    raw = raw_path(environ).lower()
    if any(trick in raw for trick in _FORBIDDEN):
        raise InvalidInput("the path must not contain encoded slashes, backslashes, dots or NUL")
    if "\\" in raw or "//" in raw or any(part in (".", "..") for part in raw.split("/")):
        raise InvalidInput("the path must not contain backslashes, empty parts, '.' or '..'")


def too_large(limit: int) -> TooLarge:
    """The refusal of a body of more than ``limit`` bytes."""
    size = f"{limit // 2**20} MB" if limit >= 2**20 else f"{limit // 1024} KB"
    return TooLarge(f"the body is larger than {size}, the most this route takes")
