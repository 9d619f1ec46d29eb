"""The C floor, compiled and measured where the benchmark runs."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("floor.c")
# What every benchmark runs: a compiled program that does nothing but say so.
PROGRAM = b"""
#include <unistd.h>
int main(void) { return write(1, "ok\\n", 3) != 3; }
"""


@contextmanager
def workshop() -> Iterator[Path]:
    """A directory with ``floor`` and ``program`` in it, which every user may enter; gone afterwards.

    The floor gives up root as agents do. Raises CalledProcessError without a C compiler.
    """
    # A private state directory below /tmp would make agents keep their code elsewhere.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="flux-benchmark-", dir="/var/lib" if root else None) as name:
        directory = Path(name)
        directory.chmod(0o755)
        build(directory)
        build_program(directory)
        yield directory


def build(directory: Path) -> Path:
    """The floor's binary in ``directory``."""
    binary = directory / "floor"
    subprocess.run(["cc", "-O2", "-o", binary, SOURCE], check=True)
    return binary


def build_program(directory: Path, name: str = "program", source: bytes = PROGRAM) -> Path:
    """A small compiled program, static so that the loader costs nothing."""
    text = directory / f"{name}.c"
    text.write_bytes(source)
    binary = directory / name
    subprocess.run(["cc", "-O2", "-static", "-o", binary, text], check=True)
    binary.chmod(0o755)
    return binary


def measure(binary: Path, program: Path, count: int = 300) -> dict[str, float]:
    """``wall_ms`` and ``cpu_ms`` of one vfork + exec + wait of ``program``."""
    done = subprocess.run([binary, str(count), program], check=True, capture_output=True, text=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}
