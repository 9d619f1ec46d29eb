"""What kind of machine this is and how it does, by psutil; cheap enough to be asked by everybody."""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path

import psutil

from fluxlib.agent.diagnosis import this_platform
from fluxlib.lifecycle import Deadline, Loop
from fluxlib.model import NodeFigures

_SAMPLE_EVERY = 2.0
_MB = 1024 * 1024


class Monitor:
    """Node figures, sampled by one loop: nobody's question waits for a measurement."""

    def __init__(self, state_dir: Path) -> None:
        self.instance_id = secrets.token_hex(8)
        self.platform = this_platform()
        self._state_dir = str(state_dir)
        self._started = time.monotonic()
        self._lock = threading.Lock()
        psutil.cpu_percent(None)  # the first answer has nothing to compare with
        self._cpu, self._cpu_at = 0.0, self._started
        self._sampled = self._sample(time.time())
        self._loop = Loop("node-figures", self.tick, _SAMPLE_EVERY)

    def start(self) -> None:
        self._loop.start()

    def stop(self, deadline: Deadline) -> None:
        self._loop.stop(deadline)

    def tick(self, now: float) -> None:
        """One sample. ``now`` is epoch seconds."""
        sampled = self._sample(now)
        with self._lock:
            self._sampled = sampled

    def figures(self, active_tasks: int, max_tasks: int) -> NodeFigures:
        with self._lock:
            sampled = self._sampled
        memory_total, memory_used, memory_percent, cpu, disk_free, at = sampled
        return NodeFigures(
            cpu_percent=cpu,
            memory_percent=memory_percent,
            memory_total_mb=memory_total,
            memory_used_mb=memory_used,
            active_tasks=active_tasks,
            max_tasks=max_tasks,
            uptime_seconds=int(time.monotonic() - self._started),
            collected_at=at,
            disk_free_mb=disk_free,
        )

    def _sample(self, now: float) -> tuple[int, int, float, float, int, float]:
        memory = psutil.virtual_memory()
        if time.monotonic() - self._cpu_at >= _SAMPLE_EVERY / 2:
            # Since the last look: over a shorter time it says 0 or 100 and nothing else.
            self._cpu, self._cpu_at = psutil.cpu_percent(None), time.monotonic()
        try:
            disk_free = psutil.disk_usage(self._state_dir).free // _MB
        except OSError:
            disk_free = 0
        # "used" as most people mean it: what is not available to a new program.
        used = memory.total - memory.available
        return memory.total // _MB, used // _MB, 100.0 * used / memory.total, self._cpu, disk_free, now
