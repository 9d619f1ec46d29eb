"""Executions whose ends nobody tells: their agents are asked, and what they say is written.

An original agent tells no end at all; an agent of ours tells none to another life of Flux
than the one that sent it the execution. The first is asked for each execution, the
second once for all that it still runs, and then only for those that it no longer does.

An execution its agent does not know is asked for three times, a tick apart, before it is taken
for lost: a request may still be on its way when its sender has died.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from fluxlib.control.agents.connection import AgentConnection
from fluxlib.control.executions.agent_calls import AgentCalls
from fluxlib.errors import AgentError, AgentRefused, StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.rpc.status import AnswerTooLarge

log = logging.getLogger(__name__)

_MISSES = 3
# After so many ticks without an end, an agent is asked every so many ticks only: some run for days.
_QUIET, _SELDOM = 30, 5

OnEnd = Callable[[ExecutionRecord, ExecutionRecord], None]


@dataclass(slots=True)
class _Followed:
    record: ExecutionRecord
    since: float = field(default_factory=time.time)
    misses: int = 0
    told_to_end: bool = False
    agent_restarted: bool = False  # since it was sent there: nothing runs it any more
    unreadable_at: float = 0.0  # since then (epoch seconds) its record does not fit into a message


@dataclass(slots=True)
class _Agent:
    executions: dict[str, _Followed] = field(default_factory=dict)
    asking: bool = False
    ticks: int = 0  # since something came or went


class Following:
    """Every method may be called from any thread. ``on_end(ours, theirs)``: one has ended; it is followed no more."""

    def __init__(self, calls: AgentCalls, on_end: OnEnd) -> None:
        self._calls = calls
        self._on_end = on_end
        self._lock = threading.Lock()
        self._agents: dict[str, _Agent] = {}

    def add(self, record: ExecutionRecord) -> None:
        """``record`` as the store has it, with the agent it is at."""
        with self._lock:
            agent = self._agents.setdefault(record.agent_id, _Agent())
            if record.execution_id not in agent.executions:
                agent.executions[record.execution_id] = _Followed(record)
                agent.ticks = 0

    def add_lost(self, record: ExecutionRecord) -> None:
        """As ``add``, where the agent has restarted since."""
        self.add(record)
        with self._lock:
            agent = self._agents.get(record.agent_id)
            if agent is not None and record.execution_id in agent.executions:
                agent.executions[record.execution_id].agent_restarted = True

    def agents(self) -> list[str]:
        with self._lock:
            return list(self._agents)

    def forget(self, agent_id: str) -> None:
        """Everything there has ended otherwise."""
        with self._lock:
            self._agents.pop(agent_id, None)

    def tick(self) -> None:
        """Ask every agent whose turn it is."""
        with self._lock:
            turn = []
            for agent_id, agent in self._agents.items():
                agent.ticks += 1
                if agent.ticks <= _QUIET or agent.ticks % _SELDOM == 0:
                    turn.append(agent_id)
        for agent_id in turn:
            self._soon(agent_id, counts=True)

    def ask(self, agent_id: str) -> None:
        """Ask this one now. Not knowing an execution is not held against it yet."""
        self._soon(agent_id, counts=False)

    def _soon(self, agent_id: str, *, counts: bool) -> None:
        with self._lock:
            agent = self._agents.get(agent_id)
            if agent is None or agent.asking:
                return
            agent.asking = True
        self._calls.soon(f"asking {agent_id} for its executions", lambda: self._ask(agent_id, agent, counts))

    def _ask(self, agent_id: str, agent: _Agent, counts: bool) -> None:
        try:
            with self._lock:
                followed = list(agent.executions.values())
            connection = self._calls.connection(agent_id)
            if connection is None:
                return
            inventory = connection.inventory()
            running = inventory.open_executions if inventory is not None else None
            for one in followed:
                try:
                    self._ask_for(one, connection, running, counts)
                except AgentRefused as error:
                    # One that cannot be told must not hide the others.
                    log.info("agent %s cannot tell of %s: %s", agent_id, one.record.execution_id, error.message)
        except AgentError as error:
            log.info("agent %s cannot be asked for its executions: %s", agent_id, error.message)
        except StoreUnavailable as error:
            log.warning("what %s says cannot be kept: %s", agent_id, error.message)
        finally:
            with self._lock:
                agent.asking = False

    def _ask_for(
        self, one: _Followed, connection: AgentConnection, running: Collection[str] | None, counts: bool
    ) -> None:
        record = one.record
        if running is not None and record.execution_id in running:
            one.misses = 0
            self._end_if_unwanted(one, connection)
            return
        # An original's record may say for an hour after a restart that it runs. Looked at first: it may end meanwhile.
        idle = running is None and self._calls.idle_since(record.agent_id, one.since)
        try:
            found = connection.record(record.execution_id, with_output=False)
        except AnswerTooLarge as error:
            found = self._unreadable(one, error.message)
            if found is None:
                return
        if found is None:
            one.misses += counts
            if one.misses < _MISSES:
                return
            text = f"agent lost: {record.agent_id} knows nothing of it (any more)"
            found = record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.AGENT_LOST)
        if not found.status.ended and (one.agent_restarted or idle):
            text = f"agent lost: {record.agent_id} has restarted while it ran"
            found = record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.AGENT_LOST)
        if not found.status.ended:
            one.misses = 0
            self._end_if_unwanted(one, connection)
            return
        if self._drop(record):
            self._on_end(record, found)

    def _unreadable(self, one: _Followed, why: str) -> ExecutionRecord | None:
        """Its end, once it is certain that it has ended; None until then."""
        one.misses = 0
        if not one.unreadable_at:
            one.unreadable_at = time.time()
        if not self._calls.idle_since(one.record.agent_id, one.unreadable_at):
            return None
        text = f"it has ended, and how is lost: {why}"
        return one.record.ended(ExecutionStatus.FAILED, at=time.time(), error=text, kind=ErrorKind.AGENT_LOST)

    def _end_if_unwanted(self, one: _Followed, connection: AgentConnection) -> None:
        """Whoever waited for a synchronous one is gone. Its end is asked for like any other."""
        if not one.record.asynchronous and not one.told_to_end:
            reason = "cancelled: whoever waited for it was told that it is lost"
            connection.cancel(one.record.execution_id, reason=reason, timeout=0)
            one.told_to_end = True

    def _drop(self, record: ExecutionRecord) -> bool:
        with self._lock:
            agent = self._agents.get(record.agent_id)
            if agent is None or agent.executions.pop(record.execution_id, None) is None:
                return False
            agent.ticks = 0
            if not agent.executions:
                del self._agents[record.agent_id]
            return True
