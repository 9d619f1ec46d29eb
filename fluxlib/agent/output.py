"""One execution's output: appended, never rewritten; read by many at any offset, while it runs and after.

Up to 64 KiB stay in memory, more goes to a file. Past the cap the rest is
dropped: the program must never wait because nobody wants to keep what it says.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

IN_MEMORY = 64 * 1024


class Output:
    """Written by the executor's thread, read by anybody's.

    ``cap`` is in bytes. ``path`` is where it goes when it outgrows memory.
    """

    def __init__(self, path: Path, cap: int) -> None:
        self._path = path
        self._cap = cap
        self._condition = threading.Condition()
        self._memory = bytearray()
        self._file: int | None = None
        self._readers = 0
        self.size = 0  # bytes kept
        self.dropped = 0
        self.ended = False

    @property
    def truncated(self) -> bool:
        return self.dropped > 0

    @property
    def in_file(self) -> bool:
        """Whether it has outgrown memory (also after ``close``)."""
        return self.size > IN_MEMORY

    def append(self, data: bytes) -> None:
        room = self._cap - self.size
        kept = data if len(data) <= room else data[: max(0, room)]
        with self._condition:
            self.dropped += len(data) - len(kept)
            if not kept:
                return
            if self._file is None and self.size + len(kept) > IN_MEMORY:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                _write(self._file, bytes(self._memory))
                self._memory = bytearray()
            if self._file is None:
                self._memory += kept
            else:
                _write(self._file, kept)
            self.size += len(kept)
            if self._readers:
                self._condition.notify_all()

    def end(self) -> None:
        """Nothing more comes; whoever follows is told."""
        with self._condition:
            self.ended = True
            self._condition.notify_all()

    def read(self, offset: int, limit: int) -> bytes:
        """At most ``limit`` bytes that are there from ``offset`` on; empty when there are none."""
        with self._condition:
            return self._read(offset, limit)

    def follow(self, offset: int, limit: int, timeout: float | None) -> tuple[bytes, bool]:
        """(bytes, whether that was the last of it); waits for either, at most ``timeout`` seconds."""
        with self._condition:
            self._readers += 1
            try:
                self._condition.wait_for(lambda: self.size > offset or self.ended, timeout)
            finally:
                self._readers -= 1
            data = self._read(offset, limit)
            return data, self.ended and offset + len(data) >= self.size

    def whole(self) -> bytes:
        return self.read(0, self.size)

    def close(self) -> None:
        """Let the file go; what was said is read from the disk then."""
        with self._condition:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _read(self, offset: int, limit: int) -> bytes:
        if offset >= self.size:
            return b""
        if self.size <= IN_MEMORY:
            return bytes(self._memory[offset : offset + limit])
        if self._file is None:
            return read_file(self._path, offset, limit)
        return os.pread(self._file, limit, offset) if hasattr(os, "pread") else read_file(self._path, offset, limit)


def read_file(path: Path, offset: int, limit: int) -> bytes:
    """A part of a kept output; empty when it is gone."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(limit)
    except FileNotFoundError:
        return b""


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
