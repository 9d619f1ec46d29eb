"""What a run of the benchmarks found: sections with a table each, and the figures that were promised."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import cell, markdown

DIRECTORY = Path(__file__).with_name("results")


@dataclass
class Section:
    """One measurement. ``figures`` is its JSON, ``promised`` feeds the table of targets, by their keys."""

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    notes: Sequence[str] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    promised: dict[str, float] = field(default_factory=dict)

    def as_markdown(self) -> str:
        parts = [f"## {self.title}"]
        if self.rows:
            parts.append(markdown(self.heads, self.rows))
        parts.extend(self.notes)
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Target:
    """One line of what must be shown. ``at_least``: more is better."""

    key: str
    what: str
    reach: float
    stretch: float
    unit: str = "x"
    at_least: bool = False

    def verdict(self, measured: float) -> str:
        def holds(limit: float) -> bool:
            return measured >= limit if self.at_least else measured <= limit

        return "stretch" if holds(self.stretch) else "reached" if holds(self.reach) else "NOT REACHED"


TARGETS = (
    Target("start off", "process start, profile `off`, CPU against the C floor", 1.6, 1.4),
    Target("start default", "process start, profile `default`, CPU against the C floor, in one VM", 5.5, 3.5),
    Target("start large", "the same start with the agent at 500 MB and 300 threads", 1.15, 1.05),
    Target("path 16", "whole path at 16 connections, profile `off`, mTLS, CPU against the C floor", 4, 2.5),
    Target("64 to 16", "throughput at 64 connections against 16", 0.95, 1.2, at_least=True),
    Target("200 to 16", "throughput at 200 connections against 16", 0.8, 1.1, at_least=True),
    Target("retained", "throughput with retained executions against none", 0.95, 1.0, at_least=True),
    Target("wait", "`wait`: slot free to start, p50", 20, 5, "ms"),
    Target(
        "backlog restart",
        "memory that a restart takes for 10 000 waiting requests of 512 KB",
        50,
        10,
        "MB",
    ),
    Target("backlog idle", "synchronous calls beside 100 000 that wait, against none", 0.97, 1.0, at_least=True),
    Target("health", "`GET /health` while the store is slow, longest", 50, 10, "ms"),
    Target("output", "CPU for chatty live output against the same program writing to a file", 3, 1.5),
    Target("management", "management routes' p99 while executions block", 50, 15, "ms"),
    Target("idle", "Flux + agent idle RSS", 110, 90, "MB"),
)


def promised_table(sections: Sequence[Section]) -> str:
    """Every target with what was measured; what this run did not measure says so."""
    measured = {key: value for section in sections for key, value in section.promised.items()}
    rows = []
    for target in TARGETS:
        value = measured.get(target.key)
        shown = "not measured" if value is None else f"{cell(value)} {target.unit}"
        verdict = "" if value is None else target.verdict(value)
        rows.append([target.what, f"{target.reach} {target.unit}", f"{target.stretch} {target.unit}", shown, verdict])
    return markdown(["must show", "reach", "stretch", "measured", ""], rows)


def machine() -> dict[str, Any]:
    """The kind of machine, without its name."""
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        model = platform.processor()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpus": os.cpu_count(),
        "cpu": model,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": os.getloadavg() if hasattr(os, "getloadavg") else (),
    }


def document(about: dict[str, Any], sections: Sequence[Section]) -> str:
    """The whole run as Markdown."""
    load = ", ".join(f"{one:.1f}" for one in about["load_before"])
    head = (
        f"# Flux measured on {about['date']}\n\n{about['cpus']} CPUs ({about['cpu']}), {about['system']}, Python"
        f" {about['python']}; load average before: {load}. Ratios within this run are what to trust."
    )
    targets = "## What was promised\n\n" + promised_table(sections)
    return "\n\n".join([head, targets, *(section.as_markdown() for section in sections)]) + "\n"


def write(about: dict[str, Any], sections: Sequence[Section], directory: Path = DIRECTORY) -> list[Path]:
    """Both files, named by the time; ``latest.*`` beside them."""
    directory.mkdir(exist_ok=True)
    data = {
        "machine": about,
        "promised": {key: value for section in sections for key, value in section.promised.items()},
        "sections": {section.title: section.figures for section in sections},
    }
    texts = {"md": document(about, sections), "json": json.dumps(data, indent=1) + "\n"}
    name = time.strftime("%Y%m%d-%H%M%S")
    paths = []
    for kind, text in texts.items():
        for stem in (name, "latest"):
            path = directory / f"{stem}.{kind}"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    return paths
