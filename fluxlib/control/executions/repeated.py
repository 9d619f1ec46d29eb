"""A submission repeated under its idempotency key while the first may still be turned down.

Its ID is an answer only once it stays known: an agent has accepted it, it is
queued, or it has an end. A first submission that is turned down is forgotten, and
nobody may have been told its ID by then.
"""

from __future__ import annotations

import threading

from fluxlib.control.executions.agent_calls import AgentCalls
from fluxlib.control.executions.tracker import Ledger
from fluxlib.errors import AgentError, Unavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import Phase

# Nothing tells of what another Flux does: it is looked at this often (seconds).
_LOOK = 0.2


class Repeated:
    """Every method may be called from any thread."""

    def __init__(self, ledger: Ledger, calls: AgentCalls) -> None:
        self._ledger = ledger
        self._calls = calls

    def stays(self, execution_id: str, deadline: Deadline) -> bool:
        """Waits until it is settled: True when its ID can be answered, False when it was forgotten.

        Raises Unavailable when that is not known at the deadline, StoreUnavailable.
        """
        changed = threading.Event()
        # Before the first look: a change after it must not be missed.
        self._ledger.watch(execution_id, changed.set)
        try:
            while True:
                settled = self._look(execution_id)
                if settled is not None:
                    return settled
                remaining = deadline.remaining()
                if remaining <= 0:
                    text = "the first submission with this Idempotency-Key has not been accepted yet: try again"
                    raise Unavailable(text, retry_after=1)
                changed.wait(min(_LOOK, remaining))
                changed.clear()
        finally:
            self._ledger.unwatch(execution_id, changed.set)

    def _look(self, execution_id: str) -> bool | None:
        """None: neither yet. In this order: what leaves our hand is in the next place before."""
        held = self._ledger.get(execution_id)
        if held is not None:
            return True if held.detached or held.accepted else None
        if self._ledger.forgets(execution_id):
            return None
        entry = self._ledger.entry(execution_id)
        if entry is None:
            return False
        if entry.owner == self._ledger.session or entry.record.status.ended or entry.record.phase is Phase.QUEUED:
            return True
        # Another Flux asks this agent, which knows what it has accepted. The store is not told of that.
        connection = self._calls.connection(entry.record.agent_id)
        try:
            found = connection.record(execution_id, with_output=False) if connection is not None else None
        except AgentError:
            return None
        # It also keeps what it had begun to start and could not: that one is offered on, or turned down.
        return True if found is not None and not found.error_kind.nothing_started else None
