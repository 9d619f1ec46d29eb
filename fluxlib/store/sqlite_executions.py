"""The executions of the control plane in SQLite: found by key or by index, never by a search."""

from __future__ import annotations

import sqlite3
from typing import Any

from fluxlib.errors import Conflict, LeaseLost, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus, Phase
from fluxlib.store import rows
from fluxlib.store.base import Commit, ExecutionEntry, ExecutionFilter, Lease, Page
from fluxlib.store.sqlite_file import SqliteFile

_COLUMNS = (
    "sequence, id, function, agent, status, phase, asynchronous, started_at, owner, idempotency_key, keep_until,"
    " request, record"
)


class SqliteExecutions:
    """The part of ControlStore that is about executions."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

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
                " idempotency_key, request) VALUES (?, ?, ?, 'running', ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
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
                "UPDATE executions SET agent = ?, phase = ? WHERE id = ? AND status = 'running' AND owner = ?",
                (agent_id, phase.value, execution_id, owner),
            ).rowcount
            if not moved:
                raise Conflict(f"execution {execution_id} has ended, or was taken over")

        return self._file.write(write)

    def end_execution(self, record: ExecutionRecord, keep_until: float) -> Commit:
        text = rows.record_to_text(record)
        values = (record.status.value, Phase.ENDED.value, record.agent_id, keep_until, text, record.execution_id)
        return self._file.write(
            lambda db: db.execute(
                "UPDATE executions SET status = ?, phase = ?, agent = ?, keep_until = ?, record = ?, request = NULL"
                " WHERE id = ? AND status = 'running'",
                values,
            ),
            patient=True,
        )

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        sql = "DELETE FROM executions WHERE id = ? AND owner = ?"
        return self._file.write(lambda db: db.execute(sql, (execution_id, owner)))

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        found = self._file.read(f"SELECT {_COLUMNS} FROM executions WHERE id = ?", (execution_id,))
        return _entry(found[0]) if found else None

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
        # A page is for looking at: standard inputs of megabytes stay where they are.
        columns = _COLUMNS.replace("request", "NULL")
        found = self._file.read(
            f"SELECT {columns} FROM executions WHERE {' AND '.join(conditions)} ORDER BY sequence DESC LIMIT ?",
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
            check_lease(db, lease)
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


def find_lease(db: sqlite3.Connection, name: str, now: float = 0.0) -> Lease | None:
    found = db.execute("SELECT name, owner, token, expires_at - ? FROM leases WHERE name = ?", (now, name)).fetchone()
    return Lease(*found) if found else None


def check_lease(db: sqlite3.Connection, lease: Lease | None) -> None:
    if lease is not None:
        held = find_lease(db, lease.name)
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
