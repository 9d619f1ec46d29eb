"""A release is made from a finished section of the changelog, for the version the tree has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import fluxlib

CHANGELOG = """# Changelog

## {version}{mark}

- One thing.
- Another.

## 0.0.1

The one before.
"""


def _notes(top: Path, tree: Path, version: str, changelog: str) -> subprocess.CompletedProcess[str]:
    (tree / "scripts").mkdir()
    (tree / "fluxlib").mkdir()
    shutil.copy(top / "scripts/release-notes", tree / "scripts")
    shutil.copy(top / "fluxlib/__init__.py", tree / "fluxlib")
    (tree / "CHANGELOG.md").write_text(changelog)
    return subprocess.run([tree / "scripts/release-notes", version], capture_output=True, text=True)


def test_the_notes_are_the_versions_section(top: Path, tmp_path: Path) -> None:
    version = fluxlib.__version__
    done = _notes(top, tmp_path, version, CHANGELOG.format(version=version, mark=" (2026-12-01)"))
    assert (done.returncode, done.stdout) == (0, "- One thing.\n- Another.\n")


@pytest.mark.parametrize(
    ("version", "mark", "complaint"),
    [
        (fluxlib.__version__, " (unreleased)", "still marked as unreleased"),
        ("9.9.9", "", "the tree is not version 9.9.9"),
    ],
)
def test_what_is_not_ready_is_not_released(top: Path, tmp_path: Path, version: str, mark: str, complaint: str) -> None:
    done = _notes(top, tmp_path, version, CHANGELOG.format(version=version, mark=mark))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stdout == ""


def test_a_version_without_a_section_is_not_released(top: Path, tmp_path: Path) -> None:
    done = _notes(top, tmp_path, fluxlib.__version__, CHANGELOG.format(version="0.0.2", mark=""))
    assert done.returncode == 1
    assert "says nothing about" in done.stderr


def test_every_file_the_image_is_built_from_reaches_the_build(top: Path) -> None:
    """.dockerignore shuts everything out that it does not name, so a COPY of something else would fail."""
    ignored = (top / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copies = [line.split() for line in (top / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    named = {name for words in copies if not words[1].startswith("--from") for name in words[1:-1]}
    assert named
    assert named <= let_in
    assert all((top / name).exists() for name in named)


def test_the_compose_file_is_whole(top: Path) -> None:
    document = yaml.safe_load((top / "compose.yaml").read_text())
    services = document["services"]
    for service in services.values():
        # An image in OCI format carries no health check, so what is waited for needs one here.
        for name, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert services[name].get("healthcheck", {}).get("test"), name
        assert set(service.get("depends_on", {})) <= set(services)
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= set(document["volumes"])
        assert {config["source"] for config in service.get("configs", [])} <= set(document["configs"])
