"""An agent that cannot run programs says so, is given none, and heals by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fluxlib.agent.health import GRACE, Health
from fluxlib.agent.records import Records
from fluxlib.config import environment
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.store import open_record_store
from tests.agent.fakes import FakeExecutor
from tests.agent.running import Running, running


class Times:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    def __init__(self, directory: Path) -> None:
        self.clock, self.executor = Times(), FakeExecutor()
        self.database = directory / "agent.db"
        self.records = Records(
            open_record_store("sqlite", "", directory, "worker-1"), directory / "outputs", 3600, 1024 * 1024
        )
        self.looks = 0
        self.health = Health(self.executor, self.records, directory, self._look, self.clock)

    def _look(self) -> None:
        self.looks += 1


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    made = Watched(tmp_path)
    yield made
    made.records.close()


def test_a_spawner_that_is_away_for_a_moment_is_no_problem_and_one_that_stays_away_is(watched: Watched) -> None:
    assert watched.health.problem == ""
    watched.executor.problem = "the spawner failed to start"
    assert watched.health.problem == ""
    watched.clock.now += GRACE
    assert watched.health.problem == "the spawner failed to start"
    watched.executor.problem = ""
    assert watched.health.problem == ""


def test_a_store_that_takes_no_writes_is_a_problem_until_it_does(watched: Watched) -> None:
    away = watched.database.with_name("away.db")
    watched.database.rename(away)
    watched.clock.now += 60
    watched.health.tick(0)
    assert "removed or replaced" in watched.health.problem
    away.rename(watched.database)
    watched.health.tick(0)
    assert watched.health.problem == ""


def test_a_disk_that_is_nearly_full_is_a_warning(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.health.tick(0)
    usage = SimpleNamespace(total=100 << 30, free=100 << 20)
    monkeypatch.setattr("fluxlib.agent.health.psutil.disk_usage", lambda path: usage)
    watched.health.tick(0)
    (warning,) = watched.health.warnings
    assert "nearly full: 100 MB are free" in warning


def test_systemd_is_told_that_it_lives_and_what_is_wrong(
    watched: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        environment.report_ready()
        try:
            assert systemd.recv(1000) == b"READY=1"
            # Programs that the agent starts must not speak in its name.
            assert "NOTIFY_SOCKET" not in os.environ
            watched.executor.problem = "no spawner"
            watched.health.tick(0)
            watched.clock.now += GRACE
            systemd.recv(1000)
            watched.health.tick(0)
            assert systemd.recv(1000) == b"WATCHDOG=1\nSTATUS=takes no work: no spawner"
        finally:
            environment._told_later.clear()
    assert watched.looks == 2


def test_an_agent_tells_flux_and_health_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(agent: Running) -> tuple[bool, Any]:
        healthy = agent.stub.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy
        return healthy, agent.stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=5)

    with running(tmp_path) as agent:
        healthy, report = asked(agent)
        assert (healthy, report.problem) == (True, "")
        with monkeypatch.context() as patch:
            patch.setattr("fluxlib.agent.health.GRACE", 0.0)
            patch.setattr("fluxlib.agent.executor.unix.UnixExecutor.problem", property(lambda self: "no spawner"))
            healthy, report = asked(agent)
            assert (healthy, report.problem) == (False, "no spawner")
        assert asked(agent)[0]
