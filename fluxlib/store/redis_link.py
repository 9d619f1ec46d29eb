"""The way to one Redis: reads on pooled connections, writes from many threads gathered into pipelines.

A write is a Lua script, so it happens wholly or not at all. Scripts must be
safe to run twice: a pipeline whose connection breaks is sent once more, because
nobody can know how much of it was done. One Redis or a Sentinel's master; not a
Cluster, whose scripts may not touch keys of several slots.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.retry import Retry

from fluxlib.config.redis_address import RedisAddress, parse_redis_address
from fluxlib.errors import FluxError, StoreUnavailable
from fluxlib.log import one_line
from fluxlib.store.pending import Pending, WriteQueue

log = logging.getLogger(__name__)

# Seconds. A store that is slower than this is away.
_CONNECT_TIMEOUT, _TIMEOUT = 2.0, 5.0
_MAX_BATCH = 200
_CONNECTIONS = 64

# What a script says of itself, from Redis 7 on, to run though maxmemory is reached and nothing may be evicted.
_WHEN_FULL = "#!lua flags=allow-oom\n"

Argument = str | bytes | int | float


@dataclass(frozen=True, slots=True)
class Script:
    """Lua to run on the server. It gets the key prefix as its first argument.

    ``spare``: it may run while the server's memory is full, because what it frees or keeps alive ends that.
    """

    text: str
    sha: str
    spare: bool = False

    @classmethod
    def of(cls, *parts: str, spare: bool = False) -> Script:
        text = "\n".join(parts)
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), spare)


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
        self._scripts = tuple(scripts)
        self._loaded: dict[str, str] = {}  # SHA of a script → that of what the server has in its place
        self._name = name
        self._answered = False  # until it has, what is wrong may be the kind of connection
        try:
            self._address = parse_redis_address(address)
        except ValueError as error:
            raise StoreUnavailable(f"redis_addr {error}") from error
        self._redis = redis.Redis(connection_pool=_pool(self._address))
        self._queue: WriteQueue[Call] = WriteQueue(_MAX_BATCH)
        self._check_kind()
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
                return client.evalsha(self._sha(script), 0, self.prefix, *arguments)
            except NoScriptError:
                self._load(client)
                return client.evalsha(self._sha(script), 0, self.prefix, *arguments)

        return self._ask(ask)

    def read(self, ask: Callable[[redis.Redis], Any]) -> Any:
        """What ``ask`` reads. Raises StoreUnavailable."""
        return self._ask(ask)

    def read_if_allowed(self, ask: Callable[[redis.Redis], Any]) -> Any:
        """As ``read``; None when this server or its ACL does not have the command. Raises StoreUnavailable."""

        def asked(client: redis.Redis) -> Any:
            try:
                return ask(client)
            except ResponseError as error:
                if isinstance(error, exceptions.NoPermissionError) or "unknown command" in str(error).lower():
                    return None
                raise

        return self._ask(asked)

    def close(self, timeout: float = 30.0) -> None:
        """Writes what is queued, then lets the connections go."""
        if self._queue.close():
            self._thread.join(timeout)
            self._redis.connection_pool.disconnect()

    def _ask(self, ask: Callable[[redis.Redis], Any]) -> Any:
        if self._queue.closed:
            raise StoreUnavailable("the store is closed")
        try:
            answer = ask(self._redis)
        except (RedisError, OSError) as error:
            raise self._unavailable(error) from error
        self._answered = True
        return answer

    def _check_kind(self) -> None:
        """Raises StoreUnavailable for what answers as Redis does and is no place for a store."""
        info: Any = self.read_if_allowed(lambda client: client.info("server"))
        kind = (info or {}).get("redis_mode")
        if kind == "sentinel":
            raise StoreUnavailable(
                f"Redis at {self._address} is a Sentinel, which keeps nothing: name the Redis it watches"
            )
        if kind == "cluster":
            raise StoreUnavailable(f"Redis at {self._address} {_CLUSTER}")

    def _load(self, client: redis.Redis) -> None:
        for script in self._scripts:
            self._loaded[script.sha] = self._load_one(client, script)

    def _load_one(self, client: redis.Redis, script: Script) -> str:
        if script.spare:
            try:
                return _text(client.script_load(_WHEN_FULL + script.text))
            except ResponseError as error:
                if isinstance(error, exceptions.NoPermissionError):
                    raise
                # Older than Redis 7, which lets scripts that only free memory run anyway.
        return _text(client.script_load(script.text))

    def _sha(self, script: Script) -> str:
        return self._loaded.get(script.sha, script.sha)

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        hint = "" if self._answered else _kind_hint(error, self._address.scheme)
        return StoreUnavailable(f"Redis at {self._address} {_reason(error)}{hint}")

    # -- the writer's thread -------------------------------------------------------------

    def _run(self) -> None:
        while True:
            batch, ended = self._queue.next_batch()
            if batch:
                try:
                    self._send(batch)
                except Exception as error:
                    unavailable = error if isinstance(error, StoreUnavailable) else self._unavailable(error)
                    log.error("%s: %d writes failed: %s", self._name, len(batch), unavailable.message)
                    for pending in batch:
                        if pending.error is None:
                            pending.error = unavailable
                for pending in batch:
                    pending.settle()
            if ended:
                return

    def _send(self, batch: list[Pending[Call]]) -> None:
        self._connect()
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

    def _connect(self) -> None:
        """Raises StoreUnavailable when nobody can be reached. Nothing was sent then, which an error of the pipeline
        does not prove: it may have been sent once on a connection that broke.
        """
        try:
            pool = self._redis.connection_pool
            pool.release(pool.get_connection())
        except (RedisError, OSError) as error:
            unavailable = self._unavailable(error)
            unavailable.nothing_written = True
            raise unavailable from error

    def _pipeline(self, batch: list[Pending[Call]]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for pending in batch:
            pipeline.evalsha(self._sha(pending.work.script), 0, *pending.work.arguments)
        return list(pipeline.execute(raise_on_error=False))


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else str(answer)


def _pool(address: RedisAddress) -> redis.ConnectionPool:
    """Raises StoreUnavailable for files of the address that cannot be read."""
    options: dict[str, Any] = {
        "db": address.database,
        "username": address.username or None,
        "password": address.password or None,
        "socket_timeout": _TIMEOUT,
        # Once more on a connection that Redis has closed meanwhile; never after a timeout.
        "retry": Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    }
    kind: type[redis.Connection] | type[redis.UnixDomainSocketConnection]
    if address.scheme == "unix":
        kind = redis.UnixDomainSocketConnection
        options["path"] = address.path
    else:
        kind = redis.SSLConnection if address.scheme == "rediss" else redis.Connection
        options |= {
            "host": address.host,
            "port": address.port,
            "socket_connect_timeout": _CONNECT_TIMEOUT,
            "socket_keepalive": True,
        }
    for name, text in address.options.items():
        if name.startswith("ssl_") and address.scheme != "rediss":
            raise StoreUnavailable(f"redis_addr: {name} goes with rediss:// only")
        if name in _FILES:
            _check_file(name, text)
        options[name] = _CONVERT.get(name, str)(text)
    return redis.BlockingConnectionPool(  # type: ignore[no-untyped-call]
        max_connections=_CONNECTIONS, timeout=_TIMEOUT, connection_class=kind, **options
    )


_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CONVERT: dict[str, Callable[[str], Any]] = {
    "protocol": int,
    "socket_timeout": float,
    "socket_connect_timeout": float,
    "ssl_check_hostname": lambda text: text.lower() in ("true", "yes", "1"),
}


def _check_file(name: str, path: str) -> None:
    """OpenSSL does not say which file it cannot read."""
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise StoreUnavailable(f"redis_addr: {name} {path} cannot be read: {error.strerror or error}") from error


_CLUSTER = (
    "is a Cluster, which Flux cannot use because its scripts touch keys of several slots: name a single Redis, or a"
    " Sentinel's master"
)
_MOVED = (exceptions.MovedError, exceptions.AskError, exceptions.ClusterCrossSlotError, exceptions.ClusterDownError)
# What a Redis says that an operator can mend, most special first.
_REASONS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (_MOVED, _CLUSTER),
    (exceptions.ReadOnlyError, "is a replica and takes no writes: name its master"),
    (exceptions.BusyLoadingError, "is still loading its data: it answers when it has"),
    (exceptions.OutOfMemoryError, "is full (maxmemory): give it more, or wait until executions expire"),
)

_UNREACHABLE = re.compile(r"Error -?[0-9]+ connecting to .*?\. (.+)")


def _reason(error: Exception) -> str:
    """Why Redis cannot be used and what to do, as the rest of a sentence that begins with "Redis at …"."""
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            return reason
    text = str(error).rstrip(".")
    if isinstance(error, exceptions.AuthenticationError):
        if "HELLO" in text or "NOAUTH" in text or "required" in text:
            return (
                "wants a password: write redis_addr as redis://:PASSWORD@HOST:PORT, or redis://USER:PASSWORD@HOST:PORT"
            )
        if "no password" in text:
            return "has no password, but redis_addr gives one: take it out"
        return "refuses the user or the password of redis_addr"
    if isinstance(error, exceptions.NoPermissionError):
        return (
            f"does not let the user of redis_addr do what Flux needs ({one_line(text, 120)}): docs/operations.md names"
            " the rights it needs"
        )
    unreachable = _UNREACHABLE.search(text)
    return (
        f"cannot be reached: {one_line(unreachable[1], 120)}"
        if unreachable
        else f"cannot be used: {one_line(text, 200)}"
    )


def _kind_hint(error: Exception, scheme: str) -> str:
    """What else to try when the very first connection fails in a way that speaks of TLS."""
    text = str(error).upper().replace(" ", "_")
    if scheme == "rediss":
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return "; name the CA of its certificate in redis_addr: ?ssl_ca_certs=/PATH/ca.pem"
        if "CERTIFICATE_REQUIRED" in text:
            return "; it wants a certificate of Flux's own: ?ssl_certfile=/PATH/cert.pem&ssl_keyfile=/PATH/key.pem"
        if isinstance(error, redis.TimeoutError) or "WRONG_VERSION" in text:
            return "; if it does not speak TLS, write redis:// in place of rediss://"
    elif scheme == "redis" and ("CONNECTION_CLOSED" in text or "RESET_BY_PEER" in text):
        return "; if it speaks TLS, write rediss:// in place of redis://"
    return ""
