"""`wait`: from the moment a slot is free until the next execution runs in it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

from benchmarks.load import Outcome
from benchmarks.results import Section
from benchmarks.system import Options, System, system
from fluxlib.model.times import epoch

# Long enough that the end of one and the start of the next are not the same moment for another reason.
_PROGRAM = "#!/bin/sh\nsleep 0.02\n"


def measure(options: Options) -> Iterator[Section]:
    """One slot, many who want it: both times are the agent's own, in milliseconds."""
    count = 20 if options.smoke else 150
    with system() as one:
        one.deploy("single", _PROGRAM, max_concurrency=1)
        rows = []
        figures = {}
        for kind, suffix in (("synchronous", ""), ("asynchronous", "/async")):
            outcome = one.run(one.call("single", suffix=suffix), 8, 600, at_most=count)
            if outcome.failures:
                raise RuntimeError(f"{outcome.failures} were refused: {outcome.last_error!r}")
            gaps = _gaps(one, outcome)
            figures[kind] = {"p50_ms": gaps[len(gaps) // 2], "p99_ms": gaps[int(len(gaps) * 0.99)], "count": len(gaps)}
            rows.append([kind, len(gaps), *list(figures[kind].values())[:2], gaps[-1]])
            # What was submitted must be over before the slot is somebody else's.
        worst = max(one["p50_ms"] for one in figures.values())
    yield Section(
        "`wait`: slot free to start",
        ["callers", "hand-overs", "p50 ms", "p99 ms", "longest ms"],
        rows,
        figures=figures,
        promised={"wait": worst},
    )


def _gaps(one: System, outcome: Outcome) -> list[float]:
    """Milliseconds between one's end and the next one's start, in rising order."""
    spans = []
    cursor = ""
    while len(spans) < outcome.count:
        _, body, _ = one.api.request("GET", f"/executions?function=single&limit=100{cursor}")
        page = json.loads(body)
        for item in page["items"][: outcome.count - len(spans)]:
            record = one.api.ended(item["execution_id"], 60)
            spans.append((epoch(record["run_started_at"]), epoch(record["status_at"])))
        if not page["next"]:
            break
        cursor = f"&cursor={page['next']}"
    spans.sort()
    return sorted(max(0.0, (after[0] - before[1]) * 1e3) for before, after in itertools.pairwise(spans))
