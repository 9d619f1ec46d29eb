"""Windows programs on this machine: the lab of windows/lab.py, and our programs inside it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from tests.support.need import need
from tests.support.programs import Agent, Flux, Program
from windows.lab import TOP, Lab, windows_path


def the_lab() -> Lab:
    """Built the first time, about half a minute; skips (or fails in CI) where Wine or the compiler is missing."""
    need("wine", "wineserver", "x86_64-w64-mingw32-gcc")
    lab = Lab()
    lab.build()
    return lab


def spawn_under_wine(
    lab: Lab, command: list[str], directory: Path, log: IO[bytes], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Says everything to ``log`` through a pipe: a file's handle is no console and no pipe, and Python fails on it."""
    copier = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    assert copier.stdin is not None
    with copier.stdin as pipe:
        return subprocess.Popen(
            ["wine", *command],
            cwd=directory,
            env=lab.environment(**environment),
            stdin=subprocess.PIPE,
            stdout=pipe,
            stderr=pipe,
        )


def stop_by_stdin(program: Program, seconds: float) -> int:
    """Close its standard input, as ``--until-stdin-closes`` waits for; its exit code."""
    assert program.process is not None
    assert program.process.stdin is not None
    program.process.stdin.close()
    try:
        return program.process.wait(seconds)
    except subprocess.TimeoutExpired:
        program.kill()
        raise AssertionError(f"{program.name} did not stop within {seconds} s") from None


class WineAgent(Agent):
    """A worker on Windows, with certificates from ``flux``."""

    def __init__(self, lab: Lab, directory: Path, flux: Flux, agent_id: str, **settings: Any) -> None:
        super().__init__(directory, flux, agent_id, **{"isolation": "default", **settings})
        self.lab = lab
        config = yaml.safe_load(self.config_file.read_text())
        config["state_dir"] = windows_path(self.home / "state")
        for name, value in config["tls"].items():
            if name != "enabled":
                config["tls"][name] = windows_path(Path(value))
        self.config_file.write_text(yaml.safe_dump(config))

    def spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [str(self.lab.python), str(TOP / "flux.py"), "agent", "--until-stdin-closes"]
        environment = {"AGENT_CONFIG": windows_path(self.config_file)}
        return spawn_under_wine(self.lab, command, self.home, log, environment)

    def stop(self, seconds: float = 30) -> int:
        return stop_by_stdin(self, seconds)
