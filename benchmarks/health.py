"""`GET /health` while the store takes 200 ms for everything: a Redis behind a delay, a disk whose syncs are slow."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks import load
from benchmarks.results import Section
from benchmarks.system import Options, System, system
from tests.support.proxy import Proxy
from tests.support.redis_server import RedisServer

_SLOW = 0.2
_SOURCE = Path(__file__).with_name("slow_disk.c")


def measure(options: Options) -> Iterator[Section]:
    """One caller that asks every 50 ms, beside four that submit: what the longest answer took."""
    seconds = 3.0 if options.smoke else 20.0
    rows = [[kind, *_of(kind, seconds)] for kind in ("redis", "sqlite")]
    yield Section(
        "`GET /health` while the store takes 200 ms",
        ["store", "asked", "p50 ms", "p99 ms", "longest ms", "others than 200"],
        rows,
        figures={str(row[0]): row[1:] for row in rows},
        promised={"health": max(float(row[4]) for row in rows)},
    )


def _of(kind: str, seconds: float) -> list[float]:
    with ExitStack() as stack:
        if kind == "redis":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(RedisServer(directory, "--appendonly", "yes", "--appendfsync", "always"))
            proxy = stack.enter_context(Proxy(server.port))
            one = stack.enter_context(system(settings={"redis_addr": proxy.address}))
            one.deploy_program("counted")
            proxy.delay = _SLOW / 2
        else:
            one = stack.enter_context(system())
            one.deploy_program("counted")
            _slow_disk(one)
        return _ask(one, seconds)


def _slow_disk(one: System) -> None:
    library, says = one.directory / "slow_disk.so", one.directory / "slow_disk"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, _SOURCE], check=True)
    one.flux.stop()
    one.flux.environment = {**one.flux.environment, "LD_PRELOAD": str(library), "SLOW_DISK_FILE": str(says)}
    one.flux.start()
    says.write_text(f"{_SLOW * 1000:.0f}\n")


def _ask(one: System, seconds: float) -> list[float]:
    ask, submit = one.get("/health"), one.call("counted", suffix="/async")
    taken, other = [], 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        asked = one.run(ask, 1, 0.5, at_most=5)
        taken += asked.latencies
        other += sum(count for status, count in asked.statuses.items() if status != 200)
        # The store has something to do, and its writes are waited for.
        load.run(one.url, submit, 4, 0.25, at_most=4)
    taken.sort()
    return [len(taken), *(taken[int(share * (len(taken) - 1))] * 1e3 for share in (0.5, 0.99, 1.0)), other]
