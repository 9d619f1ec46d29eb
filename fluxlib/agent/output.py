"""One execution's output: appended, never rewritten; read by many at any offset, while it runs and after.

Up to 64 KiB stay in memory, more goes to a file. Past the cap the rest is
dropped: the program must never wait because nobody wants to keep what it says.
The same goes for a full disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

IN_MEMORY = 64 * 1024


class Output:
    """Written by the executor's thread, read by anybody's.

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
        """Nothing more comes: whoever follows is told, and what lies in a file is read from the disk from now on."""
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
