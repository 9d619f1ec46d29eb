"""A request as it comes in: a large body is taken only when it is wanted, and no more of it than its route takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from waitress.parser import HTTPRequestParser
from waitress.utilities import BadRequest, RequestEntityTooLarge

from fluxlib.control.http.answers import Answer
from fluxlib.control.http.early import UNQUESTIONED, EarlyCheck

_TLS_HANDSHAKE = b"\x16"  # RFC 8446, 5.1: the content type that a client's first record has
# Between two chunks, and behind the last: waitress keeps a size's extensions and a trailer until their end comes.
_BETWEEN_CHUNKS = 16 * 1024


class Refusal:
    """An answer that needs no body: waitress treats it as it does its own errors."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class _Server(Protocol):
    early_check: EarlyCheck | None


class _Sender(Protocol):
    """The channel, as far as a parser knows it."""

    server: _Server
    addr: tuple[str, int]


class ApiParser(HTTPRequestParser):  # type: ignore[misc]
    """Asks about a large body once the head is there. One without a length is held to its route's limit as it comes."""

    def __init__(self, channel: _Sender, adj: Any) -> None:
        super().__init__(adj)
        self.error: Any
        self._channel = channel
        self._asked = False
        self._limit: float = math.inf  # of a chunked body
        self._beyond: Answer  # what to say to more than that
        self.admitted = False  # its route takes large bodies, and its sender was found to have a key for it
        self.begun = time.time()
        # Kept here: what follows on the connection may be served before this one's end is through.
        self.gone_calls: list[Callable[[], None]] = []

    def received(self, data: bytes) -> int:
        if data[:1] == _TLS_HANDSHAKE and not self.header_plus and self.body_rcv is None:
            # Waiting for its end would let both sides wait for a minute.
            self.error = BadRequest("this port speaks plain HTTP, not TLS: use http://")
            self.completed = True
            return len(data)
        try:
            consumed: int = super().received(data)
        except ValueError as error:
            # A target that is no URL, a length of thousands of digits: waitress takes its reading of them for safe.
            self.error = BadRequest(f"the head cannot be read: {str(error)[:200]}")
            self.completed = True
            return len(data)
        if self.error is None and "TRANSFER_ENCODING" in self.headers:
            # waitress leaves it there where it does not look at it, and would take the body for the next request.
            self.error = BadRequest(
                "a Transfer-Encoding is taken with HTTP/1.1 only: use that, or send a Content-Length"
            )
            self.completed = True
        if self.headers_finished and not self._asked:
            self._asked = True
            # What waitress finds too large is asked about as well: it may have no key, or no such path.
            fits = self.error is None or isinstance(self.error, RequestEntityTooLarge)
            if fits and (self.chunked or self.content_length > UNQUESTIONED):
                self._ask()
        elif self.chunked and self.body_rcv is not None and self.error is None:
            self._hold_to_limit()
        if self.completed:
            # Refused, or without a body: waitress would ask the client to send all the same, and wait for it.
            self.expect_continue = False
        return consumed

    def _ask(self) -> None:
        check = self._channel.server.early_check
        if check is None:
            return
        environ = {f"HTTP_{name}": value for name, value in self.headers.items()}
        environ["REQUEST_METHOD"] = self.command
        environ["PATH_INFO"] = self.path
        environ["REMOTE_ADDR"] = self._channel.addr[0]
        verdict = check(environ)
        if not verdict.limit or self.content_length > verdict.limit:
            self._refuse(verdict.beyond)
            return
        self._limit, self._beyond = verdict.limit, verdict.beyond
        self.admitted = verdict.limit > UNQUESTIONED

    def _hold_to_limit(self) -> None:
        receiver = self.body_rcv
        if max(len(receiver.control_line), len(receiver.trailer)) > _BETWEEN_CHUNKS:
            self.error = BadRequest("too much stands between the chunks")
            self.completed = True
        elif receiver.buf.__len__() + receiver.chunk_remainder > self._limit:
            # The size a chunk announces counts: all of it will come.
            self._refuse(self._beyond)

    def _refuse(self, answer: Answer) -> None:
        self.error = Refusal(answer)
        self.completed = True
