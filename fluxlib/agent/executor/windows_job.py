"""One running program of the Windows executor: its job object, its process, its pipe, and how far its end has come."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from fluxlib.agent.executor.base import Exit, Figures, Job

assert sys.platform == "win32"

from fluxlib.agent.executor.jobobject import JobObject
from fluxlib.agent.executor.windows_process import OutputPipe, Process


class Owner(Protocol):
    def ask_to_stop(self, run: WindowsJob) -> None: ...

    def invoke(
        self,
        run: WindowsJob,
        on_output: Callable[[bytes], object],
        on_started: Callable[[int, float], None] | None,
    ) -> None: ...

    def destroy(self, run: WindowsJob) -> None: ...


class WindowsJob:
    """The Sandbox of the contract: a job object, a directory, one program. Handles are closed under ``lock`` only."""

    def __init__(self, owner: Owner, identifier: int, job: Job, directory: str, *, keep: bool) -> None:
        self._owner = owner
        self.identifier = identifier
        self.job = job
        self.directory = directory
        self.keep = keep  # after its program's end, until it is destroyed
        self.used = Figures()
        self.lock = threading.Lock()
        self.object: JobObject | None = None
        self.process: Process | None = None
        self.pipe: OutputPipe | None = None
        self.pid: int | None = None
        self.on_exit: Callable[[Exit], None] = lambda ended: None
        self.start_error = ""
        self.asked_to_stop = False
        self.leader_ended = False
        self.memory_refused = False
        self.dead_at: float | None = None  # time.monotonic, when nothing of the tree was left
        self.hold_until = 0.0

    def invoke(
        self,
        job: Job,
        on_output: Callable[[bytes], object],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
        on_error_output: Callable[[bytes], object] | None = None,
    ) -> None:
        self.job, self.on_exit = job, on_exit
        self._owner.invoke(self, on_output, on_started)

    def figures(self) -> Figures:
        return self.used

    def destroy(self) -> None:
        self._owner.destroy(self)

    def terminate(self) -> None:
        self._owner.ask_to_stop(self)

    def kill(self) -> None:
        self.asked_to_stop = True
        self.end_tree()

    def end_tree(self) -> None:
        with self.lock, contextlib.suppress(OSError):
            if self.object is not None:
                self.object.terminate()

    def close(self) -> None:
        with self.lock:
            if self.object is not None:
                self.object.close()
            if self.process is not None:
                self.process.close()
            self.object = self.process = None
