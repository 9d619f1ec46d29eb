"""Directories of other people's files are removed, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxlib.agent.removal import discard, remove_tree
from tests.support.need import need_root


def test_nobody_leads_root_elsewhere_while_it_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program puts a link in the place of a directory that is just being emptied."""
    need_root()
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o755)
    (precious / "passwd").write_text("kept")
    bait = tmp_path / "work" / "sub"
    bait.mkdir(parents=True)
    (bait / "passwd").write_text("")
    unlink = os.unlink
    swapped: list[str] = []

    def swap(name: str, *, dir_fd: int | None = None) -> None:
        if name == "passwd" and not swapped:
            swapped.append(name)
            bait.rename(tmp_path / "work" / "elsewhere")
            bait.symlink_to(precious)
            raise PermissionError(1, "Operation not permitted", name)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", swap)
    with pytest.raises(OSError, match="passwd"):
        remove_tree(tmp_path / "work")
    assert swapped
    assert (precious / "passwd").read_text() == "kept"
    assert precious.stat().st_mode & 0o777 == 0o755
    discard(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert (precious / "passwd").read_text() == "kept"
