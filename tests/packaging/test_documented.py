"""Commands that people copy from the documentation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.need import need_root

# The one file of each page and the lines that install what `flux enroll` made.
PAGES = ("README.md", "docs/packaging.md", "docs/operations.md", "debian/flux.1", "debian/flux-agent.1")
NOBODY = 65534


def _commands(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("sudo ")]


@pytest.mark.parametrize("page", PAGES)
def test_what_was_enrolled_is_installed_by_a_user_who_may_not_look(top: Path, tmp_path: Path, page: str) -> None:
    """`sudo install /root's/* …`: the user's own shell looks for the files, where only root may."""
    need_root()
    (line,) = [line for line in _commands(top / page) if "/etc/flux-agent/" in line and "worker-1/" in line]
    enrolled, etc = tmp_path / "worker-1", tmp_path / "etc"
    enrolled.mkdir(mode=0o700)
    etc.mkdir()
    (enrolled / "agent.yaml").write_text("agent_id: worker-1\n")
    line = line.replace("worker-1", str(enrolled)).replace("/etc/flux-agent", str(etc))
    words = subprocess.run(
        ["sh", "-c", line.replace("sudo ", "printf '%s\\n' ", 1)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    subprocess.run(words, check=True)
    assert (etc / "agent.yaml").exists()
