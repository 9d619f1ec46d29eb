"""Channels to agents, and gRPC's errors told apart once for every call made over them.

A :class:`Line` is one channel with its calls under way. When Flux's identity
changes a new line is opened, and the old one is closed by its last call.
:class:`Lines` gives the one to use now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from fluxlib.errors import AgentUnreachable, FluxError, InvalidInput
from fluxlib.lifecycle import Timers
from fluxlib.pki import Identity, agent_server_name
from fluxlib.pki.identity import AGENT_NAME
from fluxlib.rpc import tls
from fluxlib.rpc.gen import flux_pb2_grpc
from fluxlib.rpc.status import from_rpc_error, surely_not_sent

# An agent that comes back is noticed soon; C-core's own pauses grow to two minutes.
_RECONNECT: list[tuple[str, Any]] = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
]
# A vanished host is noticed within 15 s. Only to agents of ours: an original's server
# answers pings more frequent than every five minutes with GOAWAY.
_KEEPALIVE: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


class Line:
    """One channel to an agent. Safe from any thread.

    ``agent_id`` is for messages, and for the server's name unless that is given. ``timers`` close a retired channel:
    the thread that ends its last call may be the channel's own, which cannot wait for itself.
    """

    def __init__(
        self,
        address: str,
        identity: Identity | None,
        server_name: str,
        timers: Timers,
        *,
        agent_id: str = "",
        keepalive: bool = False,
    ) -> None:
        self._agent_id = agent_id
        self._timers = timers
        self._channel = tls.channel(address, identity, server_name, _RECONNECT + (_KEEPALIVE if keepalive else []))
        self.stub: Any = flux_pb2_grpc.AgentServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        self._calls = 0
        self._retired = False

    def begin(self) -> None:
        """Count a call, so that the channel outlives it; ``end`` must follow. Raises AgentUnreachable."""
        with self._lock:
            if self._retired:
                raise self.closed()
            self._calls += 1

    def end(self) -> None:
        with self._lock:
            self._calls -= 1
            last = self._retired and not self._calls
        if last:
            self._timers.after(0, self._channel.close)

    @contextmanager
    def call(self) -> Iterator[Any]:
        """The stub for one blocking call, its errors translated: AgentUnreachable, AgentLost, AgentRefused."""
        self.begin()
        with self.begun() as stub:
            yield stub

    @contextmanager
    def begun(self) -> Iterator[Any]:
        """``call`` for one that was counted before; it is ended here."""
        try:
            yield self.stub
        except grpc.RpcError as error:
            raise self.translate(error) from error
        except ValueError as error:
            raise self.closed() from error
        finally:
            self.end()

    def begun_future(self, start: Callable[[Any], Any], on_done: Callable[[Any | FluxError], None]) -> Any | None:
        """See Lines.future; for one that was counted before. It is ended here."""
        try:
            future = start(self.stub)
        except ValueError:
            self.end()
            on_done(self.closed())
            return None
        future.add_done_callback(lambda done: self._settle(done, on_done))
        return future

    def _settle(self, done: Any, on_done: Callable[[Any | FluxError], None]) -> None:
        self.end()
        # A done call of gRPC's is its own error; ``exception()`` would raise for a cancelled one.
        on_done(done.result() if done.code() is grpc.StatusCode.OK else self.translate(done))

    def closed(self) -> AgentUnreachable:
        """What gRPC says by a ValueError when the channel was closed before the call began."""
        who = f"agent {self._agent_id}" if self._agent_id else "the agent"
        return AgentUnreachable(f"the connection to {who} is closed")

    def translate(self, error: grpc.RpcError) -> FluxError:
        return from_rpc_error(error, sent=not surely_not_sent(error), agent_id=self._agent_id)

    def retire(self) -> None:
        """No new calls; the last one under way closes the channel."""
        with self._lock:
            self._retired = True
            idle = not self._calls
        if idle:
            self._channel.close()

    def close(self) -> None:
        """At once: calls under way are cancelled."""
        with self._lock:
            self._retired = True
        self._channel.close()


class Lines:
    """The line to one agent at any time. Safe from any thread.

    Finding the line and counting a call on it are one step: between the two it could be retired, and a call that
    came then would fail for no reason of the agent's.
    """

    def __init__(self, new_line: Callable[[], Line]) -> None:
        self._new_line = new_line
        self._lock = threading.Lock()
        self._line = new_line()
        self._closed = False

    def begin(self) -> Line:
        """The line to use now, a call counted on it already; its ``end`` must follow. Raises AgentUnreachable."""
        with self._lock:
            self._line.begin()
            return self._line

    @contextmanager
    def call(self) -> Iterator[Any]:
        """See Line.call."""
        with self.begin().begun() as stub:
            yield stub

    def future(self, start: Callable[[Any], Any], on_done: Callable[[Any | FluxError], None]) -> Any | None:
        """``start(stub)`` begins a call; ``on_done`` gets its answer or error once. None: it never began."""
        try:
            line = self.begin()
        except AgentUnreachable as error:
            on_done(error)
            return None
        return line.begun_future(start, on_done)

    def renew(self) -> None:
        """Calls from now on use a new line; those under way end on theirs."""
        line = self._new_line()
        with self._lock:
            closed = self._closed
            if not closed:
                former, self._line = self._line, line
        if closed:
            line.close()
        else:
            former.retire()

    def close(self) -> None:
        """At once and for good: calls under way are cancelled."""
        with self._lock:
            self._closed = True
            line = self._line
        line.close()


def server_name(agent_id: str, *, legacy: bool) -> str:
    """The name an agent's certificate must carry: its ID's own, or what the original checks."""
    return AGENT_NAME if legacy or not agent_id else agent_server_name(agent_id)


def check_address(address: str) -> None:
    """Raises InvalidInput unless it is ``host:port``."""
    host, colon, port = address.rpartition(":")
    shown = repr(address[:100])
    if not colon or not host:
        raise InvalidInput(f"{shown} is no address of an agent: host:port is needed, as in 10.0.0.5:50052")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise InvalidInput(f"{shown} is no address of an agent: the port must be 1 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    if (":" in host and not bracketed) or len(host) > 253:
        raise InvalidInput(f"{shown} is no address of an agent: write an IPv6 address in brackets, as in [::1]:50052")
    if not all(letter.isalnum() or letter in "-._:[]%" for letter in host):
        raise InvalidInput(f"{shown} is no address of an agent: the host is no name and no IP address")
