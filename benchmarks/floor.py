"""The C floor, compiled and measured where the benchmark runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("floor.c")
# What every benchmark runs: a compiled program that does nothing but say so.
PROGRAM = b"""
#include <unistd.h>
int main(void) { return write(1, "ok\\n", 3) != 3; }
"""


def build(directory: Path) -> Path:
    """The floor's binary in ``directory``. Raises CalledProcessError without a C compiler."""
    binary = directory / "floor"
    subprocess.run(["cc", "-O2", "-o", binary, SOURCE], check=True)
    return binary


def build_program(directory: Path) -> Path:
    """The small compiled program, static so that the loader costs nothing."""
    source = directory / "program.c"
    source.write_bytes(PROGRAM)
    binary = directory / "program"
    subprocess.run(["cc", "-O2", "-static", "-o", binary, source], check=True)
    binary.chmod(0o755)
    return binary


def measure(binary: Path, program: Path, count: int = 300) -> dict[str, float]:
    """``wall_ms`` and ``cpu_ms`` of one vfork + exec + wait of ``program``."""
    done = subprocess.run([binary, str(count), program], check=True, capture_output=True, text=True)
    return {name: float(value) for name, value in json.loads(done.stdout).items()}
