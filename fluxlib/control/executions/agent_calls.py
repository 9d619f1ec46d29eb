"""Asking agents about executions: who can be asked, and cancelling without waiting for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fluxlib.control.agents.connection import AgentConnection
from fluxlib.control.agents.registry import Registry
from fluxlib.control.executions.execution import Execution
from fluxlib.control.services import AgentAway
from fluxlib.errors import AgentError, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import AgentRecord, AgentStatus, ExecutionRecord, ExecutionStatus
from fluxlib.pool import Pool

log = logging.getLogger(__name__)

# Seconds beyond the grace that a kill may take until it is certain.
KILL_MARGIN = 5.0
_THREADS = 64


class AgentCalls:
    """Calls to agents that block, on the caller's thread or (``soon``) on a few of their own.

    ``kill_grace`` is how long an agent lets a cancelled function end by itself, in seconds. ``stored`` reads an
    agent from the store.
    """

    def __init__(self, registry: Registry, kill_grace: float, stored: Callable[[str], AgentRecord | None]) -> None:
        self._registry = registry
        self._stored = stored
        self.cancel_timeout = kill_grace + KILL_MARGIN
        self._pool = Pool("executions", _THREADS)

    def soon(self, what: str, call: Callable[[], object]) -> None:
        """Do it on a thread of the pool; what goes wrong is logged. Nothing is done once closed."""

        def run() -> None:
            try:
                call()
            except AgentError as error:
                log.warning("%s: %s", what, error.message)
            except Exception:
                log.exception("%s failed", what)

        if not self._pool.submit(run):
            log.debug("%s: not done, Flux is stopping", what)

    def known(self, agent_id: str) -> bool:
        return self._registry.get(agent_id) is not None

    def idle_since(self, agent_id: str, moment: float) -> bool:
        """Whether the agent has said after ``moment`` (epoch seconds) that it runs nothing."""
        state = self._registry.get(agent_id)
        figures = state.figures if state is not None else None
        return figures is not None and figures.collected_at > moment and figures.active_tasks == 0

    def connection(self, agent_id: str) -> AgentConnection | None:
        """To ask it something; None while it is away or unknown."""
        state = self._registry.get(agent_id)
        if state is None or state.record.status is AgentStatus.OFFLINE:
            return None
        return state.connection

    def need_connection(self, record: ExecutionRecord) -> AgentConnection:
        """Raises AgentAway."""
        connection = self.connection(record.agent_id)
        if connection is None:
            raise self.away(record)
        return connection

    def away(self, record: ExecutionRecord, reason: str = "") -> AgentAway:
        agent_id = record.agent_id
        why = reason or "try again later"
        if self._registry.get(agent_id) is None:
            if self._has_left(agent_id):
                return AgentAway(f"agent {agent_id}, which owns this execution, is gone", record, gone=True)
            why = "this Flux has not heard of it yet, try again in a moment"
        return AgentAway(f"agent {agent_id}, which owns this execution, cannot be asked now: {why}", record, gone=False)

    def _has_left(self, agent_id: str) -> bool:
        """Another Flux may have taken it in a moment ago."""
        try:
            return self._stored(agent_id) is None
        except StoreUnavailable:
            return False

    def cancel(self, record: ExecutionRecord, reason: str) -> ExecutionStatus | None:
        """Kill it and wait until it is dead: the status it then has; None when its agent knows nothing of it.

        Raises AgentAway.
        """
        connection = self.need_connection(record)
        try:
            return connection.cancel(record.execution_id, reason=reason, timeout=self.cancel_timeout)
        except AgentError as error:
            raise self.away(record, error.message) from error

    def cancel_soon(self, execution: Execution, reason: str, *, wait: bool = True) -> None:
        """``wait=False``: told once, and not again should the connection break before it is dead."""
        agent_id, execution_id = execution.agent_id, execution.execution_id
        timeout = self.cancel_timeout if wait else 0.0
        connection = self.connection(agent_id)
        if connection is not None:
            self.soon(
                f"cancelling {execution_id} at {agent_id}",
                lambda: connection.cancel(execution_id, reason=reason, timeout=timeout),
            )

    def close(self, deadline: Deadline) -> None:
        self._pool.stop(deadline)
