"""Secrets on disk: private from the first byte, replaced atomically, one writer at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxlib.errors import FluxError
from fluxlib.filelock import lock, unlock

log = logging.getLogger(__name__)


class CertificatesUnusable(FluxError):
    """The certificate directory cannot be read or written; the message says what to do."""


def make_directory(path: Path) -> None:
    """The directory and its missing parents; the innermost one 0700, with its parent's owner."""
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            _give_to_owner_of(path.parent, path)
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
                _give_to_owner_of(path.parent, file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise CertificatesUnusable(f"{path} cannot be written: {error.strerror}") from error


def remove_kept_agents(directory: Path) -> None:
    """Remove the certificates and private keys of agents that earlier versions kept in ``directory``.

    Only files of these names; a link is not followed. What cannot be removed is a warning: nothing depends on it.
    """
    removed = 0
    try:
        if directory.is_symlink() or not directory.is_dir():
            return
        for agent in directory.iterdir():
            if agent.is_symlink() or not agent.is_dir():
                continue
            for name in ("agent-key.pem", "agent.pem"):
                with contextlib.suppress(FileNotFoundError):
                    (agent / name).unlink()
                    removed += name == "agent-key.pem"
            if not any(agent.iterdir()):
                agent.rmdir()
        if not any(directory.iterdir()):
            directory.rmdir()
    except OSError as error:
        log.warning(
            "%s cannot be removed: %s. Remove %s yourself: an earlier version kept agents' private keys there",
            error.filename or directory,
            error.strerror or error,
            directory,
        )
    if removed:
        log.info(
            "removed the private keys of %d agents from %s, where an earlier version kept them", removed, directory
        )


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
        # Never through a link: whoever owns the directory could have root open and give away any file.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o600), "r+b")
        _give_to_owner_of(directory, file.fileno())
    except OSError as error:
        raise CertificatesUnusable(f"{path} cannot be opened: {error.strerror}: check who owns {directory}") from error
    with file:
        lock(file.fileno())
        try:
            yield
        finally:
            unlock(file.fileno())


@contextmanager
def as_owner_of(directory: Path) -> Iterator[None]:
    """Act as the user who owns ``directory``, when root does this on a service's behalf.

    What root writes must stay the service's to read, and the service's user must not lead root
    astray by links of its own. For programs with one thread. Raises CertificatesUnusable.
    """
    make_directory(directory)
    if sys.platform == "win32" or os.geteuid() != 0 or directory.stat().st_uid == 0:
        yield
        return
    owner, groups, group = directory.stat(), os.getgroups(), os.getegid()
    os.setgroups([owner.st_gid])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _give_to_owner_of(directory: Path, made: Path | int) -> None:
    """What root makes (`sudo flux serve` for a try) must stay readable to the service's user."""
    if sys.platform != "win32" and os.geteuid() == 0:
        owner = directory.stat()
        if isinstance(made, int):
            os.fchown(made, owner.st_uid, owner.st_gid)
        else:
            os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=False)
