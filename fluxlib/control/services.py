"""What the HTTP layer may ask of the control plane, and the shapes of the answers.

``control.app`` builds the parts and hands one :class:`Services` to
``control.http.Api``; nothing in HTTP knows how a part does its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fluxlib.config.control import ControlConfig
from fluxlib.errors import AgentError, NotFound
from fluxlib.lifecycle import LoopReport
from fluxlib.model import AgentRecord, ExecutionRecord, Function, FunctionSpec, NodeFigures
from fluxlib.store.base import ExecutionFilter, Page


@dataclass(frozen=True, slots=True)
class Call:
    """One request to run a function, checked for shape already."""

    function_name: str
    args: tuple[str, ...] = ()
    stdin: bytes = b""
    timeout_seconds: float = 0.0  # 0 = the function's
    idempotency_key: str = ""  # async only


class Caller(Protocol):
    """Whoever waits for a synchronous answer."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        """``callback`` is called once, from any thread, when the client has gone away (at once if it has)."""


@dataclass(frozen=True, slots=True)
class AgentResult:
    """What became of one push to one agent."""

    agent_id: str
    status: str  # "success", "failed", "skipped"
    message: str = ""


@dataclass(frozen=True, slots=True)
class PushResult:
    """A change of the desired state and how far it has got. Saved, whatever the agents said.

    ``problem``: why no agent there is can run the function, for people; empty when one can, or may.
    """

    function: Function
    agents: tuple[AgentResult, ...]
    total_agents: int
    warnings: tuple[str, ...] = ()
    problem: str = ""

    @property
    def done(self) -> int:
        return sum(1 for agent in self.agents if agent.status == "success")


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent as GET /agents and GET /resources show it."""

    record: AgentRecord
    active_count: int
    figures: NodeFigures | None
    isolation_notes: tuple[str, ...] = ()
    problem: str = ""  # why it is offline or out of step, for people
    in_step: bool = True
    certificate_not_after: float = 0.0


class AgentAway(AgentError):
    """The agent that owns an execution cannot be asked now; ``record`` is the last state known."""

    def __init__(self, message: str, record: ExecutionRecord, *, gone: bool) -> None:
        super().__init__(message)
        self.record = record
        self.http_status = 502 if gone else 503


def no_such_execution(execution_id: str) -> NotFound:
    """One text for all: which executions of others exist is not for every key to know."""
    return NotFound(f"there is no execution {execution_id}: records are kept for a time after their end")


# Bytes of output that come with a record. Larger ones are read by themselves, piece by piece.
WHOLE_OUTPUT = 1024 * 1024


class OutputStream(Protocol):
    """Bytes of one execution's output; ``close`` ends the agent's part of it."""

    def __iter__(self) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class Functions(Protocol):
    """The desired state, and pushing it to the agents."""

    def get(self, name: str) -> Function:
        """Raises NotFound."""

    def list(self) -> Sequence[Function]:
        """All of them by name."""

    def put(self, spec: FunctionSpec) -> PushResult:
        """Save and push. InvalidInput when the deployed zip lacks the new handler."""

    def deploy(self, name: str, archive: bytes) -> PushResult:
        """Check, save and push the zip. NotFound, InvalidInput, TooLarge."""

    def delete(self, name: str, *, force: bool) -> PushResult:
        """NotFound; Conflict while executions run or wait, unless forced."""


class Nothing:
    """An output without a byte; and the body of a HEAD, which tells no length when the GET's is not known."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(())

    def close(self) -> None:
        return


class Executions(Protocol):
    """Every execution, whichever way it was started."""

    def execute(self, call: Call, caller: Caller) -> ExecutionRecord:
        """Run and wait for the end; the record carries its output.

        A run that failed or was cancelled is an answer, not an exception. Raises NotFound,
        InvalidInput, NoAgentFits, AtCapacity, AgentLost (message and ``execution_id`` attribute), Stopping.
        """

    def submit(self, call: Call) -> str:
        """Accept and answer the execution's ID; raises as ``execute`` does when it is not accepted."""

    def get(self, execution_id: str) -> ExecutionRecord:
        """With the output so far: None when it is larger than WHOLE_OUTPUT. Raises NotFound, AgentAway."""

    def function_of(self, execution_id: str) -> str:
        """The function's name, without asking an agent. Raises NotFound (no_such_execution)."""

    def list(self, where: ExecutionFilter, cursor: str, limit: int) -> Page: ...

    def output(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        """Raises NotFound, AgentAway; InvalidInput when the offset lies beyond what there is of an ended one."""

    def cancel(self, execution_id: str) -> ExecutionRecord:
        """Returns once it is really dead. Raises NotFound, Conflict (already ended), AgentAway."""


class Agents(Protocol):
    """Membership: who belongs to the fleet and how it is."""

    def views(self) -> Sequence[AgentView]: ...

    def register(self, address: str, *, legacy: bool) -> AgentView:
        """Raises InvalidInput, Conflict (the ID at another address), AgentUnreachable (with the reason)."""

    def deregister(self, agent_id: str) -> None:
        """Its open executions fail as ``agent lost``. Raises NotFound."""

    def drain(self, agent_id: str) -> AgentView:
        """Takes no new work from now on. Raises NotFound; Conflict for a node that has no agent yet."""

    def undrain(self, agent_id: str) -> AgentView:
        """Takes work again; no change when it was not draining. Raises as ``drain``."""


class Nodes(Protocol):
    """Cloud nodes (None in Services when no provider is configured)."""

    def initialize(self) -> dict[str, Any]: ...

    def remove_all(self) -> dict[str, Any]: ...

    def terminate(self, agent_id: str) -> None: ...

    def autoscaling(self) -> dict[str, Any]: ...


class Status(Protocol):
    """What /health and /resources say of this process."""

    def check_store(self) -> None:
        """Raises StoreUnavailable."""

    def loops(self) -> Sequence[LoopReport]: ...

    def warnings(self) -> Sequence[str]:
        """Certificates about to expire, weak persistence, TLS off, strays."""

    def figures(self) -> NodeFigures:
        """Of the machine Flux itself runs on."""

    def connecting(self) -> Sequence[str]:
        """The agents that were online before this Flux started, and that it has not tried to reach yet."""

    def leads(self) -> bool:
        """Whether this Flux is the one that polls, expires and scales."""

    def stopping(self) -> bool: ...


class Enrolment(Protocol):
    """Certificates for agents added by hand (None in Services when TLS is off)."""

    def bundle(self, agent_id: str) -> bytes:
        """A zip of agent.yaml and three PEM files. Raises InvalidInput, Conflict."""


@dataclass(frozen=True, slots=True)
class Services:
    config: ControlConfig
    functions: Functions
    executions: Executions
    agents: Agents
    status: Status
    nodes: Nodes | None = None
    enrolment: Enrolment | None = None
