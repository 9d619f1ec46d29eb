"""Terminating a node: drain, end the machine, delete the record. In this order.

The record goes last, so that a machine whose end was not confirmed is never
forgotten: it is tried again until the cloud says that it is gone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from fluxlib.clock import steady_time
from fluxlib.control.agents.fleet import DRAINING, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.membership import Membership
from fluxlib.control.nodes.notes import NodePhase, noted, notes_of
from fluxlib.errors import FluxError, LeaseLost, NotFound, ProviderError, StoreUnavailable
from fluxlib.model import AgentRecord
from fluxlib.pool import KeyedPool
from fluxlib.providers import Cloud
from fluxlib.providers.base import Node, NodeState

log = logging.getLogger(__name__)

# A launch whose answer was lost may show in the cloud's list only after this.
_SEEN_WITHIN = 120.0
_RETRY_EVERY = 30.0
# After a start of Flux, how long an agent that drains may take to be reached before it counts as gone.
_REACHED_WITHIN = 45.0
# Its going away, and the end of its time, are noticed within this.
_LOOK_EVERY = 1.0


class NodeTerminator:
    """Drains and terminates nodes in the background (``begin``) or terminates one on the caller's thread (``finish``).

    ``settle`` answers how many seconds other Flux processes may still send a node work after it began to drain.
    ``forget`` is told which node's ID nobody will need any more; no ID of a node comes back.
    """

    def __init__(
        self,
        clouds: Sequence[Cloud],
        membership: Membership,
        fleet: Fleet,
        jobs: KeyedPool,
        leadership: Leadership,
        *,
        settle: Callable[[], float] = lambda: 0.0,
        forget: Callable[[str], object] = lambda agent_id: None,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._clouds = {cloud.name: cloud for cloud in clouds}
        self._membership = membership
        self._fleet = fleet
        self._jobs = jobs
        self._leadership = leadership
        self._settle = settle
        self._forget = forget
        self._clock = clock
        self._condition = threading.Condition()
        self._draining: set[str] = set()
        self._retry_at: dict[str, float] = {}
        self.ended: dict[str, float] = {}  # provider ID → when: a cloud's list lags behind
        self._stopped: dict[str, frozenset[str]] = {}  # provider → IDs of machines that somebody has stopped
        fleet.on_capacity(self._changed)
        fleet.on_change(lambda agent_id: self._changed(agent_id, None))

    def begin(self, agent_id: str, reason: str, drain_seconds: float) -> None:
        """Drain and terminate it in the background; recorded first. Raises NotFound, StoreUnavailable, LeaseLost."""
        now = self._clock()
        self._membership.save(
            agent_id,
            lambda record: noted(
                record,
                phase=NodePhase.ENDING,
                ending_at=notes_of(record).ending_at or now,
                # A second order may only shorten the first.
                drain_until=min(notes_of(record).drain_until or now + drain_seconds, now + drain_seconds),
                reason=notes_of(record).reason or reason,
            ),
        )
        log.info("node %s: draining, then ending (%s)", agent_id, reason)
        with self._condition:
            self._retry_at.pop(agent_id, None)
            self._condition.notify_all()
        self._jobs.submit_after(agent_id, lambda: self._drain_and_terminate(agent_id))

    def terminate_lost(self, agent_id: str, reason: str) -> None:
        """Terminate one that has been offline for too long, unless its machine turns out to be stopped."""
        self._jobs.submit(agent_id, lambda: self._terminate_lost(agent_id, reason))

    def note_stopped(self, provider: str, nodes: Sequence[Node]) -> None:
        """What a provider has just listed."""
        self._stopped[provider] = frozenset(node.provider_id for node in nodes if node.state is NodeState.STOPPED)

    def is_stopped(self, record: AgentRecord) -> bool:
        """Whether somebody has stopped its machine, as far as was seen."""
        return record.provider_id in self._stopped.get(record.provider, ())

    def resume(self, agent_id: str, now: float) -> None:
        """Continue with one that is recorded as ending, not too often."""
        state = self._fleet.get(agent_id)
        if state is None or now < self._retry_at.get(agent_id, 0.0):
            return
        record = state.record
        # Also when it is connected to: it is present only a moment later.
        unreached = not record.status.present and record.offline_since
        if unreached and now < min(record.offline_since + _REACHED_WITHIN, notes_of(record).drain_until):
            return  # this process has just started: the node may well be running something
        self._jobs.submit(agent_id, lambda: self._drain_and_terminate(agent_id))

    def finish(self, agent_id: str) -> None:
        """End the machine now, then forget the node. Raises ProviderError; the record stays then, to be tried again."""
        state = self._fleet.get(agent_id)
        if state is None:
            return
        record = state.record
        try:
            provider_id = record.provider_id or self._find(record.provider, agent_id)
            if provider_id:
                self._cloud(record.provider).provider.terminate(provider_id)
                self.ended[provider_id] = self._clock()
        except ProviderError as error:
            self._retry_at[agent_id] = self._clock() + _RETRY_EVERY
            self._fleet.set_problem(agent_id, f"termination failed, retrying: {error.message}")
            log.warning("node %s: termination failed, retrying: %s", agent_id, error.message)
            raise
        self._membership.remove(agent_id)
        self._retry_at.pop(agent_id, None)
        if record.provider:
            self.forget(agent_id)
        log.info("node %s (%s %s) terminated", agent_id, record.provider, provider_id or "was never launched")

    def forget(self, agent_id: str) -> None:
        """Delete what is kept of a node beside its record. What cannot be deleted is left: it does no harm."""
        try:
            self._forget(agent_id)
        except FluxError as error:
            log.warning("node %s: something is left of it: %s", agent_id, error.message)

    # -- inside ------------------------------------------------------------------------

    def _terminate_lost(self, agent_id: str, reason: str) -> None:
        state = self._fleet.get(agent_id)
        if state is None or state.record.status.present:
            return
        record = state.record
        try:
            nodes = self._cloud(record.provider).provider.nodes()
            self.note_stopped(record.provider, nodes)
            if self.is_stopped(record):
                log.warning("node %s: %s was stopped, and is left to its owner", agent_id, record.provider_id)
            elif any(node.provider_id == record.provider_id and node.state is NodeState.ENDING for node in nodes):
                log.info("node %s: %s is about to stop or to end: it is looked at again", agent_id, record.provider_id)
            else:
                self.begin(agent_id, reason, 0.0)
        except NotFound:
            return
        except (ProviderError, StoreUnavailable, LeaseLost) as error:
            log.warning("node %s, %s: termination postponed: %s", agent_id, reason, error.message)

    def _drain_and_terminate(self, agent_id: str) -> None:
        try:
            if self._drain(agent_id):
                self.finish(agent_id)
        except (ProviderError, NotFound):
            return  # said already; gone already
        except StoreUnavailable as error:
            log.warning("node %s: termination postponed: %s", agent_id, error.message)
            self._retry_at[agent_id] = self._clock() + _RETRY_EVERY

    def _drain(self, agent_id: str) -> bool:
        """Whether it may be terminated now: idle, offline, or its time is over. False: another process continues."""
        state = self._fleet.get(agent_id)
        if state is None:
            return False
        if state.record.status.present:
            # Also when its time is over already: nothing new may be sent to a machine that is being ended.
            self._membership.drain(agent_id)
            settle = self._settle()
            settled = self._clock() + settle if settle else 0.0
            with self._condition:
                self._draining.add(agent_id)
                try:
                    while self._busy(agent_id, settled) and not self._jobs.stopping.is_set():
                        if not self._leadership.leads:
                            return False
                        self._condition.wait(_LOOK_EVERY)
                finally:
                    self._draining.discard(agent_id)
        if self._jobs.stopping.is_set() or not self._leadership.leads:
            return False
        self._say_how_it_ended(agent_id)
        return True

    def _busy(self, agent_id: str, settled: float) -> bool:
        state = self._fleet.get(agent_id)
        if state is None or not state.record.status.present:
            return False
        if self._clock() >= notes_of(state.record).drain_until:
            return False
        return state.expected_active > 0 or state.last_heartbeat < settled

    def _say_how_it_ended(self, agent_id: str) -> None:
        state = self._fleet.get(agent_id)
        if state is None or not state.record.extra.get(DRAINING):
            return
        if not state.record.status.present:
            log.warning("node %s went offline while draining: terminating it now", agent_id)
        elif state.expected_active:
            log.warning("node %s still runs %d executions after the drain timeout", agent_id, state.expected_active)

    def _changed(self, agent_id: str, function_name: str | None) -> None:
        """On the path of every execution: nothing but a look, unless a node is draining."""
        if self._draining and (agent_id in self._draining or not agent_id):
            with self._condition:
                self._condition.notify_all()

    def _cloud(self, name: str) -> Cloud:
        cloud = self._clouds.get(name)
        if cloud is None:
            raise ProviderError(f"{name} is not configured any more: put it back into flux.yaml to end its nodes")
        return cloud

    def _find(self, provider: str, agent_id: str) -> str:
        """The machine of a launch whose answer was lost; empty when there is none. Raises ProviderError."""
        state = self._fleet.get(agent_id)
        nodes = self._cloud(provider).provider.nodes()
        found = next((node for node in nodes if node.agent_id == agent_id and node.state is not NodeState.ENDED), None)
        if found is not None:
            return found.provider_id
        since = notes_of(state.record).ending_at if state is not None else 0.0
        if since and self._clock() - since < _SEEN_WITHIN:
            raise ProviderError(f"{provider}: whether {agent_id} was launched is not to be seen yet")
        return ""
