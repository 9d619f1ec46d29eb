"""Executions that wait for a slot, first come, first served per function: a window of the backlog in the store.

The store keeps the backlog. A Flux claims from it no more than it can soon place (its window) and keeps only those in
memory, together with the synchronous calls that wait here, which never enter the store's backlog. While the window has
a place and nothing of a function is unclaimed, what is queued here is claimed as it is written.

The window looks for slots at the moment it is told of one, on the thread that frees it: nothing polls. A lost wake-up
is impossible: an execution is added before it looks for a slot for the last time, under the lock that every
announcement takes. Order of locks: the backlog's, then the fleet's. Whoever got a slot is told without either.

Reading ``_queues`` and ``_ready`` without the lock is only a first look: a dict's ``in`` and ``get`` are read whole.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

from fluxlib.control.agents.fleet import Reservation
from fluxlib.control.executions.execution import Execution
from fluxlib.errors import AtCapacity
from fluxlib.store.base import QueuedExecutions

log = logging.getLogger(__name__)

_MB = 1024 * 1024
# A backlog that stays full is logged so often, not for each execution that it refuses.
_SAY_FULL_SECONDS = 60.0

Place = Callable[[str, str], Reservation | None]
OnSlot = Callable[[Execution, Reservation], None]
Placed = list[tuple[Execution, Reservation]]


class Backlog:
    """What waits, as this process knows it.

    ``place(function_name, agent_id)`` reserves a slot at this agent ("" = at any) or answers None; it is called under
    the backlog's lock. ``is_full(agent_id)``: no execution of any function fits there now. ``on_slot(execution,
    reservation)`` is told who got a slot, without the lock. ``window(function_name)``: how many executions of it to
    keep in memory. ``max_waiting`` and ``max_bytes`` bound what waits in all, in the store and here.
    """

    def __init__(
        self,
        place: Place,
        is_full: Callable[[str], bool],
        on_slot: OnSlot,
        window: Callable[[str], int],
        max_waiting: int,
        max_bytes: int,
    ) -> None:
        self._place = place
        self._is_full = is_full
        self._on_slot = on_slot
        self._window = window
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._queues: dict[str, OrderedDict[str, Execution]] = {}
        self._ready: dict[str, int] = {}  # function -> how many nobody has claimed
        # Of everything that waits: as the store said last, and what came and went here since.
        self._count = 0
        self._bytes = 0
        self._said_full = -_SAY_FULL_SECONDS
        # A freed slot of one function may be the memory that another one waits for.
        self._waits_for_resources: set[str] = set()

    # -- coming and going --------------------------------------------------------------

    def admit(self, execution: Execution) -> None:
        """Count one that is about to be queued; ``add``, ``stored`` or ``give_up_place`` follows.

        Raises AtCapacity when too much waits, unless it was accepted before.
        """
        with self._lock:
            if not execution.accepted:
                self.refuse_if_full(execution)
            self._counted(execution, 1)

    def refuse_if_full(self, execution: Execution) -> None:
        """Raises AtCapacity when too much waits."""
        full = ""
        if self._count >= self._max_waiting:
            full = f"{self._count} executions wait (max_waiting)"
        elif execution.request_bytes and self._bytes + execution.request_bytes > self._max_bytes:
            full = f"the requests that wait have {self._bytes / _MB:.0f} MB (max_backlog_mb)"
        if full:
            name = execution.function_name
            if time.monotonic() - self._said_full >= _SAY_FULL_SECONDS:
                self._said_full = time.monotonic()
                log.warning("the backlog is full, new executions are refused: %s", full)
            raise AtCapacity(f"function {name} at capacity, and the backlog is full: {full}", retry_after=5)

    def count(self, execution: Execution) -> None:
        """As ``admit`` for one that was written already: it has its place, full or not."""
        with self._lock:
            self._counted(execution, 1)

    def give_up_place(self, execution: Execution) -> None:
        with self._lock:
            self._counted(execution, -1)

    def add(self, executions: Sequence[Execution], *, waits_for_resources: bool) -> None:
        """Queue admitted ones of one function; they may get their slots before this returns.

        Their place is that of their acceptance, also of one that comes back because its agent refused it.
        """
        if not executions:
            return
        name = executions[0].function_name
        placed: Placed = []
        with self._lock:
            queue = self._queues.setdefault(name, OrderedDict())
            idle = not queue
            last = next(reversed(queue.values())).accepted_at if queue else 0.0
            for execution in executions:
                queue[execution.execution_id] = execution
            if min(one.accepted_at for one in executions) < last:
                self._queues[name] = OrderedDict(sorted(queue.items(), key=lambda item: item[1].accepted_at))
            if waits_for_resources:
                self._waits_for_resources.add(name)
            if idle:
                # Behind others there is nothing to look for: every change since they came was offered to them.
                placed = self._serve([name], "")
        self._tell(placed)

    def remove(self, execution: Execution) -> bool:
        """Take it out. False: it has its slot already, or was never here."""
        with self._lock:
            queue = self._queues.get(execution.function_name)
            if queue is None or queue.pop(execution.execution_id, None) is None:
                return False
            self._removed(execution, queue)
            return True

    def remove_all(self, function_name: str = "") -> list[Execution]:
        """Take out everything, or everything of one function."""
        with self._lock:
            names = [function_name] if function_name else list(self._queues)
            removed = [one for name in names for one in self._queues.pop(name, {}).values()]
            self._waits_for_resources.difference_update(names)
            for execution in removed:
                self._counted(execution, -1)
            return removed

    def capacity(self, agent_id: str, function_name: str | None) -> None:
        """A slot may have freed (Fleet.on_capacity). Costs nothing while nobody waits."""
        if not self._queues:
            return
        with self._lock:
            if function_name is None:
                names = list(self._queues)
            else:
                names = [name for name in self._queues if name == function_name or name in self._waits_for_resources]
            # Only where something changed: elsewhere there was no slot before either.
            placed = self._serve(names, agent_id)
        self._tell(placed)

    # -- the store's part ----------------------------------------------------------------

    def takes(self, function_name: str) -> bool:
        """Whether one that is queued now is claimed as it is written."""
        with self._lock:
            if self._ready.get(function_name):
                return False
            return len(self._queues.get(function_name, ())) < self._window(function_name)

    def stored(self, function_name: str) -> None:
        """One more is in the store, and nobody has claimed it."""
        with self._lock:
            self._ready[function_name] = self._ready.get(function_name, 0) + 1

    def wanted(self, function_name: str) -> int:
        """How many to claim now. None while more than half of the window is there."""
        if not self._ready.get(function_name):
            return 0
        with self._lock:
            window = self._window(function_name)
            here = sum(1 for one in self._queues.get(function_name, {}).values() if one.asynchronous)
            return window - here if here * 2 <= window else 0

    def claimed(self, function_name: str, count: int, asked: int) -> None:
        """So many of those were claimed; fewer than asked: there is none left."""
        with self._lock:
            left = self._ready.get(function_name, 0) - count if count == asked else 0
            if left > 0:
                self._ready[function_name] = left
            else:
                self._ready.pop(function_name, None)

    def refresh(self, queued: Mapping[str, QueuedExecutions]) -> None:
        """What the store says waits, whoever owns it."""
        with self._lock:
            self._ready = {name: one.ready for name, one in queued.items() if one.ready}
            self._count = sum(one.waiting for one in queued.values())
            self._bytes = sum(one.request_bytes for one in queued.values())

    # -- looking -------------------------------------------------------------------------

    def has(self, function_name: str) -> bool:
        """Whether somebody waits for this function: a newcomer must not overtake."""
        return function_name in self._queues or function_name in self._ready

    def unclaimed(self) -> list[str]:
        """Functions of which something waits in the store."""
        if not self._ready:
            return []
        with self._lock:
            return list(self._ready)

    def functions(self) -> list[str]:
        """Those of which something waits."""
        with self._lock:
            return list({**self._queues, **self._ready})

    def counts(self, *, unclaimed: bool) -> Mapping[str, int]:
        """Function -> how many wait here, and with ``unclaimed`` in the store."""
        with self._lock:
            counts = {name: len(queue) for name, queue in self._queues.items()}
            for name, ready in self._ready.items() if unclaimed else ():
                counts[name] = counts.get(name, 0) + ready
            return counts

    def __contains__(self, execution: Execution) -> bool:
        with self._lock:
            return execution.execution_id in self._queues.get(execution.function_name, ())

    # -- under the lock ----------------------------------------------------------------

    def _serve(self, names: Iterable[str], agent_id: str) -> Placed:
        """What frees belongs to no function in particular: whoever has waited longest comes first."""
        placed: Placed = []
        heap = [(self._first(name), name) for name in names]
        heapq.heapify(heap)
        while heap and not (agent_id and self._is_full(agent_id)):
            name = heapq.heappop(heap)[1]
            reservation = self._place(name, agent_id)
            if reservation is None:
                continue
            queue = self._queues[name]
            _, execution = queue.popitem(last=False)
            self._removed(execution, queue)
            placed.append((execution, reservation))
            if queue:
                heapq.heappush(heap, (self._first(name), name))
        return placed

    def _first(self, name: str) -> float:
        return next(iter(self._queues[name].values())).accepted_at

    def _removed(self, execution: Execution, queue: OrderedDict[str, Execution]) -> None:
        self._counted(execution, -1)
        if not queue:
            del self._queues[execution.function_name]
            self._waits_for_resources.discard(execution.function_name)

    def _counted(self, execution: Execution, change: int) -> None:
        self._count = max(0, self._count + change)
        self._bytes = max(0, self._bytes + change * execution.request_bytes)

    def _tell(self, placed: Placed) -> None:
        for execution, reservation in placed:
            self._on_slot(execution, reservation)
