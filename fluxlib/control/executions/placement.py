"""Which agent takes an execution, and why none does. Pure: no clock, no thread, no I/O.

The registry shows its agents in falling order of headroom, so choosing is to
take the first that fits. A refusal is worked out only when none did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from fluxlib.control.agents.registry import AgentState, Choose
from fluxlib.errors import AgentError, AtCapacity, FluxError, NoAgentFits
from fluxlib.model import AgentStatus, Behavior, Enforcement, Function, Network, Platform

# A function that asks for CPU is not sent where this much is in use already.
BUSY_CPU_PERCENT = 90.0
# Seconds: a slot may free at any moment, an agent's figures change with its next report.
_RETRY_SLOT = 1
_RETRY_FIGURES = 10


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
    when_pressed: Behavior


class Misfit(Enum):
    """Why an agent does not take an execution; those that time may mend come last."""

    PLATFORM = "platform"
    ENFORCEMENT = "enforcement"
    AWAY = "away"
    LACKING = "lacking"
    SHUNNED = "shunned"
    MEMORY = "memory"
    CPU = "cpu"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing was placed. ``wait``: the function's behaviour is to queue in this case."""

    error: FluxError
    wait: bool
    pressed: bool  # resources lack, not slots: any agent's change may end it


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
        when_pressed=spec.resource_pressure_behavior,
    )


def chooser(need: Need, shunned: Mapping[tuple[str, str], object]) -> Choose:
    """A rule for :meth:`Registry.place`. ``shunned`` holds (agent ID, function name): not to be asked now."""

    def choose(candidates: Iterator[AgentState]) -> AgentState | None:
        for agent in candidates:
            if fits(need, agent) and not (shunned and (agent.agent_id, need.function_name) in shunned):
                return agent
        return None

    return choose


def fits(need: Need, agent: AgentState) -> bool:
    """Whether this agent has what is needed now. Slots are not looked at."""
    return _can_ever(need, agent) is None and _short_of(need, agent) is None


def misfit(need: Need, agent: AgentState, shunned: Mapping[tuple[str, str], object]) -> Misfit | None:
    """The first reason against this agent, the lasting ones first; None when it could take one now."""
    never = _can_ever(need, agent)
    if never is not None:
        return never
    if not agent.takes_work:
        return Misfit.AWAY
    if need.function_name in agent.lacking:
        return Misfit.LACKING
    if (agent.agent_id, need.function_name) in shunned:
        return Misfit.SHUNNED
    short = _short_of(need, agent)
    if short is not None:
        return short
    return Misfit.FULL if agent.full and ("" in agent.full or need.function_name in agent.full) else None


def _can_ever(need: Need, agent: AgentState) -> Misfit | None:
    record = agent.record
    if need.platforms and not any(record.platform.matches(wanted) for wanted in need.platforms):
        return Misfit.PLATFORM
    # Without isolation (and on an original agent) what is asked is accepted with a warning.
    if need.enforced and record.isolation not in ("", "off") and not need.enforced.issubset(record.enforces):
        return Misfit.ENFORCEMENT
    return None


def _short_of(need: Need, agent: AgentState) -> Misfit | None:
    if need.memory_mb and 0 <= agent.expected_memory_free_mb < need.memory_mb:
        return Misfit.MEMORY
    if need.cpu_millicores and agent.figures is not None and agent.figures.cpu_percent >= BUSY_CPU_PERCENT:
        return Misfit.CPU
    return None


def refusal(need: Need, agents: Iterable[AgentState], shunned: Mapping[tuple[str, str], FluxError]) -> Refusal:
    """Why none of these took it: at capacity as soon as one is merely full, else what they lack."""
    found: dict[Misfit, list[AgentState]] = {}
    for agent in agents:
        reason = misfit(need, agent, shunned)
        if reason is None or reason is Misfit.FULL:
            error = AtCapacity(f"function {need.function_name} at capacity", retry_after=_RETRY_SLOT)
            # None: it has become free since, or others wait for it already.
            wait = need.when_full is Behavior.WAIT or (reason is None and need.when_pressed is Behavior.WAIT)
            return Refusal(error, wait, pressed=False)
        found.setdefault(reason, []).append(agent)
    wait = need.when_pressed is Behavior.WAIT
    if Misfit.SHUNNED in found:
        name = need.function_name
        reasons = (shunned.get((agent.agent_id, name)) for agent in found[Misfit.SHUNNED])
        away = next((error for error in reasons if isinstance(error, AgentError)), None)
        if away is not None:
            # Of its own: the one kept is raised by many threads.
            return Refusal(type(away)(away.message, retry_after=2), wait, pressed=True)
    # Where no agent of the right kind is known, waiting would not end: only time with other agents would help.
    lasting = bool(found) and not set(found) - {Misfit.PLATFORM, Misfit.ENFORCEMENT}
    error_text = _explanation(need, found, shunned)
    return Refusal(NoAgentFits(error_text, retry_after=_RETRY_FIGURES), wait and not lasting, pressed=True)


def _explanation(
    need: Need, found: Mapping[Misfit, list[AgentState]], shunned: Mapping[tuple[str, str], FluxError]
) -> str:
    name = need.function_name
    if not found:
        return f"no agent can take function {name}: none is registered"
    describe: dict[Misfit, Callable[[list[AgentState]], str]] = {
        Misfit.MEMORY: lambda agents: (
            f"it needs {need.memory_mb} MB of memory, and the freest agent has"
            f" {max(agent.expected_memory_free_mb for agent in agents)} MB free"
        ),
        Misfit.CPU: lambda agents: (
            f"it asks for CPU, and of {_some(agents)} less than {100 - BUSY_CPU_PERCENT:.0f} % of the CPU is free"
        ),
        Misfit.SHUNNED: lambda agents: "; ".join(
            sorted({shunned[one.agent_id, name].message for one in agents if (one.agent_id, name) in shunned})
        ),
        Misfit.LACKING: lambda agents: (
            f"it is not on {agents[0].agent_id}: {agents[0].lacking.get(name, 'being sent')}"
        ),
        Misfit.AWAY: lambda agents: f"{_some(agents)} cannot take work now ({_states(agents)})",
        Misfit.ENFORCEMENT: lambda agents: (
            f"{_some(agents)} cannot enforce"
            f" {', '.join(sorted(need.enforced.difference(*(one.record.enforces for one in agents)) or need.enforced))}"
        ),
        Misfit.PLATFORM: lambda agents: (
            f"it runs on {', '.join(str(one) for one in need.platforms)},"
            f" and {_some(agents)} {'has' if len(agents) == 1 else 'have'}"
            f" {', '.join(sorted({str(one.platform) for one in agents}))}"
        ),
    }
    reasons = "; ".join(describe[reason](found[reason]) for reason in describe if reason in found)
    return f"no agent can take function {name} now: {reasons}"


def _some(agents: list[AgentState]) -> str:
    names = [agent.agent_id for agent in agents[:3]]
    more = len(agents) - len(names)
    return f"{'agent' if len(agents) == 1 else 'agents'} {', '.join(names)}{f' and {more} more' if more else ''}"


def _states(agents: list[AgentState]) -> str:
    def state(agent: AgentState) -> str:
        status = agent.record.status
        if status in (AgentStatus.ONLINE, AgentStatus.BUSY):
            return "being brought in step" if not agent.in_step else "not reachable"
        return str(status.value)

    return ", ".join(sorted({state(agent) for agent in agents}))
