"""Functions on their way to agents: what differs by digest, to many agents at a time, one at a time to each.

What an agent holds and what it could not be given is told to the fleet here and nowhere else.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fluxlib.control.agents.connection import AgentConnection, Taken
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.services import AgentResult
from fluxlib.errors import AgentLost, AgentUnreachable, FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import Function, FunctionState
from fluxlib.pool import Pool

log = logging.getLogger(__name__)

_CACHED_BYTES = 128 * 1024 * 1024

# Pushes in a row that get no answer: the agent is away, and each further one would take its deadline.
_GIVE_UP_AFTER = 3

SUCCESS, FAILED, SKIPPED = "success", "failed", "skipped"


class Archives:
    """The zips pushed lately: a thousand agents that join need not read the store a thousand times."""

    def __init__(self, read: Callable[[str], bytes | None], limit: int = _CACHED_BYTES) -> None:
        self._read = read
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, code_digest: str) -> bytes | None:
        """None when no function refers to it any more."""
        with self._lock:
            found = self._kept.get(code_digest)
            if found is not None:
                self._kept.move_to_end(code_digest)
                return found
            # Under the lock: of many that ask at once, one reads.
            found = self._read(code_digest)
            if found is not None:
                self._kept[code_digest] = found
                while len(self._kept) > 1 and sum(map(len, self._kept.values())) > self._limit:
                    self._kept.popitem(last=False)
            return found


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of one change at one agent.

    ``again``: the agent could not be reached, so it is worth a retry. ``unfit``: why it will never run the function.
    """

    result: AgentResult
    warnings: tuple[str, ...] = ()
    again: bool = False
    unfit: str = ""


class FunctionPusher:
    """Brings agents what they should hold. Every method may be called from any thread."""

    def __init__(self, fleet: Fleet, archive: Callable[[str], bytes | None], *, at_a_time: int = 16) -> None:
        self._fleet = fleet
        self._archives = Archives(archive)
        self._pool = Pool("push", at_a_time)

    def differs(self, agent: Agent, functions: Iterable[Function]) -> bool:
        """Whether the agent, as far as is known, holds something else than it should and can be given."""
        wanted = {function.spec.name: function for function in functions if fits(agent, function)}
        return agent.holds.keys() - wanted.keys() != set() or any(
            _state(one) != agent.holds.get(name) for name, one in wanted.items() if name not in agent.missing_functions
        )

    def push_all(self, agents: Sequence[Agent], function: Function) -> list[Pushed]:
        """The function to each of the agents, in parallel; answers in the order of the agents."""
        return self._side_by_side(agents, lambda agent: self.push(agent, function))

    def remove_all(self, agents: Sequence[Agent], name: str) -> list[Pushed]:
        """Away with a function, in parallel."""
        return self._side_by_side(agents, lambda agent: self.remove(agent, name))

    def push(self, agent: Agent, function: Function) -> Pushed:
        """What differs of one function to one agent. Never raises a FluxError."""
        name = function.spec.name
        if not fits(agent, function):
            wanted = ", ".join(str(platform) for platform in function.platforms)
            # What it held may have been for its platform: it must not run on as the old version.
            if name in agent.holds and not agent.record.original:
                self.remove(agent, name)
            reason = f"is {agent.platform}, the function is for {wanted}"
            return Pushed(AgentResult(agent.agent_id, SKIPPED, reason), unfit=f"the agent {reason}")
        connection = agent.connection
        if connection is None or not agent.record.status.present:
            return Pushed(AgentResult(agent.agent_id, SKIPPED, "is offline: gets it when it is back"), again=True)
        with agent.lock:
            if agent.record.original and not function.code_digest:
                # It may still have the code of a deleted function of that name, and would run it.
                self._note(agent, name, None, "its code is not deployed yet")
                return Pushed(AgentResult(agent.agent_id, SKIPPED, "an original agent: gets it with its code"))
            # What could not start there is sent again: its answer says whether that has changed.
            unfit = name in agent.unstartable
            if agent.holds.get(name) == _state(function) and name not in agent.missing_functions and not unfit:
                return Pushed(AgentResult(agent.agent_id, SUCCESS, "has it already"))
            try:
                taken = self._send(agent, connection, function)
            except FluxError as error:
                # An original that failed may have unpacked half of it over what it had.
                held = None if agent.record.original else agent.holds.get(name)
                self._note(agent, name, held, error.message)
                log.warning("agent %s did not take %s: %s", agent.agent_id, name, error)
                return self._failed(agent, error)
            self._note(agent, name, _state(function), "", unstartable=bool(taken.cannot_start))
            result = AgentResult(agent.agent_id, SUCCESS, "; ".join(taken.warnings))
            return Pushed(result, taken.warnings, unfit=taken.cannot_start)

    def remove(self, agent: Agent, name: str) -> Pushed:
        """Never raises a FluxError."""
        connection = agent.connection
        if connection is None or not agent.record.status.present:
            return Pushed(AgentResult(agent.agent_id, SKIPPED, "is offline: loses it when it is back"), again=True)
        with agent.lock:
            if not agent.record.original and name not in agent.holds and name not in agent.missing_functions:
                return Pushed(AgentResult(agent.agent_id, SUCCESS, "did not have it"))
            try:
                removed = connection.remove_function(name)
            except FluxError as error:
                log.warning("agent %s did not remove %s: %s", agent.agent_id, name, error)
                failed = self._failed(agent, error)
                if not failed.again:
                    # Nothing a retry would change; its next inventory says whether it is still there.
                    self._note(agent, name, None, "")
                return failed
            self._note(agent, name, None, "")
        if removed:
            return Pushed(AgentResult(agent.agent_id, SUCCESS))
        return Pushed(
            AgentResult(agent.agent_id, SKIPPED, "an original agent: it keeps the code, but is not asked to run it")
        )

    def sync(self, agent: Agent, functions: Iterable[Function], held: Iterable[FunctionState] | None) -> None:
        """Push and remove until the agent holds what it should. What did not reach it leaves it ``behind``.

        ``held`` is what its inventory says; None = unknown, it gets everything. Raises AgentUnreachable
        when it does not answer any more.
        """
        wanted = {function.spec.name: function for function in functions}
        with agent.lock:
            holds = {} if held is None else {state.name: state for state in held}
            # What failed before stays missing until it is tried again below: the agent or its host may have changed.
            missing = {name: reason for name, reason in agent.missing_functions.items() if name in wanted}
            self._fleet.set_functions(agent, holds, missing, anew=True)
        in_a_row = 0
        for pushed in self._steps(agent, sorted(holds.keys() - wanted.keys()), wanted.values()):
            in_a_row = in_a_row + 1 if pushed.again else 0
            if in_a_row >= _GIVE_UP_AFTER:
                raise AgentUnreachable(f"agent {agent.agent_id} takes no functions: {pushed.result.message}")

    def stop(self, deadline: Deadline) -> None:
        """What is queued is dropped: agents get it when they are next synchronized."""
        self._pool.stop(deadline)

    def _side_by_side(self, agents: Sequence[Agent], act: Callable[[Agent], Pushed]) -> list[Pushed]:
        done = self._pool.map(lambda agent: _guarded(agent, lambda: act(agent)), agents)
        left = "Flux is stopping: it is synchronized later"
        return [
            pushed or Pushed(AgentResult(agent.agent_id, SKIPPED, left), again=True)
            for agent, pushed in zip(agents, done, strict=True)
        ]

    def _steps(self, agent: Agent, superfluous: Iterable[str], functions: Iterable[Function]) -> Iterator[Pushed]:
        for name in superfluous:
            yield self.remove(agent, name)
        for function in functions:
            yield self.push(agent, function)

    def _send(self, agent: Agent, connection: AgentConnection, function: Function) -> Taken:
        held = agent.holds.get(function.spec.name)
        same_code = held is not None and held.code_digest == function.code_digest
        if not function.code_digest or same_code:
            return connection.register_function(function.spec, function.spec_digest)
        archive = self._archives.get(function.code_digest)
        if archive is None:
            # Replaced or deleted a moment ago: that change brings the agents its own.
            raise AgentUnreachable(f"the code of {function.spec.name} was replaced meanwhile")
        return connection.deploy(function.spec, function.spec_digest, function.code_digest, archive)

    def _failed(self, agent: Agent, error: FluxError) -> Pushed:
        # An original has one place for each function, and cannot replace a program there that runs.
        busy = agent.record.original and "text file busy" in error.message.lower()
        again = busy or isinstance(error, AgentUnreachable | AgentLost)
        if again:
            self._fleet.missed_a_function(agent)
        return Pushed(
            AgentResult(agent.agent_id, FAILED, error.message), again=again, unfit="" if again else error.message
        )

    def _note(
        self, agent: Agent, name: str, held: FunctionState | None, problem: str, *, unstartable: bool = False
    ) -> None:
        """Under the agent's lock."""
        holds = {one: state for one, state in agent.holds.items() if one != name}
        missing = {one: reason for one, reason in agent.missing_functions.items() if one != name}
        if held is not None:
            holds[name] = held
        if problem:
            missing[name] = problem
        refused = agent.unstartable | {name} if unstartable else agent.unstartable - {name}
        self._fleet.set_functions(agent, holds, missing, unstartable=refused)


def fits(agent: Agent, function: Function) -> bool:
    """Whether the agent's platform can run it; an unknown one can run everything."""
    return not function.platforms or any(agent.platform.matches(wanted) for wanted in function.platforms)


def _guarded(agent: Agent, act: Callable[[], Pushed]) -> Pushed:
    """A fault of ours at one agent must not hide what became of it at the others."""
    try:
        return act()
    except Exception as error:
        log.exception("a push to agent %s failed", agent.agent_id)
        return Pushed(AgentResult(agent.agent_id, FAILED, f"a fault of Flux: {type(error).__name__}"))


def _state(function: Function) -> FunctionState:
    return FunctionState(function.spec.name, function.spec_digest, function.code_digest)
