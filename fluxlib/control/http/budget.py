"""How many requests may hold a thread at a time, so that the others always find one, and how much memory their bodies.

waitress has one queue for all requests: without a bound, a thousand waiting
calls would keep /health and a cancel behind them. And a thousand bodies of 50 MB would be more memory than there is.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from enum import Enum

from fluxlib.errors import Unavailable

RESERVED_THREADS = 16
# Half of the reserve may wait for an agent or a cloud; the other half never waits.
_RESERVE_FOR_ASKING = 8
_RETRY_AFTER = 1
# Windows' select takes 512 sockets; the listener, the trigger and the parsers' files are among them.
WINDOWS_CONNECTIONS = 450
_WINDOWS_BLOCKING = 400


class Waits(Enum):
    """How a route holds its thread."""

    NO = "no"  # answers from memory or the store
    ASK = "ask"  # may wait for an agent or a cloud, bounded
    CALL = "call"  # waits for a function
    FOLLOW = "follow"  # streams for as long as an execution runs


def blocking_limit(max_blocking: int) -> int:
    """How many requests may block here, of the ``max_blocking`` configured."""
    return min(max_blocking, _WINDOWS_BLOCKING) if sys.platform == "win32" else max_blocking


class Bodies:
    """The memory of request bodies in flight, in bytes; one that is larger than all there is may come alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held = 0

    @property
    def held(self) -> int:
        return self._held

    def take(self, size: int) -> Callable[[], None]:
        """Raises Unavailable at once when there is no room; call what it answers exactly once."""
        if not size:
            return _nothing
        with self._lock:
            if self._held and self._held + size > self._limit:
                raise Unavailable(
                    f"the bodies of the requests that are being served take {self._held // 2**20} MB of memory, of "
                    f"{self._limit // 2**20} MB (`max_bodies_mb`); try again later",
                    retry_after=_RETRY_AFTER,
                )
            self._held += size
        return lambda: self._give_back(size)

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._held -= size


class Budget:
    """Counts what blocks; ``enter`` answers the call that gives the place back."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._followers_limit = max(1, limit // 4)
        self._lock = threading.Lock()
        self._blocking = 0
        self._followers = 0
        self._asking = 0  # those in the reserve

    @property
    def blocking(self) -> int:
        return self._blocking

    def enter(self, kind: Waits) -> Callable[[], None]:
        """Raises Unavailable at once when there is no place; call what it answers exactly once."""
        if kind is Waits.NO:
            return _nothing
        with self._lock:
            if kind is Waits.FOLLOW and self._followers >= self._followers_limit:
                raise Unavailable(
                    f"{self._followers} outputs are being followed, as many as may be at a time; try again later",
                    retry_after=_RETRY_AFTER,
                )
            if self._blocking < self._limit:
                self._blocking += 1
                if kind is Waits.FOLLOW:
                    self._followers += 1
                    return self._leave_following
                return self._leave
            if kind is Waits.ASK and self._asking < _RESERVE_FOR_ASKING:
                self._asking += 1
                return self._leave_asking
        raise Unavailable(
            f"{self._limit} requests are waiting, as many as may at a time (`max_blocking`); try again, or use /async",
            retry_after=_RETRY_AFTER,
        )

    def _leave(self) -> None:
        with self._lock:
            self._blocking -= 1

    def _leave_following(self) -> None:
        with self._lock:
            self._blocking -= 1
            self._followers -= 1

    def _leave_asking(self) -> None:
        with self._lock:
            self._asking -= 1


def _nothing() -> None:
    return
