"""How long the programs take to start, what they hold when idle, and what starting a function costs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import processes, starts, startup
from benchmarks.results import Section
from benchmarks.system import Options, system
from tests.support.programs import wait_until


def measure(options: Options) -> Iterator[Section]:
    yield _idle()
    yield _startup(options)
    if sys.platform == "linux":
        yield from _starts(options)


def _idle() -> Section:
    with system() as one:
        one.deploy_program("idle")
        # A first start makes the CA, and holds what that takes from then on; a server is one that has been restarted.
        for program in (one.flux, *one.agents):
            program.stop()
            program.start()
        # By a call and not by GET /agents: that loads Flask, which is measured below.
        wait_until(lambda: one.api.execute("idle")[0] == 200, "the agent to be back")
        time.sleep(3)  # the first reports and probes are over
        pids = {"flux": [one.pids["flux"]], "agent": [one.pids["agent"]]}
        pids["its spawner"] = processes.children(one.pids["agent"])
        held = {name: [processes.memory(pid) for pid in family] for name, family in pids.items()}
        before, began = one.usage(), time.monotonic()
        time.sleep(5)
        used = one.usage().cpu_since(before)
        idle = {name: 100 * seconds / (time.monotonic() - began) for name, seconds in used.items()}
        one.api.call("GET", "/agents")
        managed = processes.memory(one.pids["flux"]).rss / 1e6
    rss = {name: sum(one.rss for one in family) / 1e6 for name, family in held.items()}
    anonymous = {name: sum(one.anonymous for one in family) / 1e6 for name, family in held.items()}
    pss = sum(one.pss for family in held.values() for one in family) / 1e6
    total = sum(rss.values())
    return Section(
        "Idle: Flux with one synchronized agent",
        ["process", "RSS MB", "CPU %"],
        [*([name, rss[name], idle.get(name, "")] for name in rss), ["together", total, sum(idle.values())]],
        notes=[
            "Flux has been restarted since the start that made its CA, and has run a function. The first request that"
            f" needs Flask, such as GET /agents, takes it to {managed:.0f} MB for good.",
            "The spawner's CPU is in the agent's. RSS counts"
            " a library's pages once for each process that maps it; shared pages counted once, all three hold"
            f" {pss:.0f} MB (PSS). Their own memory, not mapped from files, is {sum(anonymous.values()):.0f} MB: "
            + ", ".join(f"{name} {size:.1f}" for name, size in anonymous.items())
            + ".",
        ],
        figures={"rss_mb": rss, "managed_mb": managed, "anonymous_mb": anonymous, "pss_mb": pss, "cpu_percent": idle},
        promised={"idle": rss["flux"] + rss["agent"], "idle with spawner": total},
    )


def _startup(options: Options) -> Section:
    """From the source tree, and the frozen programs where they have been built. In a process of its own: what it starts
    would show this one's size as its peak."""
    built = (startup.TOP / "build/frozen/flux/flux").exists()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        arguments = ["--rounds", "1" if options.smoke else "3", "--json", file.name, *([] if built else ["--source"])]
        _run("benchmarks.startup", arguments)
        rows = json.load(file)
    heads = ["program", "until", "ms", "CPU ms", "RSS MB"]
    cells = [[row["program"], row["what"], row["wall_ms"], row["cpu_ms"], row["rss_mb"]] for row in rows]
    return Section("Start-up", heads, cells, figures={"rows": rows})


def _starts(options: Options) -> Iterator[Section]:
    """In a process of its own: it becomes large on purpose."""
    count = 40 if options.smoke else 1000
    here = _starts_of(["--count", str(count)])
    promised = {}
    if "off" in here:
        promised["start off"] = starts.times_floor(here["off"])
        promised["start large"] = here["off, large agent"]["cpu_ms"] / here["off"]["cpu_ms"]
    yield _starts_section("Starting a program through the executor, on this machine", here, promised)
    if options.lab:
        lab = _starts_of(["--lab", "--count", str(min(count, 200))])
        promised = {}
        if "default" in lab:
            promised["start default"] = starts.times_floor(lab["default"])
            promised["start large"] = lab["default, large agent"]["cpu_ms"] / lab["default"]["cpu_ms"]
        yield _starts_section("The same in a machine that counts instructions", lab, promised)


def _starts_section(title: str, figures: dict[str, Any], promised: dict[str, float]) -> Section:
    rows = [[name, row["wall_ms"], row["cpu_ms"], f"{starts.times_floor(row):.2f}x"] for name, row in figures.items()]
    return Section(title, ["start", "ms", "CPU ms", "CPU x floor"], rows, figures=figures, promised=promised)


def _starts_of(arguments: list[str]) -> dict[str, Any]:
    return dict(json.loads(_run("benchmarks.starts", ["--json", *arguments]).splitlines()[-1]))


def _run(module: str, arguments: list[str]) -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=startup.TOP).stdout
