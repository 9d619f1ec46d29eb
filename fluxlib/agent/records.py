"""The agent's memory of executions: the running ones with their output so far, and the ended ones for a while.

A record goes to the store through the journal, an output to memory or to a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

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
# How long a record waits for others to be written with it (seconds): a write each costs as much as a short program.
_TOGETHER = 0.02
# An output up to this size stays in memory (bytes).
IN_MEMORY = 64 * 1024


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
        """The newer record of a running execution; in memory only, a restart would end it anyway."""
        with self._lock:
            known = self._open.get(record.execution_id)
            if known is not None:
                self._open[record.execution_id] = (record, known[1])

    def end(self, record: ExecutionRecord) -> ExecutionRecord:
        """The final record, its output's size filled in; with the output unless it lies in a file."""
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
            # In one step: a reader finds it here or there, never nowhere.
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
        if not self._journal.discard_pending(record.execution_id):
            self._journal.put(replace(record, output=b""), record.status_at)
        with self._lock:
            known = self._open.pop(record.execution_id, None)
        if known is not None:
            known[1].end()  # somebody may follow it already

    # -- asked for -----------------------------------------------------------------

    def known(self, execution_id: str) -> ExecutionRecord | None:
        """The record of an execution known here, without its output. Cheap. Raises StoreUnavailable."""
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
                size = 0  # what was in memory is lost
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


class Journal:
    """Beginnings and ends on their way to the store, together every 20 ms; the order of one execution's is kept.

    One that begins and ends within that time is written once.
    """

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

    def discard_pending(self, execution_id: str) -> bool:
        """Discard what was not written yet; whether the store never hears of it."""
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


class Output:
    """One execution's output: appended by the executor's thread, never rewritten; read by any thread at any offset.

    Past the cap the rest is dropped, and so it is when the disk is full: the program must never wait for it.

    ``cap`` is in bytes. ``path`` is where it goes when it outgrows memory.
    """

    def __init__(self, path: str | Path, cap: int) -> None:
        self._path = path
        self._cap = cap
        self._condition = threading.Condition()
        self._memory = bytearray()
        self._file: int | None = None
        self._readers = 0
        self.size = 0  # bytes kept
        self.dropped = 0
        self.ended = False
        self.problem = ""  # why some of it could not be kept

    @classmethod
    def kept(cls, path: str | Path, size: int, data: bytes | None) -> Output:
        """The output of an execution that has ended; ``data`` None: it lies in the file."""
        output = cls(path, size)
        output.size = size if data is None else len(data)
        output._memory += data or b""
        output.ended = True
        return output

    @property
    def truncated(self) -> bool:
        return self.dropped > 0

    @property
    def in_file(self) -> bool:
        """Whether it has outgrown memory (also after ``end``)."""
        return self.size > len(self._memory)

    def append(self, data: bytes) -> bool:
        """Whether more is kept. Never raises and never waits for a reader."""
        room = 0 if self.problem else self._cap - self.size
        kept = data if len(data) <= room else data[: max(0, room)]
        self.dropped += len(data) - len(kept)
        if not kept:
            return False
        with self._condition:
            if self._file is None and self.size + len(kept) <= IN_MEMORY:
                self._memory += kept
                self.size += len(kept)
            else:
                self._to_file(kept)
            if self._readers:
                self._condition.notify_all()
        return True

    def end(self) -> None:
        """Nothing more comes: followers learn it, and what lies in a file is read from the disk from now on."""
        with self._condition:
            self.ended = True
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._condition.notify_all()

    def wake(self) -> None:
        """Followers look again whether they are still wanted."""
        with self._condition:
            self._condition.notify_all()

    def read(self, offset: int, limit: int) -> bytes:
        """At most ``limit`` bytes that are there from ``offset`` on; empty when there are none."""
        with self._condition:
            limit = min(limit, self.size - offset)
            if limit <= 0:
                return b""
            if not self.in_file:
                return bytes(self._memory[offset : offset + limit])
        # Not under the lock: what is counted is written, and the program must not wait for this.
        return read_file(self._path, offset, limit)

    def follow(self, offset: int, limit: int, abandoned: Callable[[], bool]) -> tuple[bytes, bool]:
        """(bytes, whether that was the last of it); waits for either, or until ``abandoned`` and a ``wake``."""
        with self._condition:
            self._readers += 1
            try:
                self._condition.wait_for(lambda: self.size > offset or self.ended or abandoned())
            finally:
                self._readers -= 1
            ended = self.ended
        data = self.read(offset, limit)
        # Its file may hold less than was written, after a power cut, or be gone, when its time was over: no more comes.
        return data, not data or (ended and offset + len(data) >= self.size)

    def _to_file(self, data: bytes) -> None:
        try:
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
                self._file = os.open(self._path, flags, 0o600)
                _write(self._file, self._memory)
            _write(self._file, data)
        except OSError as error:
            self.dropped += len(data)
            self.problem = f"its output could not be kept: {error.strerror or error}"
            log.error("%s: %s; the rest of it is dropped", self._path, self.problem)
            self._give_up_file()
            return
        self.size += len(data)
        self._memory = bytearray()

    def _give_up_file(self) -> None:
        """After a failed write: what counts as kept is what ``size`` says, in memory or in the file."""
        if not self.in_file and self._file is not None:
            os.close(self._file)
            self._file = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)


def read_file(path: str | Path, offset: int, limit: int) -> bytes:
    """A part of a kept output; empty when it is gone."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(limit)
    except FileNotFoundError:
        return b""


def _write(fd: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
