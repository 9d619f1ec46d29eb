"""A closed-loop HTTP load generator that costs little next to what it measures.

One thread, one epoll loop, keep-alive connections, prepared request bytes: the
CPU it takes is its own process's and is not counted with the server's.
"""

from __future__ import annotations

import select
import socket
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Outcome:
    """What came of one burst. Latencies are seconds, statuses are counted."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    last_error: bytes = b""
    bodies: list[bytes] = field(default_factory=list)  # when they were asked for

    @property
    def count(self) -> int:
        return len(self.latencies)

    @property
    def per_second(self) -> float:
        return self.count / self.seconds if self.seconds else 0.0

    def percentile(self, share: float) -> float:
        """Latency in seconds below which ``share`` (0 to 1) of the requests lie."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    @property
    def failures(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 300)


def post(url: str, key: str, body: bytes, headers: dict[str, str] | None = None) -> bytes:
    """The bytes of one POST, as ``run`` sends them over and over."""
    parts = urlsplit(url)
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        f"X-API-Key: {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(url: str, key: str) -> bytes:
    """The bytes of one GET."""
    parts = urlsplit(url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    return f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nX-API-Key: {key}\r\n\r\n".encode()


class _Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()
        self.begun = 0.0

    def send(self, request: bytes) -> None:
        self.received.clear()
        self.begun = time.perf_counter()
        self.socket.sendall(request)

    def answer(self) -> tuple[int, bytes] | None:
        """(status, body) when the whole response is here. Raises ConnectionError when it never will be."""
        data = self.socket.recv(262_144)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = bytes(self.received[:end])
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(self.received) < end + 4 + length:
            return None
        return int(head.split(b" ", 2)[1]), bytes(self.received[end + 4 :])


def run(
    url: str, request: bytes, connections: int, seconds: float, at_most: int = 0, *, keep_bodies: bool = False
) -> Outcome:
    """Keep ``connections`` requests in flight for ``seconds``, or until ``at_most`` were answered."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    outcome = Outcome()
    poller = select.epoll()
    by_fd: dict[int, _Connection] = {}
    begun = time.perf_counter()
    try:
        for _ in range(connections):
            connection = _Connection(address)
            by_fd[connection.socket.fileno()] = connection
            poller.register(connection.socket, select.EPOLLIN)
            connection.send(request)
        stop_at = begun + seconds
        waiting = connections
        while waiting:
            for fd, _ in poller.poll(60):
                connection = by_fd[fd]
                answer = connection.answer()
                if answer is None:
                    continue
                now = time.perf_counter()
                outcome.latencies.append(now - connection.begun)
                status, body = answer
                outcome.statuses[status] = outcome.statuses.get(status, 0) + 1
                if status >= 300:
                    outcome.last_error = body[:300]
                if keep_bodies:
                    outcome.bodies.append(body)
                if now < stop_at and not (at_most and outcome.count + waiting > at_most):
                    connection.send(request)
                else:
                    waiting -= 1
    finally:
        outcome.seconds = time.perf_counter() - begun
        poller.close()
        for connection in by_fd.values():
            connection.socket.close()
    return outcome
