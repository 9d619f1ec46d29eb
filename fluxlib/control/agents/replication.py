"""What the leader tells the Flux processes that follow, through the store they share.

Records say who belongs to the fleet and is online; one small fact per round says how
everybody is. A follower keeps its own connections and brings agents in step by itself.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace

from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.member import STEP_IN, Member, Wanted
from fluxlib.control.agents.membership import Membership
from fluxlib.control.agents.reconciler import Joiner
from fluxlib.control.agents.roster import CHANGED, Roster, present_status
from fluxlib.errors import LeaseLost
from fluxlib.model import AgentRecord, AgentStatus, NodeFigures
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

FACT = "fleet-figures"


class Sharing:
    """Called by the health poller only."""

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        roster: Roster,
        joiner: Joiner,
        membership: Membership,
        leadership: Leadership,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._roster = roster
        self._joiner = joiner
        self._membership = membership
        self._leadership = leadership
        self._read_last = ""
        self._changed = ""

    def publish(self) -> None:
        """The leader's figures for everybody. Raises StoreUnavailable."""
        agents = {
            state.agent_id: {
                "figures": asdict(state.figures),
                "heartbeat": state.last_heartbeat,
            }
            for state in self._fleet.agents()
            if state.figures is not None
        }
        lease = self._leadership.lease
        if lease is None:
            return
        try:
            self._store.set_note(FACT, json.dumps(agents, separators=(",", ":")), lease)
        except LeaseLost as error:
            self._leadership.lost(error)

    def take_figures(self) -> None:
        """A follower's: the figures the leader last shared. Raises StoreUnavailable."""
        text = self._store.note(FACT)
        if text is None or text == self._read_last:
            return
        self._read_last = text
        for agent_id, shared in json.loads(text).items():
            # Restarts are told by our own stream, and the leader brings everything to an original that has no stream.
            self._fleet.report(agent_id, NodeFigures.from_fields(shared["figures"]), at=shared["heartbeat"])

    def has_news(self) -> bool:
        """Whether the records have changed through another process, or this one. Raises StoreUnavailable."""
        if not self._leadership.others:
            return False
        before, self._changed = self._changed, self._store.note(CHANGED) or ""
        return self._changed != before

    def take_records(self, now: float) -> None:
        """Who joined, left or changed through another process or by the leader. Raises StoreUnavailable."""
        # Before the store is read: what joins here meanwhile is not in that reading, and must not be dropped.
        known = {member.agent_id: (member, member.stored) for member in self._roster.all()}
        leads = self._leadership.leads
        for record in self._store.agents():
            member, stored = known.pop(record.agent_id, (None, record))
            if member is None:
                member = self._roster.admit(record, now)
                self._join(member, now)
            elif record != stored:
                (self._heed if leads else self._follow)(member, record, stored)
            if not leads:
                self._join(member, now)
        for member, _ in known.values():
            log.info("agent %s was deregistered through another Flux", member.agent_id)
            self._membership.let_go(member.agent_id, self._roster.forget(member), kill=False)

    def _join(self, member: Member, now: float) -> None:
        """Connect where the leader says there is an agent; failures are tried again with growing pauses."""
        state = self._fleet.get(member.agent_id)
        waiting = member.retry.behind and member.retry.at > now
        if state is not None and member.stored.status.present and not state.record.status.present and not waiting:
            self._joiner.want(member, STEP_IN)

    # What was saved here since the store was read is newer than that reading, which must not undo it: the record
    # that was known before it tells.

    def _follow(self, member: Member, record: AgentRecord, known: AgentRecord) -> None:
        """A follower's: the record as it is, except that nobody is present before this process has joined it."""
        state = self._fleet.get(member.agent_id)
        with member.condition:
            if member.stored is not known:
                return
            member.stored = record
        if state is None:
            return
        before = state.record
        if before.status.present and not record.status.present:
            self._roster.note(
                member, lambda mine: record, in_step=False, problem="is offline, says the Flux that leads"
            )
            if state.connection is not None:
                state.connection.fail_in_flight(f"agent {member.agent_id} is offline")
            return
        status = record.status if before.status.present or not record.status.present else AgentStatus.OFFLINE
        self._roster.note(member, lambda mine: replace(record, status=status))
        if before.address != record.address and before.status.present:
            self._joiner.want(member, STEP_IN | Wanted.RECONNECT)

    def _heed(self, member: Member, record: AgentRecord, known: AgentRecord) -> None:
        """The leader's: what people changed elsewhere counts, its own judgement of presence stays."""

        def change(mine: AgentRecord) -> AgentRecord:
            status = mine.status
            if record.status is AgentStatus.PROVISIONING:
                status = AgentStatus.PROVISIONING
            elif status.present:
                status = present_status(record)
            elif status is AgentStatus.PROVISIONING:
                status = AgentStatus.OFFLINE
            return replace(record, status=status, offline_since=mine.offline_since, last_heartbeat=mine.last_heartbeat)

        with member.condition:
            if member.stored is not known:
                return
            member.stored = record
            state = self._fleet.get(member.agent_id)
            moved = state is not None and state.record.address != record.address
            self._roster.note(member, change)
        if moved:
            self._joiner.want(member, STEP_IN | Wanted.RECONNECT)
