"""The control plane's embedded store: one SQLite file, no server needed."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fluxlib.errors import LeaseLost, StoreUnavailable
from fluxlib.filelock import ExclusiveLock
from fluxlib.model import ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.store import rows
from fluxlib.store.base import (
    COMMIT_TIMEOUT,
    LEASE_MEMORY,
    SMALL_REQUEST,
    Commit,
    ExecutionEntry,
    ExecutionFilter,
    Lease,
    Page,
    QueuedExecutions,
)
from fluxlib.store.kv import NO_BLOB, Blob, TypedTables, Value
from fluxlib.store.sqlite_file import SqliteFile, reason_of

log = logging.getLogger(__name__)

_SLOW_DISK = 5e6  # bytes a second

_ADVICE = (
    "stop that Flux, or give this one a `state_dir` of its own;"
    " several Flux share their state through Redis (`redis_addr`)"
)
_COLUMNS = (
    "sequence, id, function, agent, status, phase, asynchronous, started_at, owner, idempotency_key, keep_until,"
    " CASE rank WHEN 0 THEN sequence ELSE rank END, request_bytes, attempt, record"
)
# Its place in the backlog: the order of acceptance unless it was given another.
_RANK = "CASE rank WHEN 0 THEN sequence ELSE rank END"
_QUEUED = Phase.QUEUED.value
# An execution that has not ended, if it is at this attempt (0 = at any).
_OPEN = (
    "SELECT sequence, function, phase, owner, request_bytes FROM executions"
    " WHERE id = ? AND status = 'running' AND (attempt = ? OR ? = 0)"
)
_READY = "function = ? AND status = 'running' AND phase = 'queued' AND owner = ''"

_SCHEMA_1 = """
CREATE TABLE functions (name TEXT PRIMARY KEY, code_digest TEXT NOT NULL, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE archives (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE agents (id TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (
    name TEXT PRIMARY KEY, owner TEXT NOT NULL, token INTEGER NOT NULL, expires_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE executions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    function TEXT NOT NULL,
    agent TEXT NOT NULL,
    status TEXT NOT NULL,
    phase TEXT NOT NULL,
    asynchronous INTEGER NOT NULL,
    started_at REAL NOT NULL,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    keep_until REAL,
    request BLOB,
    record TEXT
);
CREATE INDEX executions_by_function ON executions (function, sequence);
CREATE INDEX executions_by_status ON executions (status, sequence);
CREATE INDEX executions_by_both ON executions (function, status, sequence);
CREATE INDEX executions_open ON executions (agent, sequence) WHERE status = 'running';
CREATE INDEX executions_queued ON executions (sequence) WHERE status = 'running' AND phase = 'queued';
CREATE INDEX executions_owned ON executions (owner, sequence) WHERE status = 'running';
CREATE UNIQUE INDEX executions_idempotent ON executions (function, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX executions_expiring ON executions (keep_until) WHERE keep_until IS NOT NULL;
INSERT INTO counters VALUES ('functions', 0), ('lease-tokens', 0)
"""
# Requests have a table of their own: an update of a row writes the whole of it, and to read what stands behind a large
# value SQLite follows its pages. The column ``request`` of the first schema stays empty: old SQLites cannot drop it.
# ``queues`` counts what is queued; every step below changes it together with the execution (triggers took as long as
# the step itself).
_SCHEMA_2 = (
    "CREATE TABLE requests (sequence INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    "ALTER TABLE executions ADD COLUMN attempt INTEGER NOT NULL DEFAULT 1",
    "ALTER TABLE executions ADD COLUMN rank REAL NOT NULL DEFAULT 0",
    "ALTER TABLE executions ADD COLUMN request_bytes INTEGER NOT NULL DEFAULT 0",
    "INSERT INTO requests SELECT sequence, named_request(request) FROM executions WHERE request IS NOT NULL",
    "UPDATE executions SET record = named_record(record) WHERE record IS NOT NULL",
    "UPDATE executions SET request = NULL, request_bytes ="
    " coalesce((SELECT length(data) FROM requests WHERE requests.sequence = executions.sequence), 0)"
    " WHERE status = 'running'",
    "CREATE INDEX executions_ready ON executions (function, CASE rank WHEN 0 THEN sequence ELSE rank END, sequence)"
    " WHERE status = 'running' AND phase = 'queued' AND owner = ''",
    "CREATE INDEX executions_ended ON executions (sequence) WHERE status <> 'running' AND status <> 'success'",
    "CREATE TABLE queues (function TEXT PRIMARY KEY, waiting INTEGER NOT NULL, ready INTEGER NOT NULL,"
    " bytes INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT INTO queues SELECT function, count(*), sum(owner = ''), sum(request_bytes) FROM executions"
    " WHERE status = 'running' AND phase = 'queued' GROUP BY function",
    "CREATE TABLE entries (tab TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, revision INTEGER NOT NULL,"
    " blob TEXT NOT NULL, PRIMARY KEY (tab, key)) WITHOUT ROWID",
    "CREATE INDEX entries_blobs ON entries (blob) WHERE blob <> ''",
    "INSERT INTO entries SELECT 'functions', name, data, 1, code_digest FROM functions",
    "INSERT INTO entries SELECT 'agents', id, data, 1, '' FROM agents",
    "INSERT INTO entries SELECT 'notes', key, value, 1, '' FROM facts",
    "DROP TABLE functions",
    "DROP TABLE agents",
    "DROP TABLE facts",
    "UPDATE counters SET value = value + 1 WHERE name = 'functions'",
    "INSERT INTO counters VALUES ('agents', 1), ('notes', 1)",
)


class SqliteKeyValues:
    """KeyValues in one table, with the blobs in another."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    def get(self, table: str, key: str) -> Value | None:
        found = self._file.read("SELECT value, revision FROM entries WHERE tab = ? AND key = ?", (table, key))
        return Value(*found[0]) if found else None

    def all(self, table: str) -> dict[str, Value]:
        found = self._file.read("SELECT key, value, revision FROM entries WHERE tab = ? ORDER BY key", (table,))
        return {key: Value(text, revision) for key, text, revision in found}

    def put(self, table: str, key: str, text: str, blob: Blob = NO_BLOB, lease: Lease | None = None) -> None:
        self._write(table, key, text, None, blob, lease)

    def update(self, table: str, key: str, text: str, lease: Lease | None = None) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            _check_lease(db, lease)
            sql = "UPDATE entries SET value = ?, revision = ? WHERE tab = ? AND key = ?"
            return db.execute(sql, (text, _next_revision(db, table), table, key)).rowcount > 0

        return bool(self._file.write(write, durable=True).value())

    def compare_and_set(
        self, table: str, key: str, text: str, revision: int, blob: Blob = NO_BLOB, lease: Lease | None = None
    ) -> bool:
        return self._write(table, key, text, revision, blob, lease)

    def _write(self, table: str, key: str, text: str, revision: int | None, blob: Blob, lease: Lease | None) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            _check_lease(db, lease)
            former, former_blob = _entry_of(db, table, key)
            if revision is not None and revision != former:
                return False
            if blob.data is not None:
                db.execute("INSERT OR IGNORE INTO archives VALUES (?, ?)", (blob.digest, blob.data))
            values = (table, key, text, _next_revision(db, table), blob.digest)
            db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", values)
            _drop_orphan(db, former_blob)
            return True

        # Code of gigabytes takes a slow disk a while.
        timeout = COMMIT_TIMEOUT + len(blob.data or b"") / _SLOW_DISK
        return bool(self._file.write(write, durable=True).value(timeout))

    def delete(self, table: str, key: str, lease: Lease | None = None) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            _check_lease(db, lease)
            former, former_blob = _entry_of(db, table, key)
            if not former:
                return False
            db.execute("DELETE FROM entries WHERE tab = ? AND key = ?", (table, key))
            _next_revision(db, table)
            _drop_orphan(db, former_blob)
            return True

        return bool(self._file.write(write, durable=True).value())

    def revision(self, table: str) -> int:
        return int(self._file.read("SELECT value FROM counters WHERE name = ?", (table,))[0][0])

    def blob(self, digest: str) -> bytes | None:
        found = self._file.read("SELECT data FROM archives WHERE digest = ?", (digest,))
        return bytes(found[0][0]) if found else None


class SqliteControlStore(TypedTables):
    """ControlStore in ``flux.db``, for one process alone: it keeps in memory what it believes nobody else changes.

    Executions are found by key or by index, never by a search. Raises StoreUnavailable, Conflict when another process
    has the directory.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            used_before = path.with_name("flux.lock").exists()
            self._lock = ExclusiveLock(path.with_name("flux.lock"), _ADVICE)
        except OSError as error:
            raise StoreUnavailable(f"the store {path} cannot be opened: {reason_of(error)}") from error
        try:
            self._file = SqliteFile(path, [_SCHEMA_1.split(";"), _SCHEMA_2], "flux-store")
        except BaseException:
            self._lock.release()
            raise
        super().__init__(SqliteKeyValues(self._file))
        self._warnings: tuple[str, ...] = ()
        if self._file.is_new and used_before:
            # The lock file of an earlier run is there, and its store is not.
            self._warnings = (f"the store {path} was missing or empty and was made anew: nothing of before is known",)
        elif self._file.lost_wal:
            self._warnings = (
                f"the newest writes of the store {path} are missing: {path.name}-wal was removed after Flux had ended"
                " without closing it; stop Flux and restore both files together, if a copy has them",
            )
        for warning in self._warnings:
            log.warning("%s", warning)

    # -- executions

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        record = entry.record
        key = entry.idempotency_key or None
        request = rows.request_to_bytes(entry.request) if entry.request is not None else b""
        values = (
            record.execution_id,
            record.function_name,
            record.agent_id,
            record.phase.value,
            record.asynchronous,
            record.started_at,
            entry.owner,
            key,
            record.attempt,
            entry.rank,
            len(request),
        )

        def write(db: sqlite3.Connection) -> str:
            if key is not None:
                found = db.execute(
                    "SELECT id FROM executions WHERE function = ? AND idempotency_key = ?", (record.function_name, key)
                ).fetchone()
                if found is not None:
                    return str(found[0])
            made = db.execute(
                "INSERT INTO executions (id, function, agent, status, phase, asynchronous, started_at, owner,"
                " idempotency_key, attempt, rank, request_bytes) VALUES (?, ?, ?, 'running', ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO NOTHING",
                values,
            )
            if made.rowcount > 0:
                if request:
                    db.execute("INSERT INTO requests VALUES (?, ?)", (made.lastrowid, request))
                if record.phase is Phase.QUEUED:
                    _count(db, record.function_name, 1, not entry.owner, len(request))
            return record.execution_id

        pending = self._file.write(write, durable=durable)
        return (record.execution_id if key is None else str(pending.value())), pending

    def claim_executions(self, owner: str, function_name: str, limit: int) -> list[ExecutionEntry]:
        def write(db: sqlite3.Connection) -> list[ExecutionEntry]:
            sql = f"SELECT {_COLUMNS} FROM executions WHERE {_READY} ORDER BY {_RANK}, sequence LIMIT ?"
            claimed = []
            for row in db.execute(sql, (function_name, limit)).fetchall():
                db.execute("UPDATE executions SET owner = ? WHERE sequence = ?", (owner, row[0]))
                claimed.append(_entry(row, owner, _small_request(db, row)))
            if claimed:
                _count(db, function_name, 0, -len(claimed), 0)
            return claimed

        found: list[ExecutionEntry] = self._file.write(write).value()
        return found

    def assign_attempt(self, execution_id: str, attempt: int, agent_id: str, owner: str) -> Commit:
        return self._move(execution_id, attempt, owner, agent_id, Phase.STARTING, owner)

    def return_execution(self, execution_id: str, attempt: int, owner: str, *, claimed: bool = False) -> Commit:
        return self._move(execution_id, attempt, owner, "", Phase.QUEUED, owner if claimed else "")

    def _move(self, execution_id: str, attempt: int, owner: str, agent_id: str, phase: Phase, new_owner: str) -> Commit:
        def write(db: sqlite3.Connection) -> None:
            found = db.execute(f"{_OPEN} AND owner = ?", (execution_id, attempt, attempt, owner)).fetchone()
            if found is None:
                raise rows.not_current(execution_id)
            sequence, function, former, _, size = found
            values = (agent_id, phase.value, new_owner, sequence)
            db.execute("UPDATE executions SET agent = ?, phase = ?, owner = ? WHERE sequence = ?", values)
            was, is_now = former == _QUEUED, phase is Phase.QUEUED
            if was or is_now:
                ready = (is_now and not new_owner) - (was and not owner)
                _count(db, function, is_now - was, ready, size * (is_now - was))

        return self._file.write(write)

    def end_attempt(
        self, record: ExecutionRecord, attempt: int, keep_for: float, *, keep_request: bool = False
    ) -> Commit:
        text = rows.record_to_text(record)

        def write(db: sqlite3.Connection) -> bool:
            found = db.execute(_OPEN, (record.execution_id, attempt, attempt)).fetchone()
            if found is None:
                return False
            sequence, function, phase, owner, size = found
            kept = size if keep_request else 0
            db.execute(
                "UPDATE executions SET phase = 'ended', keep_until = ?, status = ?, agent = ?, record = ?,"
                " request_bytes = ? WHERE sequence = ?",
                (time.time() + keep_for, record.status.value, record.agent_id, text, kept, sequence),
            )
            if phase == _QUEUED:
                _count(db, function, -1, -(not owner), -size)
            if size and not kept:
                db.execute("DELETE FROM requests WHERE sequence = ?", (sequence,))
            return True

        return self._file.write(write, patient=True)

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        def write(db: sqlite3.Connection) -> None:
            sql = "SELECT sequence, function, phase, request_bytes FROM executions WHERE id = ? AND owner = ?"
            found = db.execute(sql, (execution_id, owner)).fetchone()
            if found is not None:
                sequence, function, phase, size = found
                _delete(db, [sequence])
                if phase == _QUEUED:
                    _count(db, function, -1, -(not owner), -size)

        return self._file.write(write)

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        found = self._file.read(f"SELECT {_COLUMNS} FROM executions WHERE id = ?", (execution_id,))
        return _entry(found[0]) if found else None

    def request(self, execution_id: str) -> ExecutionRequest | None:
        found = self._file.read(
            "SELECT function, asynchronous, data FROM executions JOIN requests USING (sequence) WHERE id = ?",
            (execution_id,),
        )
        if not found:
            return None
        function, asynchronous, data = found[0]
        return rows.request_from_bytes(data, execution_id, function, bool(asynchronous))

    def execution_by_key(self, function_name: str, idempotency_key: str) -> ExecutionEntry | None:
        found = self._file.read(
            f"SELECT {_COLUMNS} FROM executions WHERE function = ? AND idempotency_key = ?",
            (function_name, idempotency_key),
        )
        return _entry(found[0]) if found else None

    def executions(self, where: ExecutionFilter, cursor: str, limit: int) -> Page:
        conditions, values = ["sequence < ?"], [int(cursor) if cursor else 2**62]
        extra: list[Any] = []
        if where.function_name:
            conditions.append("function = ?")
            extra.append(where.function_name)
        if where.status is not None:
            conditions.append("status = ?")
            extra.append(where.status.value)
        if where.queued:
            conditions.append("status = 'running' AND phase = 'queued'")
        found = self._file.read(
            f"SELECT {_COLUMNS} FROM executions WHERE {' AND '.join(conditions)} ORDER BY sequence DESC LIMIT ?",
            (*values, *extra, limit + 1),
        )
        entries = [_entry(row) for row in found[:limit]]
        return Page(tuple(entries), str(entries[-1].sequence) if len(found) > limit else "")

    def open_executions(self, agent_id: str) -> list[ExecutionEntry]:
        sql = f"SELECT {_COLUMNS} FROM executions WHERE status = 'running' AND agent = ? ORDER BY sequence"
        return [_entry(row) for row in self._file.read(sql, (agent_id,))]

    def executions_of(self, owner: str, after: int = 0, limit: int = 0) -> list[ExecutionEntry]:
        sql = (
            f"SELECT {_COLUMNS} FROM executions WHERE status = 'running' AND owner = ? AND sequence > ?"
            " ORDER BY sequence LIMIT ?"
        )
        return [_entry(row) for row in self._file.read(sql, (owner, after, limit or -1))]

    def open_ids(self, owner: str) -> set[str]:
        sql = "SELECT id FROM executions WHERE status = 'running' AND owner = ?"
        return {execution_id for (execution_id,) in self._file.read(sql, (owner,))}

    def queued(self) -> dict[str, QueuedExecutions]:
        sql = "SELECT function, waiting, ready, bytes FROM queues ORDER BY function"
        return {function: QueuedExecutions(*counts) for function, *counts in self._file.read(sql)}

    def adopt_session(self, dead_owner: str, owner: str, lease: Lease | None = None) -> int:
        def write(db: sqlite3.Connection) -> int:
            _check_lease(db, lease)
            if dead_owner == owner:
                return 0
            of_dead = "owner = ? AND status = 'running'"
            sql = f"SELECT function FROM executions WHERE {of_dead} AND phase = 'queued' AND asynchronous"
            returned = Counter(function for (function,) in db.execute(sql, (dead_owner,)))
            db.execute(
                f"UPDATE executions SET owner = '' WHERE {of_dead} AND phase = 'queued' AND asynchronous", (dead_owner,)
            )
            for function, count in returned.items():
                _count(db, function, 0, count, 0)
            taken = db.execute(f"UPDATE executions SET owner = ? WHERE {of_dead}", (owner, dead_owner)).rowcount
            return returned.total() + taken

        return int(self._file.write(write).value())

    def expire_executions(self, max_records: int = 0, limit: int = 1000) -> int:
        surplus = self._surplus(max_records) if max_records else 0

        def write(db: sqlite3.Connection) -> int:
            sql = "SELECT sequence FROM executions WHERE keep_until <= ? LIMIT ?"
            gone = _delete(db, [sequence for (sequence,) in db.execute(sql, (time.time(), limit))])
            for which in ("status = 'success'", "status <> 'running' AND status <> 'success'"):
                wanted = min(limit, surplus) - gone
                if wanted > 0:
                    sql = f"SELECT sequence FROM executions WHERE {which} ORDER BY sequence LIMIT ?"
                    gone += _delete(db, [sequence for (sequence,) in db.execute(sql, (wanted,))])
            return gone

        return int(self._file.write(write).value())

    def _surplus(self, max_records: int) -> int:
        """How many ended ones there are beyond that. Counted only where there may be too many."""
        bounds = "SELECT (SELECT max(sequence) FROM executions), (SELECT min(sequence) FROM executions)"
        last, first = self._file.read(bounds)[0]
        if last is None or last - first < max_records:
            return 0
        every = "SELECT count(*) FROM executions"
        return int(self._file.read(f"SELECT ({every}) - ({every} WHERE status = 'running')")[0][0]) - max_records

    def count_open(self, function_name: str) -> int:
        sql = "SELECT count(*) FROM executions WHERE function = ? AND status = 'running'"
        return int(self._file.read(sql, (function_name,))[0][0])

    # -- leases

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        def write(db: sqlite3.Connection) -> Lease | None:
            held = _find_lease(db, name, now)
            live = held is not None and held.seconds_left > 0
            if held is not None and live and held.owner != owner:
                return None
            token = held.token if held is not None and live else _new_token(db, now)
            db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (name, owner, token, now + seconds))
            return Lease(name, owner, token, seconds)

        lease: Lease | None = self._file.write(write).value()
        return lease

    def lease(self, name: str, now: float) -> Lease | None:
        found = self._file.read("SELECT name, owner, token, expires_at - ? FROM leases WHERE name = ?", (now, name))
        return Lease(*found[0]) if found else None

    def leases(self, prefix: str, now: float) -> list[Lease]:
        sql = "SELECT name, owner, token, expires_at - ? FROM leases WHERE substr(name, 1, ?) = ? ORDER BY name"
        return [Lease(*row) for row in self._file.read(sql, (now, len(prefix), prefix))]

    def release_lease(self, lease: Lease) -> None:
        sql = "UPDATE leases SET expires_at = 0 WHERE name = ? AND token = ?"
        self._file.write(lambda db: db.execute(sql, (lease.name, lease.token))).wait()

    # -- the store itself

    def ping(self) -> None:
        self._file.check(5.0)

    def persistence(self) -> tuple[str, ...]:
        return self._warnings

    def close(self, timeout: float = 30.0) -> None:
        if self._file.close(timeout):
            self._lock.release()


def _new_token(db: sqlite3.Connection, now: float) -> int:
    """A fencing token larger than any before; and names of dead processes are forgotten."""
    db.execute(
        "DELETE FROM leases WHERE expires_at < ? AND NOT EXISTS"
        " (SELECT 1 FROM executions WHERE owner = leases.owner AND status = 'running')",
        (now - LEASE_MEMORY,),
    )
    db.execute("UPDATE counters SET value = value + 1 WHERE name = 'lease-tokens'")
    return int(db.execute("SELECT value FROM counters WHERE name = 'lease-tokens'").fetchone()[0])


def _find_lease(db: sqlite3.Connection, name: str, now: float = 0.0) -> Lease | None:
    found = db.execute("SELECT name, owner, token, expires_at - ? FROM leases WHERE name = ?", (now, name)).fetchone()
    return Lease(*found) if found else None


def _check_lease(db: sqlite3.Connection, lease: Lease | None) -> None:
    if lease is not None:
        held = _find_lease(db, lease.name)
        if held is None or held.token != lease.token:
            raise LeaseLost(f"another process holds {lease.name} now")


def _entry_of(db: sqlite3.Connection, table: str, key: str) -> tuple[int, str]:
    """Its revision and blob; 0 and none of one that is not there."""
    found = db.execute("SELECT revision, blob FROM entries WHERE tab = ? AND key = ?", (table, key)).fetchone()
    return found if found is not None else (0, "")


def _next_revision(db: sqlite3.Connection, table: str) -> int:
    db.execute("INSERT OR IGNORE INTO counters VALUES (?, 0)", (table,))
    db.execute("UPDATE counters SET value = value + 1 WHERE name = ?", (table,))
    return int(db.execute("SELECT value FROM counters WHERE name = ?", (table,)).fetchone()[0])


def _drop_orphan(db: sqlite3.Connection, digest: str) -> None:
    if digest:
        sql = "DELETE FROM archives WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM entries WHERE blob = ?)"
        db.execute(sql, (digest, digest))


def _count(db: sqlite3.Connection, function: str, waiting: int, ready: int, size: int) -> None:
    """Add to what is counted of a function's queue."""
    db.execute(
        "INSERT INTO queues VALUES (?, ?, ?, ?) ON CONFLICT (function) DO UPDATE SET"
        " waiting = waiting + excluded.waiting, ready = ready + excluded.ready, bytes = bytes + excluded.bytes",
        (function, waiting, ready, size),
    )
    if waiting <= 0:
        db.execute("DELETE FROM queues WHERE function = ? AND waiting = 0", (function,))


def _delete(db: sqlite3.Connection, sequences: list[int]) -> int:
    """Executions and the requests that are kept of them; how many."""
    of = [(sequence,) for sequence in sequences]
    db.executemany("DELETE FROM requests WHERE sequence = ?", of)
    db.executemany("DELETE FROM executions WHERE sequence = ?", of)
    return len(of)


def _small_request(db: sqlite3.Connection, row: tuple[Any, ...]) -> bytes | None:
    if not 0 < row[12] <= SMALL_REQUEST:
        return None
    found = db.execute("SELECT data FROM requests WHERE sequence = ?", (row[0],)).fetchone()
    return bytes(found[0]) if found else None


def _entry(row: tuple[Any, ...], owner: str | None = None, request: bytes | None = None) -> ExecutionEntry:
    sequence, execution_id, function, agent, status, phase, asynchronous, started_at, former = row[:9]
    key, keep, rank, request_bytes, attempt, record = row[9:]
    if status == ExecutionStatus.RUNNING.value:
        kept = rows.open_record(execution_id, function, agent, phase, bool(asynchronous), started_at, attempt)
    elif record is None:
        raise StoreUnavailable(f"the store's row of {execution_id} is damaged")
    else:
        kept = rows.record_from_text(record)
    return ExecutionEntry(
        record=kept,
        request=rows.request_from_bytes(request, execution_id, function, bool(asynchronous)) if request else None,
        owner=former if owner is None else owner,
        sequence=sequence,
        idempotency_key=key or "",
        keep_until=keep or 0.0,
        rank=rank,
        request_bytes=request_bytes,
    )
