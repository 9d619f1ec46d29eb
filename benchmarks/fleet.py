"""Several agents: how a burst spreads over them, and what a deploy to all of them takes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator

from benchmarks import load
from benchmarks.results import Section
from benchmarks.system import Options, system
from tests.support.programs import make_zip

_MB = 1024 * 1024


def measure(options: Options) -> Iterator[Section]:
    yield _burst(options)
    yield _deploy(options)


def _burst(options: Options) -> Section:
    with system(4) as fleet:
        fleet.deploy_program("short")
        fleet.deploy("long", "#!/bin/sh\nsleep 0.3\n")
        rows: list[list[object]] = []
        figures = {}
        for name, connections, count in (("short", 16, 100), ("short", 64, 1000), ("long", 40, 40)):
            outcome = load.run(fleet.url, fleet.call(name), connections, 600, count, keep_bodies=True)
            shares = Counter(json.loads(body)["agent_id"] for body in outcome.bodies)
            share = [shares[agent.agent_id] / outcome.count for agent in fleet.agents]
            what = f"{count} {name} calls, {connections} at a time"
            rows.append([what, outcome.per_second, *(f"{one:.0%}" for one in share)])
            figures[what] = {"per_second": outcome.per_second, "failures": outcome.failures, "share": share}
    heads = ["burst", "/s", *(agent.agent_id for agent in fleet.agents)]
    return Section("A burst over four agents: share of each", heads, rows, figures=figures)


def _deploy(options: Options) -> Section:
    agents, megabytes = (2, 2) if options.smoke else (8, 20)
    with system(agents) as fleet:
        # Noise: what cannot be made smaller on the way.
        archive = make_zip({"program": fleet.program.read_bytes(), "data.bin": os.urandom(megabytes * _MB)})
        spec = b"name: large\nhandler: program\n"
        status, body, _ = fleet.api.request("PUT", "/functions", spec)
        assert status == 201, body
        before = fleet.usage()
        began = time.perf_counter()
        status, body, _ = fleet.api.request("PUT", "/deploy/large", archive, timeout=600)
        took = time.perf_counter() - began
        used = fleet.usage()
        cpu = used.cpu_since(before)
        deployed = json.loads(body).get("deployed_count") if status == 201 else body
        flux_rss = used.rss["flux"] / 1e6
    agents_cpu = sum(seconds for name, seconds in cpu.items() if name != "flux")
    return Section(
        f"Deploying {megabytes} MB to {agents} agents",
        ["status", "deployed", "s", "CPU s flux", "CPU s all agents", "RSS MB flux after"],
        [[status, deployed, took, cpu["flux"], agents_cpu, flux_rss]],
        figures={"status": status, "seconds": took, "cpu_s": cpu, "rss_mb": flux_rss, "megabytes": megabytes},
    )
