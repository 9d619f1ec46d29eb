"""What /health and /resources say of this process: its store, its loops, its machine, and what to worry about."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import psutil

from fluxlib.control.agents.fleet import Fleet
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import LoopReport
from fluxlib.model import NodeFigures
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

SAMPLE_EVERY = 5.0
# Seconds after its start for which a Flux asks clients to wait for agents that it has not reached yet.
CONNECT_SECONDS = 10.0
# /health is public: however often it is asked, the store is asked once in this time.
_STORE_SECONDS = 1.0
_PERSISTENCE_SECONDS = 60.0
# So long a request waits for the answer; later it is told what was known before.
_STORE_WAIT = 0.02
# After this a store that has not answered is away for those who ask, though its own timeout is longer.
_STORE_PATIENCE = 2.0
_MB = 1024 * 1024

Warnings = Callable[[], Iterable[str]]


class Watchable(Protocol):
    def report(self) -> LoopReport: ...


class StatusService:
    """services.Status. ``tick`` samples the machine and asks the store every :data:`SAMPLE_EVERY` seconds.

    ``loops`` and ``warnings`` may be added to until the API is served; each of ``warnings`` answers
    what it knows now (certificates, strays, …).
    """

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        *,
        tls: bool,
        leads: Callable[[], bool] = lambda: True,
        connecting: Callable[[], Sequence[str]] = lambda: (),
        stopping: Callable[[], bool],
        loops: Sequence[Watchable] = (),
        warnings: Sequence[Warnings] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._tls = tls
        self._leads = leads
        self._connecting = connecting
        self._stopping = stopping
        self._loops = list(loops)
        self._warnings = list(warnings)
        self._clock = clock
        self._started = clock()
        self._asking = threading.Lock()
        self._asked_at: float | None = None  # since when somebody has been waiting for the store
        self._checked_at = -_STORE_SECONDS
        self._answered = False
        self._store_problem: StoreUnavailable | None = None
        self._persistence_at = -_PERSISTENCE_SECONDS
        self._persistence: tuple[str, ...] = ()
        psutil.cpu_percent(None)  # the first answer has nothing to compare with
        self._sampled = self._sample(self._started)

    def watch(self, loop: Watchable) -> None:
        """Show this loop in /health."""
        self._loops.append(loop)

    def warn(self, warnings: Warnings) -> None:
        self._warnings.append(warnings)

    def tick(self, now: float) -> None:
        self._sampled = self._sample(now)
        self._ask_store()  # so that what those are told who need not wait is never old

    # -- services.Status ---------------------------------------------------------------

    def check_store(self) -> None:
        self._look_at_store()
        problem, asked_at = self._store_problem, self._asked_at
        if problem is not None:
            raise StoreUnavailable(problem.message, retry_after=problem.retry_after)
        if asked_at is not None and time.monotonic() - asked_at > _STORE_PATIENCE:
            raise StoreUnavailable(f"the store has not answered for {_STORE_PATIENCE:g} s")

    def loops(self) -> Sequence[LoopReport]:
        return [loop.report() for loop in self._loops]

    def warnings(self) -> Sequence[str]:
        self._look_at_store()
        found = list(self._persistence)
        if not self._tls:
            found.append(
                "connections to agents are without TLS (disable_grpc_tls): anybody who reaches one can run programs"
            )
        for agent in self._fleet.agents():
            if agent.figures is not None and agent.record.status.present:
                said = [f"can run no programs: {agent.figures.problem}"] if agent.figures.problem else []
                found += [f"agent {agent.agent_id}: {warning}" for warning in (*said, *agent.figures.warnings)]
        for warnings in self._warnings:
            found += warnings()
        return found

    def figures(self) -> NodeFigures:
        return self._sampled

    def leads(self) -> bool:
        return self._leads()

    def connecting(self) -> Sequence[str]:
        return self._connecting() if self._clock() - self._started < CONNECT_SECONDS else ()

    def stopping(self) -> bool:
        return self._stopping()

    def _look_at_store(self) -> None:
        """For a request, which a slow store must not slow down: only the very first waits until there is an answer."""
        if self._asking.locked() or time.monotonic() - self._checked_at < _STORE_SECONDS:
            return
        asker = threading.Thread(target=self._ask_store, name="store-health", daemon=True)
        asker.start()
        asker.join(_STORE_WAIT if self._answered else _STORE_PATIENCE)

    def _ask_store(self) -> None:
        """One asks at a time, and nobody waits for it: a store that hangs must not take every thread."""
        if time.monotonic() - self._checked_at < _STORE_SECONDS or not self._asking.acquire(blocking=False):
            return
        try:
            self._asked_at = time.monotonic()
            try:
                self._store.ping()
            except StoreUnavailable as error:
                self._store_problem = error
                return
            self._store_problem = None
            if time.monotonic() - self._persistence_at >= _PERSISTENCE_SECONDS:
                self._persistence_at = time.monotonic()
                with suppress(StoreUnavailable):  # what was known before still holds
                    found = self._store.persistence()
                    for warning in found:
                        if warning not in self._persistence:
                            log.warning("%s", warning)
                    self._persistence = found
        finally:
            self._checked_at = time.monotonic()
            self._answered = True
            self._asked_at = None
            self._asking.release()

    def _sample(self, now: float) -> NodeFigures:
        memory = psutil.virtual_memory()
        # "used" as most people mean it: what is not available to a new program.
        used = memory.total - memory.available
        return NodeFigures(
            cpu_percent=psutil.cpu_percent(None),
            memory_percent=100.0 * used / memory.total,
            memory_total_mb=memory.total // _MB,
            memory_used_mb=used // _MB,
            active_tasks=sum(state.total for state in self._fleet.agents()),
            uptime_seconds=int(now - self._started),
            collected_at=now,
        )
