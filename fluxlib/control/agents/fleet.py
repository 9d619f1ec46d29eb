"""The fleet: which agents belong to it, their records in the store, and who of them takes work, by headroom.

Choosing does not look at every agent: the agents that take work are kept in falling order of headroom, moved by one
insertion when a reservation, a release or a report changes them. :meth:`Fleet.place` walks that order until the
caller's rule is content, and reserves in the same step, so that two threads cannot both take the last slot.

What a person asked for is written before it counts here. What this process judges counts here at once and is written
afterwards by :meth:`Fleet.write_changes`, under the leader's lease: judging never waits for the store.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from fluxlib.control.agents.agent import Agent, SyncState, free_share
from fluxlib.control.agents.connection import AgentConnection, ProbeResult
from fluxlib.control.agents.ranking import Key, Ranking
from fluxlib.errors import LeaseLost, NotFound, StoreUnavailable
from fluxlib.model import AgentRecord, AgentStatus, FunctionState, Inventory, NodeFigures, Platform
from fluxlib.rpc.codec import NodeReport
from fluxlib.store.base import ControlStore, Lease

__all__ = ["Agent", "Choose", "Fleet", "Headroom", "Reservation", "SyncState", "free_share"]

log = logging.getLogger(__name__)

MISSES = 3  # health checks in a row without an answer, after which an agent is offline
# Seconds until what failed at an agent is tried again: twice as long each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 30.0
# A note of the store that is another after every change that other Flux processes should not wait for.
CHANGED = "agents-changed"
DRAINING = "draining"  # in AgentRecord.extra: it outlives the agent's being offline

Change = Callable[[AgentRecord], AgentRecord]
T = TypeVar("T")


def present_status(record: AgentRecord) -> AgentStatus:
    """The status of an agent that answers."""
    return AgentStatus.DRAINING if record.extra.get(DRAINING) else AgentStatus.ONLINE


class Leads(Protocol):
    """What the fleet asks of the leadership."""

    @property
    def lease(self) -> Lease | None: ...

    @property
    def term(self) -> int | None: ...

    @property
    def others(self) -> frozenset[str]: ...

    def lost(self, error: LeaseLost) -> None: ...


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
    """All agents. Every method may be called from any thread; only those under "records" wait for the store.

    ``headroom`` ranks agents (greater = freer); it is called under the lock at every
    change of an agent and must be quick and pure. Without a store (simulations) there are no records to keep.
    """

    def __init__(
        self,
        store: ControlStore | None = None,
        leadership: Leads | None = None,
        *,
        headroom: Headroom = free_share,
    ) -> None:
        self._durable = _Durable(store, leadership) if store is not None and leadership is not None else None
        self._headroom = headroom
        self._lock = threading.Lock()  # guards every agent's fields; held for no longer than a change in memory
        self._agents: dict[str, Agent] = {}
        self._by_id: tuple[Agent, ...] | None = ()  # None = to be sorted anew
        self._rankings: dict[Platform, Ranking] = {}  # only agents that take work
        self._turn = itertools.count()
        self._on_capacity: list[OnCapacity] = []
        self._on_change: list[OnChange] = []
        self._on_unsaved: list[Callable[[], object]] = []

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

    # -- membership ----------------------------------------------------------------------

    def add(self, agent: Agent) -> None:
        """A new agent, or another one in place of that with the same ID."""
        with self._lock:
            former = self._agents.get(agent.agent_id)
            if former is not None:
                self._set_full(former, set())
                self._unrank(former)
            self._agents[agent.agent_id] = agent
            self._by_id = None
            self._rank(agent)
        self._tell_change(agent)

    def remove(self, agent_id: str) -> Agent | None:
        with self._lock:
            agent = self._agents.get(agent_id)
            if agent is None:
                return None
            agent.removed = True
            agent.connection_number += 1
            self._set_full(agent, set())
            self._unrank(agent)
            del self._agents[agent_id]
            self._by_id = None
        for listener in self._on_change:
            listener(agent_id)
        return agent

    def admit(self, record: AgentRecord, now: float) -> Agent:
        """Keep an agent that is in the store; offline here until this process has reached it."""
        with self._lock:
            known = self._agents.get(record.agent_id)
        if known is not None:
            return known
        agent = Agent(record)
        if record.status is not AgentStatus.PROVISIONING:
            # Whoever wrote it may have had a clock that was ahead.
            agent.record = replace(
                record, status=AgentStatus.OFFLINE, offline_since=min(record.offline_since or now, now)
            )
        agent.problem = "was not asked yet since Flux started" if record.address else ""
        self.add(agent)
        return agent

    def untried(self) -> Sequence[str]:
        """The agents that were online before this process started, and that it has not tried to reach yet."""
        return [agent.agent_id for agent in self.agents() if not agent.tried and agent.stored.status.present]

    # -- what is observed of an agent ----------------------------------------------------

    def seen(self, agent: Agent, report: NodeReport, now: float) -> None:
        """It answered a health check. One that has restarted gets no work before it is compared again."""
        with self._change(agent):
            if agent.misses or not agent.present:
                agent.retry_at = 0.0
            agent.misses = 0
            restarted = report.instance_id not in ("", agent.instance_id)
            # Its functions have changed since they were compared: by a push of ours, or by somebody else.
            agent.behind = agent.behind or report.inventory_revision != agent.revision
            self._take_report(agent, report.figures, now, report.instance_id)
            if restarted and agent.present:
                self._to_be_compared(agent)
        self._tell_capacity(agent.agent_id, None)

    def missed(self, agent: Agent, reason: str, now: float) -> None:
        """It did not answer a health check; the third time in a row it is offline, and its calls have failed."""
        with self._change(agent):
            agent.misses += 1
            away = agent.present and agent.misses >= MISSES
            if away or not agent.present:
                agent.problem = f"is offline: {reason}"
            if away:
                self._take_offline(agent, now)
        if away:
            log.warning("agent %s is unreachable after %d health checks: %s", agent.agent_id, MISSES, reason)
            if agent.connection is not None:
                # A vanished host closes nothing, and a legacy agent must not be pinged: no call may wait for it.
                agent.connection.fail_in_flight(f"agent {agent.agent_id} is offline: {reason}")
            self._tell_unsaved()

    def greeted(self, agent: Agent, instance_id: str) -> bool:
        """Its stream says which process it is; whether that is another one, which is to be compared."""
        with self._change(agent):
            restarted = agent.instance_id != instance_id and agent.present
            agent.instance_id = instance_id
            # Whether an absent one is back is the leader's to say.
            if restarted:
                self._to_be_compared(agent)
        return restarted

    def set_reachable(self, agent: Agent, reachable: bool, problem: str | None = None) -> None:
        """Whether executions can be sent now."""
        with self._change(agent):
            agent.reachable = reachable
            agent.problem = agent.problem if problem is None else problem

    def report(self, agent_id: str, figures: NodeFigures, *, at: float, instance_id: str | None = None) -> None:
        """Fresh figures. What was marked full by a refusal gets a new chance.

        ``instance_id``: the process they are of; None = whichever is known.
        """
        with self._lock:
            agent = self._agents.get(agent_id)
            if agent is None:
                return
            self._take_report(agent, figures, at, instance_id)
            self._rank(agent)
        # Not only when it was full: memory and CPU are waited for too.
        self._tell_capacity(agent_id, None)

    def set_problem(self, agent_id: str, problem: str) -> None:
        """Why it takes no work, for people."""
        agent = self._agents.get(agent_id)
        if agent is not None:
            with self._change(agent):
                agent.problem = problem

    def set_certificate_end(self, agent: Agent, not_after: float) -> None:
        with self._change(agent):
            agent.certificate_not_after = not_after

    # -- synchronization: the reconciler's ------------------------------------------------

    def must_connect(self, agent: Agent, probe: ProbeResult | None = None) -> None:
        """There is no connection to it, or it was made for another program. ``probe``: what it has just answered."""
        with self._change(agent):
            agent.state, agent.probe = SyncState.CONNECTING, probe
            agent.retry_at = 0.0

    def must_compare(self, agent: Agent) -> None:
        """What it runs is to be compared with what Flux thinks it runs."""
        with self._change(agent):
            agent.executions_compared = False
            agent.retry_at = 0.0

    def connecting(self, agent: Agent, probe: ProbeResult, features: tuple[str, ...], *, reachable: bool) -> int:
        """A connection is about to be made, whose events may overtake its return; its number."""
        with self._change(agent):
            agent.connection_number += 1
            agent.executions_compared = False
            agent.features, agent.reachable, agent.state = features, reachable, SyncState.CONNECTING
            agent.record = replace(
                agent.record, original=probe.inventory is None, legacy_certificate=probe.legacy_certificate
            )
            return agent.connection_number

    def connected(self, agent: Agent, connection: AgentConnection) -> bool:
        """False: the agent was removed meanwhile."""
        with self._change(agent):
            if not agent.removed:
                agent.connection = connection
                # One that is present elsewhere in this process stays so; its state says that it gets no work yet.
                agent.state = SyncState.SYNCING if agent.present else SyncState.OFFLINE
        return not agent.removed

    def take_inventory(self, agent: Agent, inventory: Inventory) -> None:
        with self._change(agent):
            agent.record = replace(
                agent.record,
                platform=inventory.platform,
                version=inventory.version,
                isolation=inventory.isolation,
                enforces=inventory.enforces,
                max_tasks=inventory.max_tasks,
            )
            agent.revision = inventory.revision
            agent.isolation_notes = inventory.isolation_notes
            agent.certificate_not_after = inventory.certificate_not_after

    def syncing(self, agent: Agent, now: float) -> None:
        """It answers: present from now on, and gets no work before it is ready."""
        with self._change(agent):
            if not agent.present:
                agent.state, agent.problem = SyncState.SYNCING, "synchronizing functions"
                agent.record = replace(
                    agent.record, status=present_status(agent.record), offline_since=0.0, last_heartbeat=now
                )
            agent.unsaved = True
        self._tell_unsaved()

    def compared(self, agent: Agent) -> None:
        """What it runs was compared."""
        with self._change(agent):
            agent.executions_compared, agent.given_up = True, False

    def gave_up(self, agent: Agent) -> None:
        """What it ran has failed: it was offline for too long."""
        with self._change(agent):
            agent.executions_compared, agent.given_up = False, True

    def set_functions(
        self,
        agent: Agent,
        holds: Mapping[str, FunctionState],
        missing: Mapping[str, str],
        *,
        unstartable: frozenset[str] | None = None,
        anew: bool = False,
    ) -> None:
        """What it holds, and what it could not be given. New mappings: readers take no lock.

        ``anew``: everything is compared from here on, so that nothing counts as missed before.
        """
        with self._change(agent):
            agent.holds, agent.missing_functions = dict(holds), dict(missing)
            agent.unstartable = agent.unstartable if unstartable is None else unstartable
            agent.behind = agent.behind and not anew

    def missed_a_function(self, agent: Agent) -> None:
        """It did not answer a push, which is worth a retry."""
        with self._change(agent):
            agent.behind = True

    def in_sync(self, agent: Agent, revision: int) -> None:
        """It holds what it should as of this revision: nothing needs to be compared."""
        with self._change(agent):
            agent.synced_revision = revision

    def synced(self, agent: Agent, revision: int, now: float) -> None:
        """It was given what it should hold as of this revision, or as much of it as it answered to."""
        with self._change(agent):
            if agent.state is not SyncState.SYNCING and agent.state is not SyncState.READY:
                return  # it was found offline meanwhile
            agent.state, agent.problem, agent.synced_revision = SyncState.READY, "", revision
            agent.tried = True
            if agent.behind:
                self._back_off(agent, now)
            else:
                agent.failures = 0

    def failed(self, agent: Agent, problem: str, now: float) -> None:
        """It could not be brought to take work: tried again later."""
        with self._change(agent):
            agent.tried = True
            self._back_off(agent, now)
            agent.problem = problem
            # It was online when Flux stopped, and was never reached since: that is a judgement, too.
            unsaved = agent.connection is None and agent.failures >= MISSES and agent.stored.status.present
            agent.unsaved = agent.unsaved or unsaved
        if unsaved:
            self._tell_unsaved()

    # -- records: these wait for the store ----------------------------------------------

    def load(self, now: float) -> Sequence[Agent]:
        """Everybody in the store. Raises StoreUnavailable."""
        for record in self._records.store.agents():
            self.admit(record, now)
        return self.agents()

    def enlist(self, record: AgentRecord, now: float, *, by_leader: bool = False) -> Agent:
        """A new agent, because somebody asked for it: durable when this returns. Raises StoreUnavailable.

        ``by_leader``: only as the one that leads. Raises LeaseLost when another does.
        """
        records = self._records
        records.write(lambda lease: records.store.save_agent(record, lease), by_leader)
        return self.admit(record, now)

    def save(self, agent: Agent, change: Change, *, by_leader: bool = False) -> None:
        """Because somebody asked for it: durable when this returns. Raises StoreUnavailable, NotFound.

        ``by_leader`` as for :meth:`enlist`. The change is made again of the record as it is here afterwards: what this
        process judged meanwhile must not be undone.
        """
        records = self._records
        with records.lock:
            if agent.removed:
                raise _unknown(agent)
            if by_leader or records.leadership.lease is not None:
                record = change(agent.record)
                records.update(record, by_leader)
            else:
                # Changed as the leader last wrote it: how it is here may be a round old, and presence is our own view.
                kept = records.store.agent(agent.agent_id)
                if kept is None:
                    raise _unknown(agent)
                records.update(change(kept))
                # Another object, equal: a reading under way is older than this change, the next one is followed whole.
                record = replace(agent.stored)
            with self._change(agent):
                agent.stored = record
                agent.record = change(agent.record)

    def delete(self, agent: Agent) -> Agent | None:
        """Because somebody asked for it: out of the store, then out of memory. Raises StoreUnavailable."""
        records = self._records
        with records.lock:
            records.write(lambda lease: records.store.delete_agent(agent.agent_id, lease))
            return self.remove(agent.agent_id)

    def write_changes(self) -> None:
        """Write what this process has judged, as the leader; a follower drops it. Raises StoreUnavailable.

        Stops at the first write that fails: an outage costs one timeout, not one for each agent.
        """
        for agent in self.agents():
            if agent.unsaved:
                self._write(agent)

    def _write(self, agent: Agent) -> None:
        records = self._records
        with records.lock:
            lease = records.leadership.lease
            record, stored = agent.record, agent.stored
            if lease is None:
                # Without a lease and without another leader: the store is away, and it is written later.
                agent.unsaved = records.leadership.term is not None
                return
            agent.unsaved = False  # before: what is judged meanwhile is written next time
            if agent.removed or _same(record, stored):
                return
            try:
                # Only what is there is changed: it may have been deregistered through another process.
                written = records.store.update_agent(record, lease)
            except LeaseLost as error:
                records.leadership.lost(error)
                return
            except StoreUnavailable:
                agent.unsaved = True
                raise
            if written:
                agent.stored = record
                if record.status is not stored.status:
                    records.announce()

    def read_anew(self, agent: Agent, known: AgentRecord, stored: AgentRecord, change: Change) -> bool:
        """The store has another record of it than ``known``. False: what was saved here since is newer than that.

        ``change`` makes of the record here what it should be now.
        """
        with self._records.lock, self._change(agent):
            if agent.stored is not known:
                return False
            agent.stored = stored
            agent.record = change(agent.record)
        return True

    def follow_offline(self, agent: Agent, record: AgentRecord) -> None:
        """The Flux that leads says that it is offline."""
        with self._change(agent):
            agent.record, agent.state = record, SyncState.OFFLINE
            agent.executions_compared = False
            agent.problem = "is offline, says the Flux that leads"
        if agent.connection is not None:
            agent.connection.fail_in_flight(f"agent {agent.agent_id} is offline")

    @property
    def _records(self) -> _Durable:
        assert self._durable is not None, "this fleet has no store"
        return self._durable

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

    def on_unsaved(self, listener: Callable[[], object]) -> None:
        """``listener()``: there is something for :meth:`write_changes`. Called without the lock."""
        self._on_unsaved.append(listener)

    def _tell_unsaved(self) -> None:
        for listener in self._on_unsaved:
            listener()

    def _tell_capacity(self, agent_id: str, function_name: str | None) -> None:
        for listener in self._on_capacity:
            listener(agent_id, function_name)

    def _tell_change(self, agent: Agent) -> None:
        for listener in self._on_change:
            listener(agent.agent_id)
        if agent.takes_work:
            self._tell_capacity(agent.agent_id, None)

    # -- under the lock ------------------------------------------------------------------

    @contextmanager
    def _change(self, agent: Agent) -> Iterator[None]:
        """Change an agent's fields in one step: it is ranked anew, and the listeners are told after it."""
        with self._lock:
            yield
            member = self._agents.get(agent.agent_id) is agent
            if member:
                self._rank(agent)
        if member:
            self._tell_change(agent)

    def _take_report(self, agent: Agent, figures: NodeFigures, at: float, instance_id: str | None) -> None:
        agent.figures = figures
        agent.last_heartbeat = at
        if instance_id is not None:
            agent.instance_id = instance_id
        agent._total_at_report = agent.total
        agent._memory_at_report = agent.reserved_memory_mb
        self._set_full(agent, agent.full_by_count(agent.expected_active))

    def _to_be_compared(self, agent: Agent) -> None:
        agent.executions_compared = False
        if agent.state is SyncState.READY:
            agent.state = SyncState.SYNCING
        agent.problem = "restarted: synchronizing functions"
        agent.retry_at = 0.0

    def _take_offline(self, agent: Agent, now: float) -> None:
        agent.state, agent.unsaved = SyncState.OFFLINE, True
        agent.executions_compared = False
        agent.record = replace(
            agent.record, status=AgentStatus.OFFLINE, offline_since=now, last_heartbeat=agent.last_heartbeat
        )

    def _back_off(self, agent: Agent, now: float) -> None:
        agent.behind = True
        agent.retry_at = now + min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(agent.failures, 10))
        agent.failures += 1

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
            if (
                function_name not in agent.full
                and "" not in agent.full
                and function_name not in agent.missing_functions
            ):
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


class _Durable:
    """The store of the agents' records, and the lease to write them under."""

    def __init__(self, store: ControlStore, leadership: Leads) -> None:
        self.store = store
        self.leadership = leadership
        # One writes at a time: a person's change and what this process judged must not undo each other.
        self.lock = threading.Lock()

    def update(self, record: AgentRecord, by_leader: bool = False) -> None:
        # One that was deregistered through another process a moment ago must not come back by this.
        if not self.write(lambda lease: self.store.update_agent(record, lease), by_leader):
            raise _unknown(record)

    def write(self, write: Callable[[Lease | None], T], by_leader: bool = False) -> T:
        """What a person asked for needs no lease; only what this process does by itself does (``by_leader``)."""
        lease = self.leadership.lease
        if by_leader and lease is None:
            raise LeaseLost("this process does not lead any more")
        try:
            done = write(lease)
        except LeaseLost as error:
            self.leadership.lost(error)
            if by_leader:
                raise
            done = write(None)
        self.announce()
        return done

    def announce(self) -> None:
        """Other processes read the records again within a second; without this, with their next round."""
        if self.leadership.others:
            with suppress(StoreUnavailable):
                self.store.set_note(CHANGED, secrets.token_hex(8))


def _unknown(one: Agent | AgentRecord) -> NotFound:
    return NotFound(f"there is no agent {one.agent_id}")


def _same(one: AgentRecord, other: AgentRecord) -> bool:
    """Whether they differ in nothing but the last heartbeat, which changes by the second."""
    return replace(one, last_heartbeat=0.0) == replace(other, last_heartbeat=0.0)
