"""One agent as this Flux knows it: its record, its connection, what it holds and runs, and how much headroom it has."""

from __future__ import annotations

import threading
from enum import Enum, auto

from fluxlib.control.agents.connection import AgentConnection, ProbeResult
from fluxlib.control.agents.ranking import Key, Ranking
from fluxlib.model import AgentRecord, FunctionState, NodeFigures, Platform
from fluxlib.model.agents import AgentStatus

# A task more than an agent last reported counts as so much of its CPU, before its own figures show it. Figures
# are seconds old: the agent that was idle then must not get the whole of a burst.
_CPU_PER_TASK = 0.1


class SyncState(Enum):
    """How far an agent is on its way to taking work. Draining is beside it: it is in the record."""

    OFFLINE = auto()  # does not answer, or was not reached yet
    CONNECTING = auto()  # has to be probed and connected to
    SYNCING = auto()  # connected; what it runs and holds is compared before it gets work
    READY = auto()  # holds what it should, as far as it can be given it


class Agent:
    """One agent. Changed only by :class:`Fleet`, under its lock; reading attributes needs no lock.

    ``lock`` is another one: it is held while the agent is sent a function, so that two versions cannot cross.
    """

    __slots__ = (
        "_key",
        "_memory_at_report",
        "_ranking",
        "_total_at_report",
        "asked_at",
        "behind",
        "certificate_not_after",
        "connection",
        "connection_number",
        "executions_compared",
        "failures",
        "features",
        "figures",
        "full",
        "given_up",
        "holds",
        "in_flight",
        "instance_id",
        "isolation_notes",
        "last_heartbeat",
        "lock",
        "misses",
        "missing_functions",
        "probe",
        "problem",
        "question",
        "reachable",
        "record",
        "removed",
        "reserved_memory_mb",
        "retry_at",
        "revision",
        "slots",
        "state",
        "stored",
        "synced_revision",
        "total",
        "tried",
        "unsaved",
        "unstartable",
    )

    def __init__(self, record: AgentRecord, connection: AgentConnection | None = None) -> None:
        self.lock = threading.Lock()
        # The record: as it is here, and as the store has it.
        self.record = record
        self.stored = record
        self.unsaved = False  # this process has judged something that is not in the store yet
        self.removed = False
        # The connection.
        self.connection = connection
        self.connection_number = 0  # events of an earlier connection are ignored
        self.probe: ProbeResult | None = None  # of a request that has just identified it; the next connection uses it
        self.features: tuple[str, ...] = ()
        self.reachable = True  # executions can be sent now
        self.tried = False  # this process has synchronized it, or failed to, at least once
        # Synchronization: what is desired is in the store, what is observed is here.
        self.state = SyncState.OFFLINE
        self.problem = ""  # why it takes no work, for people
        self.executions_compared = False  # what it runs was compared since it joined, came back or restarted
        self.given_up = False  # what it ran was failed, because it was offline for too long
        self.holds: dict[str, FunctionState] = {}  # what it has of each function, by digest
        self.missing_functions: dict[str, str] = {}  # functions it could not be given, and why
        self.unstartable: frozenset[str] = frozenset()  # functions it took and cannot start
        self.revision = -1  # of its functions, as it last reported; -1 = never asked
        self.synced_revision = -1  # of the desired functions it was last compared with
        self.behind = False  # something did not reach it: to be tried again at ``retry_at``
        self.failures = 0  # in a row
        self.retry_at = 0.0
        # Metrics.
        self.figures: NodeFigures | None = None
        self.last_heartbeat = record.last_heartbeat
        self.instance_id = ""
        self.isolation_notes: tuple[str, ...] = ()
        self.certificate_not_after = 0.0
        # Health checks. The health loop's thread only.
        self.misses = 0  # questions in a row that had no good answer
        self.question = 0  # the number of the last one: an answer to an earlier one is ignored
        self.asked_at = 0.0  # 0 = none is open
        # Capacity.
        self.in_flight: dict[str, int] = {}  # by function, as this Flux sent them
        self.slots: dict[str, int] = {}  # the limits of those in flight, where they have one
        self.total = 0
        self.full: set[str] = set()  # functions that have no slot left here; "" = the whole agent
        self.reserved_memory_mb = 0
        self._total_at_report = 0
        self._memory_at_report = 0
        self._ranking: Ranking | None = None  # where it is ranked; None = it takes no work
        self._key: Key = (0.0, 0, "")  # its place there

    @property
    def agent_id(self) -> str:
        return self.record.agent_id

    @property
    def platform(self) -> Platform:
        return self.record.platform

    @property
    def present(self) -> bool:
        """Whether it answers, as far as is known."""
        return self.record.status.present

    @property
    def synced(self) -> bool:
        return self.state is SyncState.READY

    @property
    def takes_work(self) -> bool:
        able = self.figures is None or not self.figures.problem
        return able and self.record.status.takes_work and self.synced and self.reachable and self.connection is not None

    @property
    def max_tasks(self) -> int:
        """0 = unknown (a legacy agent)."""
        return (self.figures.max_tasks if self.figures is not None else 0) or self.record.max_tasks

    @property
    def sent_since_report(self) -> int:
        """Tasks of ours it runs beyond those in its last report; negative when some have ended."""
        return self.total - self._total_at_report

    @property
    def expected_active(self) -> int:
        """Running tasks, everybody's: the last report and what this Flux has done since."""
        reported = self.figures.active_tasks if self.figures is not None else 0
        return max(self.total, reported + self.sent_since_report)

    @property
    def expected_memory_free_mb(self) -> int:
        """What the last report left, less what was promised to executions sent since; -1 = never reported."""
        if self.figures is None or not self.figures.memory_total_mb:
            return -1
        sent = max(0, self.reserved_memory_mb - self._memory_at_report)
        return max(0, self.figures.memory_total_mb - self.figures.memory_used_mb - sent)

    def full_by_count(self, active: int) -> set[str]:
        """What is full whatever the agent says: by this Flux's own reservations, and with ``active`` tasks in all."""
        full = {name for name, slots in self.slots.items() if self.in_flight.get(name, 0) >= slots}
        if self.max_tasks and active >= self.max_tasks:
            full.add("")
        return full

    @property
    def shown_status(self) -> AgentStatus:
        """The stored status; ``busy`` while every slot is taken, ``offline`` while executions cannot be sent.

        That is also while it is synchronized: a caller that sees it online may call it.
        """
        status = self.record.status
        if status.takes_work and not self.takes_work:
            return AgentStatus.OFFLINE
        if status.takes_work:
            full = bool(self.max_tasks) and self.expected_active >= self.max_tasks
            return AgentStatus.BUSY if full else AgentStatus.ONLINE
        return status


def free_share(agent: Agent) -> float:
    """Headroom when nobody says otherwise: the mean free share of CPU, memory and slots."""
    figures = agent.figures
    if figures is None:
        return 0.5 - _CPU_PER_TASK / 3 * agent.total
    reported, total = agent._total_at_report, agent.total
    used = figures.cpu_percent / 100
    # Those that ended since the report have given back their share of what it shows.
    used = used * total / reported if total < reported else used + _CPU_PER_TASK * (total - reported)
    memory = 1 - figures.memory_percent / 100
    slots = 1 - agent.expected_active / agent.max_tasks if agent.max_tasks else 1.0
    return (1 - used + memory + slots) / 3
