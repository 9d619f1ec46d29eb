"""How long the programs take to start, what they hold when idle, and what starting a function costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import startup
from benchmarks.results import Section
from benchmarks.system import Options, system


def measure(options: Options) -> Iterator[Section]:
    yield _idle()
    yield _startup(options)
    if sys.platform == "linux":
        yield from _starts(options)


def _idle() -> Section:
    with system() as one:
        time.sleep(3)  # the first reports and probes are over
        rss = {name: size / 1e6 for name, size in one.usage().rss.items()}
        before, began = one.usage(), time.monotonic()
        time.sleep(5)
        used = one.usage().cpu_since(before)
        idle = {name: 100 * seconds / (time.monotonic() - began) for name, seconds in used.items()}
    total = sum(rss.values())
    return Section(
        "Idle: Flux with one agent in step",
        ["process", "RSS MB", "CPU %"],
        [*([name, rss[name], idle[name]] for name in rss), ["together", total, sum(idle.values())]],
        notes=["RSS counts shared pages of libraries once for each process; children are included."],
        figures={"rss_mb": rss, "cpu_percent": idle},
        promised={"idle": total},
    )


def _startup(options: Options) -> Section:
    """From the source tree, and the frozen programs where they have been built."""
    frozen = startup.TOP / "build/frozen"
    rows = startup.measure(frozen if (frozen / "flux/flux").exists() else None, 1 if options.smoke else 3)
    heads = ["program", "until", "ms", "CPU ms", "RSS MB"]
    cells = [[row.program, row.what, row.wall_ms, row.cpu_ms, row.rss_mb] for row in rows]
    figures = {f"{row.program}, {row.what}": {"wall_ms": row.wall_ms, "rss_mb": row.rss_mb} for row in rows}
    return Section("Start-up", heads, cells, figures=figures)


def _starts(options: Options) -> Iterator[Section]:
    """In a process of its own: it becomes large on purpose."""
    count = 40 if options.smoke else 300
    here = _run(["--count", str(count)])
    promised = {}
    if "off" in here:
        promised["start off"] = here["off"]["cpu_ms"] / here["floor"]["cpu_ms"]
        promised["start large"] = here["off, large agent"]["cpu_ms"] / here["off"]["cpu_ms"]
    yield _starts_section("Starting a program through the executor, on this machine", here, promised)
    if options.lab:
        lab = _run(["--lab", "--count", str(count)])
        promised = {}
        if "default" in lab:
            promised["start default"] = lab["default"]["cpu_ms"] / lab["floor"]["cpu_ms"]
            promised["start large"] = lab["default, large agent"]["cpu_ms"] / lab["default"]["cpu_ms"]
        yield _starts_section("The same in a machine that counts instructions", lab, promised)


def _starts_section(title: str, figures: dict[str, Any], promised: dict[str, float]) -> Section:
    base = figures["floor"]
    rows = [
        [name, row["wall_ms"], row["cpu_ms"], f"{row['cpu_ms'] / base['cpu_ms']:.2f}x"] for name, row in figures.items()
    ]
    return Section(title, ["start", "ms", "CPU ms", "CPU x floor"], rows, figures=figures, promised=promised)


def _run(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.starts", "--json", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=startup.TOP)
    return dict(json.loads(done.stdout.splitlines()[-1]))
