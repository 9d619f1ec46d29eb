"""Synchronous executions over HTTP alone: measures any Flux, the original too.

    python -m benchmarks.http URL KEY [--pid flux=PID] [--pid agent=PID] [--connections 1,16,64] [--json FILE]

Deploys a small compiled program, runs it at each number of connections and
prints executions per second, p50 and p99, CPU milliseconds per execution over
all given processes (and as a multiple of the C floor of the same run), and RSS.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import floor, load, processes
from benchmarks.table import markdown

NAME = "flux-benchmark"
SPEC = f"name: {NAME}\nhandler: program\ntimeout: 60\nmax_concurrency: 250\nmax_concurrency_behavior: wait\n"


@dataclass
class Row:
    """One line of the table."""

    connections: int
    executions: int
    failures: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: dict[str, float] = field(default_factory=dict)
    cpu_ms_total: float = 0.0
    floor_cpu_ms: float = 0.0
    rss_mb: dict[str, float] = field(default_factory=dict)

    @property
    def times_floor(self) -> float:
        return self.cpu_ms_total / self.floor_cpu_ms if self.floor_cpu_ms else 0.0


def put(url: str, key: str, path: str, body: bytes) -> None:
    """A PUT that must be accepted. Raises urllib.error.HTTPError."""
    request = urllib.request.Request(url + path, data=body, method="PUT", headers={"X-API-Key": key})
    urllib.request.urlopen(request, timeout=60).close()


def prepare(url: str, key: str, program: Path) -> None:
    """Register and deploy the compiled program."""
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(program, "program")
    put(url, key, "/functions", SPEC.encode())
    put(url, key, f"/deploy/{NAME}", buffer.getvalue())


def measure(
    url: str, key: str, connections: int, seconds: float, pids: dict[str, int], floor_cpu_ms: float = 0.0
) -> Row:
    """One burst of synchronous executions, after a short one that warms things up."""
    request = load.post(f"{url}/execute/{NAME}", key, b'{"args":[]}')
    load.run(url, request, min(connections, 8), 0.5)
    before = processes.usage(pids)
    outcome = load.run(url, request, connections, seconds)
    after = processes.usage(pids)
    count = max(1, outcome.count)
    cpu = {name: value * 1000 / count for name, value in after.cpu_since(before).items()}
    return Row(
        connections,
        outcome.count,
        outcome.failures,
        outcome.per_second,
        outcome.percentile(0.5) * 1000,
        outcome.percentile(0.99) * 1000,
        cpu,
        sum(cpu.values()),
        floor_cpu_ms,
        {name: value / 1e6 for name, value in after.rss.items()},
    )


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    names = list(rows[0].cpu_ms) if rows else []
    heads = ["connections", "executions", "failed", "/s", "p50 ms", "p99 ms"]
    heads += [f"CPU ms {name}" for name in names] + ["CPU ms total", "x floor"] + [f"RSS MB {name}" for name in names]
    return markdown(
        heads,
        [
            [row.connections, row.executions, row.failures, row.per_second, row.p50_ms, row.p99_ms]
            + [row.cpu_ms[name] for name in names]
            + [row.cpu_ms_total, row.times_floor]
            + [row.rss_mb[name] for name in names]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="for example http://127.0.0.1:7227")
    parser.add_argument("key", help="an API key that may deploy and execute")
    parser.add_argument("--pid", action="append", default=[], metavar="NAME=PID", help="a process to account for")
    parser.add_argument("--connections", default="1,16,64")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    pids = {name: int(pid) for name, _, pid in (item.partition("=") for item in options.pid)}
    with floor.workshop() as directory:
        binary, program = directory / "floor", directory / "program"
        prepare(options.url.rstrip("/"), options.key, program)
        rows = []
        for connections in map(int, options.connections.split(",")):
            # The floor again before each row: the machine drifts.
            cpu = floor.measure(binary, program)["cpu_ms"]
            rows.append(measure(options.url.rstrip("/"), options.key, connections, options.seconds, pids, cpu))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"times_floor": row.times_floor} for row in rows], indent=1))


if __name__ == "__main__":
    main()
