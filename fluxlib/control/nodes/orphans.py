"""Orphaned nodes: machines that a cloud lists for this installation and the store does not know.

A machine that Flux does not know costs money and does nothing: it is reported, and
ended only when the operator has said so. Three things keep that from ending the
wrong ones: only machines with this installation's ID are looked at; the fleet must
have been read from the store, this time, without error; and the store must be older
than the machine, so that an emptied store ends nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fluxlib.clock import steady_time
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.nodes.notes import NodePhase, notes_of
from fluxlib.control.nodes.terminator import NodeTerminator
from fluxlib.errors import LeaseLost, NotFound, ProviderError, StoreUnavailable
from fluxlib.model import AgentRecord, rfc3339
from fluxlib.providers import Cloud
from fluxlib.providers.base import Node, NodeState
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

LOOK_EVERY = 180.0
OLD_ENOUGH = 900.0
# The cloud's clock and ours may differ, and a launch takes a while to be listed.
_MARGIN = 300.0
# One that was ended is listed as running for a while; for longer, its end did not come.
_ENDED_SHOWS = 600.0
_THERE = (NodeState.PENDING, NodeState.RUNNING, NodeState.STOPPED)


@dataclass(frozen=True, slots=True)
class Orphan:
    node: Node
    predates: bool  # it is older than the store's own records
    problem: str = ""  # why it could not be ended


class OrphanedNodes:
    """``tick`` looks once; ``warnings`` is what was found last, for /health."""

    def __init__(
        self,
        clouds: Sequence[Cloud],
        store: ControlStore,
        terminator: NodeTerminator,
        leadership: Leadership,
        *,
        installation_id: str,
        end_strays: bool,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._clouds = list(clouds)
        self._store = store
        self._terminator = terminator
        self._leadership = leadership
        self._fact = f"nodes-since/{installation_id}"
        self._end_strays = end_strays
        self._clock = clock
        self._found: dict[str, list[Orphan]] = {}
        self._unreadable: dict[str, str] = {}

    def tick(self, now: float) -> None:
        """One comparison; ``now`` is epoch seconds. A cloud or store that is away changes nothing."""
        if not self._leadership.leads:
            self._found.clear()
            self._unreadable.clear()
            return
        for provider_id in [one for one, at in self._terminator.ended.items() if now - at > _ENDED_SHOWS]:
            del self._terminator.ended[provider_id]
        for cloud in self._clouds:
            try:
                # Before the records: a launch is recorded before it is asked for.
                nodes = cloud.provider.nodes()
                self._unreadable.pop(cloud.name, None)
                self._terminator.note_stopped(cloud.name, nodes)
            except ProviderError as error:
                self._unreadable[cloud.name] = error.message
                log.warning("the machines at %s cannot be compared with the fleet: %s", cloud.name, error.message)
                continue
            try:
                records = {one.agent_id: one for one in self._store.agents() if one.provider == cloud.name}
                since = self._since(now)
            except StoreUnavailable as error:
                log.warning("the fleet cannot be compared with the machines at %s: %s", cloud.name, error.message)
                return
            self._found[cloud.name] = [self._end(cloud, orphan, now) for orphan in self._orphans(nodes, records, since)]
            self._forget_gone(cloud, nodes, records, now)

    def warnings(self) -> list[str]:
        """For /health."""
        found = [
            f"{name}: the list of machines cannot be read: {reason}"
            for name, reason in sorted(self._unreadable.items())
        ]
        for name, orphans in sorted(self._found.items()):
            found += [_warning(name, orphan, self._end_strays) for orphan in orphans]
        return found

    # -- orphans ------------------------------------------------------------------------

    def _orphans(self, nodes: Sequence[Node], records: Mapping[str, AgentRecord], since: float) -> list[Orphan]:
        known = {record.provider_id for record in records.values()} - {""}
        # Asked for, and not answered yet: the machine is known by its agent's ID only.
        asked = {agent_id for agent_id, record in records.items() if not record.provider_id}
        orphans = []
        for node in nodes:
            ours = node.provider_id in known or node.agent_id in asked or node.provider_id in self._terminator.ended
            if node.state in _THERE and not ours:
                orphans.append(Orphan(node, predates=node.launched_at < since + _MARGIN))
        return orphans

    def _end(self, cloud: Cloud, orphan: Orphan, now: float) -> Orphan:
        node = orphan.node
        if not self._end_strays or orphan.predates or now - node.launched_at < OLD_ENOUGH:
            return orphan
        try:
            cloud.provider.terminate(node.provider_id)
        except ProviderError as error:
            log.warning("orphan %s (%s) could not be terminated: %s", node.provider_id, node.agent_id, error.message)
            return replace(orphan, problem=error.message)
        self._terminator.ended[node.provider_id] = now
        log.warning("terminated orphan %s (%s) at %s (end_strays)", node.provider_id, node.agent_id, cloud.name)
        return orphan

    def _since(self, now: float) -> float:
        """When this store began to keep this installation's nodes. Raises StoreUnavailable."""
        known = self._store.note(self._fact)
        if known is not None:
            return float(known)
        lease = self._leadership.lease
        if lease is not None:
            try:
                self._store.set_note(self._fact, repr(now), lease)
            except LeaseLost as error:
                self._leadership.lost(error)
        return now

    # -- machines that ended by themselves -----------------------------------------------

    def _forget_gone(self, cloud: Cloud, nodes: Sequence[Node], records: Mapping[str, AgentRecord], now: float) -> None:
        """A spot machine taken back, one ended in the console: no agent will come back from there."""
        # One that somebody has stopped is there, with its disk: it is its owner's to start again, or to end.
        # Compute Engine says of one that is being stopped what it says of one that is being deleted: it is waited for.
        there = {node.provider_id for node in nodes if node.state is not NodeState.ENDED}
        for agent_id, record in records.items():
            notes = notes_of(record)
            settled = notes.phase is NodePhase.READY and now - notes.asked_at > _MARGIN
            if not settled or record.status.present or record.provider_id in there or not record.provider_id:
                continue
            log.warning("node %s: its machine %s is gone from %s", agent_id, record.provider_id, cloud.name)
            try:
                self._terminator.begin(agent_id, f"its machine is gone from {cloud.name}", 0)
            except (NotFound, StoreUnavailable, LeaseLost) as error:
                log.warning("node %s is forgotten later: %s", agent_id, error.message)


def _warning(provider: str, orphan: Orphan, end_strays: bool) -> str:
    node = orphan.node
    since = f", since {rfc3339(node.launched_at)}" if node.launched_at else ""
    what = (
        f"{provider}: {node.provider_id} ({node.agent_id or 'no agent ID'}, {node.instance_type}{since}) carries this"
    )
    what += " installation's ID, but Flux does not know it"
    if orphan.problem:
        return f"{what}, and could not end it: {orphan.problem}"
    if orphan.predates:
        return f"{what}; it is older than the store's records and is left alone: end it in the cloud yourself"
    if end_strays:
        return f"{what}: it is ended when it is {OLD_ENOUGH / 60:.0f} minutes old"
    return f"{what}: end it in the cloud yourself, or set end_strays: true"
