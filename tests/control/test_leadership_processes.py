"""Two Flux processes on one Redis with a real agent: one fleet, whichever of them is asked."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Agent, Flux, wait_until
from tests.support.redis_server import RedisServer


class Pair:
    """The first leads: it was started before the second."""

    def __init__(self, first: Flux, second: Flux, agent: Agent) -> None:
        self.first, self.second, self.agent = first, second, agent

    def takes_over(self, flux: Flux, seconds: float) -> float:
        begun = time.monotonic()
        wait_until(lambda: leads(flux), f"{flux.name} to lead", seconds)
        return time.monotonic() - begun


def leads(flux: Flux) -> bool:
    status, health = flux.api.call("GET", "/health")
    return status == 200 and bool(health["leader"])


def runs(flux: Flux) -> tuple[int, Any]:
    status, answer = flux.api.execute("hello", "you")
    return status, answer.get("output", answer)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="two-flux-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with RedisServer(directory) as redis:
            shared = {
                "redis_addr": redis.address,
                "certs_dir": str(directory / "certs"),
                "health_interval_sec": 0.5,
                "shutdown_sec": 5,
            }
            with Flux(directory, "first", **shared) as first, Flux(directory, "second", **shared) as second:
                agent = Agent(directory, first, "worker-1")
                with agent:
                    wait_until(lambda: leads(first), "the first to lead")
                    assert not leads(second)
                    # Asked of the one that follows.
                    second.register(agent)
                    second.api.deploy(
                        {"name": "hello", "handler": "run.sh"}, {"run.sh": '#!/bin/sh\necho "hello $1"\n'}
                    )
                    wait_until(
                        lambda: runs(first) == (200, "hello you\n"), "the leader to know the agent and its function"
                    )
                    assert runs(second) == (200, "hello you\n")
                    yield Pair(first, second, agent)


def test_what_is_asked_of_one_is_seen_by_the_other_and_a_stopped_leader_is_followed(pair: Pair) -> None:
    pair.agent.kill()
    for flux in (pair.first, pair.second):
        wait_until(lambda flux=flux: flux.status_of("worker-1") == "offline", f"{flux.name} to see it offline")
    pair.agent.start()
    for flux in (pair.first, pair.second):
        wait_until(lambda flux=flux: runs(flux)[0] == 200, f"{flux.name} to use it again")
    assert pair.second.api.call("POST", "/agents/worker-1/drain")[0] == 200
    wait_until(lambda: pair.first.status_of("worker-1") == "draining", "the leader to drain it")
    assert pair.second.api.call("POST", "/agents/worker-1/undrain")[0] == 200
    wait_until(lambda: pair.first.status_of("worker-1") == "online", "the leader to give it work again")
    pair.first.stop()
    assert pair.takes_over(pair.second, 10) < 10
    assert runs(pair.second)[0] == 200


@pytest.mark.faults
def test_a_leader_that_is_frozen_is_followed_and_does_nothing_on_waking(pair: Pair) -> None:
    pair.first.signal(signal.SIGSTOP)
    try:
        assert pair.takes_over(pair.second, 30) <= 20
        pair.agent.kill()
        wait_until(lambda: pair.second.status_of("worker-1") == "offline", "the second to judge agents now")
        pair.agent.start()
        wait_until(lambda: runs(pair.second)[0] == 200, "the agent to be used again")
    finally:
        pair.first.signal(signal.SIGCONT)
    wait_until(lambda: runs(pair.first)[0] == 200, "the former leader to serve as a follower")
    assert leads(pair.second)
    assert not leads(pair.first)
    assert pair.second.status_of("worker-1") == "online"


@pytest.mark.faults
def test_a_leader_that_is_killed_is_followed(pair: Pair) -> None:
    pair.first.kill()
    assert pair.takes_over(pair.second, 30) <= 20
    assert runs(pair.second)[0] == 200
