"""One simulated fleet: the real scaling decision and the real placement under a virtual clock, all else invented."""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fluxlib.config.control import AutoscalingConfig, NodeType
from fluxlib.control.agents.fleet import Agent, Fleet, Reservation, SyncState
from fluxlib.control.executions.placement import chooser, need_of
from fluxlib.control.nodes.scaler_state import ScalerState
from fluxlib.control.nodes.scaling import Action, Decision, FleetView, NodeCondition, NodeView, Sample, Wait, decide
from fluxlib.model import AgentRecord, AgentStatus, Behavior, Function, FunctionSpec, NodeFigures

SLOTS = 8
_LOST_AFTER = 300.0
_NOTICED_AFTER = 30.0  # three missed reports
_DRAIN_LOOK = 1.0


class _Connection:
    """Present, and never asked anything."""

    original = False


@dataclass(frozen=True)
class Scenario:
    """``load(t)`` is the share of the full fleet's slots that is wanted at t, in hours of the run."""

    name: str
    load: Callable[[float], float]
    boot: float = 90.0  # seconds from launch to the first execution
    lost_every: float = 0.0  # hours a node lives on average; 0 = for ever


def _day(hour: float) -> float:
    """One day and night in four hours."""
    return 0.40 - 0.35 * math.cos(hour * math.pi / 2)


def _spikes(hour: float) -> float:
    """Quiet, and five times as much for ten minutes of every hour."""
    return 0.75 if 0.5 <= hour % 1 < 0.5 + 1 / 6 else 0.15


SCENARIOS = (
    Scenario("day and night", _day),
    Scenario("spikes", _spikes),
    Scenario("spikes, boots of 5 min", _spikes, boot=300.0),
    Scenario("day and night, lost nodes", _day, lost_every=3.0),
)


@dataclass
class Node:
    agent: Agent
    launched: float
    condition: NodeCondition = NodeCondition.COMING
    away_since: float = 0.0
    dead: bool = False  # the machine is gone, noticed or not
    running: set[int] = field(default_factory=set)


@dataclass
class Outcome:
    waits: list[float] = field(default_factory=list)
    node_seconds: float = 0.0
    ideal_seconds: float = 0.0
    ups: int = 0
    downs: int = 0
    most: int = 0
    lost_executions: int = 0
    decide_seconds: float = 0.0
    decisions: int = 0


class Simulation:
    """One run. Events are (time, order, call)."""

    def __init__(self, scenario: Scenario, size: int, hours: float, cooldown: int, seed: int = 1) -> None:
        self.scenario, self.size, self.end = scenario, size, hours * 3600
        # Longer executions in larger fleets: as much load with fewer events.
        self.duration = 60.0 if size <= 100 else 300.0 if size <= 1000 else 1200.0
        self.report_every = 10.0 if size <= 1000 else 60.0
        self.config = AutoscalingConfig(
            enabled=True,
            name="sim",
            min_nodes=max(1, size // 10),
            max_nodes=size,
            poll_interval_sec=int(self.report_every),
            evaluation_window_sec=max(60, int(2 * self.report_every)),
            cooldown_sec=cooldown,
            cpu_upper_threshold=80,
            cpu_lower_threshold=40,
            mem_lower_threshold=60,
            node_types=(NodeType("small", 8, 16),),
        )
        behavior = {"max_concurrency_behavior": Behavior.WAIT, "resource_pressure_behavior": Behavior.WAIT}
        spec = FunctionSpec("work", "run", max_concurrency=SLOTS, **behavior)
        self.need = need_of(Function(spec, spec.digest(), "code"))
        self.choose = chooser(self.need, {})
        self.random = random.Random(seed)
        self.fleet = Fleet()
        self.nodes: dict[str, Node] = {}
        self.state = ScalerState()
        self.queue: deque[tuple[int, float]] = deque()
        self.places: dict[int, tuple[Node, Reservation]] = {}
        self.waited_before = 0
        self.now = 0.0
        self.outcome = Outcome()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self._in_system = 0  # if nobody ever waited
        self._ideal_since = 0.0

    def run(self) -> Outcome:
        for _ in range(self.config.min_nodes):
            self._online(self._launch())
        self._at(0, self._arrive)
        self._at(self.report_every, self._tick)
        while self._events and self._events[0][0] <= self.end:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = self.end
        for node in self.nodes.values():
            self.outcome.node_seconds += self.end - node.launched
        self.outcome.waits += [self.end - arrived for _, arrived in self.queue]
        self._ideal(0)
        return self.outcome

    def fill(self) -> None:
        """Every node there may be, at once and without a clock."""
        for _ in range(self.size):
            self._online(self._launch())

    def _at(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), call))

    # -- executions --------------------------------------------------------------------

    def _arrive(self) -> None:
        rate = self.scenario.load(self.now / 3600) * self.size * SLOTS / self.duration
        self._at(self.random.expovariate(rate), self._arrive)
        number = next(self._numbers)
        self._ideal(1)
        self._at(self.duration, lambda: self._ideal(-1))
        if self.queue or not self._start(number, 0.0):
            self.queue.append((number, self.now))

    def _start(self, number: int, waited: float) -> bool:
        reservation = self.fleet.place("work", self.choose, slots=SLOTS)
        if reservation is None:
            return False
        node = self.nodes[reservation.agent_id]
        node.running.add(number)
        self.places[number] = (node, reservation)
        self.outcome.waits.append(waited)
        self._at(self.duration, lambda: self._ended(number))
        return True

    def _ended(self, number: int) -> None:
        place = self.places.pop(number, None)
        if place is None:
            return  # lost with its node
        node, reservation = place
        node.running.discard(number)
        self.fleet.release(reservation)
        self._serve()

    def _serve(self) -> None:
        while self.queue and self._start(self.queue[0][0], self.now - self.queue[0][1]):
            self.queue.popleft()

    def _ideal(self, change: int) -> None:
        least = max(self.config.min_nodes, -(-self._in_system // SLOTS))
        self.outcome.ideal_seconds += least * (self.now - self._ideal_since)
        self._ideal_since = self.now
        self._in_system += change

    # -- nodes -------------------------------------------------------------------------

    def _launch(self) -> Node:
        agent_id = f"sim-{len(self.state.failures)}-{next(self._numbers)}"
        record = AgentRecord(agent_id, "", provider="sim", status=AgentStatus.PROVISIONING, max_tasks=SLOTS)
        node = self.nodes[agent_id] = Node(Agent(record), self.now)
        self.outcome.most = max(self.outcome.most, len(self.nodes))
        return node

    def _online(self, node: Node) -> None:
        if node.agent.agent_id not in self.nodes:
            return
        node.condition = NodeCondition.ONLINE
        record = AgentRecord(node.agent.agent_id, "", status=AgentStatus.ONLINE, max_tasks=SLOTS)
        node.agent = Agent(record, _Connection())  # type: ignore[arg-type]
        node.agent.state = SyncState.READY
        self.fleet.add(node.agent)
        self._report(node)
        self._serve()
        if self.scenario.lost_every:
            life = self.random.expovariate(1 / (self.scenario.lost_every * 3600))
            self._at(life, lambda: self._die(node))

    def _die(self, node: Node) -> None:
        if node.agent.agent_id in self.nodes and not node.dead:
            node.dead = True
            self._at(_NOTICED_AFTER, lambda: self._noticed(node))

    def _noticed(self, node: Node) -> None:
        """Its work is lost; callers send it again, which counts as waiting from the start."""
        if node.condition is not NodeCondition.LEAVING:
            node.condition, node.away_since = NodeCondition.OFFLINE, self.now
        self.fleet.set_reachable(node.agent, False)
        for number in sorted(node.running):
            self.outcome.lost_executions += 1
            self.fleet.release(self.places.pop(number)[1])
            self.queue.append((next(self._numbers), self.now))
        node.running.clear()
        self._serve()

    def _report(self, node: Node) -> None:
        figures = NodeFigures(
            100 * len(node.running) / SLOTS, 30.0, 16384, 4096, active_tasks=len(node.running), max_tasks=SLOTS
        )
        self.fleet.report(node.agent.agent_id, figures, at=self.now)

    def _drain(self, node: Node) -> None:
        node.condition = NodeCondition.LEAVING
        self.fleet.set_reachable(node.agent, False)
        self._look_drained(node)

    def _look_drained(self, node: Node) -> None:
        if node.running:
            self._at(_DRAIN_LOOK, lambda: self._look_drained(node))
            return
        self._end(node)

    def _end(self, node: Node) -> None:
        if self.nodes.pop(node.agent.agent_id, None) is not None:
            self.fleet.remove(node.agent.agent_id)
            self.outcome.node_seconds += self.now - node.launched

    # -- the autoscaler ----------------------------------------------------------------

    def _tick(self) -> None:
        self._at(self.report_every, self._tick)
        views = []
        for node in list(self.nodes.values()):
            agent_id = node.agent.agent_id
            if node.condition is NodeCondition.OFFLINE and self.now - node.away_since >= _LOST_AFTER:
                node.condition = NodeCondition.LOST
            samples: tuple[Sample, ...] = ()
            if node.condition is NodeCondition.ONLINE:
                if not node.dead:
                    self._report(node)
                sample = Sample(self.now, 100 * len(node.running) / SLOTS, 30.0)
                samples = self.state.sample(agent_id, sample, self.config.evaluation_window_sec)
            views.append(NodeView(agent_id, "small", node.condition, len(node.running), samples))
        lasting, self.waited_before = min(len(self.queue), self.waited_before), len(self.queue)
        waits = (Wait("work", lasting, slots=SLOTS),) if lasting else ()
        view = FleetView(tuple(views), waits, last_change_at=self.state.last_change_at)
        began = time.perf_counter()
        decision = decide(view, self.config, self.now)
        self.outcome.decide_seconds += time.perf_counter() - began
        self.outcome.decisions += 1
        self._carry_out(decision)
        self._serve()

    def _carry_out(self, decision: Decision) -> None:
        if decision.action is not Action.NOTHING:
            self.state.last_change_at = self.now
        if decision.action is Action.LAUNCH:
            self.outcome.ups += 1
            for _ in range(decision.count):
                node = self._launch()
                self._at(self.scenario.boot, lambda node=node: self._online(node))  # type: ignore[misc]
        for agent_id in decision.agents:
            self.outcome.downs += 1
            self._drain(self.nodes[agent_id])
        for agent_id in decision.ends:
            self._end(self.nodes[agent_id])
