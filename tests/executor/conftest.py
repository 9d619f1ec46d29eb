"""Real cgroups, also where the kernel mounts them without controllers."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.need import lacking, need_root


def need_own_root() -> None:
    """For a mount namespace with another root, which a chroot into a plain directory does not allow."""
    with open("/proc/self/mountinfo") as file:
        if not any(line.split()[4] == "/" for line in file):
            pytest.skip("needs a root that is a mount, and that of this chroot is a plain directory")


@pytest.fixture(scope="module")
def cgroups() -> Iterator[Path]:
    """A directory of cgroup v2 in which groups can be made."""
    need_root()
    place = Path(tempfile.mkdtemp(prefix="flux-cgroup-"))
    done = subprocess.run(["mount", "-t", "cgroup2", "none", place], capture_output=True, text=True)
    if done.returncode:
        place.rmdir()
        lacking(f"needs cgroup v2: {done.stderr.strip()}")
    group = place / f"flux-test-{os.getpid()}"
    group.mkdir()
    yield group
    group.rmdir()
    subprocess.run(["umount", place], check=True)
    place.rmdir()
