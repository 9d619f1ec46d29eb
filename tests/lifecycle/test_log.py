"""The log: a line for each event, a traceback only for what nobody meant."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib import log
from fluxlib.errors import CannotStart, FluxError, Internal, StoreUnavailable

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


def test_a_line_of_another_process_of_ours_keeps_its_own_time_and_level(file: Path) -> None:
    log.relay("2026-12-01 10:00:00 INFO fluxlib.agent.app: agent local listens\x1b[0m")
    assert file.read_text() == "2026-12-01 10:00:00 INFO fluxlib.agent.app: agent local listens\\x1b[0m\n"


def test_a_log_in_a_file_is_beside_standard_error_unless_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: Path
) -> None:
    for console, path in ((True, tmp_path / "new" / "both.log"), (False, tmp_path / "alone.log")):
        log.set_up("INFO", file=path, console=console)
        said.info("once")
        assert path.read_text().endswith("once\n")
        assert ("once" in capsys.readouterr().err) == console


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path, file: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotStart, match=r"the log .*flux\.log cannot be written"):
        log.set_up(file=tmp_path / "taken" / "flux.log")
