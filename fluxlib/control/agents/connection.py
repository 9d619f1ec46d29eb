"""What the control plane may ask of one agent, whichever way the agent is reached.

:class:`fluxlib.control.agents.client.client.AgentClient` is the one that talks gRPC; the
fleet hands it out as an :class:`AgentConnection`, so that placement, tests
and simulations need no wire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fluxlib.control.services import OutputStream
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, FunctionSpec, Inventory
from fluxlib.rpc.codec import NodeReport

OnAnswer = Callable[[ExecutionRecord | FluxError], None]
OnCancelled = Callable[[ExecutionStatus | FluxError | None], None]
OnReport = Callable[[NodeReport | FluxError], None]


@dataclass(frozen=True, slots=True)
class ConnectionEvents:
    """What a connection tells unasked, from threads of its own. Callbacks must not block.

    ``ended(record)``: the end of an asynchronous execution of this life of Flux (no output).
    ``missing(execution_id)``: it was accepted, and after a break of the stream the agent neither runs nor owes it.
    ``full(function_name)``: the agent refused one at capacity; called before that refusal's ``on_answer``.
    ``freed(function_name)``: the agent can take such work again; "" = ``max_tasks`` has room again.
    ``greeted(instance_id)``: this life of the agent is there (feature ``attach``); called before ``attached(True)``.
    ``attached(yes)``: executions can or cannot be sent now (agents with the feature ``attach``).
    ``stopping()``: the agent takes no further work.
    """

    ended: Callable[[ExecutionRecord], None] = lambda record: None
    missing: Callable[[str], None] = lambda execution_id: None
    full: Callable[[str], None] = lambda function_name: None
    freed: Callable[[str], None] = lambda function_name: None
    greeted: Callable[[str], None] = lambda instance_id: None
    attached: Callable[[bool], None] = lambda yes: None
    stopping: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Taken:
    """A function that an agent took. ``cannot_start``: why its machine will not start the handler all the same."""

    warnings: tuple[str, ...] = ()
    cannot_start: str = ""


class AgentConnection(Protocol):
    """One agent. Every method may be called from any thread.

    Blocking calls raise AgentUnreachable (the agent cannot have seen the request),
    AgentLost (it may have) or AgentRefused (it answered no).
    """

    @property
    def agent_id(self) -> str: ...

    @property
    def enrolled(self) -> int:
        """See ProbeResult.enrolled: a renewed certificate must keep it."""

    @property
    def original(self) -> bool:
        """Whether it answers the original contract only."""

    def execute(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        """Send and return at once; ``on_answer`` is called exactly once, mostly from a thread of the connection.

        Synchronous: the ended record with its output. Asynchronous: the accepted record (status running);
        its end comes through ``ConnectionEvents.ended``, from an original agent only by asking ``record``.
        Either way a refusal is an ended record whose ``error_kind.nothing_started``; errors are
        AgentUnreachable (it cannot have been started: another agent may be asked) and AgentLost (it may have been).
        """

    def cancel(self, execution_id: str, *, reason: str, timeout: float) -> ExecutionStatus | None:
        """Kill and wait (``timeout`` seconds) until it is dead: the status it then has; None = unknown there.

        RUNNING: it was told and is not dead yet; with ``timeout`` 0 nothing is waited for.
        An execution that had ended before answers the status it ended with.
        """

    def request_cancel(self, execution_id: str, *, reason: str, on_answer: OnCancelled) -> None:
        """``cancel`` without waiting: ``on_answer`` is told once it is dead, or an AgentError, perhaps at once."""

    def record(self, execution_id: str, *, with_output: bool) -> ExecutionRecord | None:
        """The agent's own record; None when it knows no such execution.

        Output larger than WHOLE_OUTPUT is left out: ``output`` reads it. An original agent's comes with the record.
        """

    def known_records(self, execution_ids: Sequence[str]) -> dict[str, ExecutionRecord]:
        """The agent's records of those it knows, without output."""

    def output(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        """Raises NotFound at once when the agent knows no such execution."""

    def register_function(self, spec: FunctionSpec, digest: str) -> Taken:
        """What the agent says of it. AgentRefused carries the agent's own words."""

    def deploy(self, spec: FunctionSpec, digest: str, code_digest: str, archive: bytes) -> Taken:
        """Spec and code in one step. AgentRefused, also for more than an original agent can take."""

    def remove_function(self, name: str) -> bool:
        """False: an original agent, which keeps its code for ever."""

    def inventory(self) -> Inventory | None:
        """None from an original agent."""

    def report_async(self, on_report: OnReport) -> None:
        """Ask how it is; ``on_report`` is called exactly once, without a thread waiting meanwhile."""

    def fail_in_flight(self, reason: str) -> None:
        """Every synchronous execution in flight ends as AgentLost now, every unsent one as AgentUnreachable."""

    def reopen(self) -> None:
        """A new channel, under the identity Flux has now; what is in flight on the old one is not disturbed."""

    def create_certificate_request(self) -> tuple[bytes, float]:
        """A CSR (PEM) whose private key stays with the agent, and the agent's clock (epoch seconds, 0 = not said)."""

    def install_certificate(self, certificate_pem: bytes, ca_pem: bytes) -> None: ...

    def close(self, deadline: Deadline) -> None:
        """Wait for calls in flight until the deadline, fail the rest as AgentLost, close the channel."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What an agent showed of itself when it was asked under an address."""

    agent_id: str
    address: str
    report: NodeReport
    inventory: Inventory | None  # None: an original agent
    legacy_certificate: bool = False  # its certificate carries no ID
    # When its certificate was enrolled (epoch milliseconds), where only later ones than a revocation are taken.
    enrolled: int = 0


class Connector(Protocol):
    """Makes connections to agents. Every method may be called from any thread."""

    def probe(self, address: str, *, legacy: bool = False, expected_id: str = "") -> ProbeResult:
        """Ask who is there: by the name every agent's certificate has, then again by the ID's own name.

        ``legacy`` accepts a certificate without an ID's name (and nothing but that is skipped).
        ``expected_id`` goes straight to that ID's name. Raises InvalidInput (the address is none),
        AgentUnreachable with the reason found by a diagnosing handshake, AgentRefused for an ID that is
        none or is not the one expected.
        """

    def connect(self, probe: ProbeResult, events: ConnectionEvents) -> AgentConnection:
        """A connection to keep; for an agent of ours it attaches the stream in the background."""


def refusal(request: ExecutionRequest, agent_id: str, kind: ErrorKind, error: str, at: float) -> ExecutionRecord:
    """The record of an execution that was never started. ``at`` is epoch seconds."""
    return ExecutionRecord(
        request.execution_id, request.function_name, agent_id, asynchronous=request.asynchronous, started_at=at
    ).ended(ExecutionStatus.FAILED, at=at, error=error, kind=kind)
