"""What starting a program costs under each profile, against vfork + exec from C in the same run.

    python -m benchmarks.starts                # here: profiles this machine cannot have are named and left out
    python -m benchmarks.starts --lab          # in the lab's Debian, counting instructions: repeatable within 2 %

One /bin/true after the other through the executor's whole contract: user, cgroup,
output, figures, removal. CPU is what the kernel counted for this process, the
spawner and the programs together; the floor is measured in turns with each row.
``large agent`` repeats it in a process with 500 MB and 300 threads: forking from
that would cost ten times as much.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks import floor
from benchmarks.table import markdown
from fluxlib.agent.executor import build_executor
from fluxlib.agent.executor.base import Executor, Exit, Job, Limits
from fluxlib.config.agent import read_agent
from fluxlib.errors import FluxError
from fluxlib.model import Network

PROFILES = ("off", "minimal", "default", "strict")
MB = 1024 * 1024
_LIMITS = Limits(128 * MB, 500, 64, 1024, 1024 * MB, 64 * MB)
_PROGRAM = Path("/bin/true")
_WARM_UP = 20
_TURNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="programs per row")
    parser.add_argument("--lab", action="store_true", help="measure in the lab's machine")
    parser.add_argument("--binaries", type=Path, help="a directory with the floor, built already")
    parser.add_argument("--json", action="store_true", help="figures instead of a table")
    options = parser.parse_args()
    figures = _in_the_lab(options.count) if options.lab else _here(options.count, options.binaries)
    print(json.dumps(figures) if options.json else _table(figures))


def _table(figures: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            name,
            row["wall_ms"],
            row["cpu_ms"],
            f"{row['wall_ms'] / row['floor_wall_ms']:.2f}x",
            f"{times_floor(row):.2f}x",
        ]
        for name, row in figures.items()
    ]
    return markdown(["start", "ms", "CPU ms", "x floor", "CPU x floor"], rows)


def times_floor(row: dict[str, float]) -> float:
    return row["cpu_ms"] / row["floor_cpu_ms"]


def _here(count: int, binaries: Path | None) -> dict[str, dict[str, float]]:
    # Functions' users must be able to walk there; a state directory in /tmp would be hidden from them.
    directory = Path(tempfile.mkdtemp(prefix="flux-starts-", dir="/var/lib" if os.geteuid() == 0 else None))
    directory.chmod(0o755)
    try:
        built = binaries or directory
        if binaries is None:
            floor.build(built)
        figures = {}

        def measure(name: str, executor: Executor, job: Job) -> None:
            figures[name] = _measure(executor, job, count, built / "floor")

        for profile in PROFILES:
            with _executor(profile, directory / profile) as (executor, job):
                if executor is None:
                    continue
                measure(profile, executor, job)
                if profile in ("default", "strict"):
                    measure(f"{profile}, network none", executor, replace(job, network=Network.NONE))
                with _large_agent():
                    measure(f"{profile}, large agent", executor, job)
        return figures
    finally:
        shutil.rmtree(directory)


def _in_the_lab(count: int) -> dict[str, dict[str, float]]:
    from tests.support.lab import debian
    from tests.support.machine import Machine

    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        floor.build(here)
        with Machine(debian(), here, one_clock=True, memory_mb=1536) as machine:
            machine.put_tree()
            machine.put(here / "floor", "/opt/floor")
            unit = "systemd-run -q --pipe --wait -p 'Delegate=cpu memory pids'"
            command = f"-m benchmarks.starts --json --binaries /opt --count {count}"
            output = machine.run(f"{unit} {machine.python} {command}", timeout=3600)
        return dict(json.loads(output.splitlines()[-1]))


@contextmanager
def _executor(profile: str, state: Path) -> Iterator[tuple[Executor | None, Job]]:
    code = state / "functions" / "program"
    code.mkdir(parents=True)
    for path in (state, code.parent, code):
        path.chmod(0o755)
    shutil.copy(_PROGRAM, code / "program")
    job = Job("start", (str(code / "program"),), {"PATH": "/usr/bin:/bin"}, code, limits=_LIMITS)
    config = read_agent(
        f"agent_id: starts\ntls: {{enabled: false}}\ninsecure: true\nisolation: {profile}\nstate_dir: {state}\n",
        state / "agent.yaml",
    )
    try:
        executor = build_executor(config, state)
    except FluxError as error:
        print(f"{profile}: {error.message}", file=sys.stderr)
        yield None, job
        return
    try:
        yield executor, job
    finally:
        executor.stop(time.monotonic() + 5)


_numbers = itertools.count(1)


def _measure(executor: Executor, job: Job, count: int, floor_binary: Path) -> dict[str, float]:
    """Milliseconds of one start, and of the floor's."""
    _run(executor, _jobs(job, _WARM_UP))
    sums = dict.fromkeys(("wall_ms", "cpu_ms", "floor_wall_ms", "floor_cpu_ms"), 0.0)
    each = max(1, count // _TURNS)
    for _ in range(_TURNS):
        for name, value in floor.measure(floor_binary, _PROGRAM, each).items():
            sums[f"floor_{name}"] += value / _TURNS
        jobs = _jobs(job, each)
        cpu, wall = _cpu_seconds(), time.perf_counter()
        programs = _run(executor, jobs)
        wall = time.perf_counter() - wall
        spent = _cpu_seconds() - cpu + (programs if _unit() is None else 0.0)
        sums["wall_ms"] += wall / each / _TURNS * 1e3
        sums["cpu_ms"] += spent / each / _TURNS * 1e3
    return sums


def _jobs(job: Job, count: int) -> list[Job]:
    return [replace(job, execution_id=f"start-{next(_numbers)}") for _ in range(count)]


def _run(executor: Executor, jobs: list[Job]) -> float:
    """One after the other; the CPU seconds of the programs."""
    ends: queue.SimpleQueue[Exit] = queue.SimpleQueue()
    programs = 0.0
    for job in jobs:
        executor.start(job, lambda data: None, ends.put)
        end = ends.get(timeout=60)
        assert end.exit_code == 0, end
        programs += end.cpu_seconds or 0.0
    return programs


def _unit() -> Path | None:
    """The cgroup of this process and all it starts, when it runs as a systemd unit."""
    with open("/proc/self/cgroup", encoding="ascii") as file:
        groups = [line.strip().partition("::")[2] for line in file if line.startswith("0::")]
    unit = Path("/sys/fs/cgroup" + groups[0].removesuffix("/agent")) if groups and groups[0] != "/" else None
    return unit if unit is not None and (unit / "cpu.stat").exists() else None


def _cpu_seconds() -> float:
    """Of the unit, or of this process and the spawner: /proc tells other processes' ended children in ticks only."""
    unit = _unit()
    if unit is not None:
        return int((unit / "cpu.stat").read_text().split()[1]) / 1e6
    spawners = [Path(f"/proc/{child.pid}/schedstat") for child in psutil.Process().children()]
    return time.process_time() + sum(int(file.read_text().split()[0]) for file in spawners) / 1e9


@contextmanager
def _large_agent() -> Iterator[None]:
    """This process as an agent looks after a while: 500 MB in use, 300 threads waiting."""
    weight = [bytearray(os.urandom(1) * MB) for _ in range(500)]
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, name=f"waiting-{number}") for number in range(300)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        weight.clear()


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("Linux only")
    main()
