"""The whole path: HTTP to exit status, over mTLS, at several numbers of connections; and asynchronous submissions."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict

from benchmarks import http
from benchmarks.results import Section
from benchmarks.system import Options, System, system

SHELL = "#!/bin/sh\necho ok\n"
PYTHON = '#!/usr/bin/python3\nprint("ok")\n'


def measure(options: Options) -> Iterator[Section]:
    """Sections of everything that runs on one agent without isolation."""
    with system() as one:
        yield _sync(one, options)
        yield _programs(one, options)
        yield _asynchronous(one, options)
    yield _profiles(options)


def _sync(one: System, options: Options) -> Section:
    """Rounds of all numbers of connections, interleaved, so that a busy moment of the machine hits them all."""
    http.prepare(one.url, one.flux.api.key or "", one.program)
    numbers = (1, 16, 64, 200)
    rounds = 1 if options.smoke else 5
    found: dict[int, list[http.Row]] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number in numbers:
            floor = one.floor_cpu_ms()
            row = http.measure(one.url, one.flux.api.key or "", number, options.seconds / 2, one.pids, floor)
            found[number].append(row)
    # The least disturbed round of each.
    best = {number: min(rows, key=lambda row: row.times_floor) for number, rows in found.items()}
    speed = {number: max(row.per_second for row in rows) for number, rows in found.items()}
    rows = [row for number in numbers for row in found[number]]
    return Section(
        "Synchronous executions of a small compiled program",
        *_table(rows),
        notes=["A failed row would be an answer other than 2xx. RSS and CPU count children, ended ones included."],
        figures={"rows": [asdict(row) | {"times_floor": row.times_floor} for row in rows]},
        promised={
            "path 16": best[16].times_floor,
            "64 to 16": speed[64] / speed[16],
            "200 to 16": speed[200] / speed[16],
        },
    )


def _table(rows: list[http.Row]) -> tuple[list[str], list[list[object]]]:
    names = list(rows[0].cpu_ms)
    heads = ["connections", "executions", "failed", "/s", "p50 ms", "p99 ms", "floor CPU ms"]
    heads += [f"CPU ms {name}" for name in names] + ["CPU x floor"] + [f"RSS MB {name}" for name in names]
    return heads, [
        [row.connections, row.executions, row.failures, row.per_second, row.p50_ms, row.p99_ms, row.floor_cpu_ms]
        + [row.cpu_ms[name] for name in names]
        + [row.times_floor]
        + [row.rss_mb[name] for name in names]
        for row in rows
    ]


def _programs(one: System, options: Options) -> Section:
    rows: list[list[object]] = []
    figures = {}
    for name, content in (("compiled", one.program.read_bytes()), ("shell", SHELL), ("python", PYTHON)):
        one.deploy(name, content)
        request = one.call(name)
        one.run(request, 4, 0.5)
        before = one.usage()
        outcome = one.run(request, 16, options.seconds)
        cpu = sum(one.usage().cpu_since(before).values()) * 1000 / max(1, outcome.count)
        rows.append([name, outcome.per_second, outcome.percentile(0.5) * 1e3, outcome.percentile(0.99) * 1e3, cpu])
        figures[name] = {
            "per_second": outcome.per_second,
            "failures": outcome.failures,
            "p50_ms": outcome.percentile(0.5) * 1e3,
            "p99_ms": outcome.percentile(0.99) * 1e3,
            "cpu_ms": cpu,
        }
    heads = ["function", "/s", "p50 ms", "p99 ms", "CPU ms each"]
    return Section("Kinds of functions at 16 connections", heads, rows, figures=figures)


def _asynchronous(one: System, options: Options) -> Section:
    one.deploy_program("submitted", max_concurrency=64)
    request = one.call("submitted", suffix="/async")
    before = one.usage()
    outcome = one.run(request, 16, options.seconds)
    accepted = outcome.count - outcome.failures
    began = time.monotonic()
    _until_none_runs(one)
    drained = time.monotonic() - began
    used = one.usage().cpu_since(before)
    cpu = {name: seconds * 1000 / max(1, accepted) for name, seconds in used.items()}
    heads = ["submitted", "refused", "202/s", "p50 ms", "p99 ms", "s until all had ended"]
    row: list[object] = [accepted, outcome.failures, outcome.per_second]
    row += [outcome.percentile(0.5) * 1e3, outcome.percentile(0.99) * 1e3, drained]
    return Section(
        "Asynchronous submissions at 16 connections, durable before they are accepted",
        [*heads, *(f"CPU ms {name}" for name in cpu)],
        [[*row, *cpu.values()]],
        figures={"per_second": outcome.per_second, "failures": outcome.failures, "drain_s": drained, "cpu_ms": cpu},
    )


def _profiles(options: Options) -> Section:
    """The same under each isolation profile that this machine can have."""
    rows: list[list[object]] = []
    notes: list[str] = []
    figures: dict[str, object] = {}
    for profile in ("off", "minimal", "default", "strict"):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), system(isolation=profile) as one:
                one.deploy_program("isolated")
                one.run(one.call("isolated"), 8, 0.5)
                before = one.usage()
                outcome = one.run(one.call("isolated"), 16, options.seconds)
                used = one.usage().cpu_since(before)
                floor = one.floor_cpu_ms()
        except AssertionError as error:
            if "ended with" not in str(error):
                raise
            # An agent that cannot have its profile does not start; its last line says why.
            reason = said.getvalue().partition("---- ")[0].strip().splitlines()[-1]
            notes.append(f"{profile}: {reason}")
            figures[profile] = {"not here": reason}
            continue
        cpu = {name: seconds * 1e3 / max(1, outcome.count) for name, seconds in used.items()}
        times = sum(cpu.values()) / floor
        p50, p99 = outcome.percentile(0.5) * 1e3, outcome.percentile(0.99) * 1e3
        rows.append([profile, outcome.per_second, p50, p99, cpu["flux"], cpu["agent"], times])
        figures[profile] = {"per_second": outcome.per_second, "cpu_ms": cpu, "times_floor": times}
    heads = ["isolation", "/s", "p50 ms", "p99 ms", "CPU ms flux", "CPU ms agent", "CPU x floor"]
    return Section("Isolation profiles at 16 connections", heads, rows, notes, figures)


def _until_none_runs(one: System) -> None:
    pause = 0.1
    deadline = time.monotonic() + 300
    while True:
        _, body, _ = one.api.request("GET", "/executions?status=running&limit=1")
        if not json.loads(body)["items"]:
            return
        if time.monotonic() > deadline:
            raise RuntimeError("executions submitted for the benchmark do not end")
        time.sleep(pause)
