"""The executions part of a control plane over invented agents: no HTTP, no wire."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.executions.service import ExecutionService
from fluxlib.control.services import Call
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import Behavior, ExecutionRecord
from fluxlib.store.base import ControlStore
from tests.support.fake_agents import FakeConnection, FakeFunctions, join

WAIT = {"max_concurrency_behavior": Behavior.WAIT, "resource_pressure_behavior": Behavior.WAIT}


class Client:
    """Whoever waits: goes away when told to."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def on_gone(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def leave(self) -> None:
        for callback in self._callbacks:
            callback()


class Plane:
    """A control plane without HTTP and without a wire."""

    def __init__(self, store: ControlStore, session: str = "s1", **settings: object) -> None:
        self.store = store
        self.fleet = Fleet()
        self.functions = FakeFunctions()
        self.timers = Timers("test-timers").start()
        self.service = ExecutionService(
            store,
            self.fleet,
            self.functions,
            self.timers,
            session,
            kill_grace=0.1,
            **settings,  # type: ignore[arg-type]
        )
        self.pool = ThreadPoolExecutor(8)

    def agent(self, agent_id: str = "a1", script: object = None, **more: object) -> FakeConnection:
        connection = FakeConnection(agent_id, script, bool(more.pop("original", False)))  # type: ignore[arg-type]
        connection.on_ended = self.service.events(agent_id).ended
        join(self.fleet, agent_id, connection, **more)  # type: ignore[arg-type]
        return connection

    def execute(self, name: str = "f", *args: str, client: Client | None = None, **call: object) -> ExecutionRecord:
        return self.service.execute(Call(name, args, **call), client or Client())  # type: ignore[arg-type]

    def soon(self, name: str = "f", *args: str, client: Client | None = None) -> Future[ExecutionRecord]:
        return self.pool.submit(self.execute, name, *args, client=client)

    def submit(self, name: str = "f", *args: str, **call: object) -> str:
        return self.service.submit(Call(name, args, **call))  # type: ignore[arg-type]

    def record(self, execution_id: str) -> ExecutionRecord:
        """As the store has it, once what is on its way holds."""
        self.service.tick(0.0)
        entry = self.store.execution(execution_id)
        assert entry is not None
        return entry.record

    def queued(self, count: int, name: str = "f") -> None:
        until(lambda: self.service.waiting().get(name, 0) == count)

    def close(self) -> None:
        self.service.stop(Deadline(1))
        self.timers.stop(Deadline(5))
        self.pool.shutdown()


def until(condition: Callable[[], object]) -> None:
    tick = threading.Event()
    for _ in range(2000):
        if condition():
            return
        tick.wait(0.005)
    raise AssertionError("it did not come")
