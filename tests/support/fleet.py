"""A control plane's fleet part over invented agents: the logic under invented times, without a wire."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from fluxlib.control.agents.connection import (
    AgentConnection,
    ConnectionEvents,
    Connector,
    OnAnswer,
    OnReport,
    ProbeResult,
    Taken,
)
from fluxlib.control.agents.fleet import Agent
from fluxlib.control.agents.fleet import Fleet as AgentFleet
from fluxlib.control.agents.health import Health
from fluxlib.control.agents.leadership import RENEW_EVERY, Leadership
from fluxlib.control.agents.legacy import LegacyAgent
from fluxlib.control.agents.membership import Membership
from fluxlib.control.agents.pushes import FunctionPusher
from fluxlib.control.agents.reconciler import AgentReconciler
from fluxlib.control.agents.replication import Replication
from fluxlib.control.functions.deploy import FunctionService
from fluxlib.control.services import AgentView
from fluxlib.errors import AgentRefused, AgentUnreachable, StoreUnavailable
from fluxlib.lifecycle import Deadline
from fluxlib.model import (
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    FunctionSpec,
    FunctionState,
    Inventory,
    NodeFigures,
    Platform,
)
from fluxlib.rpc.codec import NodeReport
from fluxlib.store.base import ControlStore, Lease
from tests.support.memory_store import MemoryControlStore

LINUX = Platform("linux", "amd64")


@dataclass(eq=False)
class Machine:
    """An agent as it is by itself, whoever is connected to it."""

    agent_id: str
    address: str
    original: bool = False
    platform: Platform = LINUX
    legacy_certificate: bool = False
    instance: str = "life-1"
    version: str = "1"
    features: tuple[str, ...] = ("deploy_stream",)
    up: bool = True
    slow: bool = False  # takes questions and does not answer
    clock: Callable[[], float] = time.monotonic
    up_since: float = field(init=False)  # by ``clock``
    counts_uptime: bool = True
    max_tasks: int = 8
    not_after: float = 0.0
    functions: dict[str, FunctionState] = field(default_factory=dict)
    refuses: dict[str, str] = field(default_factory=dict)  # function → the reason
    cannot_start: dict[str, str] = field(default_factory=dict)  # function → the reason
    revision: int = 0
    runs: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    largest: int = 10**9
    gate: threading.Event | None = None  # deployments wait for it
    waiting: int = 0  # how many began to

    def __post_init__(self) -> None:
        self.up_since = self.clock() - 100

    def restart(self) -> None:
        self.instance += "+"
        self.up_since = self.clock()
        self.revision = 0
        if self.original:
            self.functions.clear()

    def inventory(self) -> Inventory:
        return Inventory(
            self.agent_id,
            self.instance,
            version=self.version,
            platform=self.platform,
            max_tasks=self.max_tasks,
            functions=tuple(self.functions.values()),
            revision=self.revision,
            features=self.features,
            certificate_not_after=self.not_after,
            open_executions=tuple(sorted(self.runs)),
        )

    def report(self) -> NodeReport:
        figures = NodeFigures(
            cpu_percent=10,
            memory_percent=10,
            memory_total_mb=1000,
            memory_used_mb=100,
            max_tasks=0 if self.original else self.max_tasks,
            uptime_seconds=int(self.clock() - self.up_since) if self.counts_uptime else 0,
        )
        if self.original:
            return NodeReport(self.agent_id, figures)
        return NodeReport(self.agent_id, figures, self.instance, self.platform, "off", self.revision)

    def check_up(self) -> None:
        if not self.up:
            raise AgentUnreachable(f"{self.address} refused the connection")


class Connection:
    """AgentConnection to a Machine."""

    def __init__(self, machine: Machine, events: ConnectionEvents) -> None:
        self.machine, self.events = machine, events
        self.original = machine.original
        self.enrolled = 0
        self.failed: list[str] = []
        self.closed = False
        self.reopened = 0
        self.pending: list[OnReport] = []

    @property
    def agent_id(self) -> str:
        return self.machine.agent_id

    def execute(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        raise NotImplementedError

    def cancel(self, execution_id: str, *, reason: str, timeout: float) -> ExecutionStatus | None:
        self.machine.runs.discard(execution_id)
        return ExecutionStatus.CANCELLED

    def record(self, execution_id: str, *, with_output: bool) -> ExecutionRecord | None:
        return None

    def output(self, execution_id: str, offset: int, *, follow: bool) -> Any:
        raise NotImplementedError

    def register_function(self, spec: FunctionSpec, digest: str) -> Taken:
        held = self.machine.functions.get(spec.name)
        return self._take(f"register {spec.name}", FunctionState(spec.name, digest, held.code_digest if held else ""))

    def deploy(self, spec: FunctionSpec, digest: str, code_digest: str, archive: bytes) -> Taken:
        assert hashlib.sha256(archive).hexdigest() == code_digest
        if self.machine.gate is not None:
            self.machine.waiting += 1
            assert self.machine.gate.wait(10)
        if len(archive) > self.machine.largest:
            raise AgentRefused("the archive is larger than an original agent takes (50 MiB)")
        return self._take(f"deploy {spec.name}", FunctionState(spec.name, digest, code_digest))

    def _take(self, call: str, state: FunctionState) -> Taken:
        self.machine.check_up()
        self.machine.calls.append(call)
        if state.name in self.machine.refuses:
            raise AgentRefused(self.machine.refuses[state.name])
        self.machine.functions[state.name] = state
        self.machine.revision += 1
        return Taken(cannot_start=self.machine.cannot_start.get(state.name, ""))

    def remove_function(self, name: str) -> bool:
        self.machine.check_up()
        if self.original:
            return False
        self.machine.calls.append(f"remove {name}")
        self.machine.functions.pop(name, None)
        self.machine.revision += 1
        return True

    def inventory(self) -> Inventory | None:
        if self.original:
            return None
        self.machine.check_up()
        self.machine.calls.append("inventory")
        return self.machine.inventory()

    def report_async(self, on_report: OnReport) -> None:
        if self.machine.slow:
            self.pending.append(on_report)
        elif self.machine.up:
            on_report(self.machine.report())
        else:
            on_report(AgentUnreachable(f"{self.machine.address} refused the connection"))

    def fail_in_flight(self, reason: str) -> None:
        self.failed.append(reason)

    def reopen(self) -> None:
        self.reopened += 1

    def create_certificate_request(self) -> tuple[bytes, float]:
        raise AgentRefused("this agent runs without TLS")

    def install_certificate(self, certificate_pem: bytes, ca_pem: bytes) -> None:
        raise NotImplementedError

    def close(self, deadline: Deadline) -> None:
        self.closed = True


class Wire:
    """The Connector: machines by address."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.machines: dict[str, Machine] = {}
        self.connections: list[Connection] = []
        self.probes: list[str] = []

    def add(self, agent_id: str, address: str = "", **fields: Any) -> Machine:
        machine = Machine(agent_id, address or f"{agent_id}:50052", clock=self._clock, **fields)
        self.machines[machine.address] = machine
        return machine

    def probe(self, address: str, *, legacy: bool = False, expected_id: str = "") -> ProbeResult:
        machine = self.machines.get(address)
        self.probes.append(address)
        if machine is None:
            raise AgentUnreachable(f"{address} refused the connection")
        machine.check_up()
        if machine.legacy_certificate and not legacy:
            raise AgentRefused("the certificate carries no ID")
        if expected_id and expected_id != machine.agent_id:
            raise AgentRefused(f"the agent at {address} is {machine.agent_id}, not {expected_id}")
        inventory = None if machine.original else machine.inventory()
        return ProbeResult(machine.agent_id, address, machine.report(), inventory, machine.legacy_certificate)

    def connect(self, probe: ProbeResult, events: ConnectionEvents) -> Connection:
        connection = Connection(self.machines[probe.address], events)
        self.connections.append(connection)
        if "attach" in connection.machine.features:
            events.attached(True)
        return connection


class Executions:
    """What was asked of the executions, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.began = 0.0
        self.reconciled: dict[str, Collection[str] | None] = {}

    def events(self, agent_id: str) -> ConnectionEvents:
        return ConnectionEvents()

    def reconcile(self, agent_id: str, running: Collection[str] | None) -> None:
        self.calls.append(("reconcile", agent_id))
        self.reconciled[agent_id] = running

    def agent_restarted(self, agent_id: str, began: float) -> None:
        self.calls.append(("restarted", agent_id))
        self.began = began

    def agent_lost(self, agent_id: str, reason: str) -> None:
        self.calls.append(("lost", agent_id))

    def adopt(self, dead_session: str, lease: Lease | None) -> None:
        self.calls.append(("adopt", dead_session))


class Fleet:
    """Everything wired as the application does it, with a clock of its own. ``close`` it."""

    def __init__(
        self,
        store: ControlStore | None = None,
        wire: Connector | None = None,
        *,
        session: str = "s1",
        shared: bool = False,
        now: float = 1000.0,
        tls: bool = True,
        max_archive_bytes: int = 10**6,
        clock: list[float] | None = None,
        interval: float = 10,
        lost_after: float = 300,
    ) -> None:
        self.time = clock if clock is not None else [now]
        self.store = store if store is not None else MemoryControlStore()
        self.wire: Any = wire if wire is not None else Wire(self.clock)
        self.executions = Executions()
        self.leadership = Leadership(self.store, session, shared=shared, clock=self.clock)
        self.leadership.tick(self.now)
        self.agents = AgentFleet(self.store, self.leadership)
        self.pusher = FunctionPusher(self.agents, self.store.archive, at_a_time=4)
        self.functions = FunctionService(
            self.store,
            self.agents,
            self.pusher,
            max_archive_bytes=max_archive_bytes,
            clock=self.clock,
        )
        self.functions.refresh()
        self.reconciler = AgentReconciler(
            self.store,
            self.agents,
            self.wire,
            self.executions,
            self.functions,
            self.pusher,
            self.leadership,
            tls=tls,
            lost_after=lost_after,
            threads=4,
            clock=self.clock,
        )
        self.membership = Membership(self.agents, self.reconciler, self.wire, self.executions, clock=self.clock)
        self.replication = Replication(
            self.store,
            self.agents,
            self.reconciler,
            self.membership,
            self.executions,
            self.leadership,
            interval=interval,
            clock=self.clock,
        )
        self.health = Health(self.agents, self.reconciler, self.leadership, interval=interval)

    @property
    def now(self) -> float:
        return self.time[0]

    def clock(self) -> float:
        return self.time[0]

    def start(self) -> None:
        self.membership.start()
        self.settle()

    def round(self, seconds: float = 10, *, lead: bool = True) -> None:
        """Time passes, one round of questions, and whatever follows from the answers."""
        for passed in self.steps(seconds):
            self.time[0] += passed
            if lead:
                self.lead()
        self.functions.refresh()
        self.replicate()
        self.health.tick(self.now)
        self.health.tick(self.now)
        self.settle()
        self.replicate()

    @staticmethod
    def steps(seconds: float) -> list[float]:
        """A lease is renewed every few seconds, however much time passes."""
        whole = int(seconds // RENEW_EVERY)
        return [RENEW_EVERY] * whole + [seconds - whole * RENEW_EVERY]

    def lead(self) -> None:
        with suppress(StoreUnavailable):
            self.leadership.tick(self.now)

    def replicate(self) -> None:
        with suppress(StoreUnavailable):
            self.replication.tick(self.now)

    def settle(self) -> None:
        """Until nothing is done for any agent."""
        for agent in self.agents.agents():
            assert self.reconciler.wait(agent, 10), f"{agent.agent_id} is still being synchronized"

    def view(self, agent_id: str) -> AgentView:
        return next(view for view in self.membership.views() if view.record.agent_id == agent_id)

    def state(self, agent_id: str) -> Agent:
        state = self.agents.get(agent_id)
        assert state is not None
        return state

    def connection_of(self, agent_id: str) -> AgentConnection:
        connection = self.state(agent_id).connection
        assert connection is not None
        return connection

    def connection(self, agent_id: str) -> Connection:
        connection = self.connection_of(agent_id)
        if isinstance(connection, LegacyAgent):
            connection = connection.connection
        assert isinstance(connection, Connection)
        return connection

    def stored(self, agent_id: str) -> Any:
        return next((record for record in self.store.agents() if record.agent_id == agent_id), None)

    def close(self) -> None:
        self.membership.stop(Deadline(5))
        self.pusher.stop(Deadline(5))


def spec(name: str = "hello", handler: str = "run.sh", **fields: Any) -> FunctionSpec:
    return replace(FunctionSpec(name, handler), **fields)
