"""Programs run by one executor, and what is seen of them."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fluxlib.agent.executor.base import Exit, Job, Limits
from fluxlib.agent.executor.windows import WindowsExecutor, WindowsJob
from fluxlib.config.agent import AgentConfig
from fluxlib.model import WorkingDirectory

_numbers = itertools.count(1)


@dataclass
class Ran:
    """One program, running or ended. ``said`` may be waited on."""

    output: bytes = b""
    ends: list[Exit] = field(default_factory=list)
    pid: int = 0
    job: WindowsJob | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def on_output(self, data: bytes) -> None:
        with self._changed:
            assert not self.ends, "output after the end"
            self.output += data
            self._changed.notify_all()

    def on_exit(self, ended: Exit) -> None:
        with self._changed:
            self.ends.append(ended)
            self._changed.notify_all()

    def on_started(self, pid: int, ago: float) -> None:
        assert not self.ends, "started after the end"
        self.pid = pid

    def said(self, what: bytes, seconds: float = 30) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: what in self.output, seconds), (self.output, self.ends)

    def end(self, seconds: float = 30) -> Exit:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends, seconds), self.output
            assert len(self.ends) == 1
            return self.ends[0]

    @property
    def text(self) -> str:
        self.end()
        return self.output.decode("utf-8").replace("\r\n", "\n")


class Programs:
    """Runs things with one executor."""

    def __init__(self, state: Path, code: Path, **settings: object) -> None:
        self.state, self.code = state, code
        config = AgentConfig(agent_id="inside", state_dir=state, **settings)  # type: ignore[arg-type]
        self.executor = WindowsExecutor(config, state)

    def run(
        self,
        *argv: str,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        cwd: WorkingDirectory = WorkingDirectory.WORK,
    ) -> Ran:
        ran = Ran()
        job = Job(
            f"run-{next(_numbers)}-{time.time_ns():x}",
            argv,
            env or {},
            self.code,
            stdin=stdin,
            limits=limits or Limits(),
            working_directory=cwd,
        )
        ran.job = self.executor.start(job, ran.on_output, ran.on_exit, ran.on_started)
        return ran

    def python(self, code: str, *args: str, **more: object) -> Ran:
        return self.run(sys.executable, "-c", code, *args, **more)  # type: ignore[arg-type]

    def batch(self, name: str, lines: str) -> str:
        path = self.code / name
        path.write_bytes(lines.replace("\n", "\r\n").encode())
        return str(path)
