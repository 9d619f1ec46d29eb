"""One HTTP connection: waitress's channel, made quiet, telling when its client has gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask

log = logging.getLogger(__name__)


class _Closing:
    """Connections are not kept open while the server stops."""

    channel: Any
    set_close_on_finish: Callable[[], None]

    def build_response_header(self) -> bytes:
        if self.channel.server.draining:
            self.set_close_on_finish()
        header: bytes = super().build_response_header()  # type: ignore[misc]
        return header


class ApiTask(_Closing, WSGITask):  # type: ignore[misc]
    """A request for the application, which finds ``flux.on_gone`` in its environment."""

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        environ["flux.on_gone"] = self.channel.on_gone
        return environ


class ApiErrorTask(_Closing, ErrorTask):  # type: ignore[misc]
    """What waitress itself refuses (no HTTP, too large), said in JSON as everything else."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps({"error": f"{error.reason.lower()}: {error.body}"}).encode() + b"\n"
        self.status = f"{error.code} {error.reason}"
        self.response_headers.extend([("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")])
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class QuietChannel(HTTPChannel):  # type: ignore[misc]
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
        self._gone_calls: list[Callable[[], None]] = []
        self._unsent = False  # changed under outbuf_lock
        super().__init__(*args, **kwargs)

    # -- output --------------------------------------------------------------------

    def write_soon(self, data: Any) -> int:
        left = False
        with self.outbuf_lock:
            count: int = super().write_soon(data)
            if self.total_outbufs_len and not self._unsent:
                self._unsent = left = True
        if left:
            self.server.pull_trigger()
        return count

    def writable(self) -> bool:
        if self.requests and not self._unsent:
            return bool(self.will_close)
        return bool(super().writable())

    def handle_write(self) -> None:
        super().handle_write()
        # Under the lock, or what a worker leaves just now would be forgotten;
        # without waiting for it, since the next turn comes anyway.
        if self.outbuf_lock.acquire(False):
            try:
                if not self.total_outbufs_len:
                    self._unsent = False
            finally:
                self.outbuf_lock.release()

    # -- the client's going away -----------------------------------------------------

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Calls it once when the connection closes before the request being served has its answer.

        On the main loop's thread, which everyone waits for meanwhile: it must be short.
        """
        self._gone_calls.append(callback)
        if not self.connected:
            self._call_gone()

    def handle_close(self) -> None:
        super().handle_close()
        self._call_gone()

    def cancel(self) -> None:
        super().cancel()
        self._call_gone()

    def service(self) -> None:
        try:
            super().service()
        finally:
            # They belonged to this request, not to the next one on the connection.
            if self.connected:
                self._gone_calls.clear()

    def _call_gone(self) -> None:
        while True:
            try:
                # pop is atomic: each is called once, whoever gets here first.
                callback = self._gone_calls.pop()
            except IndexError:
                return
            try:
                callback()
            except Exception:
                log.exception("a call for a client that went away failed")
