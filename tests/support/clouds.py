"""A control plane's fleet with invented clouds: machines, their agents and time are the test's to move."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fluxlib.config.control import AutoscalingConfig, AwsConfig, GcpConfig, NodeType
from fluxlib.control.agents.leadership import RENEW_EVERY
from fluxlib.control.nodes.autoscaler import Autoscaler
from fluxlib.control.nodes.demand import Demand
from fluxlib.control.nodes.notes import NodeNotes, notes_of
from fluxlib.control.nodes.orphans import OrphanedNodes
from fluxlib.control.nodes.provisioner import NodeProvisioner
from fluxlib.control.nodes.scaling import NodeCondition
from fluxlib.control.nodes.service import NodeService
from fluxlib.control.nodes.setup import Progress
from fluxlib.control.nodes.terminator import NodeTerminator
from fluxlib.errors import ProviderError
from fluxlib.lifecycle import Deadline
from fluxlib.model import NodeFigures
from fluxlib.pool import KeyedPool
from fluxlib.providers import Cloud
from fluxlib.providers.fake import FakeCloud
from tests.support.fleet import Fleet
from tests.support.programs import wait_until

STEPS = ("check for dpkg", "install flux-agent", "start flux-agent")
SMALL, LARGE = NodeType("small", 2, 4.0), NodeType("large", 8, 16.0)


def scaling(**settings: Any) -> AutoscalingConfig:
    defaults: dict[str, Any] = {"enabled": True, "name": "web", "node_types": (LARGE, SMALL)}
    return AutoscalingConfig(**{**defaults, **settings})


def cloud(name: str = "aws", **settings: Any) -> Cloud:
    config: AwsConfig | GcpConfig
    if name == "aws":
        config = AwsConfig(region="here", ami="ami", autoscaling=scaling(**settings))
    else:
        config = GcpConfig(project_id="p", zone="z", image="i", autoscaling=scaling(**settings))
    return Cloud(FakeCloud(name), config)


@dataclass
class FakeSetup:
    """The bootstrap without SSH: an agent appears on the wire when its last step is done."""

    wire: Any
    fails: dict[str, str] = field(default_factory=dict)  # step → why, on every node
    gates: dict[str, threading.Event] = field(default_factory=dict)  # step → waits for it
    dumb: bool = False  # the agent never answers
    seen: list[tuple[str, str]] = field(default_factory=list)
    host_keys: list[str] = field(default_factory=list)  # what was demanded
    interrupted: set[str] = field(default_factory=set)

    def carry_out(
        self,
        cloud: Cloud,
        agent_id: str,
        notes: NodeNotes,
        progress: Progress,
        join: Callable[[], None],
        stopped: threading.Event,
    ) -> None:
        self.host_keys.append(notes.host_key)
        progress.begins("wait for SSH")
        progress.host_key(f"ssh-ed25519 of-{agent_id}")
        for step in STEPS:
            if step in notes.done:
                continue
            progress.begins(step)
            self.seen.append((agent_id, step))
            gate = self.gates.get(step)
            while gate is not None and not gate.wait(0.01):
                if stopped.is_set() or agent_id in self.interrupted:
                    raise ProviderError(f"bootstrap step '{step}' failed: the SSH connection is gone")
            if step in self.fails:
                raise ProviderError(f"bootstrap step '{step}' failed: {self.fails[step]}")
            progress.done(step)
        if not self.dumb:
            self.wire.add(agent_id, f"{notes.reach}:50052")
        progress.begins("wait for the agent")
        join()

    def interrupt(self, agent_id: str = "") -> None:
        self.interrupted.add(agent_id)


class CloudFleet(Fleet):
    """Everything of one Flux that has to do with nodes. ``later`` moves time."""

    def __init__(self, *clouds: Cloud, waiting: Mapping[str, int] | None = None, **settings: Any) -> None:
        self.end_strays = bool(settings.pop("end_strays", False))
        super().__init__(**settings)
        self.clouds = list(clouds)
        self.waiting: dict[str, int] = dict(waiting or {})
        for one in clouds:
            one.provider._clock = self.clock  # type: ignore[attr-defined]
        self.jobs = KeyedPool("nodes")
        self.setup = FakeSetup(self.wire)
        self.forgotten: list[str] = []
        self.terminator = NodeTerminator(
            clouds,
            self.membership,
            self.agents,
            self.jobs,
            self.leadership,
            forget=self.forgotten.append,
            clock=self.clock,
        )
        self.provisioner = NodeProvisioner(
            self.membership,
            self.agents,
            self.setup,
            self.terminator,
            self.jobs,
            self.leadership,
            ssh_public_key="ssh-ed25519 KEY",
            agent_port=50052,
            start_seconds=5,
            join_seconds=0.2,
            clock=self.clock,
        )
        self.demand = Demand(self.store, self.leadership, lambda: self.waiting, self.functions.lookup)
        self.autoscaler = Autoscaler(
            clouds,
            self.store,
            self.agents,
            self.provisioner,
            self.terminator,
            self.demand,
            self.leadership,
            drain_seconds=300,
            lost_after=300,
            clock=self.clock,
        )
        self.nodes = NodeService(
            clouds,
            self.agents,
            self.provisioner,
            self.terminator,
            self.autoscaler,
            self.jobs,
            self.leadership,
            drain_seconds=300,
            interrupt=self.setup.interrupt,
            clock=self.clock,
        )
        self.strays = OrphanedNodes(
            clouds,
            self.store,
            self.terminator,
            self.leadership,
            installation_id="here",
            end_strays=self.end_strays,
            clock=self.clock,
        )

    def cloud(self, name: str = "aws") -> FakeCloud:
        found = next(one.provider for one in self.clouds if one.name == name)
        assert isinstance(found, FakeCloud)
        return found

    def node_ids(self) -> list[str]:
        return [state.agent_id for state in self.agents.agents() if state.record.provider]

    def notes(self, agent_id: str) -> NodeNotes:
        return notes_of(self.state(agent_id).record)

    def quiet(self) -> None:
        """Until nothing is under way."""
        assert self.jobs.wait(self.node_ids(), 10)
        wait_until(lambda: not self.jobs._busy, "the jobs to be done")
        self.settle()

    def load(self, cpu: float, memory: float = 30.0, *only: str) -> None:
        """What every node (or these) reports from now on."""
        for agent_id in only or self.node_ids():
            state = self.state(agent_id)
            if state.record.status.present:
                figures = NodeFigures(cpu, memory, 4096, 1024, active_tasks=0, max_tasks=8)
                self.agents.report(agent_id, figures, at=self.now, instance_id=state.instance_id)

    def pass_time(self, seconds: float) -> None:
        """In steps that keep the leader's lease: jobs under way look at it at any moment."""
        end = self.now + seconds
        while self.now < end:
            self.time[0] = min(end, self.now + RENEW_EVERY)
            self.leadership.tick(self.now)

    def later(self, seconds: float = 10) -> None:
        """Time passes: one tick of everything, and what follows from it. Nobody is asked how it is."""
        self.pass_time(seconds)
        self.autoscaler.tick(self.now)
        self.nodes.tick(self.now)
        self.quiet()

    def last(self, name: str = "aws") -> dict[str, Any]:
        return dict(self.autoscaler.report()["providers"][name]["last_decision"] or {})

    def conditions(self, name: str = "aws") -> dict[str, str]:
        found = self.autoscaler.report()["providers"][name]["nodes"]
        return {node["agent_id"]: NodeCondition(node["condition"]).value for node in found}

    def again(self, **settings: Any) -> CloudFleet:
        """Flux restarted: the same store, clouds and agents, nothing in memory."""
        self.close()
        wish = {"session": "s2", "clock": self.time, **settings}
        made = CloudFleet(*self.clouds, store=self.store, wire=self.wire, **wish)
        made.start()
        return made

    def close(self) -> None:
        self.nodes.stop(Deadline(5))
        super().close()


def with_scaling(one: Cloud, **settings: Any) -> Cloud:
    return Cloud(one.provider, replace(one.config, autoscaling=replace(one.config.autoscaling, **settings)))
