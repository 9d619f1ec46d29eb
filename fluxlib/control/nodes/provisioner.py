"""Provisioning a node: recorded, launched, set up, joined; rolled back when any of it fails.

Everything is recorded before it is done, under an ID that makes the cloud answer
twice with the same machine. When the process ends in between, the next one
continues (``resume``), so no machine is ever launched that nobody knows of.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from fluxlib.clock import steady_time
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.membership import Membership
from fluxlib.control.nodes.notes import NodeNotes, NodePhase, noted, notes_of, with_notes
from fluxlib.control.nodes.setup import Progress
from fluxlib.control.nodes.terminator import NodeTerminator
from fluxlib.errors import (
    AgentUnreachable,
    FluxError,
    LeaseLost,
    NotFound,
    ProviderError,
    StoreUnavailable,
    StrandedNode,
)
from fluxlib.model import AgentRecord, AgentStatus
from fluxlib.pool import KeyedPool
from fluxlib.providers import Cloud
from fluxlib.providers.base import Address, Launch

log = logging.getLogger(__name__)

# The key pair is looked at again after this: somebody may have replaced it.
_PREPARED_FOR = 60.0
_JOIN_WITHIN = 90.0
_JOIN_EVERY = 1.0
_LONGEST_NAME = 40


class Setup(Protocol):
    """Installs an agent on a machine; see :class:`fluxlib.control.nodes.setup.NodeSetup`."""

    def carry_out(
        self,
        cloud: Cloud,
        agent_id: str,
        notes: NodeNotes,
        progress: Progress,
        join: Callable[[], None],
        stopped: threading.Event,
    ) -> None: ...

    def interrupt(self, agent_id: str = "") -> None: ...


class _Interrupted(Exception):
    """This process stops, or does not lead any more: the next one continues."""


class NodeCreation:
    """One node that is being provisioned. ``error`` is empty once it has joined."""

    def __init__(self, cloud: Cloud, agent_id: str, *, resumed: bool = False) -> None:
        self.cloud = cloud
        self.agent_id = agent_id
        self.resumed = resumed
        self.provider_id = ""  # once it is launched
        self.error = "Flux stopped meanwhile: provisioning continues when it starts again"
        self.step = "launch"


OnResult = Callable[[NodeCreation], object]


class NodeProvisioner:
    """``begin`` and ``resume`` return at once; ``on_result`` is told how each ended, on the job's thread."""

    def __init__(
        self,
        membership: Membership,
        fleet: Fleet,
        setup: Setup,
        terminator: NodeTerminator,
        jobs: KeyedPool,
        leadership: Leadership,
        *,
        ssh_public_key: str,
        agent_port: int,
        start_seconds: float,
        join_seconds: float = _JOIN_WITHIN,
        on_result: Sequence[OnResult] = (),
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._membership = membership
        self._fleet = fleet
        self._setup = setup
        self._terminator = terminator
        self._jobs = jobs
        self._leadership = leadership
        self._ssh_public_key = ssh_public_key
        self._agent_port = agent_port
        self._start_seconds = start_seconds
        self._join_seconds = join_seconds
        self._on_result = list(on_result)
        self._clock = clock
        self._prepare_lock = threading.Lock()
        self._prepared_at: dict[str, float] = {}

    def listen(self, on_result: OnResult) -> None:
        self._on_result.append(on_result)

    def begin(self, cloud: Cloud, instance_type: str, reason: str, replaces: str = "") -> NodeCreation:
        """Record a new node and provision it in the background. Raises StoreUnavailable: nothing was launched then."""
        agent_id = new_agent_id(cloud.scaling.name)
        notes = NodeNotes(NodePhase.ASKED, asked_at=self._clock(), replaces=replaces)
        record = AgentRecord(agent_id, "", provider=cloud.name, instance_type=instance_type)
        self._membership.adopt_node(with_notes(record, notes))
        log.info("node %s: launching a %s at %s (%s)", agent_id, instance_type, cloud.name, reason)
        creation = NodeCreation(cloud, agent_id)
        self._jobs.submit(agent_id, lambda: self._make(creation))
        return creation

    def resume(self, cloud: Cloud, agent_id: str) -> None:
        """Continue with one that another process began."""
        creation = NodeCreation(cloud, agent_id, resumed=True)
        if self._jobs.submit(agent_id, lambda: self._make(creation)):
            log.info("node %s: resuming provisioning", agent_id)

    def cancel(self, agent_id: str) -> None:
        """Interrupt one that is being provisioned: it is recorded as ending before this is called."""
        self._setup.interrupt(agent_id)

    # -- one node ----------------------------------------------------------------------

    def _make(self, creation: NodeCreation) -> None:
        agent_id = creation.agent_id
        try:
            record = self._record(creation)
            creation.provider_id = record.provider_id
            if notes_of(record).phase is NodePhase.ASKED:
                self._launch(creation, record)
            self._set_up(creation)
            creation.error = ""
        except _Interrupted:
            log.info("node %s: provisioning interrupted, it is resumed later", agent_id)
            return
        except StoreUnavailable as error:
            # Not the node's fault, and its record is as it was: it is taken up again.
            log.warning("node %s: provisioning paused until the store is reachable: %s", agent_id, error.message)
            return
        except NotFound:
            creation.error = "it was deregistered meanwhile"
            log.warning("node %s: %s", agent_id, creation.error)
            self._end_forgotten(creation)
        except FluxError as error:
            if self._jobs.stopping.is_set() or not self._leadership.leads:
                return  # broken off by our own end
            creation.error = error.message
            self._roll_back(creation, error)
        for listener in self._on_result:
            listener(creation)

    def _launch(self, creation: NodeCreation, record: AgentRecord) -> None:
        cloud, agent_id = creation.cloud, creation.agent_id
        deadline = time.monotonic() + self._start_seconds
        try:
            self._step(creation, f"launch a {record.instance_type}")
            self._prepare(cloud)
            node = cloud.provider.launch(Launch(agent_id, record.instance_type, self._ssh_public_key), deadline)
        except StrandedNode as error:
            # Recorded before anything else is tried: this machine costs money.
            stranded = error.provider_id
            self._membership.save(agent_id, lambda mine: replace(mine, provider_id=stranded))
            raise
        except ProviderError:
            if not creation.resumed:
                self._membership.remove(agent_id)
            # When a previous process asked for it, the refusal says nothing: it may run.
            raise
        creation.provider_id = node.provider_id
        address = Address.of(node, use_private_ip=cloud.config.use_private_ip)
        self._membership.save(
            agent_id,
            lambda mine: noted(
                replace(mine, provider_id=node.provider_id),
                # A removal that was ordered meanwhile must not be forgotten.
                phase=max(notes_of(mine).phase, NodePhase.SETUP, key=list(NodePhase).index),
                reach=address.reach,
                private_ip=address.private_ip,
                public_ip=address.public_ip,
            ),
        )
        log.info("node %s: %s runs at %s", agent_id, node.provider_id, address.reach)

    def _set_up(self, creation: NodeCreation) -> None:
        agent_id = creation.agent_id
        notes = notes_of(self._record(creation))
        progress = Progress(
            host_key=lambda key: self._note(agent_id, host_key=key),
            begins=lambda step: self._step(creation, step),
            done=lambda step: self._done(agent_id, step),
        )
        self._setup.carry_out(
            creation.cloud, agent_id, notes, progress, lambda: self._join(creation), self._jobs.stopping
        )
        self._record(creation)
        self._membership.save(agent_id, lambda record: noted(record, phase=NodePhase.READY, done=()))
        log.info("node %s: it has joined", agent_id)

    def _join(self, creation: NodeCreation) -> None:
        """An agent that has just been started listens in a moment."""
        notes = notes_of(self._record(creation))
        host = f"[{notes.reach}]" if ":" in notes.reach else notes.reach
        deadline = time.monotonic() + self._join_seconds
        while True:
            self._record(creation)
            try:
                self._membership.node_ready(creation.agent_id, f"{host}:{self._agent_port}")
                break
            except AgentUnreachable:
                if time.monotonic() > deadline:
                    raise
            self._jobs.stopping.wait(_JOIN_EVERY)
        # It has shown who it is; a slow machine may still be brought in step, and is tried again by the poller.
        while not self._takes_work(creation):
            if time.monotonic() > deadline:
                state = self._fleet.get(creation.agent_id)
                raise AgentUnreachable(f"it is not online: {state.problem if state is not None else 'it is gone'}")
            self._jobs.stopping.wait(_JOIN_EVERY)

    def _takes_work(self, creation: NodeCreation) -> bool:
        self._record(creation)
        state = self._fleet.get(creation.agent_id)
        return state is not None and (state.takes_work or state.record.status is AgentStatus.DRAINING)

    def _roll_back(self, creation: NodeCreation, error: FluxError) -> None:
        agent_id = creation.agent_id
        log.warning("node %s: provisioning failed at '%s', terminating it: %s", agent_id, creation.step, error.message)
        if self._fleet.get(agent_id) is None:
            return
        try:
            self._note(agent_id, phase=NodePhase.ENDING, ending_at=self._clock(), reason=error.message)
            self._terminator.finish(agent_id)
        except ProviderError as stranded:
            creation.error += f"; and {stranded.message}: it is tried again"
        except (StoreUnavailable, NotFound, LeaseLost) as unsaved:
            log.warning("node %s: %s", agent_id, unsaved.message)

    def _end_forgotten(self, creation: NodeCreation) -> None:
        """There is no record left to retry from; what fails here is reported as an orphan."""
        if creation.provider_id:
            try:
                creation.cloud.provider.terminate(creation.provider_id)
                self._terminator.ended[creation.provider_id] = self._clock()
            except ProviderError as error:
                log.warning("%s could not be ended: %s", creation.provider_id, error.message)
        self._terminator.forget(creation.agent_id)

    # -- small things ------------------------------------------------------------------

    def _record(self, creation: NodeCreation) -> AgentRecord:
        """As it is now. Raises what ends the job: this process's end, a removal that somebody ordered."""
        if self._jobs.stopping.is_set() or not self._leadership.leads:
            raise _Interrupted
        state = self._fleet.get(creation.agent_id)
        if state is None:
            raise NotFound(f"{creation.agent_id} is not registered")
        notes = notes_of(state.record)
        if notes.phase is NodePhase.ENDING:
            raise ProviderError(f"given up at '{creation.step}': {notes.reason}")
        return state.record

    def _step(self, creation: NodeCreation, step: str) -> None:
        creation.step = step
        self._record(creation)
        self._fleet.set_problem(creation.agent_id, f"is being made: {step}")
        log.info("node %s: %s", creation.agent_id, step)

    def _done(self, agent_id: str, step: str) -> None:
        self._membership.save(agent_id, lambda record: noted(record, done=(*notes_of(record).done, step)))

    def _note(self, agent_id: str, **changes: object) -> None:
        self._membership.save(agent_id, lambda record: noted(record, **changes))

    def _prepare(self, cloud: Cloud) -> None:
        with self._prepare_lock:
            now = time.monotonic()
            if now - self._prepared_at.get(cloud.name, -_PREPARED_FOR) >= _PREPARED_FOR:
                cloud.provider.prepare(self._ssh_public_key)
                self._prepared_at[cloud.name] = now


def new_agent_id(name: str) -> str:
    """A name of its own for a new node, as agents, EC2 and Compute Engine all allow."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    if not words[:1].isalpha():
        words = f"flux-{words}".strip("-")
    return f"{words}-{secrets.token_hex(4)}"
