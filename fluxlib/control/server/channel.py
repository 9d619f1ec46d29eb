"""One HTTP connection: waitress's channel, made quiet, telling when its client has gone."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import build_http_date

from fluxlib.control.http.problems import simple
from fluxlib.control.server.loop import Watched
from fluxlib.control.server.parser import ApiParser, Refusal

log = logging.getLogger(__name__)

# How long a client may go on sending what was refused.
_DISCARD_SECONDS = 10.0
_DISCARDED_AT_ONCE = 262_144
# For a head, and for a body that nobody was asked about: whoever drips them holds a connection for nothing.
_REQUEST_SECONDS = 60.0
# A client that sends no more either waits for its answer or has gone: TCP shows both alike. Whoever closes its sending
# side by habit (nc -N, socat) does so at once and gets quick answers as they are; the others are asked after so long.
_ASK_ENDED_AFTER = 0.5
# HTTP/1.0 has nothing to ask with: such a client has gone if its end came this long after it was last heard or told.
_HABIT_SECONDS = 1.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_LEADING_ZERO = b"0"  # of the next chunk's size
# Bodies up to this (bytes) are sent together with their header.
_SHORT = 64 * 1024


class _Lean:
    """Connections are not kept open while the server stops; a short answer costs one packet and little else."""

    channel: Any
    request: Any
    version: str
    status: str
    complete: bool
    wrote_header: bool
    content_length: int | None
    content_bytes_written: int
    response_headers: list[tuple[str, str]]
    start_time: float
    set_close_on_finish: Callable[[], None]

    @property
    def has_body(self) -> bool:
        # Where no length is told waitress writes chunks, and a last one behind a HEAD's answer too.
        without = self.content_length is None and self.request.command == "HEAD"
        return not without and bool(super().has_body)  # type: ignore[misc]

    def build_response_header(self) -> bytes:
        if self.channel.server.draining or self.channel.ended:
            self.set_close_on_finish()
        headers = self.response_headers
        # As the front and the errors make them; whatever is not so plain waitress looks at.
        if self.version != "1.1" or "CONNECTION" in self.request.headers or headers[-1:] != [self._length_header()]:
            header: bytes = super().build_response_header()  # type: ignore[misc]
            return header
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in headers)]
        lines += (f"Server: {self.channel.adj.ident}", f"Date: {http_date(int(self.start_time))}", "", "")
        return "\r\n".join(lines).encode("latin-1")

    def _length_header(self) -> tuple[str, str]:
        return "Content-Length", str(self.content_length)

    def write(self, data: bytes) -> None:
        # waitress sends the header by itself: a second packet, and the GIL let go and waited for once more.
        if self.wrote_header or not self.complete or len(data) != self.content_length or len(data) > _SHORT:
            super().write(data)  # type: ignore[misc]
            return
        header = self.build_response_header()
        self.wrote_header = True
        self.content_bytes_written += len(data)
        self.channel.write_soon(header + data if self.has_body else header)


@lru_cache(maxsize=2)
def http_date(seconds: int) -> str:
    """The Date header of that second."""
    return str(build_http_date(seconds))


class ApiTask(_Lean, WSGITask):  # type: ignore[misc]
    """A request for the application, which finds ``flux.on_gone`` in its environment."""

    def start(self) -> None:
        super().start()
        self.channel.task = self

    def finish(self) -> None:
        # The loop must not write between the last chunk and this.
        with self.channel.outbuf_lock:
            self.channel.task = None
            super().finish()

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["flux.on_gone"] = partial(self.channel.on_gone, self.request)
        return environ


class ApiErrorTask(_Lean, ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses (no HTTP, too large), said in JSON as everything else."""

    def execute(self) -> None:
        error = self.request.error
        if isinstance(error, Refusal):
            answer = error.answer
        else:
            # waitress says its own limit in bytes: of an application nobody can ask, or for what stands between chunks.
            limit = self.channel.adj.max_request_body_size // 2**20
            too_large = f"the body is larger than {limit} MB, the most this route takes"
            answer = simple(error.code, too_large if error.code == 413 else f"{error.reason.lower()}: {error.body}")
        self.status = answer.status_line
        self.response_headers.extend(answer.wsgi_headers())
        self.set_close_on_finish()
        self.content_length = len(answer.body)
        self.write(answer.body)


class QuietChannel(Watched, HTTPChannel):  # type: ignore[misc]
    """A channel the main loop leaves alone while a request is being served.

    waitress asks for POLLOUT whenever the output buffer is not empty, also in
    the moment between a worker's filling and its flushing it. The socket is
    writable, the worker holds the lock and waits for the GIL, and the main loop
    that holds it spins: some 80 turns a request at 64 connections. Here it asks
    only for what a worker could not send.
    """

    task_class = ApiTask
    error_task_class = ApiErrorTask

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unsent = False  # changed under outbuf_lock
        self._unread = False  # a body was refused that the client may be sending
        self._discard_until = 0.0
        self.ended = False  # the client sends no more, and may wait for its answers
        self._ended_at = 0.0
        self._asked = False  # whether it is still there
        self._answering = False  # a part of the present answer is on its way; changed under outbuf_lock
        self.task: ApiTask | None = None  # until its last chunk; likewise
        self.parser_class = partial(ApiParser, self)
        super().__init__(*args, **kwargs)
        self.watch(self.server.poller)

    # -- output --------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """Whether its silence is the server's doing: a request is served and all of its answer so far has been sent."""
        return bool(self.requests and not self.total_outbufs_len)

    def write_soon(self, data: Any) -> int:
        left = False
        with self.outbuf_lock:
            self._answering = True
            if not self.total_outbufs_len:
                # From now on the client is at it; from then on only what it takes is activity.
                self.last_activity = time.time()
            count: int = self._sent_at_once(data) or super().write_soon(data)
            if self.total_outbufs_len and not self._unsent:
                self._unsent = left = True
        if left or self.will_close:
            self._changed()
        return count

    def _sent_at_once(self, data: Any) -> int:
        """All of it by one call, without a buffer in between; 0 when that cannot be or could not be done."""
        if self.total_outbufs_len or not self.connected or not isinstance(data, bytes) or len(data) > 2 * _SHORT:
            return 0
        try:
            sent = self.send(data, do_close=False)
        except OSError:
            return 0  # it says so again, and is marked for its end
        if sent == len(data):
            self.last_activity = time.time()
            return len(data)
        if sent:
            # The rest is kept as if all of it had been buffered.
            super().write_soon(data[sent:])
            return len(data)
        return 0

    def _changed(self) -> None:
        """From a worker: what this connection waits for is another thing now."""
        if self._watching:
            self.refresh()
        else:
            self.server.wake()

    def writable(self) -> bool:
        if self.requests and not self._unsent:
            return bool(self.will_close)
        return bool(super().writable())

    def handle_write(self) -> None:
        if self._unread and self.close_when_flushed and not self.total_outbufs_len and not self.will_close:
            self._close_later()
            return
        super().handle_write()
        # Under the lock, or what a worker leaves just now would be forgotten;
        # without waiting for it, since the next turn comes anyway.
        if self.outbuf_lock.acquire(False):
            try:
                if not self.total_outbufs_len:
                    self._unsent = False
            finally:
                self.outbuf_lock.release()

    # -- input ---------------------------------------------------------------------

    def dawdles(self, now: float) -> bool:
        """Whether a request has been coming in for too long; each byte of it looks like activity. From the loop."""
        request = self.request
        # A whole one stays here for a moment after it was handed to a worker, who may have answered by then.
        coming = request is not None and not request.completed and not request.admitted
        return coming and now - request.begun > _REQUEST_SECONDS

    def readable(self) -> bool:
        if self._discard_until:
            return True
        if self.ended:
            return False
        # What a worker is just putting out is no reason to stop listening for the client's going away.
        if self.requests and not self._unsent:
            busy = len(self.requests) > self.adj.channel_request_lookahead
            return not (busy or self.will_close or self.close_when_flushed)
        return bool(super().readable())

    def handle_read(self) -> None:
        # Not waitress's: for that one the end of what a client sends is the client's end.
        try:
            data = self.socket.recv(_DISCARDED_AT_ONCE if self._discard_until else self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.handle_close()
            return
        if self._discard_until:
            if not data or time.monotonic() > self._discard_until:
                self.handle_close()
        elif data:
            self.last_activity = time.time()
            self.received(data)
        else:
            self._handle_end()

    def _close_later(self) -> None:
        """The answer is sent, the body it refuses is still coming.

        Closing now would reset the connection, and a client that sends all before
        it reads would see that instead of the answer.
        """
        self.close_when_flushed = False
        self._discard_until = time.monotonic() + _DISCARD_SECONDS
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.handle_close()

    # -- the client's going away -----------------------------------------------------

    def on_gone(self, request: ApiParser, callback: Callable[[], None]) -> None:
        """Calls it once when the connection closes before this request, which is being served, has its answer.

        On the main loop's thread, which everyone waits for meanwhile: it must be short.
        """
        request.gone_calls.append(callback)
        if not self.connected:
            _call_gone([request])

    def _handle_end(self) -> None:
        """The client sends no more: it gets the answers that are due, unless it has gone altogether."""
        with self.requests_lock:
            due = bool(self.requests)
            self.ended = due or self.total_outbufs_len > 0
            self.close_when_flushed = self.close_when_flushed or (self.ended and not due)
        if not self.ended or not self._may_wait():
            self.handle_close()
            return
        self._ended_at = time.time()
        if due:
            self.server.half_closed.add(self)

    def _may_wait(self) -> bool:
        """Whether it can be asked, or ended so soon that it ended by habit."""
        request = next(iter(self.requests), None)
        with self.outbuf_lock:
            can_ask = request is None or self._question(request) is not None
            return can_ask or self.total_outbufs_len > 0 or time.time() - self.last_activity < _HABIT_SECONDS

    def _question(self, request: ApiParser) -> bytes | None:
        """What a client that is there passes over, and one that has gone answers by a reset. Under outbuf_lock."""
        if not self._answering:
            return _CONTINUE if request.version == "1.1" else None
        task = self.task
        return _LEADING_ZERO if task is not None and task.chunked_response else None

    def attend(self, now: float) -> bool:
        """From the loop, for a client that sends no more: ask whether it is there. False when that is over."""
        with suppress(ClientDisconnected), self.outbuf_lock:
            request = next(iter(self.requests), None)
            if request is None or not self.connected:
                return False
            if self._asked or now - self._ended_at < _ASK_ENDED_AFTER or self.total_outbufs_len:
                return True
            question = self._question(request)
            if question is not None and not self._sent_at_once(question):
                HTTPChannel.write_soon(self, question)
            self._asked = True
        self.refresh()
        return True

    @property
    def asked(self) -> bool:
        """Whether nothing is left but to hear of a reset."""
        return self._asked

    def look_for_reset(self) -> None:
        """Where the poller does not tell of one. From the loop."""
        try:
            # Linux has it here, where a read still tells the end that came before; others fail the read.
            gone = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
            self.socket.recv(1)
        except BlockingIOError:
            return
        except OSError:
            gone = True
        if gone:
            self.handle_close()

    def handle_close(self) -> None:
        super().handle_close()
        coming = self.request
        if coming is not None and not coming.completed:
            coming.close()  # its file at once: parser and channel know each other, and only the collector parts them
        _call_gone(self.requests)

    def del_channel(self, map: dict[int, Any] | None = None) -> None:
        self.unwatch()  # the socket is closed next
        super().del_channel(map)

    def cancel(self) -> None:
        requests = self.requests
        super().cancel()
        _call_gone(requests)

    def service(self) -> None:
        request = self.requests[0]
        self._unread = request.error is not None
        with self.outbuf_lock:
            self._answering = False
        try:
            super().service()
        finally:
            self.task = None
            if self.ended and not self.requests:
                self.close_when_flushed = True
            # It is over: nobody is told any more, and what they hold is let go.
            request.gone_calls.clear()
            self._changed()
            if self.server.draining:
                self.server.wake()


def _call_gone(requests: Iterable[ApiParser]) -> None:
    for request in list(requests):
        while request.gone_calls:
            try:
                # pop is atomic: each is called once, whoever gets here first.
                callback = request.gone_calls.pop()
            except IndexError:
                break
            try:
                callback()
            except Exception:
                log.exception("a call for a client that went away failed")
