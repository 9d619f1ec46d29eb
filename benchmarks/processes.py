"""CPU seconds and resident memory of process trees, from the kernel's own accounting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Usage:
    """CPU seconds (ended and waited-for children included) and resident bytes by process name."""

    cpu: dict[str, float]
    rss: dict[str, int]

    def cpu_since(self, before: Usage) -> dict[str, float]:
        return {name: seconds - before.cpu.get(name, 0.0) for name, seconds in self.cpu.items()}

    @property
    def total_rss(self) -> int:
        return sum(self.rss.values())


def usage(roots: dict[str, int]) -> Usage:
    """``roots`` names the process IDs of the programs; their children count with them.

    A child that has ended counts through the parent that waited for it.
    """
    cpu: dict[str, float] = {}
    rss: dict[str, int] = {}
    for name, pid in roots.items():
        cpu[name] = 0.0
        rss[name] = 0
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                cpu[name] += times.user + times.system + times.children_user + times.children_system
                rss[name] += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    return Usage(cpu, rss)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: resident; of these anonymous (not from a file); shared pages divided by their sharers.

    Only Linux tells the last two; they are 0 elsewhere.
    """

    rss: int
    anonymous: int
    pss: int


def memory(pid: int) -> Memory:
    """Of the process alone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except FileNotFoundError:
        return Memory(psutil.Process(pid).memory_info().rss, 0, 0)
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return Memory(sizes["Rss"], sizes["Anonymous"], sizes["Pss"])


def children(pid: int) -> list[int]:
    """And theirs."""
    return [one.pid for one in psutil.Process(pid).children(recursive=True)]
