"""An agent's own records in an embedded SQLite file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fluxlib.errors import StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus
from fluxlib.store import rows
from fluxlib.store.sqlite_file import SqliteFile

_SCHEMA = """
CREATE TABLE records (
    id TEXT PRIMARY KEY,
    running INTEGER NOT NULL,
    keep_until REAL,
    record TEXT NOT NULL,
    output BLOB
);
CREATE INDEX records_running ON records (id) WHERE running;
CREATE INDEX records_expiring ON records (keep_until) WHERE keep_until IS NOT NULL
"""


class SqliteRecordStore:
    """RecordStore in ``agent.db``."""

    def __init__(self, path: Path) -> None:
        self._file = SqliteFile(path, [_SCHEMA], "record-store")

    def begin(self, record: ExecutionRecord) -> None:
        # What a restarted agent needs of it; the rest is in memory while it runs.
        values = (record.execution_id, 1, None, rows.record_to_text(record), None)
        self._file.write(lambda db: db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", values))

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        values = (record.execution_id, 0, keep_until, rows.record_to_text(record), output)
        self._file.write(lambda db: db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", values))

    def flush(self, timeout: float | None = None) -> None:
        self._file.write(lambda db: None, durable=True).wait(timeout)

    def record(self, execution_id: str) -> ExecutionRecord | None:
        found = self._file.read("SELECT record, output FROM records WHERE id = ?", (execution_id,))
        if not found:
            return None
        text, output = found[0]
        return replace(rows.record_from_text(text), output=bytes(output) if output is not None else None)

    def unfinished(self) -> list[ExecutionRecord]:
        found = [rows.record_from_text(text) for (text,) in self._file.read("SELECT record FROM records WHERE running")]
        return [record for record in found if record.status is ExecutionStatus.RUNNING]

    def expire(self, now: float, limit: int = 1000) -> list[str]:
        sql = "SELECT id FROM records WHERE keep_until <= ? LIMIT ?"
        over = [execution_id for (execution_id,) in self._file.read(sql, (now, limit))]
        if over:
            pairs = [(execution_id,) for execution_id in over]
            self._file.write(lambda db: db.executemany("DELETE FROM records WHERE id = ?", pairs)).wait()
        return over

    def close(self, timeout: float = 30.0) -> None:
        try:
            self.flush(min(10.0, timeout))
        except StoreUnavailable:
            return
        finally:
            self._file.close(timeout)
