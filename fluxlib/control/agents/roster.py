"""Who belongs to the fleet: each agent's durable record and what this process remembers about it.

The one place that writes agents to the store. A record is written when a person
asked for it, or by the leader under its lease; followers only read.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.member import Member
from fluxlib.errors import LeaseLost, NotFound, StoreUnavailable
from fluxlib.model import AgentRecord, AgentStatus
from fluxlib.store.base import ControlStore, Lease

log = logging.getLogger(__name__)

Change = Callable[[AgentRecord], AgentRecord]
T = TypeVar("T")
# A fact of the store that is another after every change that other Flux processes should not wait for.
CHANGED = "agents-changed"
DRAINING = "draining"  # in AgentRecord.extra: it outlives the agent's being offline


def present_status(record: AgentRecord) -> AgentStatus:
    """The status of an agent that answers."""
    return AgentStatus.DRAINING if record.extra.get(DRAINING) else AgentStatus.ONLINE


class Roster:
    """The agents' records in the store, in memory and in the fleet."""

    def __init__(self, store: ControlStore, fleet: Fleet, leadership: Leadership) -> None:
        self._store = store
        self._fleet = fleet
        self._leadership = leadership
        self._lock = threading.Lock()
        self._members: dict[str, Member] = {}

    def get(self, agent_id: str) -> Member | None:
        return self._members.get(agent_id)

    def all(self) -> Sequence[Member]:
        with self._lock:
            return list(self._members.values())

    def load(self, now: float) -> Sequence[Member]:
        """Everybody in the store. Raises StoreUnavailable."""
        for record in self._store.agents():
            self.admit(record, now)
        return self.all()

    def admit(self, record: AgentRecord, now: float) -> Member:
        """Keep an agent that is in the store; offline here until this process has talked to it."""
        with self._lock:
            known = self._members.get(record.agent_id)
            if known is not None:
                return known
            member = self._members[record.agent_id] = Member(record.agent_id, record)
        if record.status is not AgentStatus.PROVISIONING:
            # Whoever wrote it may have had a clock that was ahead.
            record = replace(record, status=AgentStatus.OFFLINE, offline_since=min(record.offline_since or now, now))
        state = Agent(record)
        state.problem = "was not asked yet since Flux started" if state.record.address else ""
        self._fleet.add(state)
        return member

    # -- writing -------------------------------------------------------------------
    # Each change is made of the record as it is then, under the member's condition: a person's
    # change and one this process judged must not undo each other.

    def enlist(self, record: AgentRecord, now: float, *, by_leader: bool = False) -> Member:
        """A new agent, because somebody asked for it: durable when this returns. Raises StoreUnavailable.

        ``by_leader``: only as the one that leads. Raises LeaseLost when another does.
        """
        self._durably(lambda lease: self._store.save_agent(record, lease), by_leader)
        return self.admit(record, now)

    def save(self, member: Member, change: Change, *, by_leader: bool = False) -> None:
        """Because somebody asked for it: durable when this returns. Raises StoreUnavailable, NotFound.

        ``by_leader`` as for :meth:`enlist`.
        """
        with member.condition:
            record = change(self._record(member))
            if by_leader or self._leadership.leads:
                self._update(record, by_leader)
                member.stored, member.unsaved = record, False
            else:
                # Changed as the leader last wrote it: how it is here may be a round old, and presence is our own view.
                kept = self._store.agent(member.agent_id)
                if kept is None:
                    raise _unknown(member)
                self._update(change(kept))
                # Another object, equal: a reading under way is older than this change, the next one is followed whole.
                member.stored = replace(member.stored)
            self._fleet.update(member.agent_id, record=record)

    def observe(self, member: Member, change: Change, **state: Any) -> None:
        """What this process saw of an agent: in memory at once, in the store when this process leads.

        A store that is away is tried again by :meth:`catch_up`.
        """
        with member.condition:
            if member.removed:
                return
            record = change(self._record(member))
            self._fleet.update(member.agent_id, record=record, **state)
            self._write(member, record)

    def note(self, member: Member, change: Change, **state: Any) -> None:
        """As :meth:`observe`, in memory only: the next observation writes it."""
        with member.condition:
            if not member.removed:
                self._fleet.update(member.agent_id, record=change(self._record(member)), **state)

    def catch_up(self, member: Member) -> None:
        """Write what a store that was away has missed."""
        with member.condition:
            if member.unsaved and not member.removed:
                self._write(member, self._record(member))

    def delete(self, member: Member) -> Agent | None:
        """Because somebody asked for it: out of the store, then out of memory. Raises StoreUnavailable."""
        with member.condition:
            self._durably(lambda lease: self._store.delete_agent(member.agent_id, lease))
            return self.forget(member)

    def forget(self, member: Member) -> Agent | None:
        """Out of memory: another process deleted it. Its last state, with the connection still open."""
        with member.condition:
            member.removed = True
            member.life += 1
        with self._lock:
            if self._members.get(member.agent_id) is member:
                del self._members[member.agent_id]
        return self._fleet.remove(member.agent_id)

    def _record(self, member: Member) -> AgentRecord:
        state = self._fleet.get(member.agent_id)
        if state is None or member.removed:
            raise _unknown(member)
        return state.record

    def _update(self, record: AgentRecord, by_leader: bool = False) -> None:
        # One that was deregistered through another process a moment ago must not come back by this.
        if not self._durably(lambda lease: self._store.update_agent(record, lease), by_leader):
            raise _unknown(record)

    def _durably(self, write: Callable[[Lease | None], T], by_leader: bool = False) -> T:
        """A person's wish needs no lease; only what this process does by itself does (``by_leader``)."""
        lease = self._leadership.lease
        if by_leader and lease is None:
            raise LeaseLost("this process does not lead any more")
        try:
            done = write(lease)
        except LeaseLost as error:
            self._leadership.lost(error)
            if by_leader:
                raise
            done = write(None)
        self._announce()
        return done

    def _write(self, member: Member, record: AgentRecord) -> None:
        lease = self._leadership.lease
        if lease is None or _same(record, member.stored):
            member.unsaved = False
            return
        try:
            # As for a person's change: only what is there is changed.
            written = self._store.update_agent(record, lease)
            if written and record.status is not member.stored.status:
                self._announce()
        except LeaseLost as error:
            self._leadership.lost(error)
        except StoreUnavailable as error:
            member.unsaved = True
            log.warning("the state of agent %s could not be saved: %s", member.agent_id, error)
        else:
            member.unsaved = False
            if written:
                member.stored = record

    def _announce(self) -> None:
        """Other processes read the records again within a second; without this, with their next round."""
        if self._leadership.others:
            with suppress(StoreUnavailable):
                self._store.set_note(CHANGED, secrets.token_hex(8))


def _unknown(one: Member | AgentRecord) -> NotFound:
    return NotFound(f"there is no agent {one.agent_id}")


def _same(one: AgentRecord, other: AgentRecord) -> bool:
    """Whether they differ in nothing but the last heartbeat, which changes by the second."""
    return replace(one, last_heartbeat=0.0) == replace(other, last_heartbeat=0.0)
