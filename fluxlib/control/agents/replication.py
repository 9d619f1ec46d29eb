"""What the Flux processes that share a store tell each other about agents, and what is written of them.

Records say who belongs to the fleet and is online; one small note per round says how everybody is. A follower keeps
its own connections and synchronizes agents by itself. All of this waits for the store, so that nothing else has to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace

from fluxlib.clock import steady_time
from fluxlib.control.agents.agent import Agent
from fluxlib.control.agents.fleet import CHANGED, Fleet, present_status
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.membership import Membership
from fluxlib.control.agents.reconciler import AgentReconciler, ExecutionsPart
from fluxlib.errors import LeaseLost
from fluxlib.lifecycle import Loop
from fluxlib.model import AgentRecord, AgentStatus, NodeFigures
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

METRICS = "fleet-figures"
_LOOK_EVERY = 1.0


class Replication:
    """``loop`` runs it; ``tick(now)`` is one step, cheap when there is nothing to do. Raises StoreUnavailable."""

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        reconciler: AgentReconciler,
        membership: Membership,
        executions: ExecutionsPart,
        leadership: Leadership,
        *,
        interval: float,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._reconciler = reconciler
        self._membership = membership
        self._executions = executions
        self._leadership = leadership
        self._interval = interval
        self._next_round = 0.0
        self._led: int | None = None  # the token of the lease it led under in its last round; None = it followed
        self._behind = False  # what the last leader wrote was not read yet
        self._read_last = ""
        self._changed = ""
        self._adopted: frozenset[str] = frozenset()
        self.loop = Loop("agents", self.tick, min(interval / 2, _LOOK_EVERY), clock)
        leadership.on_change(lambda leads: self.loop.wake())
        fleet.on_unsaved(self.loop.wake)

    def tick(self, now: float) -> None:
        self._fleet.write_changes()
        lease = self._leadership.lease
        # By the token: between two ticks the lease may have been lost, held by another and taken again.
        token = lease.token if lease is not None else None
        if now >= self._next_round or token != self._led:
            self._next_round = now + self._interval
            self._behind = self._behind or (token is not None and token != self._led)
            self._led = token
            self._round(now, token is not None)
        elif self._has_news():
            self._read_records(now)
        if token is not None:
            self._adopt()

    def _round(self, now: float, leads: bool) -> None:
        # One that takes over reads what the last leader wrote at the end, even when nobody else is left.
        shared = not leads or self._behind or bool(self._leadership.others)
        if shared:
            self._read_records(now)
            self._behind = False
        if not leads:
            self._read_metrics()
        elif shared:
            self._publish_metrics()

    def _adopt(self) -> None:
        """What dead Flux processes left open goes to this one, each of them once."""
        gone = self._leadership.gone
        self._adopted &= gone  # one that was only frozen may die again
        for session in sorted(gone - self._adopted):
            lease = self._leadership.lease
            if lease is None:
                return
            try:
                self._executions.adopt(session, lease)
            except LeaseLost as error:
                self._leadership.lost(error)
                return
            self._adopted |= {session}

    # -- metrics -------------------------------------------------------------------------

    def _publish_metrics(self) -> None:
        agents = {
            agent.agent_id: {"figures": asdict(agent.figures), "heartbeat": agent.last_heartbeat}
            for agent in self._fleet.agents()
            if agent.figures is not None
        }
        lease = self._leadership.lease
        if lease is None:
            return
        try:
            self._store.set_note(METRICS, json.dumps(agents, separators=(",", ":")), lease)
        except LeaseLost as error:
            self._leadership.lost(error)

    def _read_metrics(self) -> None:
        """A follower's: the metrics the leader last shared."""
        text = self._store.note(METRICS)
        if text is None or text == self._read_last:
            return
        self._read_last = text
        for agent_id, shared in json.loads(text).items():
            # Restarts are told by our own stream, and the leader brings everything to an agent that has no stream.
            self._fleet.report(agent_id, NodeFigures.from_fields(shared["figures"]), at=shared["heartbeat"])

    # -- records -------------------------------------------------------------------------

    def _has_news(self) -> bool:
        """Whether the records have changed through another process, or this one."""
        if not self._leadership.others:
            return False
        before, self._changed = self._changed, self._store.note(CHANGED) or ""
        return self._changed != before

    def _read_records(self, now: float) -> None:
        """Who joined, left or changed through another process or by the leader."""
        # Before the store is read: what joins here meanwhile is not in that reading, and must not be dropped.
        known = {agent.agent_id: (agent, agent.stored) for agent in self._fleet.agents()}
        leads = self._leadership.leads
        for record in self._store.agents():
            agent, stored = known.pop(record.agent_id, (None, record))
            if agent is not None and stored.registered_at and record.registered_at != stored.registered_at:
                # Deregistered and registered again since: its former connection may be one to a revoked certificate.
                if self._fleet.get(record.agent_id) is not agent:
                    continue  # by this process, a moment ago
                self._fleet.remove(record.agent_id)
                self._membership.let_go(agent, kill=False)
                agent = None
            if agent is None:
                agent = self._fleet.admit(record, now)
                self._join(agent, now)
            elif record != stored:
                # What was saved here since the store was read is newer than that reading, which must not undo it: the
                # record that was known before it tells.
                (self._merge if leads else self._follow)(agent, record, stored)
            if not leads:
                self._join(agent, now)
        for agent, _ in known.values():
            if self._fleet.get(agent.agent_id) is not agent:
                continue
            log.info("agent %s was deregistered through another Flux", agent.agent_id)
            self._fleet.remove(agent.agent_id)
            self._membership.let_go(agent, kill=False)

    def _join(self, agent: Agent, now: float) -> None:
        """Connect where the leader says there is an agent; failures are tried again with growing pauses."""
        waiting = agent.behind and agent.retry_at > now
        if agent.stored.status.present and not agent.present and not waiting:
            self._reconciler.reconcile(agent)

    def _follow(self, agent: Agent, record: AgentRecord, known: AgentRecord) -> None:
        """A follower's: the record as it is, except that nobody is present before this process has joined it."""
        before = agent.record

        def change(mine: AgentRecord) -> AgentRecord:
            status = record.status if mine.status.present or not record.status.present else AgentStatus.OFFLINE
            return replace(record, status=status)

        if not self._fleet.read_anew(agent, known, record, change):
            return
        if before.status.present and not record.status.present:
            self._fleet.follow_offline(agent, record)
        elif before.address != record.address and before.status.present:
            self._fleet.must_connect(agent)
            self._reconciler.reconcile(agent)

    def _merge(self, agent: Agent, record: AgentRecord, known: AgentRecord) -> None:
        """The leader's: what people changed elsewhere counts, its own judgement of presence stays."""
        moved = agent.record.address != record.address

        def change(mine: AgentRecord) -> AgentRecord:
            status = mine.status
            if record.status is AgentStatus.PROVISIONING:
                status = AgentStatus.PROVISIONING
            elif status.present:
                status = present_status(record)
            elif status is AgentStatus.PROVISIONING:
                status = AgentStatus.OFFLINE
            return replace(record, status=status, offline_since=mine.offline_since, last_heartbeat=mine.last_heartbeat)

        if self._fleet.read_anew(agent, known, record, change) and moved:
            self._fleet.must_connect(agent)
            self._reconciler.reconcile(agent)
