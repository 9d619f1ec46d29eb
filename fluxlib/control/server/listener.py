"""A listening socket, and what becomes of the connections it took."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from waitress.server import TcpWSGIServer

from fluxlib.control.http.early import EarlyCheck
from fluxlib.control.server.channel import QuietChannel
from fluxlib.control.server.loop import POLLIN, Poller, Watched

log = logging.getLogger(__name__)

# Whoever follows a quiet output sends and gets nothing: without these probes one that vanished would do so for ever.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

# No descriptor, or no memory for one, is left to the process or the system.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 1.0
_ATTEND_SECONDS = 0.25

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Listener(Watched, TcpWSGIServer):  # type: ignore[misc]
    """One listening socket and the connections it took."""

    channel_class = QuietChannel
    draining = False
    untidy = False
    _listens_at = 0.0
    _exhausted = False
    early_check: EarlyCheck | None = None

    def __init__(self, app: Wsgi, poller: Poller, report_error: Callable[[BaseException], None], **kwargs: Any) -> None:
        self.poller = poller
        self.report_error = report_error
        self._trigger_lock = threading.Lock()
        self._trigger_closed = False
        self.half_closed: set[QuietChannel] = set()  # whose clients send no more and wait for an answer, or have gone
        super().__init__(app, **kwargs)
        poller.want(self.trigger._fileno, POLLIN)
        self.watch(poller)

    def pull_trigger(self) -> None:
        """What waitress's channels call when something has changed. Ours tell the poller themselves, if it listens."""
        if not self.poller.watches:
            self.wake()

    def wake(self) -> None:
        """End the loop's wait. After its end by no means: the descriptor's number may be another file's by then."""
        with self._trigger_lock:
            if not self._trigger_closed:
                self.trigger.pull_trigger()

    def close_trigger(self) -> None:
        with self._trigger_lock:
            if not self._trigger_closed:
                self._trigger_closed = True
                self.poller.forget(self.trigger._fileno)
                self.trigger.close()

    def del_channel(self, map: dict[int, Any] | None = None) -> None:
        self.unwatch()
        super().del_channel(map)

    def accept(self) -> tuple[socket.socket, Any] | None:
        try:
            pair: tuple[socket.socket, Any] | None = super().accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                # The connection stays where it is and would wake the loop at once, again and again.
                self._listens_at = time.monotonic() + _PAUSE_SECONDS
                if not self._exhausted:
                    log.warning("new connections must wait: %s", error.strerror)
                self._exhausted = True
            raise
        self._exhausted = False
        return pair

    def handle_accept(self) -> None:
        """Take one connection. What goes wrong with it closes that connection, never the listening socket."""
        try:
            pair = self.accept()
        except OSError:
            return  # reset before it was taken, or no descriptor is left
        if pair is None:
            return
        connection, address = pair
        number = connection.fileno()
        try:
            self.set_socket_options(connection)
            self.channel_class(self, connection, self.fix_addr(address), self.adj, map=self._map)
        except Exception as error:
            # A client that has gone already is nothing to report.
            if not isinstance(error, ConnectionError) and getattr(error, "errno", None) != errno.EINVAL:
                self.report_error(error)
            self._drop(number)
            connection.close()

    def _drop(self, number: int) -> None:
        """Forget a connection whose channel could not be made."""
        with suppress(OSError, KeyError):
            self.poller.forget(number)
        self.active_channels.pop(number, None)
        self._map.pop(number, None)

    def handle_error(self) -> None:
        """wasyncore calls this from its except clause; its own version would close the listening socket."""
        self.report_error(sys.exc_info()[1] or RuntimeError("unknown error at the listening socket"))

    def abandon(self) -> None:
        """An error at the listening socket costs one connection, not the socket."""

    def patience(self, seconds: float) -> float:
        """How long the loop may wait: not beyond the end of a pause, and not while a client is to be asked for."""
        if any(not channel.asked or not self.poller.watches for channel in self.half_closed):
            seconds = min(seconds, _ATTEND_SECONDS)
        pause = self._listens_at - time.monotonic()
        return min(seconds, pause) if pause > 0 else seconds

    def attend(self, now: float) -> None:
        """Find out which of the clients that send no more have gone. Between two waits."""
        for channel in list(self.half_closed):
            if not channel.attend(now):
                self.half_closed.discard(channel)
            elif not self.poller.watches:
                channel.look_for_reset()

    def readable(self) -> bool:
        # First: it also sees when to tidy.
        wanted = bool(super().readable())
        return wanted and time.monotonic() >= self._listens_at

    def maintenance(self, now: float) -> None:
        """Called by waitress every half minute, in the midst of asking the sockets what they wait for.

        Closing one then would leave select with a descriptor that is none: the loop does it between two waits.
        """
        self.untidy = True

    def tidy(self, now: float) -> None:
        """Closes connections that are idle, drip a request, or have not taken a byte of their answer for long.

        Not by their will_close flag, as waitress does: a full socket would never come to it.
        """
        self.untidy = False
        idle_since = now - self.adj.channel_timeout
        for channel in list(self.active_channels.values()):
            if channel.dawdles(now) or (not channel.waits and channel.last_activity < idle_since):
                channel.handle_close()

    def set_socket_options(self, conn: socket.socket) -> None:
        super().set_socket_options(conn)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            # Not every system has each, and old ones of Windows have the names alone.
            with suppress(OSError, AttributeError):
                conn.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def set_reuse_addr(self) -> None:
        # On Windows SO_REUSEADDR lets a second program take the port of a living one.
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            super().set_reuse_addr()
