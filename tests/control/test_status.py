"""What /health is told: the store as it is, the loops, and what to worry about."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict

import pytest

from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.status import StatusService
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Deadline, Loop
from fluxlib.model import NodeFigures
from fluxlib.model.agents import AgentStatus
from tests.support.fake_agents import join
from tests.support.memory_store import MemoryControlStore
from tests.support.programs import wait_until


def service(store: MemoryControlStore, *, tls: bool = True) -> StatusService:
    return StatusService(store, Fleet(), tls=tls, stopping=lambda: False, leads=lambda: True)


def test_a_store_that_is_away_is_said_and_asked_once_a_second_only(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryControlStore()
    status = service(store)
    asked = 0

    def ping() -> None:
        nonlocal asked
        asked += 1
        raise StoreUnavailable("redis refused the connection")

    monkeypatch.setattr(store, "ping", ping)
    for _ in range(50):
        with pytest.raises(StoreUnavailable, match="refused"):
            status.check_store()
    assert 1 <= asked <= 2
    monkeypatch.undo()
    monkeypatch.setattr("fluxlib.control.status._STORE_SECONDS", 0.0)

    def is_back() -> bool:
        try:
            status.check_store()
        except StoreUnavailable:
            return False
        return True

    wait_until(is_back, "the store to be seen again")


class Hanging(MemoryControlStore):
    """Answers nothing until it is let go, as a frozen Redis."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = threading.Semaphore(0), threading.Event()

    def ping(self) -> None:
        self.asked.release()
        assert self.go_on.wait(20)
        raise StoreUnavailable("redis did not answer in 5 s")

    def persistence(self) -> tuple[str, ...]:
        raise AssertionError("asked although the store is away")


@pytest.mark.parametrize("first", ["request", "loop"])
def test_a_store_that_hangs_holds_one_thread_only_and_shows(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    store = Hanging()
    status = service(store)

    def ask() -> None:
        if first == "loop":
            status.tick(2_000_000_000.0)
        else:
            with suppress(StoreUnavailable):  # it waits for the very first answer, within its patience
                status.check_store()

    asker = threading.Thread(target=ask, name="test-asker")
    asker.start()
    try:
        assert store.asked.acquire(timeout=5)
        for _ in range(20):
            status.check_store()  # what is known: it was there
            assert status.warnings() == []
        monkeypatch.setattr("fluxlib.control.status._STORE_PATIENCE", -1.0)
        with pytest.raises(StoreUnavailable, match="has not answered"):
            status.check_store()
        assert not store.asked.acquire(blocking=False)
    finally:
        store.go_on.set()
        asker.join(5)
    assert not asker.is_alive()

    def is_told() -> bool:
        try:
            status.check_store()
        except StoreUnavailable as error:
            return "did not answer" in str(error)
        return False

    wait_until(is_told, "the store's own error")


def test_health_does_not_wait_for_a_slow_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis 200 ms away made every second's first GET /health that much slower."""
    store = Hanging()
    store.go_on.set()
    monkeypatch.setattr(Hanging, "ping", MemoryControlStore.ping)
    monkeypatch.setattr(Hanging, "persistence", lambda self: ())
    status = service(store)
    status.check_store()
    monkeypatch.undo()
    store.go_on.clear()
    monkeypatch.setattr("fluxlib.control.status._STORE_SECONDS", 0.0)
    try:
        began = time.monotonic()
        status.check_store()
        assert status.warnings() == []
        took = time.monotonic() - began
        assert store.asked.acquire(timeout=5)
    finally:
        store.go_on.set()
    assert took < 2  # the store answers never; the benchmark `backlog` has the 50 ms


def test_warnings_name_the_store_the_missing_tls_and_what_others_know() -> None:
    status = service(MemoryControlStore(), tls=False)
    status.warn(lambda: ["a stray node"])
    warnings = list(status.warnings())
    assert any("in memory" in warning for warning in warnings)
    assert any("without TLS" in warning for warning in warnings)
    assert "a stray node" in warnings
    assert not any("TLS" in warning for warning in service(MemoryControlStore()).warnings())


def test_a_store_that_may_forget_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("_STORE_SECONDS", "_PERSISTENCE_SECONDS"):
        monkeypatch.setattr(f"fluxlib.control.status.{name}", 0.0)
    status = service(MemoryControlStore())
    for _ in range(3):
        status.check_store()
    assert [record.levelname for record in caplog.records if "in memory" in record.getMessage()] == ["WARNING"]


def test_a_loop_that_crashes_is_seen() -> None:
    crashed = threading.Event()

    def body(now: float) -> None:
        crashed.set()
        raise RuntimeError("broken")

    status = service(MemoryControlStore())
    loop = Loop("shaky", body, 60).start()
    status.watch(loop)
    assert crashed.wait(5)
    loop.stop(Deadline(5))
    (report,) = status.loops()
    assert (report.name, report.crashes, report.last_error) == ("shaky", 1, "RuntimeError: broken")


def test_the_machines_figures_are_sampled() -> None:
    status = service(MemoryControlStore())
    status.tick(2_000_000_000.0)
    figures = status.figures()
    assert figures.collected_at == 2_000_000_000.0
    assert 0 < figures.memory_used_mb < figures.memory_total_mb
    assert 0 <= figures.cpu_percent <= 100


def test_an_agent_that_can_run_no_programs_is_given_none_and_health_warns() -> None:
    fleet = Fleet()
    join(fleet, "w1")
    status = StatusService(MemoryControlStore(), fleet, tls=True, stopping=lambda: False, leads=lambda: True)
    assert fleet.place("hello", lambda candidates: next(candidates, None), slots=0) is not None
    sick = NodeFigures(problem="the spawner cannot be started", warnings=("the disk is nearly full",))
    fleet.report("w1", sick, at=1.0)
    assert fleet.place("hello", lambda candidates: next(candidates, None), slots=0) is None
    agent = fleet.get("w1")
    assert agent is not None
    assert agent.shown_status is AgentStatus.OFFLINE
    assert [warning for warning in status.warnings() if "w1" in warning] == [
        "agent w1: can run no programs: the spawner cannot be started",
        "agent w1: the disk is nearly full",
    ]
    # Shared with the processes that do not lead, as JSON.
    assert NodeFigures.from_fields(json.loads(json.dumps(asdict(sick)))) == sick
    fleet.report("w1", NodeFigures(), at=2.0)
    assert fleet.place("hello", lambda candidates: next(candidates, None), slots=0) is not None
    assert not any("w1" in warning for warning in status.warnings())
