"""Locks between processes, which the kernel takes back when their holder dies.

flock on Unix. On Windows a locked range of bytes: a mandatory lock, so the range
lies far behind anything a lock file holds, and others can still read who has it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fluxlib.errors import InUse

if sys.platform == "win32":
    import msvcrt

    _RANGE_AT = 1 << 30

    def lock(descriptor: int) -> None:
        """Waits until nobody else has it; after ten seconds OSError, as msvcrt has it."""
        os.lseek(descriptor, _RANGE_AT, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)

    def try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _RANGE_AT, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            # EACCES; Wine says nothing. What else could fail is a bad descriptor, and this one was just opened.
            return False
        return True

    def unlock(descriptor: int) -> None:
        os.lseek(descriptor, _RANGE_AT, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def lock(descriptor: int) -> None:
        """Waits until nobody else has it."""
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


class ExclusiveLock:
    """Held from the moment it is made until ``release`` or this process's end; the file stays.

    Raises InUse when another process has it: the message names that process and ends with ``advice``. Raises OSError
    when the file cannot be locked. Its directory must be there.
    """

    def __init__(self, path: Path, advice: str) -> None:
        # Not truncated before it is ours: what it says is the holder's.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not try_lock(self._descriptor):
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                holder = os.read(self._descriptor, 20).decode("ascii", "replace").strip()
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise InUse(f"{path.parent} is in use by {who}: {advice}", who)
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, f"{os.getpid()}\n".encode())
        except BaseException:
            os.close(self._descriptor)
            raise

    def release(self) -> None:
        """Once."""
        # Removing the file would let a third process lock a new one beside the holder of the old.
        unlock(self._descriptor)
        os.close(self._descriptor)
