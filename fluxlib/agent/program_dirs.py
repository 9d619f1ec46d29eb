"""Where functions' code and work directories lie: somewhere every user can walk to.

A function runs as a user of its own, which must be able to enter each directory
on the way to its code. Usually that is the state directory. Under a parent only
root may enter (a clone below /root, a private temporary directory) code and work
directories go to a directory of their own instead:

    /var/lib/flux-programs/<random name>/         functions/ and work/ of one agent
    /var/lib/flux-programs/<random name>/owner    whose: the path of its state directory
    /var/lib/flux-programs/<random name>/agent.lock   held by that agent while it lives
    <state_dir>/programs                          the random name

/var/lib is root's, so nobody can have put a link or a directory of that name
there first, and nothing there is swept away after a month as in /var/tmp. What
belongs to a state directory that is gone is removed by the next agent that
starts.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import stat
from pathlib import Path

from fluxlib.agent.removal import discard
from fluxlib.errors import FluxError
from fluxlib.filelock import ExclusiveLock, try_lock

log = logging.getLogger(__name__)

FALLBACK_DIR = Path("/var/lib/flux-programs")
LOCK = "agent.lock"
_NAME = re.compile(r"[0-9a-f]{16}")


def programs_dir(state_dir: Path, outside: Path = FALLBACK_DIR) -> Path:
    """The directory for code and work directories: ``state_dir`` itself, or one outside that all can reach.

    Raises FluxError when neither is usable.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return state_dir  # functions run as the agent's own user
    try:
        closed = closed_parent(state_dir)
        if closed is None:
            return state_dir
        directory = _claimed(state_dir, outside)
    except OSError as error:
        raise FluxError(
            f"functions' users cannot reach {state_dir}, and {outside} cannot be used instead: {error}:"
            " set `state_dir` to a directory that everybody may enter"
        ) from error
    log.info("%s is closed to other users, so functions' code and work directories are kept in %s", closed, directory)
    return directory


def outside_programs(state_dir: Path, outside: Path = FALLBACK_DIR) -> Path | None:
    """The directory outside that this state directory has, if it has one. For who removes both."""
    note = state_dir / "programs"
    name = note.read_text().strip() if note.is_file() else ""
    owner = outside / name / "owner"
    if not _NAME.fullmatch(name) or not owner.is_file():
        return None
    # A copy of the state directory has the same note, and the original is still there.
    theirs = Path(os.fsdecode(owner.read_bytes()))
    return outside / name if theirs == state_dir.resolve() or not theirs.exists() else None


def lock_state_dir(directory: Path) -> ExclusiveLock:
    """Keep a directory for this agent alone. Raises Conflict when another process has it, FluxError."""
    try:
        return ExclusiveLock(directory / LOCK, "stop that agent, or give this one a `state_dir` of its own")
    except OSError as error:
        raise FluxError(f"{directory / LOCK} cannot be locked: {error.strerror}: set `state_dir`") from error


def closed_parent(directory: Path) -> Path | None:
    """The first directory on the way that not every user may enter. Mode bits only: an ACL can grant no less."""
    resolved = directory.resolve()
    for step in [*reversed(resolved.parents), resolved]:
        if not step.stat().st_mode & stat.S_IXOTH:
            return step
    return None


def _claimed(state_dir: Path, outside: Path) -> Path:
    _ensure_root_owned(outside)
    _sweep(outside)
    note = state_dir / "programs"
    name = note.read_text().strip() if note.is_file() else ""
    if not _NAME.fullmatch(name):
        name = secrets.token_hex(8)
        # The note first: a sweep of another agent goes by it.
        note.write_text(name + "\n")
    directory = outside / name
    _ensure_root_owned(directory)
    owner = directory / "owner"
    if not owner.exists():
        # Whole or not at all: half a path would be that of a state directory which is gone.
        new = directory / "owner.new"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(os.fsencode(state_dir.resolve()))
        os.replace(new, owner)
    return directory


def _ensure_root_owned(directory: Path) -> None:
    """Made, or found to be a directory of root's that only root may write. Raises FluxError, OSError."""
    try:
        os.mkdir(directory, 0o711)
    except FileExistsError:
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise FluxError(f"{directory} is not a directory of root's own: remove it, or set `state_dir`") from None
    os.chmod(directory, 0o711)


def _sweep(outside: Path) -> None:
    """Remove what belongs to state directories that are no more, or that use another directory now."""
    for entry in os.scandir(outside):
        directory = Path(entry.path)
        if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and _abandoned(directory):
            log.info("removing the code of an agent whose state directory is gone: %s", directory)
            discard(directory)


def _abandoned(directory: Path) -> bool:
    """Whether nobody will ever use it again; in doubt it is kept."""
    try:
        state_dir = Path(os.fsdecode((directory / "owner").read_bytes()))
    except OSError:
        return False  # its agent is just making it
    if not state_dir.is_absolute():
        return False
    try:
        claimed = (state_dir / "programs").read_bytes().strip() == os.fsencode(directory.name)
    except (FileNotFoundError, NotADirectoryError):
        claimed = False
    except OSError:
        return False  # a disk that cannot be read now is not gone
    return not claimed and not _in_use(directory / LOCK)


def _in_use(path: Path) -> bool:
    """Whether a living agent holds its lock: its state may be out of sight (moved, unmounted) and it still runs."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)
