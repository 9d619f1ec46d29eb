"""The control plane's embedded store: one SQLite file, no server needed."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from fluxlib.errors import Conflict, LeaseLost, StoreUnavailable
from fluxlib.model import AgentRecord, ExecutionRecord, ExecutionStatus, Function, Phase
from fluxlib.store import rows
from fluxlib.store.base import Commit, ExecutionEntry, ExecutionFilter, Lease, Page
from fluxlib.store.sqlite_file import SqliteFile

_SCHEMA = """
CREATE TABLE functions (name TEXT PRIMARY KEY, code_digest TEXT NOT NULL, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE archives (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE agents (id TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
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
INSERT INTO facts VALUES ('functions-revision', '0')
"""
_COLUMNS = (
    "sequence, id, function, agent, status, phase, asynchronous, started_at, owner, idempotency_key, keep_until,"
    " request, record"
)


class SqliteControlStore:
    """ControlStore in ``flux.db``."""

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, [_SCHEMA], "flux-store")

    # -- functions and code

    def functions(self) -> list[Function]:
        return [
            rows.function_from_text(data) for (data,) in self._file.read("SELECT data FROM functions ORDER BY name")
        ]

    def function(self, name: str) -> Function | None:
        found = self._file.read("SELECT data FROM functions WHERE name = ?", (name,))
        return rows.function_from_text(found[0][0]) if found else None

    def functions_revision(self) -> int:
        return int(self._file.read("SELECT value FROM facts WHERE key = 'functions-revision'")[0][0])

    def save_function(self, function: Function, archive: bytes | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            values = (function.spec.name, function.code_digest, rows.function_to_text(function))
            db.execute("INSERT OR REPLACE INTO functions VALUES (?, ?, ?)", values)
            if archive is not None:
                db.execute("INSERT OR IGNORE INTO archives VALUES (?, ?)", (function.code_digest, archive))
            _functions_changed(db)

        self._file.write(write, durable=True).wait()

    def delete_function(self, name: str) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            deleted = db.execute("DELETE FROM functions WHERE name = ?", (name,)).rowcount > 0
            if deleted:
                _functions_changed(db)
            return deleted

        return bool(self._file.write(write, durable=True).value())

    def archive(self, code_digest: str) -> bytes | None:
        found = self._file.read("SELECT data FROM archives WHERE digest = ?", (code_digest,))
        return bytes(found[0][0]) if found else None

    # -- agents

    def agents(self) -> list[AgentRecord]:
        return [rows.agent_from_text(data) for (data,) in self._file.read("SELECT data FROM agents ORDER BY id")]

    def save_agent(self, agent: AgentRecord, lease: Lease | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            _check(db, lease)
            db.execute("INSERT OR REPLACE INTO agents VALUES (?, ?)", (agent.agent_id, rows.agent_to_text(agent)))

        self._file.write(write, durable=True).wait()

    def delete_agent(self, agent_id: str, lease: Lease | None = None) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            _check(db, lease)
            return db.execute("DELETE FROM agents WHERE id = ?", (agent_id,)).rowcount > 0

        return bool(self._file.write(write, durable=True).value())

    # -- executions

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        record = entry.record
        key = entry.idempotency_key or None
        values = (
            record.execution_id,
            record.function_name,
            record.agent_id,
            record.phase.value,
            record.asynchronous,
            record.started_at,
            entry.owner,
            key,
            rows.request_to_bytes(entry.request) if entry.request is not None else None,
        )

        def write(db: sqlite3.Connection) -> str:
            if key is not None:
                found = db.execute(
                    "SELECT id FROM executions WHERE function = ? AND idempotency_key = ?", (record.function_name, key)
                ).fetchone()
                if found is not None:
                    return str(found[0])
            db.execute(
                "INSERT INTO executions (id, function, agent, status, phase, asynchronous, started_at, owner,"
                " idempotency_key, request) VALUES (?, ?, ?, 'running', ?, ?, ?, ?, ?, ?)",
                values,
            )
            return record.execution_id

        pending = self._file.write(write, durable=durable)
        return (record.execution_id if key is None else str(pending.value())), pending

    def assign_execution(self, execution_id: str, agent_id: str, owner: str) -> Commit:
        return self._move(execution_id, agent_id, Phase.STARTING, owner)

    def requeue_execution(self, execution_id: str, owner: str) -> Commit:
        return self._move(execution_id, "", Phase.QUEUED, owner)

    def _move(self, execution_id: str, agent_id: str, phase: Phase, owner: str) -> Commit:
        def write(db: sqlite3.Connection) -> None:
            moved = db.execute(
                "UPDATE executions SET agent = ?, phase = ?, owner = ? WHERE id = ? AND status = 'running'",
                (agent_id, phase.value, owner, execution_id),
            ).rowcount
            if not moved:
                raise Conflict(f"execution {execution_id} has ended")

        return self._file.write(write)

    def end_execution(self, record: ExecutionRecord, keep_until: float) -> Commit:
        text = rows.record_to_text(record)
        values = (record.status.value, Phase.ENDED.value, record.agent_id, keep_until, text, record.execution_id)
        return self._file.write(
            lambda db: db.execute(
                "UPDATE executions SET status = ?, phase = ?, agent = ?, keep_until = ?, record = ?, request = NULL"
                " WHERE id = ? AND status = 'running'",
                values,
            )
        )

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        found = self._file.read(f"SELECT {_COLUMNS} FROM executions WHERE id = ?", (execution_id,))
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
        return self._open("agent = ?", agent_id)

    def executions_of(self, owner: str) -> list[ExecutionEntry]:
        return self._open("owner = ?", owner)

    def _open(self, condition: str, value: str) -> list[ExecutionEntry]:
        sql = f"SELECT {_COLUMNS} FROM executions WHERE status = 'running' AND {condition} ORDER BY sequence"
        return [_entry(row) for row in self._file.read(sql, (value,))]

    def adopt_executions(self, from_owner: str, to_owner: str, lease: Lease | None = None) -> int:
        def write(db: sqlite3.Connection) -> int:
            _check(db, lease)
            sql = "UPDATE executions SET owner = ? WHERE owner = ? AND status = 'running'"
            return db.execute(sql, (to_owner, from_owner)).rowcount

        return int(self._file.write(write).value())

    def expire_executions(self, now: float, limit: int = 1000) -> int:
        def write(db: sqlite3.Connection) -> int:
            return db.execute(
                "DELETE FROM executions WHERE sequence IN"
                " (SELECT sequence FROM executions WHERE keep_until <= ? LIMIT ?)",
                (now, limit),
            ).rowcount

        return int(self._file.write(write).value())

    def count_open(self, function_name: str) -> int:
        sql = "SELECT count(*) FROM executions WHERE function = ? AND status = 'running'"
        return int(self._file.read(sql, (function_name,))[0][0])

    # -- leases and facts

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        def write(db: sqlite3.Connection) -> Lease | None:
            held = _lease(db, name)
            live = held is not None and held.expires_at > now
            if held is not None and live and held.owner != owner:
                return None
            token = held.token if held is not None and live else (held.token if held else 0) + 1
            db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (name, owner, token, now + seconds))
            return Lease(name, owner, token, now + seconds)

        lease: Lease | None = self._file.write(write).value()
        return lease

    def lease(self, name: str) -> Lease | None:
        found = self._file.read("SELECT * FROM leases WHERE name = ?", (name,))
        return Lease(*found[0]) if found else None

    def leases(self, prefix: str) -> list[Lease]:
        sql = "SELECT * FROM leases WHERE substr(name, 1, ?) = ? ORDER BY name"
        return [Lease(*row) for row in self._file.read(sql, (len(prefix), prefix))]

    def release_lease(self, lease: Lease) -> None:
        # The token stays: the next holder's must be larger.
        sql = "UPDATE leases SET expires_at = 0 WHERE name = ? AND token = ?"
        self._file.write(lambda db: db.execute(sql, (lease.name, lease.token))).wait()

    def get_fact(self, key: str) -> str | None:
        found = self._file.read("SELECT value FROM facts WHERE key = ?", (key,))
        return str(found[0][0]) if found else None

    def set_fact(self, key: str, value: str, lease: Lease | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            _check(db, lease)
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

        self._file.write(write, durable=True).wait()

    # -- the store itself

    def ping(self) -> None:
        self._file.write(lambda db: db.execute("UPDATE facts SET value = value WHERE key = 'functions-revision'")).wait(
            5
        )

    def persistence(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        self._file.close()


def _functions_changed(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM archives WHERE digest NOT IN (SELECT code_digest FROM functions)")
    db.execute("UPDATE facts SET value = value + 1 WHERE key = 'functions-revision'")


def _lease(db: sqlite3.Connection, name: str) -> Lease | None:
    found = db.execute("SELECT * FROM leases WHERE name = ?", (name,)).fetchone()
    return Lease(*found) if found else None


def _check(db: sqlite3.Connection, lease: Lease | None) -> None:
    if lease is not None:
        held = _lease(db, lease.name)
        if held is None or held.token != lease.token:
            raise LeaseLost(f"another process holds {lease.name} now")


def _entry(row: tuple[Any, ...]) -> ExecutionEntry:
    (
        sequence,
        execution_id,
        function,
        agent,
        status,
        phase,
        asynchronous,
        started_at,
        owner,
        key,
        keep,
        request,
        record,
    ) = row
    if status == ExecutionStatus.RUNNING.value:
        kept = rows.open_record(execution_id, function, agent, phase, bool(asynchronous), started_at)
    elif record is None:
        raise StoreUnavailable(f"the store's row of {execution_id} is damaged")
    else:
        kept = rows.record_from_text(record)
    return ExecutionEntry(
        record=kept,
        request=rows.request_from_bytes(request, execution_id, function, bool(asynchronous)) if request else None,
        owner=owner,
        sequence=sequence,
        idempotency_key=key or "",
        keep_until=keep or 0.0,
    )
