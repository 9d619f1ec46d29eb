"""What a handler answers with, before Flask or the fast path makes a response of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, BinaryIO, Protocol
from wsgiref.util import FileWrapper

from fluxlib.control.services import Nothing

JSON = "application/json"
Headers = tuple[tuple[str, str], ...]
StartResponse = Callable[..., Any]


class Chunks(Protocol):
    """A body that comes bit by bit; ``close`` is always called at its end, however it ends."""

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """One response. ``chunks`` replaces ``body`` for what is not known in whole, ``file`` for what is large.

    Whoever sends the file closes it. ``other_length`` is that of what replaces ``body``, where it is known.
    """

    status: int
    body: bytes = b""
    content_type: str = JSON
    headers: Headers = ()
    chunks: Chunks | None = None
    file: BinaryIO | None = None
    other_length: int | None = None

    @property
    def length(self) -> int | None:
        """Of its body; None while that is not known."""
        return len(self.body) if self.chunks is None and self.file is None else self.other_length

    def without_body(self) -> Answer:
        """As HEAD has it."""
        for source in (self.chunks, self.file):
            if source is not None:
                source.close()
        return replace(self, body=b"", chunks=Nothing(), file=None, other_length=self.length)

    def with_headers(self, more: Headers) -> Answer:
        return replace(self, headers=self.headers + more) if more else self

    def wsgi_headers(self) -> list[tuple[str, str]]:
        """All headers."""
        fixed = [("Content-Type", self.content_type), ("X-Content-Type-Options", "nosniff"), *self.headers]
        if self.length is not None:
            fixed.append(("Content-Length", str(self.length)))
        return fixed

    def send(self, environ: Mapping[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """As a WSGI application answers; a file by the server's wrapper, which sends it without holding a thread."""
        write = start_response(self.status_line, self.wsgi_headers())
        if self.file is not None:
            wrapper: Callable[[BinaryIO], Iterable[bytes]] = environ.get("wsgi.file_wrapper") or FileWrapper
            return wrapper(self.file)
        if self.chunks is None:
            return (self.body,)
        write(b"")  # the headers: whoever follows an output that is quiet knows that it is there
        return self.chunks

    @property
    def status_line(self) -> str:
        return _STATUS_LINES[self.status]


_STATUS_LINES = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def json_bytes(data: Any) -> bytes:
    """As people read it with curl: UTF-8 as it is, a line feed at the end.

    A lone surrogate (an argument echoed in a message) would not encode: it becomes a question mark.
    """
    return _ENCODER.encode(data).encode("utf-8", "replace") + b"\n"


def json_answer(status: int, data: Any, headers: Headers = ()) -> Answer:
    return Answer(status, json_bytes(data), JSON, headers)
