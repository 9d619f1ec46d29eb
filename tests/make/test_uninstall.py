"""`make uninstall` after a real `flux run`: nothing of it stays, and nothing else goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib.agent.program_dirs import FALLBACK_DIR
from fluxlib.config.control import read_control
from fluxlib.config.first_start import make_flux_yaml
from tests.support.programs import Api, Program, free_port

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has flux.exe")


class Run(Program):
    def __init__(self, directory: Path, state: Path) -> None:
        super().__init__(directory, "run", ["run", "--state", str(state)], {})

    def ready(self) -> bool:
        super().ready()
        return "is synchronized" in self.log.read_text()


def uninstall(top: Path, state: Path, venv: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", top / "scripts" / "uninstall", state, venv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def ran(tmp_path: Path) -> tuple[Path, Path]:
    """(state directory, where the functions' code is) of a Flux that has run a function."""
    state = tmp_path / "my state"
    make_flux_yaml(state / "flux.yaml", data=".", port=(port := free_port()))
    key = read_control((state / "flux.yaml").read_text(), Path("x")).api_key
    api = Api(f"http://127.0.0.1:{port}", key)
    with Run(tmp_path, state):
        api.deploy({"name": "here", "handler": "bin/run.sh"}, {"bin/run.sh": "#!/bin/sh\necho here\n"})
        assert api.execute("here")[1]["output"] == "here\n"
    note = state / "agent" / "state" / "programs"
    programs = FALLBACK_DIR / note.read_text().strip() if note.exists() else state / "agent" / "state"
    return state, programs


def test_nothing_stays_inside_or_outside(top: Path, tmp_path: Path, ran: tuple[Path, Path]) -> None:
    state, programs = ran
    assert list(programs.glob("functions/here/*/bin/run.sh"))
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / ".flux-venv").touch()
    done = uninstall(top, state, venv)
    assert done.returncode == 0, done.stderr
    assert f"removed {programs if FALLBACK_DIR in programs.parents else programs.parent}\n" in done.stdout
    assert not any(path.exists() for path in (state, programs, venv))
    assert uninstall(top, state, venv).returncode == 0


def test_what_others_have_there_stays(top: Path, tmp_path: Path, ran: tuple[Path, Path]) -> None:
    state, _ = ran
    (state / "thesis.txt").touch()
    (tmp_path / "venv").mkdir()
    done = uninstall(top, state, tmp_path / "venv")
    assert done.returncode == 0
    assert "thesis.txt was not made by Flux" in done.stdout
    assert [path.name for path in state.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "venv").exists()


def test_nothing_is_removed_while_it_runs(top: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    make_flux_yaml(state / "flux.yaml", data=".", port=free_port())
    with Run(tmp_path, state) as run:
        assert run.process is not None
        done = uninstall(top, state, tmp_path / "venv")
        assert done.returncode == 1
        assert f"in use by process {run.process.pid}" in done.stderr
        assert (state / "flux.yaml").exists()


def test_a_copys_code_is_not_the_originals(top: Path, tmp_path: Path, ran: tuple[Path, Path]) -> None:
    """A copied clone names the same directory outside."""
    state, programs = ran
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", state, copy], check=True)
    assert uninstall(top, copy, tmp_path / "venv").returncode == 0
    assert not copy.exists()
    assert list(programs.glob("functions/here/*/bin/run.sh"))
    assert uninstall(top, state, tmp_path / "venv").returncode == 0
