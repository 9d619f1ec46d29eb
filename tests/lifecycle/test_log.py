"""The log: a line for each event, a traceback only for what nobody meant."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib import log
from fluxlib.errors import FluxError, Internal, StoreUnavailable

said = logging.getLogger("fluxlib.test")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    path = tmp_path / "flux.log"
    log.set_up("INFO", timestamps=False, file=path)
    yield path
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def log_of(error: Exception, path: Path) -> list[str]:
    try:
        raise error
    except Exception:
        said.exception("a write failed")
    return path.read_text(encoding="utf-8").splitlines()


def test_an_error_raised_on_purpose_is_one_line(file: Path) -> None:
    lines = log_of(StoreUnavailable("Redis at h:1 wants a password\nforged"), file)
    assert lines == ["ERROR fluxlib.test: a write failed: Redis at h:1 wants a password\\x0aforged"]


@pytest.mark.parametrize("error", [ValueError("x"), Internal("x")])
def test_a_fault_keeps_its_traceback(file: Path, error: Exception) -> None:
    assert not isinstance(error, FluxError) or isinstance(error, Internal)
    assert "    Traceback (most recent call last):" in log_of(error, file)
