"""`make run` from a fresh clone to the program: interrupted anywhere, moved, without network, with any names.

Most of it with a Python whose venv and pip do next to nothing; one test with the real ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.need import need
from tests.support.programs import free_port, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has flux.exe")

# ON_VENV and ON_PIP are what happens in the middle of each.
_PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv")
    echo venv >>"{log}"
    mkdir "$3/bin"
    cp "$0" "$3/bin/python"
    eval "$ON_VENV"
    touch "$3/pyvenv.cfg" "$3/pip"
    ;;
"-m pip")
    echo pip >>"{log}"
    [ -e "${{0%/bin/python}}/pip" ] || {{ echo "No module named pip" >&2; exit 1; }}
    eval "$ON_PIP"
    ;;
*) exec "{python}" "$@" ;;
esac
"""


class Clone:
    """The part of the tree that sets a clone up, with a program that says what it was started with."""

    def __init__(self, top: Path, directory: Path, requirements: str = "") -> None:
        self.directory = directory
        self.log = directory.parent / "python.log"
        (directory / "requirements").mkdir(parents=True)
        (directory / "requirements" / "run.txt").write_text(requirements)
        (directory / "scripts").mkdir()
        shutil.copy(top / "Makefile", directory)
        shutil.copy(top / "scripts" / "setup", directory / "scripts")
        (directory / "flux.py").write_text("import sys\nprint('started', sys.argv[1:], sys.prefix)\n")
        self._python = directory.parent / "python"
        self._python.write_text(_PYTHON.format(log=self.log, python=sys.executable))
        self._python.chmod(0o755)
        self.environment: dict[str, str] = {"PYTHON": str(self._python)}

    def move(self, name: str) -> None:
        self.directory = self.directory.rename(self.directory.with_name(name))

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            ["make", "run", *words],
            cwd=self.directory,
            env=_without_ours(os.environ) | self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **environment: str) -> str:
        """What it said; it must have started the program."""
        said, code = self.tried(*words, **environment)
        assert code == 0, said
        assert "started" in said
        return said

    def tried(self, *words: str, **environment: str) -> tuple[str, int]:
        with self.start(*words, **environment) as process:
            said, _ = process.communicate(timeout=110)
        return said, process.returncode

    def done(self) -> list[str]:
        """What Python was asked for since the last look: venv, pip."""
        words = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return words


def _without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """As in a terminal, though `make test` started these tests."""
    return {
        name: value
        for name, value in environment.items()
        if name not in ("FLUX_VENV", "STATE", "VENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHONPATH")
    }


@pytest.fixture
def clone(top: Path, tmp_path: Path) -> Clone:
    need("make")
    return Clone(top, tmp_path / "a clone")


def test_it_is_set_up_once(clone: Clone) -> None:
    assert "installing the locked Python packages" in clone.run()
    assert clone.done() == ["venv", "pip"]
    assert "flux:" not in clone.run()
    assert clone.done() == []
    (clone.directory / "requirements" / "run.txt").write_text("# changed\n")
    clone.run()
    assert clone.done() == ["pip"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", ["ON_VENV", "ON_PIP"])
def test_what_was_interrupted_is_made_again(clone: Clone, step: str, number: signal.Signals) -> None:
    reached = clone.directory / "reached"
    with clone.start(**{step: f"touch '{reached}'; exec sleep 100"}) as process:
        wait_until(reached.exists, f"{step} to be under way")
        os.killpg(process.pid, number)
        process.communicate(timeout=30)
    assert process.returncode != 0
    clone.done()
    assert "half made" in clone.run()
    assert clone.done() == ["venv", "pip"]


def test_what_was_interrupted_while_it_changed_is_made_again(clone: Clone) -> None:
    """pip takes the old version of a package away before the new one is there."""
    clone.run()
    (clone.directory / "requirements" / "run.txt").write_text("# changed\n")
    assert clone.tried(ON_PIP="kill -9 $$")[1] != 0
    clone.done()
    clone.run()
    assert clone.done() == ["venv", "pip"]


def test_a_moved_clone_is_set_up_where_it_is(clone: Clone) -> None:
    clone.run()
    clone.done()
    clone.move("elsewhere")
    clone.run()
    assert clone.done() == ["venv", "pip"]
    program = clone.directory / ".venv" / "bin" / "flux"
    said = subprocess.run([program, "keys"], capture_output=True, text=True, check=True).stdout
    assert "started ['keys']" in said


def test_another_python_gets_an_environment_of_its_own(clone: Clone) -> None:
    clone.run()
    clone.done()
    state = clone.directory / ".venv" / ".flux-venv"
    state.write_text(state.read_text().replace(str(sys.implementation.cache_tag), "cpython-310"))
    clone.run()
    assert clone.done() == ["venv", "pip"]


def test_two_at_once_install_one_after_the_other(clone: Clone) -> None:
    reached, go = clone.directory / "reached", clone.directory / "go"
    with clone.start(ON_PIP=f"touch '{reached}'; until [ -e '{go}' ]; do sleep 0.05; done") as first:
        wait_until(reached.exists, "the first to install")
        with clone.start() as second:
            assert second.stdout is not None
            assert "waiting for it" in second.stdout.readline()
            go.touch()
            assert "started" in second.communicate(timeout=60)[0]
        assert "started" in first.communicate(timeout=60)[0]
    assert clone.done() == ["venv", "pip"]


@pytest.mark.parametrize("state", ["a b", "it's", "$HOME"])
def test_the_state_directory_may_be_called_anything(clone: Clone, state: str) -> None:
    assert f"started {['run', '--state', state]!r}" in clone.run(f"STATE={state.replace('$', '$$')}")
    assert f"started {['run', '--state', state]!r}" in clone.run(STATE=state)


def test_so_may_the_environment(clone: Clone) -> None:
    clone.run("VENV=my venv")
    assert (clone.directory / "my venv" / "bin" / "flux").is_file()
    assert not (clone.directory / ".venv").exists()


def test_somebody_elses_directory_is_not_made_an_environment(clone: Clone) -> None:
    precious = clone.directory / "mine" / "thesis.txt"
    precious.parent.mkdir()
    precious.touch()
    said, code = clone.tried("VENV=mine")
    assert code != 0
    assert "was not made here" in said
    assert precious.exists()


def test_without_a_network_the_last_line_says_so(clone: Clone) -> None:
    complaint = (
        "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution"
    )
    said, code = clone.tried(ON_PIP=f'echo "{complaint}" >&2; exit 1')
    assert code != 0
    assert said.rstrip().splitlines()[-2].startswith("flux: there is no network")  # make's own is behind it
    said, _ = clone.tried(ON_PIP='echo "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES" >&2; exit 1')
    assert "there is no network" not in said
    assert "could not install requirements/run.txt" in said.rstrip().splitlines()[-2]
    clone.run()


def test_the_real_ones_mend_it_too(top: Path, tmp_path: Path) -> None:
    """The real venv and pip, killed at several moments; moved; and with an index that does not answer."""
    need("make")
    wheels = tmp_path / "wheels"
    clone = Clone(top, tmp_path / "a clone", f"tiny==1.0 --hash=sha256:{_tiny(wheels)}\n")
    clone.environment = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    (clone.directory / "flux.py").write_text("import sys, tiny\nprint('started', tiny.__file__)\n")
    for seconds in (0.2, 1, 2.5):
        with clone.start() as process:
            try:
                process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=60)
    assert f"started {clone.directory}" in clone.run()
    clone.move("moved there")
    assert f"started {clone.directory}" in clone.run()
    (clone.directory / "requirements" / "run.txt").write_text(f"absent==1.0 --hash=sha256:{'0' * 64}\n")
    index = f"http://127.0.0.1:{free_port()}/simple"
    said, code = clone.tried(PIP_NO_INDEX="0", PIP_INDEX_URL=index, PIP_RETRIES="1")
    assert code != 0
    assert said.rstrip().splitlines()[-2].startswith("flux: there is no network")


def _tiny(directory: Path) -> str:
    """A wheel of one empty module; its SHA-256."""
    directory.mkdir()
    path = directory / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\ntiny-1.0.dist-info/METADATA,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()
