"""Everything, on one machine, in one run.

    python -m benchmarks [--smoke] [--lab] [--only NAME,…] [--seconds 5]

Prints Markdown, and writes it and JSON into benchmarks/results/. ``--smoke``
takes a few minutes and shows that all of it runs; its figures mean little.
``--lab`` adds the isolation profiles in a virtual machine that counts
instructions (as `make test-vm` it needs qemu).
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from benchmarks import backlog, executions, fleet, footprint, health, management, output, queueing, results, retained
from benchmarks.results import Section
from benchmarks.system import Options

MEASUREMENTS: dict[str, Callable[[Options], Iterator[Section]]] = {
    "executions": executions.measure,
    "retained": retained.measure,
    "wait": queueing.measure,
    "backlog": backlog.measure,
    "health": health.measure,
    "fleet": fleet.measure,
    "output": output.measure,
    "management": management.measure,
    "footprint": footprint.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="short bursts, small numbers")
    parser.add_argument("--lab", action="store_true", help="the isolation profiles too, in a virtual machine")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, help="of one burst; default 6, with --smoke 1")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"no measurement {', '.join(unknown)}: there are {', '.join(MEASUREMENTS)}")
    wanted = Options(options.smoke, options.seconds or (1.0 if options.smoke else 6.0), options.lab)
    about = results.machine()
    sections: list[Section] = []
    failed: list[str] = []
    for name in names:
        began = time.monotonic()
        try:
            for section in MEASUREMENTS[name](wanted):
                sections.append(section)
                print(section.as_markdown(), end="\n\n", flush=True)
        except Exception:
            # The others are worth their minutes all the same.
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print(f"## What was promised\n\n{results.promised_table(sections)}\n")
    for path in results.write(about, sections):
        print(path, file=sys.stderr)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
