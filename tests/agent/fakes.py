"""An executor whose programs end when the test says so, and an agent's rooms built around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxlib.agent.executions import Executions, Settings
from fluxlib.agent.executor.base import Exit, Isolation, Job, Limits
from fluxlib.agent.packages import Packages
from fluxlib.agent.records import Records
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ExecutionRecord, ExecutionRequest, FunctionSpec
from fluxlib.store.base import RecordStore
from tests.support.memory_records import MemoryRecordStore
from tests.support.programs import make_zip

CODE = make_zip({"main.sh": "#!/bin/sh\necho hello\n"})
OK = Exit(exit_code=0)


class FakeJob:
    def __init__(self, job: Job, on_output: Callable[[bytes], None], on_exit: Callable[[Exit], None]) -> None:
        self.job, self.write, self._on_exit = job, on_output, on_exit
        self.pid = 4711
        self.told: list[str] = []
        self.dies_of: str | None = None  # "terminate" or "kill": what ends it
        self._lock = threading.Lock()
        self._over = False

    def terminate(self) -> None:
        self._tell("terminate")

    def kill(self) -> None:
        self._tell("kill")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if self.dies_of == what:
            self.end(Exit(signal=15 if what == "terminate" else 9))

    def end(self, ended: Exit = OK) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
        self._on_exit(ended)


class FakeExecutor:
    """Executor. ``during_start`` is called with each new job before ``start`` returns; it may raise."""

    def __init__(self) -> None:
        self.isolation = Isolation("off", frozenset())
        self.problem = ""
        self.jobs: list[FakeJob] = []
        self.during_check: Callable[[FunctionSpec], None] = lambda spec: None
        self.during_start: Callable[[FakeJob], None] = lambda job: None
        self.warnings: tuple[str, ...] = ()

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        self.during_check(spec)
        return self.warnings

    def check_args(self, handler: str, args: tuple[str, ...]) -> None:
        return

    def start(
        self,
        job: Job,
        on_output: Callable[[bytes], None],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
    ) -> FakeJob:
        fake = FakeJob(job, on_output, on_exit)
        self.during_start(fake)
        self.jobs.append(fake)
        if on_started is not None and not fake._over:
            on_started(fake.pid, 0.0)
        return fake

    def recover_previous_run(self, execution_ids: Collection[str]) -> int:
        return 0

    def stop(self, deadline: float) -> None:
        return


class Rooms:
    """The rooms below the server."""

    def __init__(self, directory: Path, store: RecordStore, executor: FakeExecutor, max_tasks: int) -> None:
        self.executor, self.store = executor, store
        self.timers = Timers("test-timers").start()
        self.packages = Packages(directory / "functions")
        self.records = Records(store, directory / "outputs", 3600, 1024 * 1024)
        settings = Settings("worker-1", max_tasks, 0.05, Limits(), {"PATH": "/usr/bin:/bin"})
        self.runs = Executions(settings, self.packages, self.records, executor, self.timers)

    def deploy(self, name: str = "hello", **fields: object) -> FunctionSpec:
        spec = FunctionSpec(name=name, handler="main.sh", **fields)  # type: ignore[arg-type]
        self.packages.deploy(spec, spec.digest(), "", CODE)
        return spec

    def close(self) -> None:
        for job in self.executor.jobs:
            job.end()
        self.packages.stop(Deadline(5))
        self.timers.stop(Deadline(5))
        self.records.close()


@contextmanager
def rooms(directory: Path, store: RecordStore | None = None, max_tasks: int = 16) -> Iterator[Rooms]:
    made = Rooms(directory, store or MemoryRecordStore(), FakeExecutor(), max_tasks)
    try:
        yield made
    finally:
        made.close()


class Ends:
    """An ``on_end`` that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.records: list[ExecutionRecord] = []
        self._some = threading.Event()

    def __call__(self, record: ExecutionRecord) -> None:
        self.records.append(record)
        self._some.set()

    def wait(self, seconds: float = 10) -> ExecutionRecord:
        assert self._some.wait(seconds), "it never ended"
        return self.records[0]


def asked(execution_id: str = "one", name: str = "hello", **fields: object) -> ExecutionRequest:
    return ExecutionRequest(execution_id, name, **fields)  # type: ignore[arg-type]
