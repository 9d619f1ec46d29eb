"""A version of this tree that knows a field and an enum value more everywhere, to run beside this one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]

# File -> what a developer of the next version would write: (text, with this after it).
_ADDITIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "fluxlib/model/executions.py": (
        ('    CANCELLED = "cancelled"\n', '    SKIPPED = "skipped"\n'),
        ('    ENDED = "ended"\n', '    THAWING = "thawing"\n'),
        ("    INTERNAL = 15\n", "    TOO_HOT = 116\n"),
        ("    attempt: int = 1", "  # which start\n    joules: float = 0.5"),
        ("            f',\"attempt\":{self.attempt}'\n", "            f',\"joules\":{self.joules}'\n"),
        ('            get("attempt", 1),\n', '            get("joules", 0.5),\n'),
    ),
    "fluxlib/model/agents.py": (
        ('    BUSY = "busy"', '  # every slot taken\n    ASLEEP = "asleep"'),
        ("    offline_since: float = 0.0\n", '    zone: str = "nowhere"\n'),
        ("    disk_free_mb: int = 0\n", "    gpu_percent: float = 0.0\n"),
    ),
    "fluxlib/model/functions.py": (
        ('    NONE = "none"\n', '    EGRESS = "egress"\n'),
        ("    tmp_size_mb: int = 0\n", "    gpus: int = 0\n"),
        ('            "network": self.network.value,\n', '            "gpus": self.gpus,\n'),
        ('            tmp_size_mb=limits.get("tmp_size", 0),\n', '            gpus=get("gpus", 0),\n'),
    ),
    "fluxlib/rpc/codec.py": (
        ("    message.attempt = record.attempt\n", "    message.joules = record.joules\n"),
        ("        message.attempt or 1,\n", "        message.joules or 0.5,\n"),
        ("        disk_free_mb=figures.disk_free_mb,\n", "        gpu_percent=figures.gpu_percent,\n"),
    ),
    "protos/flux.proto": (
        ("  ERROR_KIND_INTERNAL = 15;\n", "  ERROR_KIND_TOO_HOT = 116;\n"),
        ("  int32 attempt = 21;", "  // newer\n  double joules = 122;"),
        ("  int64 disk_free_mb = 24;", "\n  double gpu_percent = 127;"),
    ),
}


class NewerVersion:
    """Made in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_ROOT / "fluxlib", directory / "fluxlib", ignore=ignore)
        shutil.copytree(_ROOT / "protos", directory / "protos")
        for name, additions in _ADDITIONS.items():
            path = directory / name
            text = path.read_text("utf-8")
            for known, added in additions:
                assert known in text, (name, known)
                text = text.replace(known, known + added)
            path.write_text(text, "utf-8")
        generated = "fluxlib/rpc/gen"
        command = ["-m", "grpc_tools.protoc", f"-I{generated}=protos", "--python_out=.", f"{generated}/flux.proto"]
        subprocess.run([sys.executable, *command], cwd=directory, check=True)

    def run(self, script: str, *arguments: str) -> Any:
        """What the script prints as JSON, run by the newer version."""
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=self._directory,
            env={**os.environ, "PYTHONPATH": str(self._directory), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)
