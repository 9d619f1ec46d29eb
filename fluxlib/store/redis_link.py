"""The way to one Redis: reads on pooled connections, writes from many threads gathered into pipelines.

A write is a Lua script, so it happens wholly or not at all. Scripts must be
safe to run twice: a pipeline whose connection breaks is sent once more, because
nobody can know how much of it was done. One Redis or a Sentinel's master; not a
Cluster, whose scripts may not touch keys of several slots.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from fluxlib.errors import FluxError, StoreUnavailable
from fluxlib.store.pending import Pending, WriteQueue

log = logging.getLogger(__name__)

# Seconds. A store that is slower than this is away.
_CONNECT_TIMEOUT, _TIMEOUT = 2.0, 5.0
_MAX_BATCH = 200
_CONNECTIONS = 64

Argument = str | bytes | int | float


@dataclass(frozen=True, slots=True)
class Script:
    """Lua to run on the server. It gets the key prefix as its first argument."""

    text: str
    sha: str

    @classmethod
    def of(cls, *parts: str) -> Script:
        text = "\n".join(parts)
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script. ``read`` turns its answer into a value, or raises a FluxError for a condition not met."""

    script: Script
    arguments: tuple[Argument, ...]
    read: Callable[[Any], Any]


class RedisLink:
    """``address``: host:port, or a redis://, rediss:// or unix:// URL. Raises StoreUnavailable."""

    def __init__(self, address: str, prefix: str, scripts: Sequence[Script], name: str) -> None:
        self.prefix = prefix
        url = address if "://" in address else f"redis://{address}"
        self._shown = _without_secrets(url)
        self._scripts = tuple(scripts)
        self._name = name
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=_TIMEOUT,
                socket_connect_timeout=_CONNECT_TIMEOUT,
                socket_timeout=_TIMEOUT,
                socket_keepalive=True,
                # Once more on a connection that Redis has closed meanwhile; never after a timeout.
                retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
            )
            self._redis = redis.Redis(connection_pool=pool)
        except (RedisError, ValueError) as error:
            raise StoreUnavailable(f"redis_addr cannot be used: {error}") from error
        self._queue: WriteQueue[Call] = WriteQueue(_MAX_BATCH)
        self._ask(lambda client: self._load(client))
        self._thread = threading.Thread(target=self._run, name=f"{name}-writer", daemon=True)
        self._thread.start()

    def write(self, script: Script, *arguments: Argument, read: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """Queue a script; the answer is a Pending whose value is what ``read`` makes of the script's."""
        return self._queue.put(Call(script, (self.prefix, *arguments), read))

    def run(self, script: Script, *arguments: Argument) -> Any:
        """A script now and on this thread; only one that reads, or that no other write has to come behind.

        Raises StoreUnavailable.
        """

        def ask(client: redis.Redis) -> Any:
            try:
                return client.evalsha(script.sha, 0, self.prefix, *arguments)
            except NoScriptError:
                return client.eval(script.text, 0, self.prefix, *arguments)

        return self._ask(ask)

    def read(self, ask: Callable[[redis.Redis], Any]) -> Any:
        """What ``ask`` reads. Raises StoreUnavailable."""
        return self._ask(ask)

    def close(self, timeout: float = 30.0) -> None:
        """Writes what is queued, then lets the connections go."""
        if self._queue.close():
            self._thread.join(timeout)
            self._redis.connection_pool.disconnect()

    def _ask(self, ask: Callable[[redis.Redis], Any]) -> Any:
        if self._queue.closed:
            raise StoreUnavailable("the store is closed")
        try:
            return ask(self._redis)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _load(self, client: redis.Redis) -> None:
        for script in self._scripts:
            client.script_load(script.text)

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"Redis at {self._shown} cannot be used: {error}")

    # -- the writer's thread -------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch, ended = self._queue.next_batch()
            if batch:
                try:
                    self._send(batch)
                except Exception as error:
                    log.error("%s: %d writes to Redis at %s failed: %s", self._name, len(batch), self._shown, error)
                    for pending in batch:
                        if pending.error is None:
                            pending.error = self._unavailable(error)
                for pending in batch:
                    pending.settle()
            if ended:
                return

    def _send(self, batch: list[Pending[Call]]) -> None:
        answers = self._pipeline(batch)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            # Redis was restarted. The whole batch again, in its order: a later write may rest on an earlier one.
            self._load(self._redis)
            answers = self._pipeline(batch)
        for pending, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                pending.error = self._unavailable(answer)
                continue
            try:
                pending.result = pending.work.read(answer)
            except FluxError as error:
                pending.error = error

    def _pipeline(self, batch: list[Pending[Call]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for pending in batch:
            pipeline.evalsha(pending.work.script.sha, 0, *pending.work.arguments)
        return list(pipeline.execute(raise_on_error=False))


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname or parts.path}:{parts.port}" if parts.port else (parts.hostname or parts.path)
