"""Beginnings and ends on their way to the store, together every 20 ms.

A thread woken for each of them would cost as much as a short program does. One
that begins and ends within that time is written once.
"""

from __future__ import annotations

import logging
import threading

from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import ExecutionRecord
from fluxlib.store.base import RecordStore

log = logging.getLogger(__name__)

_TOGETHER = 0.02


class Journal:
    """What the store is to be told, by execution ID; the order of one execution's is kept."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._condition = threading.Condition()
        self._writing = threading.Lock()
        self._waiting: dict[str, tuple[ExecutionRecord, float | None]] = {}
        self._being_written: dict[str, tuple[ExecutionRecord, float | None]] = {}
        self._stopping = False
        self.written = 0  # how many records the store was told
        self._thread = threading.Thread(target=self._run, name="record-journal", daemon=True)
        self._thread.start()

    def put(self, record: ExecutionRecord, keep_until: float | None) -> None:
        """``keep_until`` None: it has begun; else it has ended, with ``record.output`` as RecordStore.end takes it."""
        with self._condition:
            first = not self._waiting
            self._waiting[record.execution_id] = (record, keep_until)
            if first:
                self._condition.notify()

    def strike(self, execution_id: str) -> bool:
        """Whether the store has not been told of it and never will be."""
        with self._condition:
            return self._waiting.pop(execution_id, None) is not None and execution_id not in self._being_written

    def find(self, execution_id: str) -> ExecutionRecord | None:
        """What the store has not been told yet."""
        with self._condition:
            found = self._waiting.get(execution_id) or self._being_written.get(execution_id)
            return found[0] if found is not None else None

    def flush(self) -> None:
        """Tell the store everything now. It may still be on its way to the disk there."""
        with self._writing:
            with self._condition:
                self._being_written, self._waiting = self._waiting, {}
            for record, keep_until in self._being_written.values():
                try:
                    if keep_until is None:
                        self._store.begin(record)
                    else:
                        self._store.end(record, record.output, keep_until)
                except StoreUnavailable as error:
                    log.error("the record of %s cannot be kept: %s", record.execution_id, error.message)
                except Exception:
                    log.exception("the record of %s cannot be kept", record.execution_id)
            with self._condition:
                self.written += len(self._being_written)
                self._being_written = {}

    def stop(self, deadline: Deadline) -> None:
        """Everything that waits is told first."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(deadline.remaining())
        self.flush()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._stopping)
                self._condition.wait_for(lambda: self._stopping, _TOGETHER)
                stopping = self._stopping
            self.flush()
            if stopping:
                return
