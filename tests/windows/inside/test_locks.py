"""Locks between processes, as Windows has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib.errors import Conflict
from fluxlib.store.sqlite import SqliteControlStore

_HOLD = """
import sys
from pathlib import Path
from fluxlib.store.sqlite import SqliteControlStore
store = SqliteControlStore(Path(sys.argv[1]) / "flux.db")
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_has_the_store_until_it_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(Conflict, match=f"in use by process {other.pid}"):
            SqliteControlStore(tmp_path / "flux.db")
        other.kill()
    store = SqliteControlStore(tmp_path / "flux.db")
    with pytest.raises(Conflict, match="in use by process"):
        SqliteControlStore(tmp_path / "flux.db")
    store.close()
    SqliteControlStore(tmp_path / "flux.db").close()
