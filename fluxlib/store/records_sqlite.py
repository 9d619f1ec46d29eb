"""An agent's own records in an embedded SQLite file."""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fluxlib.errors import StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus
from fluxlib.store import rows
from fluxlib.store.base import COMMIT_TIMEOUT
from fluxlib.store.pending import Pending
from fluxlib.store.sqlite_file import Damaged, SqliteFile, Write

log = logging.getLogger(__name__)

# Writes that wait for a disk with room again. Each may hold an output of 64 KiB.
_REMEMBERED = 2_000

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
    """RecordStore in ``agent.db``. A damaged one is moved aside: its records are kept for an hour only."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._lock = threading.Lock()
        # Under way, or failed: a disk that was full for a moment must not lose an end.
        self._written: deque[Pending[Write]] = deque(maxlen=_REMEMBERED)

    def begin(self, record: ExecutionRecord) -> None:
        # What a restarted agent needs of it; the rest is in memory while it runs.
        self._keep((record.execution_id, 1, None, rows.record_to_text(record), None))

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        self._keep((record.execution_id, 0, keep_until, rows.record_to_text(record), output))

    def _keep(self, values: tuple[object, ...]) -> None:
        with self._lock:
            self._written.append(
                self._file.write(lambda db: db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", values))
            )
            while self._written and self._written[0].settled and self._written[0].error is None:
                self._written.popleft()

    def _write_again(self) -> None:
        """In their order: an end comes after its begin."""
        with self._lock:
            if not any(one.settled and one.error is not None for one in self._written):
                return
            # What was committed or is under way goes along: a begin that failed must not come after its end.
            self._written = deque((self._file.write(one.work) for one in self._written), maxlen=_REMEMBERED)

    def flush(self, timeout: float = COMMIT_TIMEOUT) -> None:
        self._file.write(lambda db: None, durable=True).wait(timeout)

    def check(self, timeout: float) -> None:
        self._file.check(timeout)

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
        self._write_again()
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


def _open(path: Path) -> SqliteFile:
    migrations = (_SCHEMA.split(";"), ("UPDATE records SET record = named_record(record)",))
    try:
        return SqliteFile(path, migrations, "record-store", check=True)
    except Damaged as error:
        kept = path.with_name(f"{path.name}.damaged")
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                path.with_name(path.name + end).replace(kept.with_name(kept.name + end))
        log.warning(
            "%s is damaged (%s) and was moved to %s: this agent does not know what it ran before any more",
            path,
            error.__cause__,
            kept,
        )
        return SqliteFile(path, migrations, "record-store")
