"""A host that vanishes without a word: packets between two network namespaces go nowhere, nothing is killed."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.need import lacking, need, need_root
from tests.support.programs import Agent, Flux, wait_until

# A network of this process alone: two suites may run on one machine.
_NETWORK = f"10.231.{os.getpid() % 256}"
HERE, THERE = f"{_NETWORK}.1", f"{_NETWORK}.2"
_NOBODYS = "02:00:00:00:00:99"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["ip", *words], check=check, capture_output=True)


class Wire:
    """A namespace reached by a pair of virtual cards, whose packets can be made to go nowhere."""

    def __init__(self) -> None:
        unique = f"{os.getpid() % 100000}"
        self.namespace, self._here, self._there = f"flux-{unique}", f"fh{unique}", f"ft{unique}"

    def __enter__(self) -> Wire:
        try:
            _ip("netns", "add", self.namespace)
            _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there, "netns", self.namespace)
            _ip("addr", "add", f"{HERE}/30", "dev", self._here)
            _ip("link", "set", self._here, "up")
            self._inside("addr", "add", f"{THERE}/30", "dev", self._there)
            self._inside("link", "set", self._there, "up")
            self._inside("link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            lacking(f"needs network namespaces: {error.stderr.decode().strip()}")
        return self

    def drop(self) -> None:
        """From now on frames in both directions are addressed to a card nobody has."""
        _ip("neigh", "replace", THERE, "lladdr", _NOBODYS, "dev", self._here, "nud", "permanent")
        self._inside("neigh", "replace", HERE, "lladdr", _NOBODYS, "dev", self._there, "nud", "permanent")

    def mend(self) -> None:
        _ip("neigh", "del", THERE, "dev", self._here)
        self._inside("neigh", "del", HERE, "dev", self._there)

    def _inside(self, *words: str) -> None:
        _ip("-n", self.namespace, *words)

    def __exit__(self, *_: object) -> None:
        _ip("link", "del", self._here, check=False)
        _ip("netns", "del", self.namespace, check=False)


@pytest.fixture
def wire() -> Iterator[Wire]:
    need_root()
    need("ip")
    with Wire() as made:
        yield made


def test_a_dropped_host_is_noticed(tmp_path: Path, wire: Wire) -> None:
    inside = ("ip", "netns", "exec", wire.namespace)
    with (
        Flux(tmp_path) as flux,  # the health interval is the product's own, 10 s
        Agent(tmp_path, flux, "far", host=THERE, prefix=inside) as agent,
    ):
        flux.register(agent)
        flux.api.deploy({"name": "slow", "handler": "run.sh"}, {"run.sh": "#!/bin/sh\nsleep 120\n"})
        answers: list[tuple[float, int, Any]] = []

        def call() -> None:
            status, answer = flux.api.execute("slow", timeout=100)
            answers.append((time.monotonic(), status, answer))

        caller = threading.Thread(target=call)
        caller.start()
        wait_until(lambda: flux.api.call("GET", "/executions?status=running")[1]["items"], "it to run")
        wire.drop()
        dropped = time.monotonic()
        caller.join(60)
        assert answers, "the call still hangs"
        at, status, answer = answers[0]
        assert (status, bool(answer["execution_id"])) == (502, True), answer
        assert at - dropped < 20, f"noticed after {at - dropped:.0f} s"
        wait_until(lambda: flux.status_of("far") == "offline", "it to be offline", 45)
        wire.mend()
        wait_until(lambda: flux.status_of("far") == "online", "it to be back", 60)
        # Its caller is gone: what it ran is ended and accounted for.
        record = flux.api.ended(answer["execution_id"], 30)
        assert record["status"] in ("cancelled", "failed")
        assert record["error"]
