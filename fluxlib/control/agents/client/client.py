"""AgentConnection over gRPC: the stream where the agent has one, unary calls for all else and for originals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

from fluxlib.control.agents.client.calls import guarded
from fluxlib.control.agents.client.channels import Line, Lines
from fluxlib.control.agents.client.output import AgentOutput, PolledOutput
from fluxlib.control.agents.client.stream import AgentStream
from fluxlib.control.agents.client.unary import UnaryExecutions
from fluxlib.control.agents.connection import ConnectionEvents, OnAnswer, OnCancelled, OnReport, Taken, refusal
from fluxlib.control.services import WHOLE_OUTPUT, OutputStream
from fluxlib.errors import AgentLost, AgentRefused, FluxError, NotFound
from fluxlib.lifecycle import Deadline, pause
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionRequest, ExecutionStatus, FunctionSpec, Inventory
from fluxlib.pool import Pool
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.status import NotImplementedByPeer
from fluxlib.rpc.tls import MESSAGE_LIMIT

# Seconds (wire.md). A deploy gets more the larger it is: the network's time and the agent's disk.
_REGISTER, _DEPLOY, _CANCEL, _RECORD, _REPORT = 10.0, 30.0, 5.0, 5.0, 5.0
_DEPLOY_PER_MB = 0.5
_CANCEL_AGAIN = 0.1
_OUTPUT = 60.0
_LEGACY_CANCELS = 4
_MB = 1024 * 1024


class AgentClient:
    """One agent. ``new_line`` opens a channel under the identity Flux has at that moment.

    ``inventory`` is what the agent said when it was probed; None = an original agent.
    """

    def __init__(
        self,
        agent_id: str,
        inventory: Inventory | None,
        new_line: Callable[[], Line],
        session: str,
        events: ConnectionEvents,
        enrolled: int = 0,
    ) -> None:
        self._agent_id = agent_id
        self._enrolled = enrolled
        self._original = inventory is None
        self._features = frozenset(inventory.features) if inventory is not None else frozenset()
        self._lines = Lines(new_line)
        events = guarded(events)
        self._unary = UnaryExecutions(agent_id, self._lines, events)
        self._legacy_cancels = Pool(f"cancel-{agent_id}", _LEGACY_CANCELS)
        self._stream: AgentStream | None = None
        if "attach" in self._features:
            self._stream = AgentStream(agent_id, session, self._lines, events, self._whole_record)

    @property
    def agent_id(self) -> str:
        return self._agent_id

    @property
    def enrolled(self) -> int:
        return self._enrolled

    @property
    def original(self) -> bool:
        return self._original

    # -- executions ------------------------------------------------------------------

    def execute(self, request: ExecutionRequest, on_answer: OnAnswer) -> None:
        if self._stream is None:
            self._unary.execute(request, on_answer)
            return
        message = codec.request_to_message(request)
        if message.ByteSize() > MESSAGE_LIMIT:
            # It would break the stream, and everybody's executions with it.
            text = f"the request is larger than {MESSAGE_LIMIT // _MB} MB"
            on_answer(refusal(request, self._agent_id, ErrorKind.INVALID, text, time.time()))
            return
        self._stream.execute(request, message, on_answer)

    def cancel(self, execution_id: str, *, reason: str, timeout: float) -> ExecutionStatus | None:
        done, answers = threading.Event(), list[ExecutionStatus | FluxError | None]()

        def answered(answer: ExecutionStatus | FluxError | None) -> None:
            answers.append(answer)
            done.set()

        if self._stream is not None and self._stream.cancel(execution_id, reason, answered):
            if done.wait(timeout):
                return self._status_or_raise(answers[0])
            if self._stream.attached:
                return ExecutionStatus.RUNNING
            raise AgentLost(f"agent {self._agent_id} was lost before it confirmed that {execution_id} is dead")
        # Not attached, it is no reason to wait: an agent that has just come back is told by a call of its own.
        if self._original and self._unary.hang_up(execution_id):
            return ExecutionStatus.CANCELLED
        deadline = Deadline(timeout)
        request = pb.CancelExecutionRequest(execution_id=execution_id, reason=reason, no_wait=timeout <= 0)
        while True:
            called = self._unary.cancelling(execution_id, True)
            answer = self._ask("CancelExecution", request, max(_CANCEL, deadline.remaining()))
            if answer.success and called:
                self._unary.wait(execution_id, deadline.remaining())
                return ExecutionStatus.CANCELLED
            called = called and self._unary.cancelling(execution_id, False)
            if answer.status:
                return ExecutionStatus(answer.status)
            record = self.record(execution_id, with_output=False)
            status = record.status if record is not None else ExecutionStatus.RUNNING if called else None
            if status is None or status.ended or deadline.remaining() <= _CANCEL_AGAIN:
                return status
            # An original agent that has accepted it and not yet started its process finds nothing to kill.
            pause(_CANCEL_AGAIN)

    def request_cancel(self, execution_id: str, *, reason: str, on_answer: OnCancelled) -> None:
        if self._stream is not None and self._stream.cancel(execution_id, reason, on_answer):
            return
        if self._original:
            # It has to be asked again and again.
            self._legacy_cancels.submit(self._cancel_legacy, execution_id, reason, on_answer)
            return

        def answered(answer: Any | FluxError) -> None:
            if isinstance(answer, FluxError):
                on_answer(answer)
            else:
                on_answer(ExecutionStatus(answer.status) if answer.status else None)

        request = pb.CancelExecutionRequest(execution_id=execution_id, reason=reason)
        self._lines.future(lambda stub: stub.CancelExecution.future(request, timeout=_CANCEL), answered)

    def _cancel_legacy(self, execution_id: str, reason: str, on_answer: OnCancelled) -> None:
        try:
            on_answer(self.cancel(execution_id, reason=reason, timeout=_CANCEL))
        except FluxError as error:
            on_answer(error)

    def _status_or_raise(self, answer: ExecutionStatus | FluxError | None) -> ExecutionStatus | None:
        if isinstance(answer, FluxError):
            raise answer
        return answer

    def record(self, execution_id: str, *, with_output: bool) -> ExecutionRecord | None:
        # Ours keeps bytes, and JSON has only text: the output comes by the call made for it.
        whole = with_output and "read_output" not in self._features
        request = pb.GetExecutionRequest(execution_id=execution_id, without_output=not whole)
        record = self._record_of(self._ask("GetExecution", request, _RECORD if not whole else _OUTPUT))
        if record is None or whole or not with_output:
            return record
        if record.output_bytes > WHOLE_OUTPUT:
            return record
        output = self._whole_output(execution_id) if record.output_bytes else b""
        return replace(record, output=output)

    def known_records(self, execution_ids: Sequence[str]) -> dict[str, ExecutionRecord]:
        if "get_executions" not in self._features:
            found = ((one, self.record(one, with_output=False)) for one in execution_ids)
            return {execution_id: record for execution_id, record in found if record is not None}
        answer = self._ask("GetExecutions", pb.GetExecutionsRequest(execution_ids=execution_ids), _RECORD)
        return {
            message.execution_id: codec.record_from_message(message, None, self._agent_id)
            for message in answer.executions
        }

    def output(self, execution_id: str, offset: int, *, follow: bool) -> OutputStream:
        record = self.record(execution_id, with_output=self._original)
        if record is None:
            raise NotFound(f"agent {self._agent_id} knows no execution {execution_id}")
        if self._original:
            return PolledOutput(record, lambda: self.record(execution_id, with_output=True), offset, follow=follow)
        timeout = None if follow else _OUTPUT
        return AgentOutput(self._lines, execution_id, offset, follow=follow, timeout=timeout)

    def fail_in_flight(self, reason: str) -> None:
        self._unary.fail(reason)
        if self._stream is not None:
            self._stream.fail(reason)

    # -- functions ---------------------------------------------------------------------

    def register_function(self, spec: FunctionSpec, digest: str) -> Taken:
        return self._accepted(self._ask("RegisterFunction", codec.spec_to_message(spec, digest), _REGISTER))

    def deploy(self, spec: FunctionSpec, digest: str, code_digest: str, archive: bytes) -> Taken:
        timeout = _DEPLOY + _DEPLOY_PER_MB * len(archive) / _MB
        if "deploy_stream" in self._features:
            chunks: Iterable[pb.DeployChunk] = codec.deployment_chunks(spec, digest, code_digest, archive)
            return self._accepted(self._ask("DeployStream", iter(chunks), timeout))
        message = codec.deployment_to_message(spec, digest, code_digest, archive)
        if message.ByteSize() > MESSAGE_LIMIT:
            raise AgentRefused(
                f"agent {self._agent_id} takes archives of at most {MESSAGE_LIMIT // _MB} MB, this one has"
                f" {len(archive) / _MB:.1f} MB: make it smaller, or install this system's own flux-agent there"
            )
        # It takes the code of registered functions only, and ignores the settings that come with the code.
        self.register_function(spec, digest)
        return self._accepted(self._ask("DeployFunction", message, timeout))

    def remove_function(self, name: str) -> bool:
        if self._original:
            return False
        self._accepted(self._ask("RemoveFunction", pb.RemoveFunctionRequest(function_name=name), _REGISTER))
        return True

    # -- the node ------------------------------------------------------------------------

    def inventory(self) -> Inventory | None:
        if self._original:
            return None
        return codec.inventory_from_message(self._ask("GetInventory", pb.InventoryRequest(), _REPORT))

    def report_async(self, on_report: OnReport) -> None:
        def answered(answer: Any | FluxError) -> None:
            if isinstance(answer, FluxError):
                on_report(answer)
                return
            if self._stream is not None:
                self._stream.wake()
            on_report(codec.report_from_message(answer, time.time()))

        self._lines.future(lambda stub: stub.ReportNodeStatus.future(pb.NodeStatusRequest(), timeout=_REPORT), answered)

    def create_certificate_request(self) -> tuple[bytes, float]:
        answer = self._ask("CreateCertificateRequest", pb.CertificateRequestRequest(), _REGISTER)
        return answer.csr_pem, answer.now

    def install_certificate(self, certificate_pem: bytes, ca_pem: bytes) -> None:
        request = pb.InstallCertificateRequest(certificate_pem=certificate_pem, ca_pem=ca_pem)
        self._accepted(self._ask("InstallCertificate", request, _REGISTER))

    # -- the connection itself -----------------------------------------------------------

    def reopen(self) -> None:
        self._lines.renew()
        if self._stream is not None:
            self._stream.switch()

    def close(self, deadline: Deadline) -> None:
        self._unary.close(deadline)
        if self._stream is not None:
            self._stream.close(deadline)
        self._legacy_cancels.stop(Deadline(0))
        self._lines.close()

    def _ask(self, method: str, request: Any, timeout: float) -> Any:
        """A unary call's answer. A call that an original lacks is AgentRefused."""
        try:
            with self._lines.call() as stub:
                return getattr(stub, method)(request, timeout=timeout)
        except NotImplementedByPeer as error:
            raise AgentRefused(f"agent {self._agent_id} has no call {method}: it is older than this Flux") from error

    def _accepted(self, answer: Any) -> Taken:
        if not answer.success:
            raise AgentRefused(answer.message or f"agent {self._agent_id} refused without a reason")
        return Taken(tuple(answer.warnings), answer.cannot_start)

    def _record_of(self, answer: Any) -> ExecutionRecord | None:
        if not answer.found:
            return None
        try:
            return codec.record_from_json(answer.data)
        except ValueError as error:
            raise AgentRefused(f"agent {self._agent_id} answered what cannot be read: {error}") from error

    def _whole_output(self, execution_id: str) -> bytes:
        # Joined from a list it would be there twice.
        whole = BytesIO()
        for piece in AgentOutput(self._lines, execution_id, 0, follow=False, timeout=_OUTPUT):
            whole.write(piece)
        return whole.getvalue()

    def _whole_record(self, execution_id: str) -> ExecutionRecord | None:
        record = self.record(execution_id, with_output=True)
        if record is None or record.output is not None:
            return record
        return replace(record, output=self._whole_output(execution_id))
