"""Which agent gets an execution, and why none does.

The decisions are pure: no clock, no thread, no I/O. The fleet shows its agents in falling order of headroom, so
choosing is to take the first that fits; the reasons are worked out only when none did. :class:`Placement` applies them
to the fleet, and remembers which agents are excluded for a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from fluxlib.control.agents.fleet import Agent, Choose, Fleet, Reservation
from fluxlib.errors import (
    AgentError,
    AtCapacity,
    FluxError,
    Internal,
    NoAgentFits,
    NotFound,
    StoreUnavailable,
    Unavailable,
    Unenforceable,
)
from fluxlib.lifecycle import Timers
from fluxlib.model import (
    AgentStatus,
    Behavior,
    Enforcement,
    ErrorKind,
    ExecutionRecord,
    Function,
    Network,
    Platform,
)

log = logging.getLogger(__name__)

# A function that asks for CPU is not sent where this much is in use already.
BUSY_CPU_PERCENT = 90.0
# Seconds: a slot may free at any moment, an agent's figures change with its next report.
_RETRY_SLOT = 1
_RETRY_FIGURES = 10
# An agent that could not be reached, or will not take a function, is excluded for so long (seconds).
EXCLUDE_SECONDS = 2.0
# An agent whose machine cannot start anything: excluded from everything, for longer each time it fails again.
_FAULT_SECONDS, _LONGEST_FAULT_SECONDS = 5.0, 60.0
# A scan of every agent that took longer than this (seconds) is not repeated before so many times what it took.
_SLOW_SCAN = 0.001
_SCAN_BACKOFF = 2.0
# Waiting executions of one function that are kept in memory; the store keeps the others.
_LEAST_WAITING, _MOST_WAITING = 16, 500
# Agents that were known before this process get so long (seconds) to be connected before a call is refused for them.
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Need:
    """What a function asks of an agent."""

    function_name: str
    slots: int  # of this function per agent; 0 = not limited
    memory_mb: int
    cpu_millicores: int
    platforms: tuple[Platform, ...]  # empty = any
    enforced: frozenset[str]  # values of Enforcement
    when_full: Behavior
    when_resources_exhausted: Behavior


# (agent ID, function name) → why that agent is not sent that function for a while; "" = no function at all.
Excluded = Mapping[tuple[str, str], FluxError]


class RejectReason(Enum):
    """Why an agent does not take an execution; reasons that pass by themselves come last."""

    PLATFORM = "platform"
    ENFORCEMENT = "enforcement"
    UNAVAILABLE = "unavailable"
    MISSING = "missing"
    EXCLUDED = "excluded"
    MEMORY = "memory"
    CPU = "cpu"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was placed. ``wait``: the function's behaviour is to queue in this case."""

    error: FluxError
    wait: bool
    for_resources: bool  # resources are short, not slots: any change of any agent may end it


def need_of(function: Function) -> Need:
    spec = function.spec
    asked = {
        Enforcement.MEMORY: spec.memory_mb,
        Enforcement.CPU: spec.cpu_millicores,
        Enforcement.PROCESSES: spec.max_processes,
        Enforcement.OPEN_FILES: spec.max_open_files,
        Enforcement.FILE_SIZE: spec.max_file_size_mb,
        Enforcement.TMP_SIZE: spec.tmp_size_mb,
        Enforcement.NETWORK_NONE: spec.network is Network.NONE,
    }
    return Need(
        function_name=spec.name,
        slots=spec.max_concurrency,
        memory_mb=spec.memory_mb,
        cpu_millicores=spec.cpu_millicores,
        platforms=function.platforms,
        enforced=frozenset(one.value for one, value in asked.items() if value),
        when_full=spec.max_concurrency_behavior,
        when_resources_exhausted=spec.resource_pressure_behavior,
    )


def chooser(need: Need, excluded: Excluded) -> Choose:
    """A rule for :meth:`Fleet.place`. ``excluded``: see Excluded."""

    def choose(candidates: Iterator[Agent]) -> Agent | None:
        for agent in candidates:
            if fits(need, agent) and not (excluded and _exclusion(excluded, agent.agent_id, need.function_name)):
                return agent
        return None

    return choose


def _exclusion(excluded: Excluded, agent_id: str, function_name: str) -> FluxError | None:
    return excluded.get((agent_id, function_name)) or excluded.get((agent_id, ""))


def fits(need: Need, agent: Agent) -> bool:
    """Whether this agent has what is needed now. Slots are not looked at."""
    return _can_ever(need, agent) is None and _short_of(need, agent) is None


def reject_reason(need: Need, agent: Agent, excluded: Excluded) -> RejectReason | None:
    """The first reason against this agent, the lasting ones first; None when it could take one now."""
    never = _can_ever(need, agent)
    if never is not None:
        return never
    if not agent.takes_work:
        return RejectReason.UNAVAILABLE
    if need.function_name in agent.missing_functions:
        return RejectReason.MISSING
    if _exclusion(excluded, agent.agent_id, need.function_name):
        return RejectReason.EXCLUDED
    short = _short_of(need, agent)
    if short is not None:
        return short
    return RejectReason.FULL if agent.full and ("" in agent.full or need.function_name in agent.full) else None


def _can_ever(need: Need, agent: Agent) -> RejectReason | None:
    record = agent.record
    if need.platforms and not any(record.platform.matches(wanted) for wanted in need.platforms):
        return RejectReason.PLATFORM
    # Without isolation (and on an original agent) what is asked is accepted with a warning.
    if need.enforced and record.isolation not in ("", "off") and not need.enforced.issubset(record.enforces):
        return RejectReason.ENFORCEMENT
    return None


def _short_of(need: Need, agent: Agent) -> RejectReason | None:
    if need.memory_mb and 0 <= agent.expected_memory_free_mb < need.memory_mb:
        return RejectReason.MEMORY
    if need.cpu_millicores and agent.figures is not None and agent.figures.cpu_percent >= BUSY_CPU_PERCENT:
        return RejectReason.CPU
    return None


def refusal(need: Need, agents: Iterable[Agent], excluded: Excluded) -> Refusal:
    """Why none of these took it: at capacity as soon as one is merely full, else what they lack."""
    found: dict[RejectReason, list[Agent]] = {}
    for agent in agents:
        reason = reject_reason(need, agent, excluded)
        if reason is None or reason is RejectReason.FULL:
            error = AtCapacity(f"function {need.function_name} at capacity", retry_after=_RETRY_SLOT)
            # None: it has become free since, or others wait for it already.
            wait = need.when_full is Behavior.WAIT or (
                reason is None and need.when_resources_exhausted is Behavior.WAIT
            )
            return Refusal(error, wait, for_resources=False)
        found.setdefault(reason, []).append(agent)
    wait = need.when_resources_exhausted is Behavior.WAIT
    if RejectReason.EXCLUDED in found:
        name = need.function_name
        reasons = (_exclusion(excluded, agent.agent_id, name) for agent in found[RejectReason.EXCLUDED])
        away = next((error for error in reasons if isinstance(error, AgentError)), None)
        if away is not None:
            # Of its own: the one kept is raised by many threads.
            return Refusal(type(away)(away.message, retry_after=2), wait, for_resources=True)
    # Where no agent of the right kind is known, waiting would not end: only time with other agents would help.
    lasting = bool(found) and not set(found) - {RejectReason.PLATFORM, RejectReason.ENFORCEMENT}
    error_text = _explanation(need, found, excluded)
    return Refusal(NoAgentFits(error_text, retry_after=_RETRY_FIGURES), wait and not lasting, for_resources=True)


def _explanation(need: Need, found: Mapping[RejectReason, list[Agent]], excluded: Excluded) -> str:
    name = need.function_name
    if not found:
        return f"no agent can take function {name}: none is registered"
    describe: dict[RejectReason, Callable[[list[Agent]], str]] = {
        RejectReason.MEMORY: lambda agents: (
            f"it needs {need.memory_mb} MB of memory, and the freest agent has"
            f" {max(agent.expected_memory_free_mb for agent in agents)} MB free"
        ),
        RejectReason.CPU: lambda agents: (
            f"it asks for CPU, and of {_some(agents)} less than {100 - BUSY_CPU_PERCENT:.0f} % of the CPU is free"
        ),
        RejectReason.EXCLUDED: lambda agents: "; ".join(
            sorted({error.message for one in agents if (error := _exclusion(excluded, one.agent_id, name))})
        ),
        RejectReason.MISSING: lambda agents: (
            f"it is not on {agents[0].agent_id}: {agents[0].missing_functions.get(name, 'being sent')}"
        ),
        RejectReason.UNAVAILABLE: lambda agents: f"{_some(agents)} cannot take work now ({_states(agents)})",
        RejectReason.ENFORCEMENT: lambda agents: (
            f"{_some(agents)} cannot enforce"
            f" {', '.join(sorted(need.enforced.difference(*(one.record.enforces for one in agents)) or need.enforced))}"
        ),
        RejectReason.PLATFORM: lambda agents: (
            f"it runs on {', '.join(str(one) for one in need.platforms)},"
            f" and {_some(agents)} {'has' if len(agents) == 1 else 'have'}"
            f" {', '.join(sorted({str(one.platform) for one in agents}))}"
        ),
    }
    reasons = "; ".join(describe[reason](found[reason]) for reason in describe if reason in found)
    return f"no agent can take function {name} now: {reasons}"


def _some(agents: list[Agent]) -> str:
    names = [agent.agent_id for agent in agents[:3]]
    more = len(agents) - len(names)
    return f"{'agent' if len(agents) == 1 else 'agents'} {', '.join(names)}{f' and {more} more' if more else ''}"


def _states(agents: list[Agent]) -> str:
    def state(agent: Agent) -> str:
        status = agent.record.status
        if status in (AgentStatus.ONLINE, AgentStatus.BUSY):
            return "synchronizing functions" if not agent.synced else "not reachable"
        return str(status.value)

    return ", ".join(sorted({state(agent) for agent in agents}))


# -- the fleet ----------------------------------------------------------------------------


class Functions(Protocol):
    """The functions, as executions need them."""

    def lookup(self, name: str) -> Function:
        """From memory, else from the store. Raises NotFound, StoreUnavailable."""

    def cached(self, name: str) -> Function | None:
        """From memory alone: never waits."""


class Placement:
    """Reserves slots at agents, and excludes agents that refused.

    ``readmitted(agent_id, function_name)``: an excluded agent may be sent work again (None = any function's). Every
    method may be called from any thread; only ``need`` and ``tidy`` may wait for the store. The dictionaries are
    changed by single operations, which are atomic also without a GIL; nothing depends on two of them agreeing.
    """

    def __init__(
        self,
        fleet: Fleet,
        functions: Functions,
        timers: Timers,
        readmitted: Callable[[str, str | None], None],
    ) -> None:
        self._fleet = fleet
        self._functions = functions
        self._timers = timers
        self._readmitted = readmitted
        self._needs: dict[str, tuple[Function, Need]] = {}
        self._last_used: dict[str, str] = {}  # by function; an agent's ID
        self._no_fit_until: dict[str, float] = {}
        self._refusals: dict[str, tuple[float, Need, Refusal]] = {}
        self._excluded: dict[tuple[str, str], FluxError] = {}
        self._faults: dict[str, int] = {}  # by agent: how often in a row its machine could not start anything
        self._awaited: set[str] = set()  # agents that were online before this process, and are not connected yet
        self._awaited_until = 0.0

    # -- what functions need -------------------------------------------------------------

    def need(self, function_name: str) -> Need:
        """What the function needs as it is declared now. Raises NotFound, StoreUnavailable."""
        try:
            function = self._functions.lookup(function_name)
        except NotFound:
            for memory in (self._needs, self._last_used, self._no_fit_until, self._refusals):
                memory.pop(function_name, None)
            raise
        return self._need_of(function)

    def known_need(self, function_name: str) -> Need | None:
        """The same from memory alone; None when it was never looked up, or was deleted."""
        function = self._functions.cached(function_name)
        if function is not None:
            return self._need_of(function)
        known = self._needs.get(function_name)
        return known[1] if known is not None else None

    def _need_of(self, function: Function) -> Need:
        known = self._needs.get(function.spec.name)
        if known is not None and known[0] is function:
            return known[1]
        need = need_of(function)
        self._needs[function.spec.name] = (function, need)
        return need

    def tidy(self) -> None:
        """Forget what is only known of functions that were deleted, and of agents that have left."""
        for name in list(self._needs):
            with suppress(NotFound, StoreUnavailable):
                self.need(name)
        for agent_id in list(self._faults):
            if self._fleet.get(agent_id) is None:
                self._faults.pop(agent_id, None)

    # -- slots ---------------------------------------------------------------------------

    def place(self, need: Need) -> Reservation | None:
        """A slot at the fitting agent with most headroom.

        None also while the last scan of a large fleet found none just now: a flood of calls that nobody can take must
        not scan ten thousand agents each.
        """
        name, began = need.function_name, time.monotonic()
        if self._no_fit_until and began < self._no_fit_until.get(name, 0.0):
            return None
        reservation = self._reserve(need, "")
        if reservation is None:
            took = time.monotonic() - began
            if took > _SLOW_SCAN:
                self._no_fit_until[name] = began + took * (1 + _SCAN_BACKOFF)
        return reservation

    def place_waiting(self, function_name: str, agent_id: str) -> Reservation | None:
        """A slot for one that waits, at this agent ("" = at any): what has freed must not be overlooked."""
        need = self.known_need(function_name)
        return self._reserve(need, agent_id) if need is not None else None

    def window(self, function_name: str) -> int:
        """How many waiting executions of a function to keep in memory: twice the slots there are for it."""
        need = self.known_need(function_name)
        slots = need.slots if need is not None else 0
        return min(_MOST_WAITING, max(_LEAST_WAITING, 2 * slots * self._fleet.placeable() if slots else _MOST_WAITING))

    def is_full(self, agent_id: str) -> bool:
        """Whether this agent can take nothing now, of whichever function."""
        agent = self._fleet.get(agent_id)
        return agent is None or not agent.takes_work or "" in agent.full

    def _reserve(self, need: Need, only: str) -> Reservation | None:
        name = need.function_name
        reservation = self._fleet.place(
            name,
            chooser(need, self._excluded),
            slots=need.slots,
            memory_mb=need.memory_mb,
            platforms=need.platforms,
            only=only,
        )
        if reservation is not None:
            self._last_used[name] = reservation.agent_id
        return reservation

    def refusal(self, need: Need) -> Refusal:
        """Why ``place`` found none."""
        began = time.monotonic()
        until, of, known = self._refusals.get(need.function_name, (0.0, need, None))
        if known is None or of is not need or began >= until:
            known = refusal(need, self._agents(need.function_name), self._excluded)
            took = time.monotonic() - began
            if took > _SLOW_SCAN:
                self._refusals[need.function_name] = (began + took * (1 + _SCAN_BACKOFF), need, known)
        error: FluxError = known.error
        if known.for_resources and self.still_connecting():
            text = f"Flux has just started and is still connecting to its agents ({error.message})"
            error = Unavailable(text, retry_after=_RETRY_SLOT)
        # An error of its own: the one kept is raised by many threads.
        return replace(known, error=type(error)(error.message, retry_after=error.retry_after))

    def _agents(self, function_name: str) -> Iterator[Agent]:
        """Every agent; first the one used last, which most often explains a refusal at once."""
        last = self._fleet.get(self._last_used.get(function_name, ""))
        if last is not None:
            yield last
        for agent in self._fleet.agents():
            if last is None or agent.agent_id != last.agent_id:
                yield agent

    def await_agents(self, agent_ids: Collection[str]) -> None:
        """These were online before this process started: they get some seconds to be connected."""
        self._awaited_until = time.monotonic() + _CONNECT_SECONDS
        self._awaited = set(agent_ids)

    def still_connecting(self) -> bool:
        """Whether one of them has neither been connected nor failed for the first time."""
        if self._awaited:
            if time.monotonic() >= self._awaited_until:
                self._awaited = set()
            self._awaited = {agent_id for agent_id in self._awaited if self._is_awaited(agent_id)}
        return bool(self._awaited)

    def _is_awaited(self, agent_id: str) -> bool:
        agent = self._fleet.get(agent_id)
        # Not in the fleet yet: membership starts after executions.
        return agent is None or not agent.tried

    # -- giving back ---------------------------------------------------------------------

    def release(self, reservation: Reservation) -> None:
        self._fleet.release(reservation)

    def succeeded(self, agent_id: str) -> None:
        """The agent has started something: its machine is well."""
        if self._faults and self._faults.pop(agent_id, None) is not None:
            self._fleet.set_problem(agent_id, "")

    def rejected(self, reservation: Reservation, answer: ExecutionRecord) -> None:
        """The agent started nothing: give the slot back, and try others for a while."""
        kind = answer.error_kind
        if kind is ErrorKind.INVALID:
            # This call's arguments; the next call may well bring others.
            self._fleet.release(reservation)
        elif kind is ErrorKind.MACHINE_FAULT:
            self._machine_fault(reservation, answer.error)
        elif kind is ErrorKind.AT_CAPACITY:
            self._full(reservation, answer.error)
        else:
            error = Unenforceable if kind is ErrorKind.UNENFORCEABLE else Internal
            self.unusable(reservation, error(f"{reservation.agent_id}: {answer.error}"))

    def unusable(self, reservation: Reservation, error: FluxError) -> None:
        """The agent cannot be reached, or will not take this function: give the slot back, try again later."""
        self._exclude((reservation.agent_id, reservation.function_name), error, EXCLUDE_SECONDS)
        self._fleet.release(reservation)

    def _full(self, reservation: Reservation, error: str) -> None:
        # Giving the slot back announces it, and the next in the queue would be sent into the same refusal.
        key = (reservation.agent_id, reservation.function_name)
        self._excluded[key] = AtCapacity(error)
        self._fleet.release(reservation)
        self._fleet.mark_full(reservation.agent_id, reservation.function_name)
        self._excluded.pop(key, None)
        connection = reservation.agent.connection
        if connection is not None and connection.original:
            # It will not say when it has a slot again, and a report of its tasks comes late.
            self._timers.after(EXCLUDE_SECONDS, lambda: self._fleet.freed(*key))

    def _machine_fault(self, reservation: Reservation, error: str) -> None:
        """No directory, no space, no descriptors: whatever it is sent fails at once, so it would always look idle."""
        agent_id = reservation.agent_id
        problem = f"cannot start anything: {error}"
        faults = self._faults.get(agent_id, 0)
        if (agent_id, "") not in self._excluded:
            log.warning("agent %s excluded from placement: it %s", agent_id, problem)
            self._faults[agent_id] = faults + 1
            seconds = min(_LONGEST_FAULT_SECONDS, _FAULT_SECONDS * 2**faults)
            self._exclude((agent_id, ""), Internal(f"agent {agent_id} {problem}"), seconds)
            self._fleet.set_problem(agent_id, problem)
        self._fleet.release(reservation)

    def _exclude(self, key: tuple[str, str], error: FluxError, seconds: float) -> None:
        if key not in self._excluded:
            self._excluded[key] = error
            self._timers.after(seconds, lambda: self._readmit(key))

    def _readmit(self, key: tuple[str, str]) -> None:
        agent_id, function_name = key
        self._excluded.pop(key, None)
        self._readmitted(agent_id, function_name or None)
