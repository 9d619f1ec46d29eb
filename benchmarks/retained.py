"""What a hundred thousand remembered executions cost those that run now."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Section
from benchmarks.system import Options, System, system
from fluxlib.model import ExecutionRecord, ExecutionStatus, Phase
from fluxlib.store.base import ExecutionEntry
from fluxlib.store.records_sqlite import SqliteRecordStore
from fluxlib.store.sqlite import SqliteControlStore

_KEEP_SECONDS = 3600.0


def measure(options: Options) -> Iterator[Section]:
    """Two systems side by side, asked in turns; one of them remembers."""
    count = 5_000 if options.smoke else 100_000
    rounds = 2 if options.smoke else 16
    with system() as empty, system() as full:
        for one in (empty, full):
            one.deploy_program("counted")
        _fill(full, count)
        speeds: dict[str, list[float]] = {"none": [], "retained": []}
        cpu: dict[str, list[float]] = {"none": [], "retained": []}
        for turn in range(rounds):
            pair = [("none", empty), ("retained", full)]
            for name, one in pair if turn % 2 else reversed(pair):
                before = one.usage()
                # Short turns: both have their share of the machine's better and worse moments.
                outcome = one.run(one.call("counted"), 16, options.seconds / 6)
                if outcome.failures:
                    raise RuntimeError(f"{outcome.failures} executions failed: {outcome.last_error!r}")
                speeds[name].append(outcome.per_second)
                cpu[name].append(sum(one.usage().cpu_since(before).values()) * 1e3 / outcome.count)
        ratio = sum(speeds["retained"]) / sum(speeds["none"])
        listed = full.run(full.get("/executions?limit=50"), 1, 1.0)
        page = listed.percentile(0.5) * 1e3
    rows = [
        [name, statistics.mean(each), statistics.median(each), min(each), max(each), statistics.median(cpu[name])]
        for name, each in speeds.items()
    ]
    yield Section(
        f"{count} retained executions, in Flux's store and in the agent's",
        ["executions", "/s, mean", "/s, median", "least", "most", "CPU ms each, median"],
        rows,
        notes=[
            f"Ratio of the means over {rounds} turns each: {ratio:.3f}. A page of 50 of them takes {page:.1f} ms (p50)."
        ],
        figures={"count": count, "per_second": speeds, "cpu_ms": cpu, "ratio": ratio, "page_ms": page},
        promised={"retained": ratio},
    )


def _fill(one: System, count: int) -> None:
    """Through the stores' own writes, while their processes stand still."""
    flux, agent = one.flux, one.agents[0]
    agent.stop()
    flux.stop()
    ended = [_record(f"{uuid.uuid4()}", agent.agent_id) for _ in range(count)]
    control = SqliteControlStore(Path(flux.home) / "state" / "flux.db")
    records = SqliteRecordStore(Path(agent.home) / "state" / "agent.db")
    keep_until = time.time() + _KEEP_SECONDS
    for record in ended:
        control.create_execution(ExecutionEntry(_begun(record), None, "former"), durable=False)
        control.end_attempt(record, 1, _KEEP_SECONDS)
        records.end(record, b"ok\n", keep_until)
    control.close()
    records.close()
    flux.start()
    agent.start()
    one.flux.register(agent)


def _record(execution_id: str, agent_id: str) -> ExecutionRecord:
    now = time.time()
    return ExecutionRecord(
        execution_id,
        "counted",
        agent_id,
        status=ExecutionStatus.SUCCESS,
        phase=Phase.ENDED,
        output_bytes=3,
        exit_code=0,
        started_at=now,
        run_started_at=now,
        status_at=now,
    )


def _begun(record: ExecutionRecord) -> ExecutionRecord:
    return ExecutionRecord(
        record.execution_id, "counted", record.agent_id, phase=Phase.STARTING, started_at=record.started_at
    )
