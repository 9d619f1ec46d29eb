"""The gRPC calls: decode, ask, encode. A rejection is an answer that a legacy Flux understands, with status OK."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import grpc

import fluxlib
from fluxlib.agent.certificates import Certificates
from fluxlib.agent.diagnosis import start_problem
from fluxlib.agent.executions import Executions, sendable
from fluxlib.agent.executor.base import Executor
from fluxlib.agent.health import Health
from fluxlib.agent.monitor import Monitor
from fluxlib.agent.packages import Installed, Packages
from fluxlib.agent.records import Records
from fluxlib.agent.sessions import Sessions, cancel_response
from fluxlib.archive import Archive
from fluxlib.errors import Conflict, FluxError, InvalidInput, NotFound
from fluxlib.model import ErrorKind, ExecutionRecord, Inventory, kind_of
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from fluxlib.rpc.status import abort
from fluxlib.rpc.tls import MESSAGE_LIMIT

log = logging.getLogger(__name__)

FEATURES = ("attach", "deploy_stream", "get_executions", "read_output", "renew")
# A legacy Flux waits 5 s for a cancel; what takes longer is dying all the same.
_CANCEL_ANSWER = 4.0
# Each follower holds a thread of the server while it waits.
MAX_FOLLOWERS = 200

T = TypeVar("T")
Ack = TypeVar("Ack", pb.FunctionAck, pb.DeploymentAck)


@dataclass(frozen=True, slots=True)
class ServiceContext:
    """What the calls work on."""

    agent_id: str
    max_tasks: int
    max_archive: int  # bytes
    packages: Packages
    records: Records
    executions: Executions
    sessions: Sessions
    executor: Executor
    monitor: Monitor
    health: Health
    certificates: Certificates | None
    notes: tuple[str, ...] = ()  # what of its configuration is worth showing beside the isolation's


@dataclass(frozen=True, slots=True)
class Done:
    """What is to be said of a change that was made."""

    warnings: tuple[str, ...] = ()
    cannot_start: str = ""


class AgentService(flux_pb2_grpc.AgentServiceServicer):
    """Every call of flux.proto's AgentService."""

    def __init__(self, context: ServiceContext) -> None:
        self._agent_id = context.agent_id
        self._max_tasks = context.max_tasks
        self._max_archive = context.max_archive
        self._packages = context.packages
        self._records = context.records
        self._executions = context.executions
        self._sessions = context.sessions
        self._executor = context.executor
        self._monitor = context.monitor
        self._health = context.health
        self._certificates = context.certificates
        self._notes = context.notes
        self._followers = threading.BoundedSemaphore(MAX_FOLLOWERS)

    # -- functions -----------------------------------------------------------------

    def RegisterFunction(self, request: pb.FunctionConfig, context: grpc.ServicerContext) -> pb.FunctionAck:
        def register() -> Done:
            spec, digest = codec.spec_from_message(request)
            warnings = self._executions.check(spec)
            installed = self._packages.register(spec, digest)
            self._sessions.notify_capacity_changed(spec.name)
            return Done(warnings, self._start_problem(installed))

        return _acknowledge(pb.FunctionAck, "registered", register)

    def DeployFunction(self, request: pb.DeploymentPackage, context: grpc.ServicerContext) -> pb.DeploymentAck:
        return self._deploy(request, request.code_archive)

    def DeployStream(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> pb.DeploymentAck:
        first = next(request_iterator, None)
        if first is None or not first.HasField("header"):
            abort(context, InvalidInput("the first chunk must carry the header"))
        if first.total_bytes > self._max_archive:
            return _failed(pb.DeploymentAck, InvalidInput(f"the archive is larger than {self._max_archive >> 20} MiB"))
        with self._packages.spool() as spool:
            size = 0
            for chunk in request_iterator:
                size += len(chunk.data)
                if size > first.total_bytes:
                    return _failed(pb.DeploymentAck, InvalidInput("the archive is larger than was said"))
                spool.write(chunk.data)
            if size != first.total_bytes:
                return _failed(pb.DeploymentAck, InvalidInput("the archive did not arrive whole"))
            return self._deploy(first.header, spool)

    def _deploy(self, package: pb.DeploymentPackage, archive: Archive) -> pb.DeploymentAck:
        def deploy() -> Done:
            if package.HasField("config") and package.config.name:
                spec, digest = codec.spec_from_message(package.config)
                if spec.name != package.function_name:
                    raise InvalidInput(f"the archive is for {package.function_name}, its config for {spec.name}")
            else:
                installed = self._packages.get(package.function_name)
                if installed is None:
                    raise NotFound(f"function {package.function_name} is not registered")
                spec, digest = installed.spec, installed.spec_digest
            warnings = self._executions.check(spec)
            installed = self._packages.deploy(spec, digest, package.code_digest, archive)
            self._sessions.notify_capacity_changed(spec.name)
            return Done(warnings, self._start_problem(installed))

        return _acknowledge(pb.DeploymentAck, "deployed", deploy)

    def _start_problem(self, installed: Installed) -> str:
        if installed.code_dir is None:
            return ""
        return start_problem(installed.spec, installed.code_dir, self._executor.isolation.shows)

    def RemoveFunction(self, request: pb.RemoveFunctionRequest, context: grpc.ServicerContext) -> pb.FunctionAck:
        def remove() -> Done:
            self._packages.remove(request.function_name)
            return Done()

        return _acknowledge(pb.FunctionAck, "removed", remove)

    # -- executions ----------------------------------------------------------------

    def ExecuteFunction(self, request: pb.ExecutionRequest, context: grpc.ServicerContext) -> pb.ExecutionResponse:
        asked = codec.request_from_message(request)
        done = threading.Event()
        final: list[ExecutionRecord] = []

        def ended(record: ExecutionRecord) -> None:
            final.append(record)
            done.set()

        record, accepted = self._executions.start(asked, ended)
        if not accepted or asked.asynchronous:
            return codec.response_from_record(record, with_output=False)

        def caller_gone() -> None:
            # A legacy Flux hangs up when its own client does.
            if not done.is_set():
                self._executions.cancel(record.execution_id, "cancelled: the caller is gone")

        if not context.add_callback(caller_gone):
            caller_gone()
        done.wait()
        return codec.response_from_record(sendable(self._executions.with_output(final[0])))

    def CancelExecution(
        self, request: pb.CancelExecutionRequest, context: grpc.ServicerContext
    ) -> pb.CancelExecutionResponse:
        dead = threading.Event()
        final: list[ExecutionRecord] = []

        def ended(record: ExecutionRecord) -> None:
            final.append(record)
            dead.set()

        record = self._answer(
            context, lambda: self._executions.cancel(request.execution_id, request.reason or "cancelled", ended)
        )
        if record is None or record.status.ended:
            return cancel_response(record, in_time=False)
        if not request.no_wait:
            remaining = context.time_remaining()
            dead.wait(_CANCEL_ANSWER if remaining is None else min(max(_CANCEL_ANSWER, remaining - 1), remaining * 0.8))
        return cancel_response(final[0] if final else record, in_time=True)

    def GetExecution(self, request: pb.GetExecutionRequest, context: grpc.ServicerContext) -> pb.GetExecutionResponse:
        with_output = not request.without_output
        record = self._answer(context, lambda: self._records.get(request.execution_id, with_output=with_output))
        if record is None:
            return pb.GetExecutionResponse(found=False)
        return pb.GetExecutionResponse(found=True, data=_json_that_fits(record, with_output))

    def GetExecutions(
        self, request: pb.GetExecutionsRequest, context: grpc.ServicerContext
    ) -> pb.GetExecutionsResponse:
        answer = pb.GetExecutionsResponse()
        for execution_id in request.execution_ids:
            record = self._answer(context, partial(self._records.get, execution_id, with_output=False))
            if record is not None:
                codec.fill_record(answer.executions.add(), record)
        return answer

    def ReadOutput(self, request: pb.ReadOutputRequest, context: grpc.ServicerContext) -> Iterator[pb.OutputChunk]:
        reader = self._answer(context, lambda: self._records.reader(request.execution_id))
        if reader is None:
            yield pb.OutputChunk(found=False, ended=True)
            return
        if not self._followers.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_FOLLOWERS} readers of output are served already")
        try:
            if not context.add_callback(reader.abandon):
                return
            for offset, data, ended in reader.pieces(request.offset, request.max_bytes, follow=request.follow):
                yield pb.OutputChunk(found=True, offset=offset, data=data, ended=ended)
        finally:
            self._followers.release()

    def Attach(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        return self._sessions.serve(request_iterator, context.is_active, context.cancel)

    # -- the node --------------------------------------------------------------------

    def HealthCheck(self, request: pb.HealthCheckRequest, context: grpc.ServicerContext) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(healthy=not self._health.problem, version=fluxlib.__version__)

    def ReportNodeStatus(self, request: pb.NodeStatusRequest, context: grpc.ServicerContext) -> pb.NodeStatusResponse:
        report = codec.NodeReport(
            agent_id=self._agent_id,
            figures=replace(
                self._monitor.figures(self._executions.active, self._max_tasks),
                problem=self._health.problem,
                warnings=self._health.warnings,
            ),
            instance_id=self._monitor.instance_id,
            platform=self._monitor.platform,
            isolation=self._executor.isolation.profile,
            inventory_revision=self._packages.revision,
        )
        return codec.report_to_message(report)

    def GetInventory(self, request: pb.InventoryRequest, context: grpc.ServicerContext) -> pb.InventoryResponse:
        isolation = self._executor.isolation
        renew = self._certificates is not None
        inventory = Inventory(
            agent_id=self._agent_id,
            instance_id=self._monitor.instance_id,
            version=fluxlib.__version__,
            platform=self._monitor.platform,
            max_tasks=self._max_tasks,
            isolation=isolation.profile,
            isolation_notes=(*self._notes, *isolation.notes),
            enforces=tuple(sorted(one.value for one in isolation.enforces)),
            functions=self._packages.states(),
            revision=self._packages.revision,
            features=FEATURES if renew else FEATURES[:-1],
            certificate_not_after=self._certificates.not_after if self._certificates is not None else 0.0,
            open_executions=self._executions.open_ids(),
        )
        return codec.inventory_to_message(inventory)

    # -- certificates ------------------------------------------------------------------

    def CreateCertificateRequest(
        self, request: pb.CertificateRequestRequest, context: grpc.ServicerContext
    ) -> pb.CertificateRequestResponse:
        if self._certificates is None:
            abort(context, Conflict("this agent runs without TLS"))
        return pb.CertificateRequestResponse(csr_pem=self._certificates.create_request(), now=time.time())

    def InstallCertificate(
        self, request: pb.InstallCertificateRequest, context: grpc.ServicerContext
    ) -> pb.FunctionAck:
        def install() -> Done:
            if self._certificates is None:
                raise InvalidInput("this agent runs without TLS")
            not_after = self._certificates.install(request.certificate_pem, request.ca_pem)
            log.info("took a new certificate, good until %s", time.strftime("%Y-%m-%d", time.gmtime(not_after)))
            return Done()

        return _acknowledge(pb.FunctionAck, "installed", install)

    def _answer(self, context: grpc.ServicerContext, ask: Callable[[], T]) -> T:
        """A store that is away is a status of its own, never "not found"."""
        try:
            return ask()
        except FluxError as error:
            abort(context, error)


def _acknowledge(kind: type[Ack], done: str, act: Callable[[], Done]) -> Ack:
    """An Ack of ``kind`` for what ``act`` did, or for why it did not."""
    try:
        result = act()
    except FluxError as error:
        return _failed(kind, error)
    except OSError as error:
        log.error("a change of the functions failed: %s", error)
        return kind(success=False, message=f"the agent's disk: {error}", error_kind=pb.ERROR_KIND_INTERNAL)
    ack = kind(success=True, message=done, warnings=result.warnings, cannot_start=result.cannot_start)
    if result.cannot_start:
        ack.warnings.append(result.cannot_start)  # for a Flux that does not know the field
    return ack


def _failed(kind: type[Ack], error: FluxError) -> Ack:
    name = pb.ErrorKind.Name(int(kind_of(error, ErrorKind.INTERNAL)))
    return kind(success=False, message=error.message, error_kind=name)


def _json_that_fits(record: ExecutionRecord, with_output: bool) -> bytes:
    """The record as JSON. Escapes can make it six times its output: then less of that goes into it."""
    data = codec.record_to_json(record, with_output=with_output)
    while len(data) > MESSAGE_LIMIT:
        record = sendable(record, len(record.output or b"") * MESSAGE_LIMIT // len(data) * 9 // 10)
        data = codec.record_to_json(record, with_output=with_output)
    return data
