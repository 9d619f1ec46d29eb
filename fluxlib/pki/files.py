"""Secrets on disk: private from the first byte, replaced atomically, one writer at a time."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxlib.errors import FluxError


class CertificatesUnusable(FluxError):
    """The certificate directory cannot be read or written; the message says what to do."""


def make_directory(path: Path) -> None:
    """The directory and its missing parents; the innermost one 0700."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise CertificatesUnusable(f"{path} cannot be made: {error.strerror}: set `certs_dir`") from error


def write_secret(path: Path, content: bytes) -> None:
    """``path`` with mode 0600 and the directory's owner, all of it or nothing. Raises CertificatesUnusable."""
    make_directory(path.parent)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _give_to_owner_of(path.parent, temporary)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CertificatesUnusable(f"{path} cannot be written: {error.strerror}") from error


def read_file(path: Path) -> bytes | None:
    """The content, or None when there is no such file. Raises CertificatesUnusable for everything else."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CertificatesUnusable(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time in ``directory``: two that start at once must make one CA."""
    make_directory(directory)
    path = directory / ".lock"
    try:
        file = open(path, "a+b")  # noqa: SIM115 - closed below, after the lock is let go
        _give_to_owner_of(directory, path)
    except OSError as error:
        raise CertificatesUnusable(f"{path} cannot be opened: {error.strerror}: check who owns {directory}") from error
    with file:
        _lock(file.fileno())
        try:
            yield
        finally:
            _unlock(file.fileno())


def _give_to_owner_of(directory: Path, path: str | Path) -> None:
    """What root writes (`sudo flux enroll`) must stay readable to the service's user."""
    if sys.platform != "win32" and os.geteuid() == 0:
        owner = directory.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
