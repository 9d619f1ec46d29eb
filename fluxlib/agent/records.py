"""The agent's memory of executions: what runs, with its output so far, and what has ended, for a while."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from fluxlib.agent.journal import Journal
from fluxlib.agent.output import IN_MEMORY, Output, read_file
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import RecordStore

log = logging.getLogger(__name__)

_CHECK = 5.0
_REMOVED = "its output was removed: all outputs together exceeded max_output_store_mb of this agent"
_CHUNK = 256 * 1024
_CLOSE = 10.0
# For clients that ask at once, and for a store whose disk is full.
_RECENT = 2000
_RECENT_BYTES = 16 * 1024 * 1024


class Records:
    """Records by execution ID. ``keep_for`` is in seconds, ``cap`` in bytes of output of one execution, ``total`` in
    bytes of all ended ones together.

    ``problem`` says why records cannot be kept now, empty when they can.
    """

    def __init__(self, store: RecordStore, directory: Path, keep_for: float, cap: int, total: int = 1 << 62) -> None:
        self._store = store
        self._journal = Journal(store)
        self._directory = os.fspath(directory)
        self._keep_for = keep_for
        self._cap = cap
        self._lock = threading.Lock()
        self._open: dict[str, tuple[ExecutionRecord, Output]] = {}
        self._recent: OrderedDict[str, ExecutionRecord] = OrderedDict()
        self._recent_bytes = 0
        self._total = total
        self._outputs: OrderedDict[str, int] = OrderedDict()  # bytes kept of each ended execution, oldest first
        self._outputs_bytes = 0
        self._removed = 0
        self._flushed = 0  # so many of the journal's records were in the store for certain
        self.problem = ""
        self.over: Callable[[], object] = lambda: None  # called when ``tick`` has outputs to remove
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = sorted((entry.stat().st_mtime, entry.name, entry.stat().st_size) for entry in os.scandir(directory))
        for _, name, size in files:
            self._count(name, size)

    # -- while it runs -------------------------------------------------------------

    def begin(self, record: ExecutionRecord) -> Output:
        """A new execution and where its output goes."""
        output = Output(self._path(record.execution_id), self._cap)
        with self._lock:
            self._open[record.execution_id] = (record, output)
        self._journal.put(record, None)
        return output

    def update(self, record: ExecutionRecord) -> None:
        """A newer look at one that runs; in memory only, a restart would end it anyway."""
        with self._lock:
            known = self._open.get(record.execution_id)
            if known is not None:
                self._open[record.execution_id] = (record, known[1])

    def end(self, record: ExecutionRecord) -> ExecutionRecord:
        """The final record, its output figures filled in; with the output unless it lies in a file."""
        with self._lock:
            output = self._open[record.execution_id][1]
        warnings = (*record.warnings, output.problem) if output.problem else record.warnings
        record = replace(
            record,
            output=None if output.in_file else output.read(0, IN_MEMORY),
            output_bytes=output.size,
            truncated=output.truncated,
            warnings=warnings,
        )
        self._journal.put(record, record.status_at + self._keep_for)
        with self._lock:
            # In one step: whoever asks finds it here or there, never nowhere.
            del self._open[record.execution_id]
            self._remember(record)
            self._count(record.execution_id, output.size)
            over = self._outputs_bytes > self._total
        if over:
            self.over()
        output.end()
        return record

    def refuse(self, record: ExecutionRecord) -> None:
        """One that was begun and refused after all: as if it had never been here."""
        if not self._journal.strike(record.execution_id):
            self._journal.put(replace(record, output=b""), record.status_at)
        with self._lock:
            known = self._open.pop(record.execution_id, None)
        if known is not None:
            known[1].end()  # somebody may follow it already

    # -- asked for -----------------------------------------------------------------

    def known(self, execution_id: str) -> ExecutionRecord | None:
        """The record of one that ran or runs here, without its output. Cheap. Raises StoreUnavailable."""
        with self._lock:
            running = self._open.get(execution_id)
            found = running[0] if running is not None else self._recent.get(execution_id)
        found = found or self._journal.find(execution_id) or self._store.record(execution_id)
        return None if found is None or found.error_kind.nothing_started else found

    def get(self, execution_id: str, *, with_output: bool = True) -> ExecutionRecord | None:
        """The record with its output so far. Raises StoreUnavailable."""
        with self._lock:
            running = self._open.get(execution_id)
        if running is not None:
            record, output = running
            size = output.size
            data = output.read(0, size) if with_output else None
            return replace(record, output=data, output_bytes=size, truncated=output.truncated)
        found = self._ended(execution_id)
        if found is None or not with_output:
            return found
        return self.with_output(found)

    def with_output(self, record: ExecutionRecord) -> ExecutionRecord:
        """An ended record with the output that lies in a file; without it, and told so, when that cannot be read.

        Raises nothing: the same answer would break the stream it travels on each time it is sent again, and all the
        others' with it.
        """
        if record.output is not None:
            return record
        try:
            return replace(record, output=read_file(self._path(record.execution_id), 0, record.output_bytes))
        except OSError as error:
            log.error("the output of %s cannot be read: %s", record.execution_id, error)
            warning = f"its output cannot be read now: {error.strerror or error}"
            return replace(record, output=b"", truncated=True, warnings=(*record.warnings, warning))

    def reader(self, execution_id: str) -> Reader | None:
        """For its output piece by piece; None for an unknown execution. Raises StoreUnavailable."""
        with self._lock:
            running = self._open.get(execution_id)
        if running is not None:
            return Reader(running[1])
        record = self._ended(execution_id)
        if record is None:
            return None
        return Reader(Output.kept(self._path(execution_id), record.output_bytes, record.output))

    def _ended(self, execution_id: str) -> ExecutionRecord | None:
        """As the store has it: with the output unless that lies in a file."""
        with self._lock:
            found = self._recent.get(execution_id)
        found = found or self._journal.find(execution_id) or self._store.record(execution_id)
        written = self._journal.written
        if found is None and written != self._flushed:
            # It may be on its way through the store's own queue. Asking for what never was must not cost a write each.
            self._store.flush(5)
            self._flushed = written
            found = self._store.record(execution_id)
        return None if found is None or found.error_kind.nothing_started else found

    # -- in between ----------------------------------------------------------------

    def unfinished(self) -> list[str]:
        """The IDs of what the previous run of this agent had not finished."""
        return [record.execution_id for record in self._store.unfinished()]

    def end_previous_run(self, now: float, reason: str) -> int:
        """Mark what the previous run had not finished as failed; how many that were. Removes outputs of no record."""
        unfinished = self._store.unfinished()
        for record in unfinished:
            try:
                size = os.stat(self._path(record.execution_id)).st_size
            except OSError:
                size = 0  # what was in memory is lost with that life
            ended = record.ended(ExecutionStatus.FAILED, at=now, error=reason, kind=ErrorKind.AGENT_STOPPED)
            ended = replace(ended, output_bytes=min(size, self._cap), truncated=size >= self._cap)
            self._store.end(ended, None if size > IN_MEMORY else b"", now + self._keep_for)
        self._store.flush(60)
        for name in os.listdir(self._directory):
            if self._store.record(name) is None:
                self._unlink(name)
                self._uncount(name)
        return len(unfinished)

    def check(self) -> None:
        """Find out whether the store takes writes."""
        try:
            self._store.check(_CHECK)
        except StoreUnavailable as error:
            self.problem = error.message
        else:
            self.problem = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know of the outputs."""
        if not self._removed:
            return ()
        most = self._total >> 20
        return (
            f"outputs of {self._removed} executions were removed early: together they exceed {most} MB"
            " (max_output_store_mb)",
        )

    def _trim(self) -> None:
        """Remove the oldest outputs until all of them together are within the limit."""
        removed = 0
        while True:
            with self._lock:
                if self._outputs_bytes <= self._total:
                    break
                execution_id = next(iter(self._outputs))
                self._uncount(execution_id)
            found = self._ended(execution_id)
            if found is not None:
                warnings = (*found.warnings, _REMOVED)
                kept = replace(found, output=b"", truncated=True, warnings=warnings)
                with self._lock:
                    # The store has the old one until the new one is through its queue.
                    self._drop(execution_id)
                    self._remember(kept)
                self._journal.put(kept, found.status_at + self._keep_for)
            self._unlink(execution_id)
            removed += 1
        if removed:
            log.warning(
                "removed the outputs of the %d oldest executions: all together exceeded %d MB (max_output_store_mb)",
                removed,
                self._total >> 20,
            )
            self._removed += removed

    def _count(self, execution_id: str, size: int) -> None:
        if size:
            self._outputs[execution_id] = size
            self._outputs_bytes += size

    def _uncount(self, execution_id: str) -> None:
        self._outputs_bytes -= self._outputs.pop(execution_id, 0)

    def tick(self, now: float) -> None:
        """Forget what is over, and the oldest outputs where there are too many. ``now`` is epoch seconds."""
        self._expire(now)
        self._trim()

    def _expire(self, now: float) -> None:
        while True:
            over = self._store.expire(now)
            for execution_id in over:
                self._unlink(execution_id)
            with self._lock:
                for execution_id in over:
                    self._drop(execution_id)
                    self._uncount(execution_id)
            if not over:
                return

    def flush(self) -> None:
        """Until the store holds everything so far."""
        self._journal.flush()
        self._store.flush()

    def close(self, timeout: float = _CLOSE) -> None:
        """Keeps everything first, within ``timeout`` seconds."""
        deadline = Deadline(timeout)
        self._journal.stop(deadline)
        self._store.close(deadline.remaining())

    def _remember(self, record: ExecutionRecord) -> None:
        self._recent[record.execution_id] = record
        self._recent_bytes += len(record.output or b"")
        while len(self._recent) > _RECENT or self._recent_bytes > _RECENT_BYTES:
            self._drop(next(iter(self._recent)))

    def _drop(self, execution_id: str) -> None:
        dropped = self._recent.pop(execution_id, None)
        if dropped is not None:
            self._recent_bytes -= len(dropped.output or b"")

    def _unlink(self, execution_id: str) -> None:
        try:
            os.unlink(self._path(execution_id))
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("the output of %s cannot be removed: %s", execution_id, error)

    def _path(self, execution_id: str) -> str:
        return os.path.join(self._directory, execution_id)


class Reader:
    """One reader of one output. ``abandon`` may be called from any thread and ends a ``pieces`` that waits."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._abandoned = False

    def abandon(self) -> None:
        self._abandoned = True
        self._output.wake()

    def pieces(self, offset: int, limit: int, *, follow: bool) -> Iterator[tuple[int, bytes, bool]]:
        """(offset, data, whether that was the last of it); ``limit`` 0 = no limit.

        Following ends when the execution has ended or the reader was abandoned; otherwise with what is
        there now. The last piece may be empty.
        """
        output = self._output
        left = limit or 1 << 62
        while not self._abandoned:
            room = min(_CHUNK, left)
            if follow:
                data, ended = output.follow(offset, room, lambda: self._abandoned)
            else:
                over = output.ended  # asked first: what is read next is then all there will be
                data = output.read(offset, room)
                ended = over and (not data or offset + len(data) >= output.size)
            offset += len(data)
            left -= len(data)
            yield offset - len(data), data, ended
            if ended or left <= 0 or (not data and not follow):
                return


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
