"""An agent's own records in memory, for tests and for trying things out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from fluxlib.errors import StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus


class MemoryRecordStore:
    """RecordStore with nothing behind it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: dict[str, tuple[ExecutionRecord, float]] = {}
        self._closed = False

    def begin(self, record: ExecutionRecord) -> None:
        with self._open():
            self._records[record.execution_id] = (record, 0.0)

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        with self._open():
            self._records[record.execution_id] = (replace(record, output=output), keep_until)

    def check(self, timeout: float) -> None:
        return

    def flush(self, timeout: float = 10.0) -> None:
        return

    def record(self, execution_id: str) -> ExecutionRecord | None:
        with self._open():
            found = self._records.get(execution_id)
        return found[0] if found else None

    def unfinished(self) -> list[ExecutionRecord]:
        with self._open():
            return [record for record, _ in self._records.values() if record.status is ExecutionStatus.RUNNING]

    def expire(self, now: float, limit: int = 1000) -> list[str]:
        with self._open():
            over = [one for one, (_, keep) in self._records.items() if 0 < keep <= now][:limit]
            for execution_id in over:
                del self._records[execution_id]
            return over

    def close(self, timeout: float = 30.0) -> None:
        del timeout  # nothing is on its way
        self._closed = True

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            yield
