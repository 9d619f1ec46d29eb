"""Ten megabytes of short lines: what keeping and following them costs, against the same program writing to a file."""

from __future__ import annotations

import resource
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks import floor
from benchmarks.results import Section
from benchmarks.system import Options, System, system
from tests.support.programs import API_KEY

# One write per line, as an unbuffered program does it.
_PROGRAM = b"""
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    long lines = argc > 1 ? atol(argv[1]) : 1;
    for (long i = 0; i < lines; i++)
        if (write(1, "a line of a chatty program, fifty bytes of it all.\\n", 51) != 51) return 1;
    return 0;
}
"""
_LINE = 51


def measure(options: Options) -> Iterator[Section]:
    lines = (1_000_000 if options.smoke else 10_000_000) // _LINE
    rounds = 1 if options.smoke else 3
    with system(max_output_mb=20) as one:
        binary = floor.build_program(one.directory, "chatty", _PROGRAM)
        one.deploy("chatty", binary.read_bytes())
        found: dict[str, list[tuple[float, float]]] = {"to a file": [], "kept": [], "kept and followed": []}
        for _ in range(rounds):
            found["to a file"].append(_to_file(binary, lines, one.directory / "written"))
            found["kept"].append(_through(one, lines, follow=False))
            found["kept and followed"].append(_through(one, lines, follow=True))
    best = {name: min(cpu for cpu, _ in each) for name, each in found.items()}
    rows = [
        [name, best[name], min(wall for _, wall in each), f"{best[name] / best['to a file']:.2f}x"]
        for name, each in found.items()
    ]
    yield Section(
        f"{lines} lines of {_LINE} bytes, each a write of its own",
        ["output", "CPU s", "s", "CPU against a file"],
        rows,
        notes=["CPU of the program, Flux and the agent together; the follower reads over HTTP while it is written."],
        figures={"cpu_s": best, "rounds": found},
        promised={"output": best["kept and followed"] / best["to a file"]},
    )


def _to_file(binary: Path, lines: int, path: Path) -> tuple[float, float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with path.open("wb") as file:
        subprocess.run([binary, str(lines)], stdout=file, check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def _through(one: System, lines: int, *, follow: bool) -> tuple[float, float]:
    before = one.usage()
    began = time.perf_counter()
    status, answer = one.api.call("POST", "/execute/chatty/async", {"args": [str(lines)]})
    assert status == 202, answer
    if follow:
        url = f"{one.url}/executions/{answer['execution_id']}/output?follow=1"
        request = urllib.request.Request(url, headers={"X-API-Key": API_KEY})
        size = 0
        with urllib.request.urlopen(request, timeout=120) as response:
            while data := response.read(1 << 20):
                size += len(data)
        assert size == lines * _LINE, size
    record = one.api.ended(answer["execution_id"], 120)
    assert record["status"] == "success", record
    assert not record["truncated"], record
    wall = time.perf_counter() - began
    return sum(one.usage().cpu_since(before).values()), wall
