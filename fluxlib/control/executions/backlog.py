"""Executions that wait for room: first come, first served per function.

The room looks for slots itself, at the moment it is told of one and on the
thread that frees it: nothing polls. Order of locks: the room's, then the
registry's. The registry calls its capacity listeners without its own.

A lost wake-up is impossible: an execution is queued before it looks for a slot
for the last time, under the lock that every announcement takes.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from fluxlib.control.agents.registry import Reservation
from fluxlib.control.executions.execution import Execution
from fluxlib.errors import AtCapacity

Place = Callable[[str, str], Reservation | None]
OnSlot = Callable[[Execution, Reservation], None]


class WaitingRoom:
    """Every queue of this process.

    ``place(function_name, agent_id)`` reserves a slot at this agent ("" = at any) or answers None,
    ``on_slot(execution, reservation)`` is told who got it. Both are called under the room's lock: they must be
    quick, and call nothing here.
    """

    def __init__(self, place: Place, on_slot: OnSlot, max_waiting: int) -> None:
        self._place = place
        self._on_slot = on_slot
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._queues: dict[str, OrderedDict[str, Execution]] = {}
        self._count = 0
        self._order = itertools.count()
        # A freed slot of one function may be the memory that another one waits for.
        self._pressed: set[str] = set()

    def join(self, execution: Execution, *, pressed: bool, invited: bool = False) -> None:
        """Queue it; it may get its slot before this returns.

        ``invited``: it was accepted before and must not be turned away. One that comes back (the agent it
        was given to refused it) goes where it was. Raises AtCapacity when too many wait.
        """
        name = execution.function_name
        with self._lock:
            if not invited:
                self.refuse_if_full(name)
            queue = self._queues.setdefault(name, OrderedDict())
            queue[execution.execution_id] = execution
            self._count += 1
            execution.pressed = pressed
            if execution.sequence:
                if next(iter(queue)) != execution.execution_id:
                    self._queues[name] = OrderedDict(sorted(queue.items(), key=lambda item: item[1].sequence))
            else:
                execution.sequence = next(self._order) + 1
            if pressed:
                self._pressed.add(name)
            if len(queue) == 1:
                # Behind others there is nothing to look for: every change since they came was offered to them.
                self._serve_in_turn([name], "")

    def refuse_if_full(self, function_name: str) -> None:
        """Raises AtCapacity when too many wait. Needs no lock: a first look before anything is written."""
        if self._count >= self._max_waiting:
            raise AtCapacity(
                f"function {function_name} at capacity, and {self._count} executions wait already (max_waiting)",
                retry_after=5,
            )

    def leave(self, execution: Execution) -> bool:
        """Take it out. False: it has its slot already (or never waited), and whoever drives it goes on."""
        with self._lock:
            queue = self._queues.get(execution.function_name)
            if queue is None or queue.pop(execution.execution_id, None) is None:
                return False
            self._removed(execution.function_name, queue)
            return True

    def leave_all(self, function_name: str = "") -> list[Execution]:
        """Take out everything, or everything of one function."""
        with self._lock:
            names = [function_name] if function_name else list(self._queues)
            left = [one for name in names for one in self._queues.pop(name, {}).values()]
            self._pressed.difference_update(names)
            self._count -= len(left)
            return left

    def capacity(self, agent_id: str, function_name: str | None) -> None:
        """A slot may have freed (Registry.on_capacity). Costs nothing while nobody waits."""
        if not self._queues:
            return
        with self._lock:
            if function_name is None:
                names = list(self._queues)
            else:
                names = [name for name in self._queues if name == function_name or name in self._pressed]
            # Only where something changed: elsewhere there was no room before either.
            self._serve_in_turn(names, agent_id)

    def has(self, function_name: str) -> bool:
        """Whether somebody waits for this function: a newcomer must not overtake."""
        return function_name in self._queues

    def all(self) -> list[Execution]:
        with self._lock:
            return [one for queue in self._queues.values() for one in queue.values()]

    def counts(self) -> Mapping[str, int]:
        """Function → how many wait."""
        with self._lock:
            return {name: len(queue) for name, queue in self._queues.items()}

    # -- under the lock ----------------------------------------------------------------

    def _serve_in_turn(self, names: list[str], agent_id: str) -> None:
        """What frees belongs to no function in particular: whoever has waited longest comes first."""
        while names:
            name = min(names, key=self._first_sequence) if len(names) > 1 else names[0]
            if not self._serve_one(name, agent_id) or name not in self._queues:
                names.remove(name)

    def _first_sequence(self, name: str) -> int:
        return next(iter(self._queues[name].values())).sequence

    def _serve_one(self, name: str, agent_id: str) -> bool:
        reservation = self._place(name, agent_id)
        if reservation is None:
            return False
        queue = self._queues[name]
        _, execution = queue.popitem(last=False)
        self._removed(name, queue)
        self._on_slot(execution, reservation)
        return True

    def _removed(self, name: str, queue: OrderedDict[str, Execution]) -> None:
        self._count -= 1
        if not queue:
            del self._queues[name]
            self._pressed.discard(name)
