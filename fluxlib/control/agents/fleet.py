"""The agents as this Flux sees them this second, in memory, ordered by headroom.

Choosing does not look at every agent: the agents that can take work are kept in
falling order of headroom, moved by one insertion when a reservation, a release
or a report changes them. :meth:`Fleet.place` walks that order until the
caller's rule is content, and reserves in the same step, so that two threads
cannot both take the last slot.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fluxlib.control.agents.agent import Agent, free_share
from fluxlib.control.agents.connection import AgentConnection
from fluxlib.control.agents.ranking import Key, Ranking
from fluxlib.model import AgentStatus, NodeFigures, Platform

__all__ = ["Agent", "Choose", "Fleet", "Headroom", "Reservation", "free_share"]


@dataclass(slots=True, eq=False)
class Reservation:
    """A slot taken at an agent until :meth:`Fleet.release`."""

    agent: Agent
    function_name: str
    memory_mb: int = 0
    released: bool = False

    @property
    def agent_id(self) -> str:
        return self.agent.agent_id


Headroom = Callable[[Agent], float]
Choose = Callable[[Iterator[Agent]], Agent | None]
OnCapacity = Callable[[str, str | None], None]
OnChange = Callable[[str], None]


class Fleet:
    """All agents. Every method may be called from any thread; none of them blocks on I/O.

    ``headroom`` ranks agents (greater = freer); it is called under the lock at every
    change of an agent and must be quick and pure.
    """

    def __init__(self, headroom: Headroom = free_share) -> None:
        self._headroom = headroom
        self._lock = threading.Lock()
        self._agents: dict[str, Agent] = {}
        self._by_id: tuple[Agent, ...] | None = ()  # None = to be sorted anew
        self._rankings: dict[Platform, Ranking] = {}  # only agents that take work
        self._turn = itertools.count()
        self._on_capacity: list[OnCapacity] = []
        self._on_change: list[OnChange] = []

    # -- reading -------------------------------------------------------------------

    def get(self, agent_id: str) -> Agent | None:
        return self._agents.get(agent_id)

    def connection(self, agent_id: str) -> AgentConnection | None:
        """To ask the agent something; None while it is offline or unknown."""
        agent = self._agents.get(agent_id)
        return None if agent is None or agent.record.status is AgentStatus.OFFLINE else agent.connection

    def agents(self) -> Sequence[Agent]:
        """Every agent, by ID."""
        with self._lock:
            if self._by_id is None:
                self._by_id = tuple(self._agents[agent_id] for agent_id in sorted(self._agents))
            return self._by_id

    def placeable(self) -> int:
        """How many agents take work now."""
        with self._lock:
            return sum(map(len, self._rankings.values()))

    def full_everywhere(self, function_name: str, platforms: Sequence[Platform] = ()) -> bool:
        """Whether agents of these platforms take work, and none has a slot left for this function.

        Known without a walk.
        """
        with self._lock:
            rankings = self._rankings_for(platforms)
            return bool(rankings) and all(ranking.all_full(function_name) for ranking in rankings)

    # -- slots ---------------------------------------------------------------------

    def place(
        self,
        function_name: str,
        choose: Choose,
        *,
        slots: int = 0,
        memory_mb: int = 0,
        platforms: Sequence[Platform] = (),
        only: str = "",
    ) -> Reservation | None:
        """Let ``choose`` pick from the agents that take work, most headroom first, and reserve there.

        Agents without a slot for the function are not shown, nor those that lack it or are of another platform
        than ``platforms`` (empty = any): idle ones of the wrong kind would be walked over by every call.
        ``slots`` is the function's ``max_concurrency`` per agent (0 = not limited). ``choose`` runs under the
        lock: it must be quick and call nothing here. ``only``: the one agent that may take it. None when it
        picks none.
        """
        with self._lock:
            rankings = [one for one in self._rankings_for(platforms) if not one.all_full(function_name)]
            if not rankings:
                return None
            agent = choose(self._candidates(function_name, rankings, only))
            return None if agent is None else self._reserve(agent, function_name, slots, memory_mb)

    def reserve(self, agent_id: str, function_name: str, *, slots: int = 0, memory_mb: int = 0) -> Reservation | None:
        """Count an execution that this agent has already, whatever its limits; None for an unknown agent."""
        with self._lock:
            agent = self._agents.get(agent_id)
            return None if agent is None else self._reserve(agent, function_name, slots, memory_mb)

    def release(self, reservation: Reservation) -> None:
        """Give the slot back; a second time does nothing. Tells the capacity listeners."""
        with self._lock:
            if reservation.released:
                return
            reservation.released = True
            agent, name = reservation.agent, reservation.function_name
            agent.total -= 1
            left = agent.in_flight.get(name, 0) - 1
            if left > 0:
                agent.in_flight[name] = left
            else:
                agent.in_flight.pop(name, None)
                agent.slots.pop(name, None)
            agent.reserved_memory_mb -= reservation.memory_mb
            if self._agents.get(agent.agent_id) is not agent:
                return
            whole = "" in agent.full
            self._set_full(agent, (agent.full - {"", name}) | agent.full_by_count(agent.expected_active))
            self._rank(agent)
        self._tell_capacity(agent.agent_id, None if whole else name)

    def mark_full(self, agent_id: str, function_name: str) -> None:
        """The agent refused one at capacity: others fill it. Until a slot frees, it says so, or it reports."""
        with self._lock:
            agent = self._agents.get(agent_id)
            if agent is not None:
                self._set_full(agent, agent.full | {function_name})

    def freed(self, agent_id: str, function_name: str) -> None:
        """The agent says that it can take this function again ("" = anything)."""
        with self._lock:
            agent = self._agents.get(agent_id)
            if agent is None:
                return
            # By our own count only: what the last report says of other people's tasks is older than this.
            left = agent.full - {"", function_name} if function_name else set()
            self._set_full(agent, left | agent.full_by_count(agent.total))
        self._tell_capacity(agent_id, function_name or None)

    def function_changed(self, function_name: str) -> None:
        """Its spec changed: what was full by its former limit may have room."""
        with self._lock:
            for agent in self._agents.values():
                agent.slots.pop(function_name, None)
                if function_name in agent.full:
                    self._set_full(agent, agent.full - {function_name})
        self._tell_capacity("", function_name)

    # -- what membership says ------------------------------------------------------------

    def add(self, state: Agent) -> None:
        """A new agent, or a new life of one under the same ID."""
        with self._lock:
            former = self._agents.get(state.agent_id)
            if former is not None:
                self._set_full(former, set())
                self._unrank(former)
            self._agents[state.agent_id] = state
            self._by_id = None
            self._rank(state)
        self._tell_change(state)

    def remove(self, agent_id: str) -> Agent | None:
        with self._lock:
            state = self._agents.get(agent_id)
            if state is None:
                return None
            self._set_full(state, set())
            self._unrank(state)
            del self._agents[agent_id]
            self._by_id = None
        for listener in self._on_change:
            listener(agent_id)
        return state

    def update(self, agent_id: str, **changes: Any) -> Agent | None:
        """Set attributes of an agent's state in one step. Tells the listeners."""
        with self._lock:
            state = self._agents.get(agent_id)
            if state is None:
                return None
            for name, value in changes.items():
                setattr(state, name, value)
            self._rank(state)
        self._tell_change(state)
        return state

    def set_problem(self, agent_id: str, problem: str) -> None:
        """Why it takes no work, for people."""
        self.update(agent_id, problem=problem)

    def report(self, agent_id: str, figures: NodeFigures, *, at: float, instance_id: str | None = None) -> None:
        """Fresh figures. What was marked full by a refusal gets a new chance.

        ``instance_id``: the life they are of; None = whichever is known.
        """
        with self._lock:
            state = self._agents.get(agent_id)
            if state is None:
                return
            state.figures = figures
            state.last_heartbeat = at
            if instance_id is not None:
                state.instance_id = instance_id
            state._total_at_report = state.total
            state._memory_at_report = state.reserved_memory_mb
            self._set_full(state, state.full_by_count(state.expected_active))
            self._rank(state)
        # Not only when it was full: memory and CPU are waited for too.
        self._tell_capacity(agent_id, None)

    # -- listeners -----------------------------------------------------------------------

    def on_capacity(self, listener: OnCapacity) -> None:
        """``listener(agent_id, function_name)``: a slot may have freed there; None = for any function.

        Called from any thread without the lock, also on the path of an execution: be quick.
        The agent ID is "" when any agent may have room.
        """
        self._on_capacity.append(listener)

    def on_change(self, listener: OnChange) -> None:
        """``listener(agent_id)``: the agent joined, left, or changed what it can take."""
        self._on_change.append(listener)

    def _tell_capacity(self, agent_id: str, function_name: str | None) -> None:
        for listener in self._on_capacity:
            listener(agent_id, function_name)

    def _tell_change(self, state: Agent) -> None:
        for listener in self._on_change:
            listener(state.agent_id)
        if state.takes_work:
            self._tell_capacity(state.agent_id, None)

    # -- under the lock ------------------------------------------------------------------

    def _rankings_for(self, platforms: Sequence[Platform]) -> list[Ranking]:
        return [
            ranking
            for platform, ranking in self._rankings.items()
            if len(ranking) and (not platforms or any(platform.matches(wanted) for wanted in platforms))
        ]

    def _candidates(self, function_name: str, rankings: list[Ranking], only: str) -> Iterator[Agent]:
        if only:
            found = self._agents.get(only)
            keys: Iterable[Key] = (found._key,) if found is not None and found._ranking in rankings else ()
        else:
            walks = [ranking.falling() for ranking in rankings]
            keys = walks[0] if len(walks) == 1 else heapq.merge(*walks, reverse=True)
        for _, _, agent_id in keys:
            agent = self._agents[agent_id]
            if function_name not in agent.full and "" not in agent.full and function_name not in agent.lacking:
                yield agent

    def _reserve(self, agent: Agent, function_name: str, slots: int, memory_mb: int) -> Reservation:
        running = agent.in_flight.get(function_name, 0) + 1
        agent.in_flight[function_name] = running
        agent.total += 1
        agent.reserved_memory_mb += memory_mb
        if slots:
            agent.slots[function_name] = slots
        full = {function_name} if slots and running >= slots else set()
        if agent.max_tasks and agent.expected_active >= agent.max_tasks:
            full.add("")
        if not full <= agent.full:
            self._set_full(agent, agent.full | full)
        self._rank(agent)
        return Reservation(agent, function_name, memory_mb)

    def _set_full(self, agent: Agent, full: set[str]) -> None:
        if agent._ranking is not None:
            agent._ranking.count(agent.full, -1)
            agent._ranking.count(full, 1)
        agent.full = full

    def _rank(self, agent: Agent) -> None:
        self._unrank(agent)
        if not agent.takes_work:
            return
        headroom = self._headroom(agent)
        # A figure that is no number compares with nothing and would break the order for everybody.
        if math.isnan(headroom):
            headroom = -math.inf
        # Among equals the one that changed longest ago comes first: light load goes round.
        agent._key = (headroom, -next(self._turn), agent.agent_id)
        agent._ranking = self._rankings.setdefault(agent.platform, Ranking())
        agent._ranking.insert(agent._key, agent.full)

    def _unrank(self, agent: Agent) -> None:
        if agent._ranking is not None:
            agent._ranking.remove(agent._key, agent.full)
            agent._ranking = None
