"""The other routes while two hundred callers wait for their functions."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from benchmarks.results import Section
from benchmarks.system import Options, System, system
from tests.support.programs import wait_until

ROUTES = ("/health", "/agents", "/functions", "/functions/sleeper", "/executions?limit=20", "/resources")


def measure(options: Options) -> Iterator[Section]:
    blocked = 50 if options.smoke else 200
    seconds = options.seconds / 2
    with system() as one:
        one.deploy("sleeper", f"#!/bin/sh\nsleep {seconds * len(ROUTES) + 10:.0f}\n")
        callers = threading.Thread(target=lambda: one.run(one.call("sleeper"), blocked, 600, at_most=blocked))
        callers.start()
        wait_until(lambda: _running(one) >= blocked, "every call to run", 60)
        rows: list[list[object]] = []
        latencies: list[float] = []
        figures = {}
        for route in ROUTES:
            outcome = one.run(one.get(route), 1, seconds)
            if outcome.failures:
                raise RuntimeError(f"GET {route}: {outcome.last_error!r}")
            latencies += outcome.latencies
            p50, p99 = outcome.percentile(0.5) * 1e3, outcome.percentile(0.99) * 1e3
            figures[route] = {"p50_ms": p50, "p99_ms": p99, "per_second": outcome.per_second}
            rows.append([f"GET {route}", outcome.count, p50, p99, outcome.percentile(1.0) * 1e3])
        rss = one.usage().rss["flux"] / 1e6
        callers.join()
    latencies.sort()
    all_p99 = latencies[int(len(latencies) * 0.99)] * 1e3
    yield Section(
        f"Other routes, one client, while {blocked} synchronous calls wait",
        ["route", "answers", "p50 ms", "p99 ms", "longest ms"],
        rows,
        notes=[f"p99 over all of them: {all_p99:.1f} ms. Flux holds {rss:.0f} MB meanwhile."],
        figures={"routes": figures, "p99_ms": all_p99, "rss_mb": rss},
        promised={"management": max(one["p99_ms"] for one in figures.values())},
    )


def _running(one: System) -> int:
    return sum(agent["active_count"] for agent in one.api.call("GET", "/agents")[1])
