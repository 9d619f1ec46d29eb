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
import sqlite3
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxlib.errors import FluxError, StoreUnavailable
from fluxlib.store import rows
from fluxlib.store.pending import Pending, WriteQueue

log = logging.getLogger(__name__)

_MAX_BATCH = 500
_BUSY_TIMEOUT = 5.0
_CACHE_KB = 8192
# Each may hold that cache and two descriptors for ever; a burst of readers opens its own and closes them.
_IDLE_READERS = 8

Write = Callable[[sqlite3.Connection], Any]


class Damaged(StoreUnavailable):
    """What the file holds is not what SQLite wrote."""


class SqliteFile:
    """A database file with its schema brought up to date.

    ``migrations`` are the statements of each schema version, run in order, each version once and in a transaction of
    its own. With ``check`` the whole file is looked through first. ``is_new``: there was none, or an empty one.
    ``lost_wal``: its newest writes are gone, because its WAL was removed after a crash.
    Raises StoreUnavailable, Damaged.
    """

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]], name: str, *, check: bool = False) -> None:
        self._path = path
        self._name = name
        self._queue: WriteQueue[Write] = WriteQueue(_MAX_BATCH)
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        try:
            self.is_new = _make_private(path)
            self.lost_wal = not self.is_new and _lacks_wal(path)
            self._identity = _identity(path)
            self._damage = ""  # what was found damaged since
            connection = self._connect()
            if check:
                _check(connection)
            # What migrations call: JSON by position becomes JSON by name.
            connection.create_function("named_record", 1, rows.named_record, deterministic=True)
            connection.create_function("named_request", 1, rows.named_request, deterministic=True)
            _migrate(connection, migrations)
            self._version = len(migrations)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            kind = Damaged if is_damage(error) else StoreUnavailable
            raise kind(f"the store {path} cannot be opened: {reason_of(error)}") from error
        self._thread = threading.Thread(target=self._run, args=(connection,), name=f"{name}-writer", daemon=True)
        self._thread.start()

    def write(self, write: Write, *, durable: bool = False, patient: bool = False) -> Pending[Write]:
        """Queue ``write``; it runs in the writer's transaction and must check before it changes anything.

        ``patient``: nobody waits for it; it is written within 20 ms, and before anything is read.
        """
        return self._queue.put(write, durable=durable, patient=patient)

    def read(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Rows of a query. Raises StoreUnavailable."""
        if threading.current_thread() is not self._thread and not self._queue.catch_up(_BUSY_TIMEOUT):
            # What would be read is older than what this process has written.
            raise StoreUnavailable(
                f"the store {self._path} is too slow: an earlier write was not committed within {_BUSY_TIMEOUT:g} s"
            )
        try:
            # As many connections as there are readers at once, whichever threads they are.
            connection = self._borrow()
            try:
                found = connection.execute(sql, values).fetchall()
            finally:
                self._give_back(connection)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            self._note_damage(error)
            raise StoreUnavailable(f"the store {self._path} cannot be read: {reason_of(error)}") from error
        if self._damage and not found:
            # A damaged index finds nothing: that is no proof that there is nothing.
            raise StoreUnavailable(f"the store {self._path} cannot be relied on: {self._damage}")
        return found

    def check(self, timeout: float) -> None:
        """Raises StoreUnavailable unless a durable write goes through, into the file that the next start will open,
        and nothing was found damaged.
        """
        self.write(lambda db: db.execute(f"PRAGMA user_version={self._version}"), durable=True).wait(timeout)
        if self._damage:
            raise StoreUnavailable(f"the store {self._path} is damaged: {self._damage}")

    def close(self, timeout: float = 30.0) -> bool:
        """Commits what is queued, then lets the file go; False when it was closed before."""
        if not self._queue.close():
            return False
        self._thread.join(timeout)
        with self._lock:
            for reader in self._idle:
                reader.close()
            self._idle.clear()
        return True

    # -- the writer's thread -----------------------------------------------------

    def _run(self, connection: sqlite3.Connection) -> None:
        synced = False
        while True:
            batch, ended = self._queue.next_batch()
            if batch:
                durable = any(pending.durable for pending in batch)
                try:
                    if durable != synced:
                        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                        synced = durable
                except sqlite3.Error as error:
                    self._fail(connection, batch, error, nothing_written=True)
                else:
                    self._commit_or_fail(connection, batch)
                for pending in batch:
                    pending.settle()
            if ended:
                connection.close()
                return

    def _commit_or_fail(self, connection: sqlite3.Connection, batch: list[Pending[Write]]) -> None:
        try:
            self._apply(connection, batch)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, sqlite3.OperationalError):
                self._fail(connection, batch, error, nothing_written=True)
                return
            # One of them is at fault, and the others only shared its transaction.
            self._roll_back(connection)
            for pending in batch:
                pending.error = None
                self._commit_or_fail(connection, [pending])
            return
        try:
            connection.execute("COMMIT")
        except Exception as error:
            # Its frames may be in the WAL, where the next start could find them.
            self._fail(connection, batch, error, nothing_written=False)

    def _apply(self, connection: sqlite3.Connection, batch: list[Pending[Write]]) -> None:
        if any(pending.durable for pending in batch) and _identity(self._path) != self._identity:
            raise sqlite3.OperationalError(
                "its file was removed or replaced while Flux uses it, and what is written now would be gone after the"
                " next start: bring it back from a backup and restart Flux"
            )
        connection.execute("BEGIN IMMEDIATE")
        for pending in batch:
            try:
                pending.result = pending.work(connection)
            except FluxError as error:
                # A condition that did not hold; such a write has changed nothing.
                pending.error = error

    def _fail(
        self, connection: sqlite3.Connection, batch: list[Pending[Write]], error: Exception, *, nothing_written: bool
    ) -> None:
        self._roll_back(connection)
        self._note_damage(error)
        log.error("%s: %d writes to %s failed: %s", self._name, len(batch), self._path, error)
        for pending in batch:
            if pending.error is None:
                unavailable = StoreUnavailable(f"the store {self._path} cannot be written: {reason_of(error)}")
                unavailable.nothing_written = nothing_written
                pending.error = unavailable

    def _note_damage(self, error: Exception) -> None:
        if is_damage(error) and not self._damage:
            self._damage = reason_of(error)
            log.error("%s: %s is damaged: %s", self._name, self._path, self._damage)

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            log.exception("%s: the failed transaction could not be rolled back", self._name)

    # -- connections ---------------------------------------------------------------

    def _borrow(self) -> sqlite3.Connection:
        with self._lock:
            if self._queue.closed:
                raise StoreUnavailable("the store is closed")
            if self._idle:
                return self._idle.pop()
        connection = self._connect()
        connection.execute("PRAGMA query_only=ON")
        return connection

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if not self._queue.closed and len(self._idle) < _IDLE_READERS:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        # Never made here: whoever reads must not find an empty store where somebody has removed the file.
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        # Room for the upper pages of every index when there are a hundred thousand rows; taken as it is used.
        connection.execute(f"PRAGMA cache_size=-{_CACHE_KB}")
        return connection


def _make_private(path: Path) -> bool:
    """Before SQLite makes it: the file holds environment values, and SQLite copies its mode to the WAL. Whether there
    was nothing in it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    if sys.platform != "win32":
        os.chmod(path, 0o600)
    return path.stat().st_size == 0


def _lacks_wal(path: Path) -> bool:
    """Whether the WAL of a file that was not closed was removed.

    SQLite makes -wal before -shm and at a clean end removes -shm before -wal, so that -shm is never there alone.
    """
    return path.with_name(f"{path.name}-shm").exists() and not path.with_name(f"{path.name}-wal").exists()


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, whatever its name; None when there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _check(connection: sqlite3.Connection) -> None:
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"database disk image is malformed ({found})")


def _migrate(connection: sqlite3.Connection, migrations: Sequence[Sequence[str]]) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise sqlite3.DatabaseError(f"it is of a newer Flux (schema {version}, this one knows {len(migrations)})")
    for number, statements in enumerate(migrations[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have been quicker while this one waited for the lock.
        (now,) = connection.execute("PRAGMA user_version").fetchone()
        if now < number:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={number}")
        connection.execute("COMMIT")


def reason_of(error: Exception) -> str:
    """Why the file cannot be used, in words; for a damaged one what to do."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if is_damage(error):
        return f"{error}: bring it back from a backup, or move it away to begin with an empty one"
    return str(error)


def is_damage(error: Exception) -> bool:
    """Whether it says that the file's content is damaged, not that it cannot be reached."""
    text = str(error)
    return isinstance(error, UnicodeDecodeError) or "malformed" in text or "not a database" in text
