"""Where functions' code and work directories lie: somewhere every user can walk to.

A function runs as a user of its own, which must be able to enter each directory
on the way to its code. Usually that is the state directory. Under a parent only
root may enter (a clone below /root, a private temporary directory) code and work
directories go to a directory of their own instead:

    /var/lib/flux-programs/<random name>/         functions/ and work/ of one agent
    /var/lib/flux-programs/<random name>/owner    whose: the path of its state directory
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
import shutil
import stat
from pathlib import Path

from fluxlib.errors import FluxError

log = logging.getLogger(__name__)

OUTSIDE = Path("/var/lib/flux-programs")
_NAME = re.compile(r"[0-9a-f]{16}")


def programs_dir(state_dir: Path, outside: Path = OUTSIDE) -> Path:
    """The directory for code and work directories: ``state_dir`` itself, or one outside that all can reach.

    Raises FluxError when neither can be had.
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
    log.info("functions' users may not enter %s: their code and work directories are in %s", closed, directory)
    return directory


def closed_parent(directory: Path) -> Path | None:
    """The first directory on the way that not every user may enter. Mode bits only: an ACL can grant no less."""
    resolved = directory.resolve()
    for step in [*reversed(resolved.parents), resolved]:
        if not step.stat().st_mode & stat.S_IXOTH:
            return step
    return None


def _claimed(state_dir: Path, outside: Path) -> Path:
    _make_ours(outside)
    _sweep(outside)
    note = state_dir / "programs"
    name = note.read_text().strip() if note.is_file() else ""
    if not _NAME.fullmatch(name):
        name = secrets.token_hex(8)
        # The note first: a sweep of another agent goes by it.
        note.write_text(name + "\n")
    directory = outside / name
    _make_ours(directory)
    owner = directory / "owner"
    if not owner.exists():
        descriptor = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(os.fsencode(state_dir.resolve()))
    return directory


def _make_ours(directory: Path) -> None:
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
        if not _NAME.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            state_dir = Path(os.fsdecode(Path(entry.path, "owner").read_bytes()))
            claimed = Path(state_dir, "programs").read_text().strip() == entry.name
        except FileNotFoundError:
            # No owner yet: its agent is just making it. No claim: the state directory is gone.
            claimed = not Path(entry.path, "owner").exists()
        if not claimed:
            log.info("removing the programs of an agent whose state is gone: %s", entry.path)
            shutil.rmtree(entry.path, ignore_errors=True)
