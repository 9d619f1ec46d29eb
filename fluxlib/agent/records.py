"""The agent's memory of executions: what runs, with its output so far, and what has ended, for a while."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fluxlib.agent.output import IN_MEMORY, Output, read_file
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import RecordStore

log = logging.getLogger(__name__)

_CHUNK = 256 * 1024


class Records:
    """Records by execution ID. ``keep_for`` is in seconds."""

    def __init__(self, store: RecordStore, directory: Path, keep_for: float, cap: int) -> None:
        self._store = store
        self._directory = directory
        self._keep_for = keep_for
        self._cap = cap
        self._lock = threading.Lock()
        self._open: dict[str, tuple[ExecutionRecord, Output]] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self, record: ExecutionRecord) -> Output:
        """A new execution and where its output goes."""
        output = Output(self._path(record.execution_id), self._cap)
        with self._lock:
            self._open[record.execution_id] = (record, output)
        self._store.begin(record)
        return output

    def update(self, record: ExecutionRecord) -> None:
        """A newer look at one that runs; in memory only, a restart would end it anyway."""
        with self._lock:
            known = self._open.get(record.execution_id)
            if known is not None:
                self._open[record.execution_id] = (record, known[1])

    def end(self, record: ExecutionRecord) -> ExecutionRecord:
        """The final record, its output figures filled in; the record returned carries the output itself."""
        with self._lock:
            output = self._open[record.execution_id][1]
        record = replace(record, output_bytes=output.size, truncated=output.truncated)
        whole = output.whole()
        in_store = None if output.in_file else whole
        self._store.end(record, in_store, record.status_at + self._keep_for)
        with self._lock:
            # Only now: whoever asks finds it here or in the store, never nowhere.
            del self._open[record.execution_id]
        output.end()
        output.close()
        return replace(record, output=whole)

    def forget(self, execution_id: str) -> None:
        """One that was refused after all."""
        with self._lock:
            self._open.pop(execution_id, None)

    def get(self, execution_id: str, *, with_output: bool = True) -> ExecutionRecord | None:
        """The record with its output so far. Raises StoreUnavailable."""
        with self._lock:
            running = self._open.get(execution_id)
        if running is not None:
            record, output = running
            data = output.whole() if with_output else None
            return replace(record, output=data, output_bytes=output.size, truncated=output.truncated)
        found = self._store.record(execution_id)
        if found is None:
            # It may have been begun so lately that the store has not heard of it, or ended just now.
            self._store.flush(5)
            found = self._store.record(execution_id)
        if found is None or not with_output or found.output is not None:
            return found
        return replace(found, output=read_file(self._path(execution_id), 0, found.output_bytes))

    def read(
        self, execution_id: str, offset: int, *, follow: bool, limit: int, abandoned: threading.Event
    ) -> Iterator[tuple[int, bytes, bool]] | None:
        """Pieces of output as (offset, data, ended), or None for an unknown execution.

        Following ends when the execution has ended or ``abandoned`` is set; ``limit`` 0 = no limit.
        """
        with self._lock:
            running = self._open.get(execution_id)
        if running is not None:
            return _live(running[1], offset, follow, limit, abandoned)
        record = self.get(execution_id)
        return None if record is None else _kept(record, offset, limit)

    def end_former_life(self, now: float, reason: str) -> int:
        """What an earlier life of this agent was running has failed; how many there were."""
        unfinished = self._store.unfinished()
        for record in unfinished:
            size = 0
            with contextlib.suppress(OSError):
                size = self._path(record.execution_id).stat().st_size
            ended = record.ended(ExecutionStatus.FAILED, at=now, error=reason, kind=ErrorKind.AGENT_STOPPED)
            ended = replace(ended, output_bytes=size)
            self._store.end(ended, None if size > IN_MEMORY else b"", now + self._keep_for)
        return len(unfinished)

    def tick(self, now: float) -> None:
        """Forget what is over. ``now`` is epoch seconds."""
        while True:
            over = self._store.expire(now)
            for execution_id in over:
                self._path(execution_id).unlink(missing_ok=True)
            if not over:
                return

    def close(self) -> None:
        self._store.close()

    def _path(self, execution_id: str) -> Path:
        return self._directory / execution_id


def _live(
    output: Output, offset: int, follow: bool, limit: int, abandoned: threading.Event
) -> Iterator[tuple[int, bytes, bool]]:
    left = limit or 1 << 62
    end = None if follow else output.size
    while left > 0 and not abandoned.is_set():
        room = min(_CHUNK, left) if end is None else min(_CHUNK, left, end - offset)
        if end is not None and room <= 0:
            yield offset, b"", output.ended
            return
        # The timeout is only for the reader that went away without anything being written.
        data, ended = output.follow(offset, room, 1.0) if end is None else (output.read(offset, room), False)
        if data or ended:
            yield offset, data, ended
        offset += len(data)
        left -= len(data)
        if ended:
            return


def _kept(record: ExecutionRecord, offset: int, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    output = record.output or b""
    end = min(len(output), offset + limit) if limit else len(output)
    while offset < end:
        data = output[offset : min(end, offset + _CHUNK)]
        yield offset, data, offset + len(data) >= len(output)
        offset += len(data)
    if offset >= len(output) and not output[offset - 1 : offset]:
        yield offset, b"", True


def new_record(
    execution_id: str, function_name: str, agent_id: str, asynchronous: bool, warnings: tuple[str, ...]
) -> ExecutionRecord:
    """A record of something accepted now."""
    return ExecutionRecord(
        execution_id,
        function_name,
        agent_id,
        asynchronous=asynchronous,
        started_at=time.time(),
        warnings=warnings,
    )
