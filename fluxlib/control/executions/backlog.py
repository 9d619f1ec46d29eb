"""Executions that wait for a slot in this process: first come, first served per function.

The backlog looks for slots at the moment it is told of one, on the thread that frees it: nothing polls. A lost wake-up
is impossible: an execution is added before it looks for a slot for the last time, under the lock that every
announcement takes. Order of locks: the backlog's, then the fleet's. Whoever got a slot is told without either.

Reading ``_queues`` and ``_count`` without the lock is only a first look: a dict's ``in`` and an int are read whole.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

from fluxlib.control.agents.fleet import Reservation
from fluxlib.control.executions.execution import Execution
from fluxlib.errors import AtCapacity

Place = Callable[[str, str], Reservation | None]
OnSlot = Callable[[Execution, Reservation], None]
Placed = list[tuple[Execution, Reservation]]


class Backlog:
    """Every queue of this process.

    ``place(function_name, agent_id)`` reserves a slot at this agent ("" = at any) or answers None; it is called under
    the backlog's lock. ``is_full(agent_id)``: no execution of any function fits there now. ``on_slot(execution,
    reservation)`` is told who got a slot, without the lock.
    """

    def __init__(self, place: Place, is_full: Callable[[str], bool], on_slot: OnSlot, max_waiting: int) -> None:
        self._place = place
        self._is_full = is_full
        self._on_slot = on_slot
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._queues: dict[str, OrderedDict[str, Execution]] = {}
        self._count = 0  # of those that wait, and of those that are being written and will
        self._order = itertools.count(1)
        # A freed slot of one function may be the memory that another one waits for.
        self._waits_for_resources: set[str] = set()

    # -- coming and going --------------------------------------------------------------

    def admit(self, function_name: str, *, already_accepted: bool = False) -> None:
        """Take a place for one that is about to be written as queued; ``add`` or ``give_up_place`` follows.

        Raises AtCapacity when too many wait, unless it was accepted before.
        """
        with self._lock:
            if not already_accepted:
                self.refuse_if_full(function_name)
            self._count += 1

    def refuse_if_full(self, function_name: str) -> None:
        """Raises AtCapacity when too many wait."""
        if self._count >= self._max_waiting:
            raise AtCapacity(
                f"function {function_name} at capacity, and the backlog is full:"
                f" {self._count} executions wait (max_waiting)",
                retry_after=5,
            )

    def give_up_place(self) -> None:
        with self._lock:
            self._count -= 1

    def add(self, execution: Execution, *, waits_for_resources: bool) -> None:
        """Queue an admitted one; it may get its slot before this returns.

        One that comes back (the agent it was sent to refused it) goes where it was.
        """
        name = execution.function_name
        placed: Placed = []
        with self._lock:
            queue = self._queues.setdefault(name, OrderedDict())
            queue[execution.execution_id] = execution
            if execution.sequence:
                if next(iter(queue)) != execution.execution_id:
                    self._queues[name] = OrderedDict(sorted(queue.items(), key=lambda item: item[1].sequence))
            else:
                execution.sequence = next(self._order)
            if waits_for_resources:
                self._waits_for_resources.add(name)
            if len(queue) == 1:
                # Behind others there is nothing to look for: every change since they came was offered to them.
                placed = self._serve([name], "")
        self._tell(placed)

    def remove(self, execution: Execution) -> bool:
        """Take it out. False: it has its slot already, or was never here."""
        with self._lock:
            queue = self._queues.get(execution.function_name)
            if queue is None or queue.pop(execution.execution_id, None) is None:
                return False
            self._removed(execution.function_name, queue)
            return True

    def remove_all(self, function_name: str = "") -> list[Execution]:
        """Take out everything, or everything of one function."""
        with self._lock:
            names = [function_name] if function_name else list(self._queues)
            removed = [one for name in names for one in self._queues.pop(name, {}).values()]
            self._waits_for_resources.difference_update(names)
            self._count -= len(removed)
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

    # -- looking -----------------------------------------------------------------------

    def has(self, function_name: str) -> bool:
        """Whether somebody waits for this function: a newcomer must not overtake."""
        return function_name in self._queues

    def counts(self) -> Mapping[str, int]:
        """Function → how many wait."""
        with self._lock:
            return {name: len(queue) for name, queue in self._queues.items()}

    def __contains__(self, execution: Execution) -> bool:
        with self._lock:
            return execution.execution_id in self._queues.get(execution.function_name, ())

    # -- under the lock ----------------------------------------------------------------

    def _serve(self, names: Iterable[str], agent_id: str) -> Placed:
        """What frees belongs to no function in particular: whoever has waited longest comes first."""
        placed: Placed = []
        heap = [(self._first_sequence(name), name) for name in names]
        heapq.heapify(heap)
        while heap and not (agent_id and self._is_full(agent_id)):
            name = heapq.heappop(heap)[1]
            reservation = self._place(name, agent_id)
            if reservation is None:
                continue
            queue = self._queues[name]
            _, execution = queue.popitem(last=False)
            self._removed(name, queue)
            placed.append((execution, reservation))
            if queue:
                heapq.heappush(heap, (self._first_sequence(name), name))
        return placed

    def _first_sequence(self, name: str) -> int:
        return next(iter(self._queues[name].values())).sequence

    def _removed(self, name: str, queue: OrderedDict[str, Execution]) -> None:
        self._count -= 1
        if not queue:
            del self._queues[name]
            self._waits_for_resources.discard(name)

    def _tell(self, placed: Placed) -> None:
        for execution, reservation in placed:
            self._on_slot(execution, reservation)
