"""One SQLite file: a writer thread that batches, and readers that never wait for it.

Facts of SQLite (sqlite.org/wal.html, pragma.html#pragma_synchronous): in WAL
mode readers and the one writer do not block each other; with synchronous=NORMAL
a commit survives the crash of the process but the newest ones may be lost to a
power cut; with FULL each commit is synced. ``synchronous`` cannot change inside
a transaction, so it is set before each one that needs another value.
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxlib.errors import FluxError, StoreUnavailable

log = logging.getLogger(__name__)

_MAX_BATCH = 500
_BUSY_TIMEOUT = 5.0

Write = Callable[[sqlite3.Connection], Any]


class Pending:
    """A write on its way to the file; ``wait`` returns when it holds. Cheap when nobody waits."""

    __slots__ = ("_done", "durable", "error", "result", "write")

    def __init__(self, write: Write, durable: bool) -> None:
        self.write = write
        self.durable = durable
        self.result: Any = None
        self.error: Exception | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def wait(self, timeout: float | None = None) -> None:
        """Raises what the write raised, StoreUnavailable when it did not hold in time."""
        if not self._done.acquire(timeout=-1 if timeout is None else timeout):
            raise StoreUnavailable("the store is too slow: a write did not hold in time")
        self._done.release()
        if self.error is not None:
            raise self.error

    def value(self) -> Any:
        """Wait, then what the write returned."""
        self.wait()
        return self.result

    def settle(self) -> None:
        self._done.release()


class SqliteFile:
    """A database file with its schema brought up to date.

    ``migrations`` are run in order, each once, each in a transaction of its own.
    Raises StoreUnavailable.
    """

    def __init__(self, path: Path, migrations: Sequence[str], name: str) -> None:
        self._path = path
        self._name = name
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        self._broken: StoreUnavailable | None = None
        try:
            _make_private(path)
            connection = self._connect()
            _migrate(connection, migrations)
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"the store {path} cannot be opened: {error}") from error
        self._thread = threading.Thread(target=self._run, args=(connection,), name=f"{name}-writer", daemon=True)
        self._thread.start()

    def write(self, write: Write, *, durable: bool = False) -> Pending:
        """Queue ``write``; it runs in the writer's transaction and must check before it changes anything."""
        pending = Pending(write, durable)
        with self._lock:
            # Under the lock, so that nothing is queued behind the end of the queue.
            if self._closed:
                raise StoreUnavailable("the store is closed")
            self._queue.put(pending)
        return pending

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Rows of a query on this thread's own connection. Raises StoreUnavailable."""
        try:
            return self._reader().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the store {self._path} cannot be read: {error}") from error

    def close(self, timeout: float = 30.0) -> None:
        """Commits what is queued, then lets the file go."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join(timeout)
        with self._lock:
            for reader in self._readers:
                reader.close()
            self._readers.clear()

    # -- the writer's thread -----------------------------------------------------

    def _run(self, connection: sqlite3.Connection) -> None:
        synced = False
        while True:
            batch, ended = self._next_batch()
            if batch:
                durable = any(pending.durable for pending in batch)
                try:
                    if durable != synced:
                        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                        synced = durable
                    self._commit(connection, batch)
                except Exception as error:
                    self._fail(connection, batch, error)
                for pending in batch:
                    pending.settle()
            if ended:
                connection.close()
                return

    def _next_batch(self) -> tuple[list[Pending], bool]:
        """What waits now, at least one; and whether the queue ends here."""
        first = self._queue.get()
        if first is None:
            return [], True
        batch = [first]
        while len(batch) < _MAX_BATCH:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return batch, True
            batch.append(following)
        return batch, False

    def _commit(self, connection: sqlite3.Connection, batch: list[Pending]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        for pending in batch:
            try:
                pending.result = pending.write(connection)
            except FluxError as error:
                # A condition that did not hold; such a write has changed nothing.
                pending.error = error
        connection.execute("COMMIT")

    def _fail(self, connection: sqlite3.Connection, batch: list[Pending], error: Exception) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            log.exception("%s: the failed transaction could not be rolled back", self._name)
        log.error("%s: %d writes to %s failed: %s", self._name, len(batch), self._path, error)
        for pending in batch:
            if pending.error is None:
                pending.error = StoreUnavailable(f"the store {self._path} cannot be written: {error}")

    # -- connections ---------------------------------------------------------------

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._connect()
            connection.execute("PRAGMA query_only=ON")
            with self._lock:
                if self._closed:
                    connection.close()
                    raise StoreUnavailable("the store is closed")
                self._readers.append(connection)
            self._local.connection = connection
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        return connection


def _make_private(path: Path) -> None:
    """Before SQLite makes it: the file holds environment values, and SQLite copies its mode to the WAL."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    if sys.platform != "win32":
        os.chmod(path, 0o600)


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise sqlite3.DatabaseError(f"it is of a newer Flux (schema {version}, this one knows {len(migrations)})")
    for number, script in enumerate(migrations[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have been quicker while this one waited for the lock.
        (now,) = connection.execute("PRAGMA user_version").fetchone()
        if now < number:
            for statement in script.split(";"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number}")
        connection.execute("COMMIT")
