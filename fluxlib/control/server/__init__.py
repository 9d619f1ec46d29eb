"""waitress with the settings that make it serve many blocking calls, and a stop that lets them finish."""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from waitress import wasyncore
from waitress.adjustments import Adjustments

from fluxlib.config.control import ControlConfig
from fluxlib.config.environment import inherited_sockets, keep_sockets
from fluxlib.control.http.budget import RESERVED_THREADS, WINDOWS_CONNECTIONS
from fluxlib.control.server.channel import QuietChannel
from fluxlib.control.server.listener import Listener, Wsgi
from fluxlib.control.server.loop import Poller, best_poller
from fluxlib.control.server.threads import LazyThreads
from fluxlib.descriptors import raise_limit
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline, LoopReport
from fluxlib.listening import listen_problem

log = logging.getLogger(__name__)

_CONNECTIONS = 4_000
# For the store, the agents' channels, temporary files of large bodies: at least. The rest is theirs.
_OTHER_DESCRIPTORS = 512
_IDLE_CONNECTION_SECONDS = 75
_LOOP_SECONDS = 5.0
# Turns of the loop that may fail in a row before the server gives up.
_MAX_FAILURES = 10


class WebServer:
    """Listens from the moment it is made, serves from ``start``.

    ``app`` may have an ``early_check`` (http.Api has), asked before a large body is
    read. ``on_failure(reason)`` is called when the loop has ended although nobody stopped it: nothing is served from
    then on. Raises FluxError when the address cannot be bound.
    """

    def __init__(
        self,
        app: Wsgi,
        config: ControlConfig,
        poller: Callable[[dict[int, Any]], Poller] | None = None,
        on_failure: Callable[[str], object] = lambda reason: None,
    ) -> None:
        self._on_failure = on_failure
        self._errors = 0
        self._last_error = ""
        self._last_ran_at = 0.0
        # The queue's depth is logged per request that waits, and waiting is normal here.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        adjustments = _adjustments(config)
        self._pool = LazyThreads(config.max_blocking + RESERVED_THREADS)
        self._map: dict[int, Any] = {}
        self._poller = (poller or best_poller)(self._map)
        self._listeners: list[Listener] = []
        try:
            self._listen(app, adjustments)
        except OSError as error:
            self._close_all()
            raise FluxError(listen_problem("Flux", config.listen_host, config.port, error, config.path)) from error
        except BaseException:
            self._close_all()
            raise
        for listener in self._listeners:
            listener.early_check = getattr(app, "early_check", None)
        self.port = int(self._listeners[0].effective_port)
        self.turns = 0  # of the loop: it must stand still while all there is waits
        self._deadline: Deadline | None = None
        self._thread = threading.Thread(target=self._run, name="http-loop", daemon=True)

    def _listen(self, app: Wsgi, adjustments: Adjustments) -> None:
        """On every address wanted, with the sockets systemd has kept since the last run where there are some."""
        kept = inherited_sockets()
        used: set[str] = set()
        try:
            for address, demanded in _addresses(adjustments.listen):
                family, kind, protocol, place = address
                if not place[1] and self._listeners:  # any port, the same one for all
                    place = (place[0], int(self._listeners[0].effective_port), *place[2:])
                name = _socket_name(place)
                own = kept.get(name)
                try:
                    listener = Listener(
                        app,
                        self._poller,
                        self._report_error,
                        map=self._map,
                        dispatcher=self._pool,
                        adj=adjustments,
                        sockinfo=(family, kind, protocol, place),
                        _sock=own,
                        bind_socket=own is None,
                    )
                except OSError as error:
                    if demanded:
                        raise
                    if address[3][1]:
                        self._other_loopback_failed(place, error)
                    continue
                used.add(name)
                self._listeners.append(listener)
        finally:
            for name, one in kept.items():
                if name not in used:
                    one.close()
        made = {_socket_name(listener.sockinfo[3]): listener.socket for listener in self._listeners}
        keep_sockets(
            {name: one for name, one in made.items() if name not in kept}, [name for name in kept if name not in used]
        )

    @staticmethod
    def _other_loopback_failed(place: tuple[Any, ...], error: OSError) -> None:
        """A machine without IPv6 has one loopback address only. A program that holds the other one is a danger."""
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return
        problem = listen_problem("Flux", place[0], place[1], error, "flux.yaml")
        raise FluxError(
            f"{problem}. Flux takes the port on 127.0.0.1 and on ::1, because a program that holds one of them is sent "
            "the API keys of whoever asks `localhost`"
        ) from error

    @property
    def threads(self) -> int:
        """How many threads serve requests now."""
        return self._pool.count

    def report(self) -> LoopReport:
        """For /health: whether its loop is alive, and the errors it has survived."""
        return LoopReport(self._thread.name, self._thread.is_alive(), self._errors, self._last_error, self._last_ran_at)

    def start(self) -> WebServer:
        self._thread.start()
        return self

    def stop(self, deadline: Deadline) -> None:
        """Take nothing new, let what runs finish, then close; at the deadline close whatever is open."""
        if self._thread.is_alive():
            self._deadline = deadline
            self._listeners[0].wake()
            # The loop ends by itself at the deadline; a little more, to see it end.
            self._thread.join(deadline.remaining() + 1.0)
        elif self._deadline is None:  # never started
            self._close_all()
        self._pool.stop(deadline)

    # -- the loop's thread -------------------------------------------------------------

    def _run(self) -> None:
        try:
            failures = 0
            while self._deadline is None:
                try:
                    self._turn()
                    failures = 0
                except Exception as error:
                    failures += 1
                    self._report_error(error)
                    if failures >= _MAX_FAILURES:
                        self._on_failure(f"the HTTP server failed {failures} times in a row: {self._last_error}")
                        return
            self._stop_listening()
            while self._open_channels() and self._deadline.remaining() > 0:
                self._poller.turn(min(_LOOP_SECONDS, self._deadline.remaining()))
        except BaseException as error:
            self._report_error(error)
            self._on_failure(f"the HTTP server ended: {self._last_error}")
        finally:
            left = self._open_channels()
            if left:
                log.warning("closing %d connections with unfinished requests", left)
            self._close_all()

    def _turn(self) -> None:
        self._poller.turn(min(listener.patience(_LOOP_SECONDS) for listener in self._listeners))
        self.turns += 1
        self._last_ran_at = time.time()
        for listener in self._listeners:
            listener.refresh()  # room for connections again, or none left
            listener.attend(time.time())
            if listener.untidy:
                listener.tidy(time.time())

    def _report_error(self, error: BaseException) -> None:
        self._errors += 1
        self._last_error = f"{type(error).__name__}: {error}"
        log.error("error %d in the HTTP server's loop", self._errors, exc_info=error)

    def _close_all(self) -> None:
        for channel in self._channels():
            channel.handle_close()
        for listener in self._listeners:
            listener.close_trigger()
        # What is left: a socket that could not be bound, listeners of a loop that never ran.
        wasyncore.close_all(self._map)
        self._poller.close()

    def _stop_listening(self) -> None:
        """Closes the sockets and keeps the triggers, by which workers wake the loop."""
        for listener in self._listeners:
            listener.draining = True
            wasyncore.dispatcher.close(listener)

    def _channels(self) -> list[QuietChannel]:
        return [channel for listener in self._listeners for channel in list(listener.active_channels.values())]

    def _open_channels(self) -> int:
        """How many still have something to do; the others are closed."""
        left = 0
        for channel in self._channels():
            if channel.requests or channel.total_outbufs_len:
                left += 1
            else:
                channel.handle_close()
        return left


Address = tuple[int, int, int, tuple[Any, ...]]
# What is listened on beside each of these: whoever asks `localhost` reaches one loopback address or the other.
_OTHER_LOOPBACK = {"127.0.0.1": "::1", "0.0.0.0": "::1", "::1": "127.0.0.1", "::": "127.0.0.1"}


def _addresses(wanted: Sequence[Address]) -> list[tuple[Address, bool]]:
    """Each address and whether listening there is demanded: the other loopback address need not exist."""
    hosts = {address[3][0] for address in wanted}
    found = [(address, True) for address in wanted]
    for _, kind, protocol, place in wanted:
        other = _OTHER_LOOPBACK.get(place[0])
        if other is not None and other not in hosts:
            hosts.add(other)
            family = socket.AF_INET6 if ":" in other else socket.AF_INET
            found.append(((family, kind, protocol, (other, place[1])), False))
    return found


def _socket_name(place: tuple[Any, ...]) -> str:
    """As systemd lists it: without colons, which separate names there."""
    return f"http-{place[0].replace(':', '.')}-{place[1]}"


def _adjustments(config: ControlConfig) -> Adjustments:
    try:
        # waitress tells a name nobody knows as a ValueError without a reason.
        socket.getaddrinfo(config.listen_host, config.port)
    except OSError as error:
        raise FluxError(listen_problem("Flux", config.listen_host, config.port, error, config.path)) from error
    host = f"[{config.listen_host}]" if ":" in config.listen_host else config.listen_host
    return Adjustments(
        listen=f"{host}:{config.port}",
        ident="Flux",
        backlog=1024,
        connection_limit=_connection_limit(config.max_blocking),
        channel_timeout=_IDLE_CONNECTION_SECONDS,
        # Reading on while a request is served is how a client's going away is noticed.
        channel_request_lookahead=1,
        # waitress refuses what is as large as its limit.
        max_request_body_size=config.max_archive_mb * 2**20 + 1,
        max_request_header_size=64 * 1024,
        # What a client has not read yet: more would be memory and temporary files.
        outbuf_high_watermark=1024 * 1024,
        # Resets by clients are their business.
        log_socket_errors=False,
        # Nothing here reads X-Forwarded-*.
        clear_untrusted_proxy_headers=False,
    )


def _connection_limit(max_blocking: int) -> int:
    if sys.platform == "win32":
        return WINDOWS_CONNECTIONS
    wanted = max(_CONNECTIONS, 2 * max_blocking)
    available = raise_limit() - _OTHER_DESCRIPTORS
    if available < wanted:
        log.warning(
            "the limit of open files leaves room for %d connections of %d; raise it (ulimit -n)", available, wanted
        )
    return max(64, min(wanted, available))
