"""The conventions of the tree that no linter checks."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fluxlib


def _tracked(top: Path, *patterns: str) -> list[Path]:
    listed = subprocess.run(  #
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=top,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [top / name for name in listed.stdout.split() if (top / name).is_file()]


def test_generated_stubs_are_current(top: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    command = ["-I", f"fluxlib/rpc/gen={top}/protos", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    command += [f"--grpc_python_out={tmp_path}", "fluxlib/rpc/gen/flux.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *command], check=True, cwd=top)
    for made in (tmp_path / "fluxlib/rpc/gen").iterdir():
        checked_in = top / "fluxlib/rpc/gen" / made.name
        assert checked_in.read_text() == made.read_text(), f"{made.name} is stale: run `make proto`"


def test_one_version_everywhere(top: Path) -> None:
    first = re.search(r"^## (\d+\.\d+\.\d+)", (top / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first.group(1) == fluxlib.__version__
    debian = top / "debian/changelog"
    if debian.exists():
        assert debian.read_text().startswith(f"flux ({fluxlib.__version__})")


def test_nothing_names_a_machine(top: Path) -> None:
    """No path of a developer's machine, no package mirror, in anything that is checked in."""
    forbidden = re.compile(
        r"/work/main|/opt/fluxdev|/root/\.pyenv|deb\.debian\.org|files\.pythonhosted\.org|pypi\.org/simple"
    )
    found = [
        f"{path.relative_to(top)}:{number}"
        for path in _tracked(top)
        if path != Path(__file__)
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not found


@pytest.mark.parametrize("name", ["run", "cloud", "build", "dev"])
def test_locked_requirements_have_hashes(top: Path, name: str) -> None:
    text = (top / "requirements" / f"{name}.txt").read_text()
    pins = re.findall(r"^[A-Za-z0-9_.\[\]-]+==", text, re.MULTILINE)
    assert pins
    assert text.count("--hash=sha256:") >= len(pins)


def test_shell_scripts_parse(top: Path) -> None:
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash")
    for script in [".ci/run", ".ci/debian", "scripts/setup", "windows/build-wine.sh"]:
        subprocess.run([shell, "-n", top / script], check=True)
