"""A legacy agent as the rest of the control plane sees it: with an instance ID and an inventory, which it has not.

A legacy agent forgets its functions when it restarts, and says of its process only for how long it has been up, in
whole seconds. What it holds is what it was sent since then; what it runs, nobody can ask it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fluxlib.clock import steady_time
from fluxlib.control.agents.connection import AgentConnection, OnAnswer, OnCancelled, OnReport, Taken
from fluxlib.control.services import OutputStream
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import ExecutionRecord, ExecutionRequest, ExecutionStatus, FunctionSpec, FunctionState, Inventory
from fluxlib.rpc.codec import NodeReport

FIRST_INSTANCE = "legacy-0"


class LegacyAgent:
    """See connection.AgentConnection. ``holds``: what it is taken to have; ``report``: what it said when probed."""

    original = True

    def __init__(
        self,
        connection: AgentConnection,
        report: NodeReport,
        holds: Iterable[FunctionState],
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self.connection = connection
        self._clock = clock
        self._lock = threading.Lock()
        self._holds = {state.name: state for state in holds}
        self._restarts = 0
        self._restarted_at = 0.0
        # An agent that says the same uptime for ever says nothing of restarts.
        self._counts = False
        self._uptime = report.figures.uptime_seconds
        self._heard_at = clock()

    @property
    def agent_id(self) -> str:
        return self.connection.agent_id

    @property
    def enrolled(self) -> int:
        return self.connection.enrolled

    @property
    def instance_id(self) -> str:
        return f"legacy-{self._restarts}"

    # -- what it has not -----------------------------------------------------------------

    def inventory(self) -> Inventory:
        """What it was sent since it started; unknown what it runs."""
        with self._lock:
            return Inventory(
                self.agent_id,
                self.instance_id,
                functions=tuple(self._holds.values()),
                open_executions=None,
                restarted_at=self._restarted_at,
            )

    def report_async(self, on_report: OnReport) -> None:
        asked_at = self._clock()

        def answered(answer: NodeReport | FluxError) -> None:
            if isinstance(answer, NodeReport):
                # Without an instance ID it is not the agent this connection was made for: so is one that has its own.
                answer = replace(answer, instance_id="" if answer.instance_id else self._instance_of(answer, asked_at))
            on_report(answer)

        self.connection.report_async(answered)

    def _instance_of(self, report: NodeReport, asked_at: float) -> str:
        uptime = report.figures.uptime_seconds
        with self._lock:
            self._counts |= uptime != self._uptime
            # A process that began later than the last report allows is another one. It says whole seconds: a restart
            # takes longer than that.
            began = asked_at - uptime - 1
            if self._counts and began > self._heard_at - self._uptime:
                self._restarts += 1
                self._restarted_at = began
                self._holds.clear()
            self._uptime, self._heard_at = uptime, self._clock()
            return self.instance_id

    # -- functions -------------------------------------------------------------------------

    def register_function(self, spec: FunctionSpec, digest: str) -> Taken:
        with self._lock:
            held = self._holds.get(spec.name)
        return self._sent(
            FunctionState(spec.name, digest, held.code_digest if held is not None else ""),
            lambda: self.connection.register_function(spec, digest),
        )

    def deploy(self, spec: FunctionSpec, digest: str, code_digest: str, archive: bytes) -> Taken:
        return self._sent(
            FunctionState(spec.name, digest, code_digest),
            lambda: self.connection.deploy(spec, digest, code_digest, archive),
        )

    def _sent(self, state: FunctionState, send: Callable[[], Taken]) -> Taken:
        with self._lock:
            restarts = self._restarts
            # One that fails may have unpacked half of it over what it had.
            self._holds.pop(state.name, None)
        taken = send()
        with self._lock:
            if self._restarts == restarts:
                self._holds[state.name] = state
        return taken

    def remove_function(self, name: str) -> bool:
        with self._lock:
            self._holds.pop(name, None)
        return self.connection.remove_function(name)

    # -- as it is --------------------------------------------------------------------------

    def execute(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        self.connection.execute(request, on_answer)

    def cancel(self, execution_id: str, *, reason: str, timeout: float) -> ExecutionStatus | None:
        return self.connection.cancel(execution_id, reason=reason, timeout=timeout)

    def request_cancel(self, execution_id: str, *, reason: str, on_answer: OnCancelled) -> None:
        self.connection.request_cancel(execution_id, reason=reason, on_answer=on_answer)

    def record(self, execution_id: str, *, with_output: bool) -> ExecutionRecord | None:
        return self.connection.record(execution_id, with_output=with_output)

    def known_records(self, execution_ids: Sequence[str]) -> dict[str, ExecutionRecord]:
        return self.connection.known_records(execution_ids)

    def output(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        return self.connection.output(execution_id, offset, follow=follow)

    def fail_in_flight(self, reason: str) -> None:
        self.connection.fail_in_flight(reason)

    def reopen(self) -> None:
        self.connection.reopen()

    def create_certificate_request(self) -> tuple[bytes, float]:
        return self.connection.create_certificate_request()

    def install_certificate(self, certificate_pem: bytes, ca_pem: bytes) -> None:
        self.connection.install_certificate(certificate_pem, ca_pem)

    def close(self, deadline: Deadline) -> None:
        self.connection.close(deadline)
