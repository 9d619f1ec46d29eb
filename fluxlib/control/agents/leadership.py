"""Which Flux leads: one at a time polls the agents, expires executions and scales.

Two leases in the store that several processes share: ``leader``, which one of them holds, and
each one's ``flux/<session>``, which says that it lives. A leader's writes carry
its lease, so that one that was frozen and wakes up cannot write as a leader any more.

No time of day is compared: the store says how long a lease lasts, and each process counts
that on its monotonic clock. Machines whose clocks differ agree all the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from fluxlib.errors import LeaseLost
from fluxlib.store.base import ControlStore, Lease

log = logging.getLogger(__name__)

LEADER = "leader"
SESSIONS = "flux/"
LEASE_SECONDS = 15.0
RENEW_EVERY = 5.0
# A renewal later than this was kept from being made: no loop is late by so much.
_LATE = 1.5 * RENEW_EVERY

OnChange = Callable[[bool], object]


class Leadership:
    """This process's two leases. ``tick`` every :data:`RENEW_EVERY` seconds, once before anything else starts.

    ``shared`` False: the store is a file of this process alone, so that whoever leads
    there is a former life of it, and is not waited for.
    """

    def __init__(
        self, store: ControlStore, session: str, *, shared: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.session = session
        self._store = store
        self._shared = shared
        self._clock = clock
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._until = 0.0  # when the lease runs out, by our clock
        self._token = 0  # of the lease it holds, or held last
        self._follows_until = 0.0  # so long another process leads, as far as is known
        self._renewed_at: float | None = None  # when its own lease was last renewed
        self._unsure_until = 0.0  # before this, a lease of another that ran out says nothing
        self._living: frozenset[str] = frozenset()
        self._gone: frozenset[str] = frozenset()
        self._listeners: list[OnChange] = []

    @property
    def lease(self) -> Lease | None:
        """For a leader's writes; None in a follower, and in a leader that was frozen for too long."""
        lease = self._lease
        return lease if lease is not None and self._until > self._clock() else None

    @property
    def leads(self) -> bool:
        return self.lease is not None

    @property
    def term(self) -> int | None:
        """Whose health checks count: None while another process leads, else a number that changes with the leader.

        It needs no lease: while the store is away, and nobody can know who leads, each judges for itself.
        """
        if not self.leads and self._clock() < self._follows_until:
            return None
        return self._token

    @property
    def others(self) -> frozenset[str]:
        """The sessions of other processes that live, as of the last tick."""
        return self._living

    @property
    def gone(self) -> frozenset[str]:
        """The sessions that ended, by themselves or by a crash: what they left open is for the leader to adopt."""
        return self._gone

    def on_change(self, listener: OnChange) -> None:
        """``listener(leads)`` whenever this process begins or ceases to lead, from the thread that found out."""
        self._listeners.append(listener)

    def tick(self, _time_of_day: float) -> None:
        """Prolong both leases and look who else lives. StoreUnavailable leaves the leases to run out."""
        now = self._clock()
        if self._lease is not None and self._until <= now:
            log.warning("leader lease expired %.0f s ago: another process may have led meanwhile", now - self._until)
            self._set(None)
        if self._shared:
            self._store.acquire_lease(SESSIONS + self.session, self.session, LEASE_SECONDS, now)
            self._renewed()
            leases = self._store.leases(SESSIONS, now)
            others = {lease.owner: lease for lease in leases if lease.owner != self.session}
            expired = frozenset(owner for owner, lease in others.items() if lease.seconds_left <= 0)
            self._gone = expired if self._clock() >= self._unsure_until else frozenset()
            self._living = frozenset(others) - self._gone
        else:
            self._release_stale_lease(now)
        # Counted from before the store was asked: it has run out here before it has there.
        asked_at = self._clock()
        lease = self._store.acquire_lease(LEADER, self.session, LEASE_SECONDS, asked_at)
        if lease is not None:
            self._until, self._token = asked_at + lease.seconds_left, lease.token
        else:
            self._follows_until = asked_at + LEASE_SECONDS
        self._set(lease)

    def lost(self, error: LeaseLost) -> None:
        """A write was refused: this process does not lead any more."""
        log.warning("leader lease lost, this process follows from now on: %s", error)
        self._follows_until = self._clock() + LEASE_SECONDS
        self._set(None)

    def resign(self) -> None:
        """Give both leases up, so that another process need not wait until they run out."""
        lease = self.lease
        self._set(None)
        own = self._store.lease(SESSIONS + self.session, self._clock())
        for held in (lease, own):
            if held is not None:
                self._store.release_lease(held)

    def _renewed(self) -> None:
        """What kept this process from its own lease (the store was away, the machine was frozen) kept others from
        theirs: they get a whole lease more before one that ran out counts as stale.
        """
        now = self._clock()
        if self._renewed_at is not None and now - self._renewed_at > _LATE:
            log.warning(
                "own lease was not renewed for %.0f s: stale leases of others count in %.0f s at the earliest",
                now - self._renewed_at,
                LEASE_SECONDS,
            )
            self._unsure_until = now + LEASE_SECONDS
        self._renewed_at = now

    def _release_stale_lease(self, now: float) -> None:
        held = self._store.lease(LEADER, now)
        # Whatever it says of its end: that was counted on a clock that may have begun anew.
        if held is not None and held.owner != self.session:
            self._store.release_lease(held)

    def _set(self, lease: Lease | None) -> None:
        with self._lock:
            before, self._lease = self._lease, lease
        if (before is None) != (lease is None):
            log.info("this process %s", "leads" if lease is not None else "follows")
            for listener in self._listeners:
                listener(lease is not None)
