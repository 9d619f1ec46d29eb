"""The control plane's embedded store: one SQLite file, no server needed."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from fluxlib.errors import StoreUnavailable
from fluxlib.filelock import ExclusiveLock
from fluxlib.model import AgentRecord, Function
from fluxlib.store import rows
from fluxlib.store.base import LEASE_MEMORY, Lease
from fluxlib.store.sqlite_executions import SCHEMA_2, SqliteExecutions, check_lease, find_lease
from fluxlib.store.sqlite_file import SqliteFile, reason_of

_ADVICE = (
    "stop that Flux, or give this one a `state_dir` of its own;"
    " several Flux share their state through Redis (`redis_addr`)"
)
_SCHEMA = """
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


class SqliteControlStore(SqliteExecutions):
    """ControlStore in ``flux.db``, for one process alone: it keeps in memory what it believes nobody else changes.

    Raises StoreUnavailable, Conflict when another process has the directory.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = ExclusiveLock(path.with_name("flux.lock"), _ADVICE)
        except OSError as error:
            raise StoreUnavailable(f"the store {path} cannot be opened: {reason_of(error)}") from error
        try:
            super().__init__(SqliteFile(path, [_SCHEMA.split(";"), SCHEMA_2], "flux-store"))
        except BaseException:
            self._lock.release()
            raise

    # -- functions and code

    def functions(self) -> list[Function]:
        return [_function(data) for (data,) in self._file.read("SELECT data FROM functions ORDER BY name")]

    def function(self, name: str) -> Function | None:
        found = self._file.read("SELECT data FROM functions WHERE name = ?", (name,))
        return _function(found[0][0]) if found else None

    def functions_revision(self) -> int:
        return int(self._file.read("SELECT value FROM counters WHERE name = 'functions'")[0][0])

    def save_function(self, function: Function, archive: bytes | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            values = (function.spec.name, function.code_digest, rows.dump(function.to_fields()))
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
        return [_agent(data) for (data,) in self._file.read("SELECT data FROM agents ORDER BY id")]

    def agent(self, agent_id: str) -> AgentRecord | None:
        found = self._file.read("SELECT data FROM agents WHERE id = ?", (agent_id,))
        return _agent(found[0][0]) if found else None

    def save_agent(self, agent: AgentRecord, lease: Lease | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            check_lease(db, lease)
            db.execute("INSERT OR REPLACE INTO agents VALUES (?, ?)", (agent.agent_id, rows.dump(agent.to_fields())))

        self._file.write(write, durable=True).wait()

    def update_agent(self, agent: AgentRecord, lease: Lease | None = None) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            check_lease(db, lease)
            data = rows.dump(agent.to_fields())
            return db.execute("UPDATE agents SET data = ? WHERE id = ?", (data, agent.agent_id)).rowcount > 0

        return bool(self._file.write(write, durable=True).value())

    def delete_agent(self, agent_id: str, lease: Lease | None = None) -> bool:
        def write(db: sqlite3.Connection) -> bool:
            check_lease(db, lease)
            return db.execute("DELETE FROM agents WHERE id = ?", (agent_id,)).rowcount > 0

        return bool(self._file.write(write, durable=True).value())

    # -- leases and facts

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        def write(db: sqlite3.Connection) -> Lease | None:
            held = find_lease(db, name, now)
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

    def get_fact(self, key: str) -> str | None:
        found = self._file.read("SELECT value FROM facts WHERE key = ?", (key,))
        return str(found[0][0]) if found else None

    def set_fact(self, key: str, value: str, lease: Lease | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            check_lease(db, lease)
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

        self._file.write(write, durable=True).wait()

    def delete_fact(self, key: str, lease: Lease | None = None) -> None:
        def write(db: sqlite3.Connection) -> None:
            check_lease(db, lease)
            db.execute("DELETE FROM facts WHERE key = ?", (key,))

        self._file.write(write, durable=True).wait()

    # -- the store itself

    def ping(self) -> None:
        self._file.write(lambda db: db.execute("UPDATE counters SET value = value WHERE name = 'functions'")).wait(5)

    def persistence(self) -> tuple[str, ...]:
        return ()

    def close(self, timeout: float = 30.0) -> None:
        if self._file.close(timeout):
            self._lock.release()


def _functions_changed(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM archives WHERE digest NOT IN (SELECT code_digest FROM functions)")
    db.execute("UPDATE counters SET value = value + 1 WHERE name = 'functions'")


def _new_token(db: sqlite3.Connection, now: float) -> int:
    """A fencing token larger than any before; and names of dead processes are forgotten."""
    db.execute(
        "DELETE FROM leases WHERE expires_at < ? AND NOT EXISTS"
        " (SELECT 1 FROM executions WHERE owner = leases.owner AND status = 'running')",
        (now - LEASE_MEMORY,),
    )
    db.execute("UPDATE counters SET value = value + 1 WHERE name = 'lease-tokens'")
    return int(db.execute("SELECT value FROM counters WHERE name = 'lease-tokens'").fetchone()[0])


def _function(text: str | bytes) -> Function:
    return Function.from_fields(json.loads(text))


def _agent(text: str | bytes) -> AgentRecord:
    return AgentRecord.from_fields(json.loads(text))
