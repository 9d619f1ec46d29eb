"""Whether this agent can run programs now, and what about it needs somebody's attention."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from fluxlib.agent.executor.base import Executor
from fluxlib.agent.records import Records
from fluxlib.clock import elapsed
from fluxlib.config.environment import report_alive
from fluxlib.lifecycle import Deadline, Loop

log = logging.getLogger(__name__)

CHECK_EVERY = 5.0
# A spawner that dies is replaced in a tenth of this, and starts wait for it meanwhile.
GRACE = 3.0
_STORE_EVERY = 30.0
_GB = 1024**3
# Seconds. Flux gives an agent up after three questions without an answer, of 5 s each at least.
_STILL = 10.0
_BEAT = 1.0
# What was sent before is read within so long after it goes on.
_AFTERWARDS = 1.0


class Health:
    """``problem`` and ``warnings`` may be read from any thread; ``tick`` is one loop's."""

    def __init__(
        self,
        executor: Executor,
        records: Records,
        state_dir: Path,
        alive: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._records = records
        self._state_dir = str(state_dir)
        self._alive = alive  # returns unless the agent hangs
        self._clock = clock
        self._broken_since: float | None = None
        self._store_at = clock()
        self._shown = ""
        self.warnings: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """Why this agent should be given no work, empty when it can run programs. It heals by itself."""
        problem = self._executor.problem
        if not problem:
            self._broken_since = None
            return self._records.problem
        now = self._clock()
        since = self._broken_since = now if self._broken_since is None else self._broken_since
        return problem if now - since >= GRACE else self._records.problem

    def tick(self, now: float) -> None:
        at = self._clock()
        if self._records.problem or at - self._store_at >= _STORE_EVERY:
            self._store_at = at
            self._records.check()
        self.warnings = (*self._disk(), *self._records.warnings)
        problem = self.problem
        if problem != self._shown:
            self._shown = problem
            log.log(
                logging.ERROR if problem else logging.INFO,
                "%s",
                f"takes no work: {problem}" if problem else "healthy again",
            )
        self._alive()
        report_alive(f"takes no work: {problem}" if problem else "; ".join(self.warnings) or "serving")

    def _disk(self) -> tuple[str, ...]:
        try:
            usage = psutil.disk_usage(self._state_dir)
        except OSError as error:
            return (f"the disk of {self._state_dir} cannot be looked at: {error.strerror or error}",)
        if usage.free >= min(usage.total // 20, _GB):
            return ()
        return (f"the disk of {self._state_dir} is nearly full: {usage.free // 1024**2} MB are free",)


class StallDetector:
    """Detects that this process was stopped, or its machine suspended.

    What waited in its sockets meanwhile is read when it continues, before it learns that its callers have gone.
    ``beat`` is called every second by a thread of its own (``start``).
    """

    def __init__(self, clock: Callable[[], float] = elapsed) -> None:
        self._clock = clock
        self._at = clock()
        self._woke_at = -math.inf
        self._loop = Loop("stall-detector", lambda now: self.beat(), _BEAT)

    def start(self) -> None:
        self._loop.start()

    def stop(self, deadline: Deadline) -> None:
        self._loop.stop(deadline)

    def beat(self) -> None:
        now = self._clock()
        if now - self._at > _STILL:
            self._woke_at = now
        self._at = now

    @property
    def recently_stalled(self) -> bool:
        """It does, or did a moment ago: what is read now may be as old as that."""
        now = self._clock()
        return now - self._at > _STILL or now - self._woke_at < _AFTERWARDS
