"""What executions that wait in the store cost a restart of Flux, and the synchronous calls beside them."""

from __future__ import annotations

import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil

from benchmarks.results import Section
from benchmarks.system import Options, System, system
from fluxlib.model import ExecutionRecord, ExecutionRequest, Phase
from fluxlib.store import open_control_store
from fluxlib.store.base import ExecutionEntry
from tests.support.programs import wait_until
from tests.support.redis_server import RedisServer

_REQUEST_BYTES = 512 * 1024
# The one slot of the function that they wait for is taken for as long as is measured.
_BUSY = '#!/bin/sh\n[ "$1" = busy ] && exec sleep 3600\nexec cat > /dev/null\n'


def measure(options: Options) -> Iterator[Section]:
    yield _restart(("sqlite",) if options.smoke else ("sqlite", "redis"), 50 if options.smoke else 10_000)
    yield _idle(2_000 if options.smoke else 100_000, 2 if options.smoke else 16, options.seconds)


def _restart(kinds: Sequence[str], count: int) -> Section:
    """The peak of a start that finds them and runs some, against one that finds none."""
    rows = []
    for kind in kinds:
        with ExitStack() as stack:
            settings: dict[str, object] = {"max_waiting": 1_000_000, "max_backlog_mb": 100_000}
            if kind == "redis":
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                settings["redis_addr"] = stack.enter_context(RedisServer(directory)).address
            one = stack.enter_context(system(settings=settings))
            one.deploy("waited", _BUSY, max_concurrency=1)
            one.flux.stop()
            peaks = []
            for number in (0, count):
                _fill(one, str(settings.get("redis_addr", "")), number, _REQUEST_BYTES)
                one.flux.start()
                _run_some(one, min(number, 20))
                peaks.append(_peak_mb(one))
                one.flux.stop()
            rows.append([kind, count, *peaks, peaks[1] - peaks[0]])
    return Section(
        "A restart with a backlog of requests of 512 KB",
        ["store", "waiting", "peak RSS MB with none", "with them", "more"],
        rows,
        figures={str(row[0]): row[1:] for row in rows},
        promised={"backlog restart": max(float(row[4]) for row in rows)},
    )


def _idle(count: int, rounds: int, seconds: float) -> Section:
    """Two systems side by side, asked in turns; in one of them many wait for a slot that does not become free."""
    with system() as empty, system(settings={"max_waiting": 1_000_000}, shutdown_sec=1) as full:
        for one in (empty, full):
            one.deploy_program("counted")
        full.deploy("waited", _BUSY, max_concurrency=1)
        full.flux.stop()
        _fill(full, "", count, 0)
        full.flux.start()
        wait_until(lambda: full.api.execute("counted")[0] == 200, "the agent to take calls")
        speeds: dict[str, list[float]] = {"none": [], "waiting": []}
        cpu: dict[str, list[float]] = {"none": [], "waiting": []}
        for turn in range(rounds):
            pair = [("none", empty), ("waiting", full)]
            for name, one in pair if turn % 2 else reversed(pair):
                before = one.usage()
                outcome = one.run(one.call("counted"), 16, seconds / 6)
                if outcome.failures:
                    raise RuntimeError(f"{outcome.failures} executions failed: {outcome.last_error!r}")
                speeds[name].append(outcome.per_second)
                cpu[name].append(sum(one.usage().cpu_since(before).values()) * 1e3 / outcome.count)
    ratio = sum(speeds["waiting"]) / sum(speeds["none"])
    rows = [
        [name, statistics.mean(each), statistics.median(each), min(each), max(each), statistics.median(cpu[name])]
        for name, each in speeds.items()
    ]
    return Section(
        f"Synchronous calls beside {count} that wait",
        ["backlog", "/s, mean", "/s, median", "least", "most", "CPU ms each, median"],
        rows,
        notes=[f"Ratio of the means over {rounds} turns each: {ratio:.3f}."],
        figures={"count": count, "per_second": speeds, "cpu_ms": cpu, "ratio": ratio},
        promised={"backlog idle": ratio},
    )


def _fill(one: System, redis: str, count: int, size: int) -> None:
    """Through the store's own writes, while Flux stands still. Without a ``size`` the first takes the slot for good."""
    store = open_control_store(redis, Path(one.flux.home) / "state")
    try:
        commits = []
        for number in range(count):
            args = ("busy",) if size == 0 and number == 0 else ()
            name = str(uuid.uuid4())
            request = ExecutionRequest(name, "waited", args, bytes(size), asynchronous=True)
            record = ExecutionRecord(name, "waited", phase=Phase.QUEUED, asynchronous=True, started_at=time.time())
            commits.append(store.create_execution(ExecutionEntry(record, request), durable=False)[1])
            if len(commits) >= 100:
                # Each still holds its request.
                commits.pop().wait()
                commits.clear()
        for commit in commits:
            commit.wait()
    finally:
        store.close()


def _run_some(one: System, count: int) -> None:
    """``count`` more than have run before."""
    least = len(_ended(one)) + count
    wait_until(lambda: len(_ended(one)) >= least, f"{count} to run", 300)


def _ended(one: System) -> list[object]:
    status, page = one.api.call("GET", "/executions?function=waited&status=success&limit=100")
    return list(page["items"]) if status == 200 else []


def _peak_mb(one: System) -> float:
    """The most that Flux has held since it started."""
    pid = one.pids["flux"]
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024
    except OSError:
        return float(psutil.Process(pid).memory_info().rss) / 2**20
