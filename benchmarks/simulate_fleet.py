"""A fleet under a virtual clock: the real scaling decision and the real placement, everything else invented.

    python -m benchmarks.simulate_fleet --sizes 10 100 1000 --hours 4

Functions arrive at random, each takes one of a node's eight slots. The table holds what people
wait, what the nodes cost against the least that could have done it (every node there the moment it is
needed and gone the moment it is not), and how often the fleet changed. A second table shows
what one placement costs with so many agents.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks.simulation import SCENARIOS, SLOTS, Simulation
from benchmarks.table import markdown


def simulate(sizes: list[int], hours: float, cooldown: int) -> str:
    rows: list[list[object]] = []
    for size in sizes:
        for scenario in SCENARIOS:
            began = time.perf_counter()
            outcome = Simulation(scenario, size, hours, cooldown).run()
            waits = sorted(outcome.waits) or [0.0]
            rows.append(
                [
                    size,
                    scenario.name,
                    len(waits),
                    f"{sum(1 for wait in waits if wait > 0) / len(waits):.1%}",
                    sum(waits) / len(waits),
                    waits[int(0.99 * (len(waits) - 1))],
                    waits[-1],
                    outcome.node_seconds / 3600,
                    outcome.node_seconds / outcome.ideal_seconds,
                    outcome.most,
                    f"{outcome.ups}/{outcome.downs}",
                    outcome.lost_executions,
                    1000 * outcome.decide_seconds / max(1, outcome.decisions),
                ]
            )
            print(f"{size} {scenario.name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    heads = ["max nodes", "load", "executions", "waited", "wait mean s", "p99 s", "longest s"]
    heads += ["node-hours", "x ideal", "most nodes", "up/down", "lost", "decision ms"]
    return markdown(heads, rows)


def placement(sizes: list[int], count: int = 20_000) -> str:
    """What one place and release costs, on a fleet that is half busy."""
    rows: list[list[object]] = []
    for size in sizes:
        simulation = Simulation(SCENARIOS[0], size, 1, 300)
        simulation.fill()
        held = [simulation.fleet.place("work", simulation.choose, slots=SLOTS) for _ in range(size * SLOTS // 2)]
        began = time.process_time()
        for _ in range(count):
            reservation = simulation.fleet.place("work", simulation.choose, slots=SLOTS)
            assert reservation is not None
            simulation.fleet.release(reservation)
        rows.append([size, len(held), 1e6 * (time.process_time() - began) / count])
    return markdown(["agents", "running", "place and release, CPU µs"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="max_nodes of each run")
    parser.add_argument("--hours", type=float, default=4.0, help="of virtual time")
    parser.add_argument("--cooldown", type=int, default=300, help="cooldown_sec")
    options = parser.parse_args()
    print(f"# A simulated fleet, {options.hours:g} h, cooldown {options.cooldown} s\n")
    print(simulate(options.sizes, options.hours, options.cooldown))
    print("\n# Placement\n")
    print(placement(options.sizes))


if __name__ == "__main__":
    main()
