"""CPU seconds and resident memory of process trees, from the kernel's own accounting."""

from __future__ import annotations

from dataclasses import dataclass

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


def proportional(root: int) -> int:
    """Bytes a process and its children hold, each shared page divided by those who share it (Linux; else RSS)."""
    process = psutil.Process(root)
    infos = [one.memory_full_info() for one in (process, *process.children(recursive=True))]
    return sum(getattr(info, "pss", info.rss) for info in infos)
