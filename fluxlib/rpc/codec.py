"""Messages to model and back: with the two stubs, the only place that touches generated messages.

The original's sides know nothing of our fields: every refusal and every end
travels as its text too, and an original's texts are read here and nowhere else
(wire.md, "Behaviour the original's two sides rely on").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

from fluxlib.model import (
    ANYWHERE,
    Behavior,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    FunctionSpec,
    FunctionState,
    Inventory,
    Network,
    NodeFigures,
    Phase,
    Platform,
    WorkingDirectory,
    handler_path,
    positional,
)
from fluxlib.model.times import epoch, rfc3339
from fluxlib.rpc.gen import flux_pb2 as pb

_DEFAULT_CONCURRENCY = 5
_ENCODER = json.JSONEncoder(separators=(",", ":"))


# ---- functions ---------------------------------------------------------------


def spec_to_message(spec: FunctionSpec, spec_digest: str = "") -> pb.FunctionConfig:
    return pb.FunctionConfig(
        name=spec.name,
        handler=spec.handler,
        cpu_millicores=spec.cpu_millicores,
        memory_mb=spec.memory_mb,
        timeout_seconds=spec.timeout_seconds,
        env=dict(spec.env),
        max_concurrency=spec.max_concurrency,
        max_concurrency_behavior=spec.max_concurrency_behavior.value,
        spec_digest=spec_digest,
        network=spec.network.value,
        max_processes=spec.max_processes,
        max_open_files=spec.max_open_files,
        max_file_size_mb=spec.max_file_size_mb,
        tmp_size_mb=spec.tmp_size_mb,
        working_directory=spec.working_directory.value,
        platforms=[str(platform) for platform in spec.platforms],
    )


def spec_from_message(message: pb.FunctionConfig) -> tuple[FunctionSpec, str]:
    """The spec and its digest as Flux sent it; an original sends none, so it is computed.

    An original's zero or unknown values mean its defaults.
    """
    spec = FunctionSpec(
        name=message.name,
        handler=handler_path(message.handler),  # an original hands it on as it was written
        cpu_millicores=max(0, message.cpu_millicores),
        memory_mb=max(0, message.memory_mb),
        timeout_seconds=max(0, message.timeout_seconds),
        max_concurrency=message.max_concurrency if message.max_concurrency > 0 else _DEFAULT_CONCURRENCY,
        max_concurrency_behavior=(
            Behavior.WAIT if message.max_concurrency_behavior == Behavior.WAIT.value else Behavior.EXIT
        ),
        env=dict(message.env),
        platforms=tuple(Platform.parse(text) for text in message.platforms),
        network=Network.NONE if message.network == Network.NONE.value else Network.HOST,
        working_directory=(
            WorkingDirectory.WORK if message.working_directory == WorkingDirectory.WORK.value else WorkingDirectory.CODE
        ),
        max_processes=max(0, message.max_processes),
        max_open_files=max(0, message.max_open_files),
        max_file_size_mb=max(0, message.max_file_size_mb),
        tmp_size_mb=max(0, message.tmp_size_mb),
    )
    return spec, message.spec_digest or spec.digest()


def deployment_to_message(
    spec: FunctionSpec, spec_digest: str, code_digest: str, archive: bytes
) -> pb.DeploymentPackage:
    return pb.DeploymentPackage(
        function_name=spec.name,
        code_archive=archive,
        config=spec_to_message(spec, spec_digest),
        code_digest=code_digest,
    )


def deployment_chunks(
    spec: FunctionSpec, spec_digest: str, code_digest: str, archive: bytes, size: int = 1024 * 1024
) -> Iterable[pb.DeployChunk]:
    """The same deployment in pieces, the header first."""
    header = deployment_to_message(spec, spec_digest, code_digest, b"")
    yield pb.DeployChunk(header=header, total_bytes=len(archive))
    for start in range(0, len(archive), size):
        yield pb.DeployChunk(data=archive[start : start + size])


# ---- executions --------------------------------------------------------------


def request_to_message(request: ExecutionRequest) -> pb.ExecutionRequest:
    message = pb.ExecutionRequest(
        function_name=request.function_name,
        args=request.args,
        execution_id=request.execution_id,
        stdin=request.stdin,
        timeout_seconds=request.timeout_seconds,
    )
    if request.asynchronous:
        setattr(message, "async", True)  # a keyword of Python since the original chose the name
    return message


def request_from_message(message: pb.ExecutionRequest) -> ExecutionRequest:
    return ExecutionRequest(
        execution_id=message.execution_id,
        function_name=message.function_name,
        args=tuple(message.args),
        stdin=message.stdin,
        timeout_seconds=max(0.0, message.timeout_seconds),
        asynchronous=bool(getattr(message, "async")),
    )


def record_to_json(record: ExecutionRecord, *, with_output: bool = True) -> bytes:
    """The record of GetExecution."""
    return _ENCODER.encode(record.to_json(with_output=with_output)).encode()


def record_from_json(data: bytes, output: bytes | None = None) -> ExecutionRecord:
    """A record from an agent: an object, or the list of an answer. Raises ValueError for neither."""
    try:
        value = json.loads(data)
        if isinstance(value, list):
            return positional.from_list(value, output)
        record = ExecutionRecord.from_json(value)
        return record if "error_kind" in value else _of_original(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an execution record: {error!r}") from error


def _of_original(record: ExecutionRecord) -> ExecutionRecord:
    """With what its words and its output tell, as it has no fields for that."""
    record = replace(record, output_bytes=len(record.output or b""))
    match record.status:
        case ExecutionStatus.SUCCESS:
            return replace(record, exit_code=0)
        case ExecutionStatus.CANCELLED:
            return replace(record, error_kind=ErrorKind.CANCELLED)
        case ExecutionStatus.FAILED:
            kind, exit_code, signal = _kind_of_text(record.error)
            # There is a record only of what was started.
            kind = ErrorKind.INTERNAL if kind.nothing_started else kind
            return replace(record, error_kind=kind, exit_code=exit_code, signal=signal)
        case _:
            return record


def original_text(record: ExecutionRecord) -> str:
    """The record's error in the original's words, which an original Flux reads."""
    match record.error_kind:
        case ErrorKind.NONE:
            return ""
        case ErrorKind.AT_CAPACITY:
            return f"function {record.function_name} at capacity"
        case ErrorKind.NOT_FOUND:
            return "function not found"
        case ErrorKind.EXIT_CODE:
            return f"exit code {record.exit_code}"
        case ErrorKind.SIGNAL:
            return "exit code -1"
        case _:
            return record.error or record.error_kind.name.lower().replace("_", " ")


def response_from_record(record: ExecutionRecord, *, with_output: bool = True) -> pb.ExecutionResponse:
    """An ended, refused or just accepted execution as its answer."""
    response = pb.ExecutionResponse(
        error=original_text(record), duration_ms=record.duration_ms, error_kind=cast("Any", int(record.error_kind))
    )
    if record.status.ended and not record.error_kind.nothing_started:
        fill_record(response.ended_record, record)
        response.record = _ENCODER.encode(positional.to_list(record)).encode()
    if with_output and record.output:
        response.output = record.output
    return response


def record_from_response(
    message: pb.ExecutionResponse, request: ExecutionRequest, agent_id: str, at: float
) -> ExecutionRecord:
    """What an agent answered, ours or an original; ``at`` is when (epoch seconds).

    A refusal has an ``error_kind`` with ``nothing_started``. Raises ValueError for a broken answer of ours.
    """
    if message.HasField("ended_record"):
        return _machine_fault(record_from_message(message.ended_record, message.output, agent_id))
    if message.record:
        # Of an agent that is not upgraded yet.
        record = _machine_fault(record_from_json(message.record, message.output))
        if record.agent_id == agent_id and record.output is not None:
            return record
        return replace(record, output=message.output, agent_id=agent_id)
    kind = ErrorKind(message.error_kind)
    exit_code: int | None = None
    signal: int | None = None
    if message.error and not kind:
        kind, exit_code, signal = _kind_of_text(message.error)
    elif not message.error and not request.asynchronous:
        exit_code = 0
    if request.asynchronous and not message.error and not kind:
        return ExecutionRecord(
            request.execution_id, request.function_name, agent_id, phase=Phase.RUNNING, asynchronous=True, started_at=at
        )
    return ExecutionRecord(
        execution_id=request.execution_id,
        function_name=request.function_name,
        agent_id=agent_id,
        status=ExecutionStatus.FAILED if kind else ExecutionStatus.SUCCESS,
        phase=Phase.ENDED,
        asynchronous=request.asynchronous,
        output=message.output,
        output_bytes=len(message.output),
        error=message.error,
        error_kind=kind,
        exit_code=exit_code,
        signal=signal,
        duration_ms=message.duration_ms,
        started_at=at - message.duration_ms / 1000,
        run_started_at=at - message.duration_ms / 1000,
        status_at=at,
    )


def fill_record(message: pb.ExecutionRecord, record: ExecutionRecord) -> None:
    """Everything but its output."""
    # In place, and only what is set: half of what a message made and copied costs.
    message.execution_id = record.execution_id
    message.function_name = record.function_name
    message.agent_id = record.agent_id
    message.status = record.status.value
    message.phase = record.phase.value
    message.asynchronous = record.asynchronous
    message.output_bytes = record.output_bytes
    message.truncated = record.truncated
    message.error = record.error
    message.error_kind = cast("Any", int(record.error_kind))
    if record.exit_code is not None:
        message.exit_code = record.exit_code
    if record.signal is not None:
        message.signal = record.signal
    message.duration_ms = record.duration_ms
    message.queue_ms = record.queue_ms
    message.started_at = record.started_at
    message.run_started_at = record.run_started_at
    message.status_at = record.status_at
    if record.peak_memory_bytes is not None:
        message.peak_memory_bytes = record.peak_memory_bytes
    if record.cpu_seconds is not None:
        message.cpu_seconds = record.cpu_seconds
    if record.warnings:
        message.warnings.extend(record.warnings)
    message.attempt = record.attempt


def record_from_message(message: pb.ExecutionRecord, output: bytes | None, agent_id: str) -> ExecutionRecord:
    return ExecutionRecord(
        message.execution_id,
        message.function_name,
        agent_id,
        ExecutionStatus(message.status),
        Phase(message.phase),
        message.asynchronous,
        output,
        message.output_bytes,
        message.truncated,
        message.error,
        ErrorKind(message.error_kind),
        message.exit_code if message.HasField("exit_code") else None,
        message.signal if message.HasField("signal") else None,
        message.duration_ms,
        message.queue_ms,
        message.started_at,
        message.run_started_at,
        message.status_at,
        message.peak_memory_bytes if message.HasField("peak_memory_bytes") else None,
        message.cpu_seconds if message.HasField("cpu_seconds") else None,
        tuple(message.warnings),
        message.attempt or 1,
    )


# How agents before ERROR_KIND_MACHINE_FAULT said that their machine, not the program, is at fault.
_MACHINE_FAULTS = ("the agent's machine cannot: ", "the store ")


def _machine_fault(record: ExecutionRecord) -> ExecutionRecord:
    if record.error_kind in (ErrorKind.CANNOT_START, ErrorKind.INTERNAL) and record.error.startswith(_MACHINE_FAULTS):
        return replace(record, error_kind=ErrorKind.MACHINE_FAULT)
    return record


_EXIT_CODE = re.compile(r"exit code (-?\d+)")


def _kind_of_text(error: str) -> tuple[ErrorKind, int | None, int | None]:
    """An original agent gives nothing but words: (kind, exit code, signal)."""
    match = _EXIT_CODE.search(error)
    if match:
        code = int(match.group(1))
        # Go answers -1 for a program that a signal ended; which one it does not say.
        return (ErrorKind.SIGNAL, None, None) if code == -1 else (ErrorKind.EXIT_CODE, code, None)
    if "at capacity" in error:
        return ErrorKind.AT_CAPACITY, None, None
    if "function not found" in error:
        return ErrorKind.NOT_FOUND, None, None
    if "timed out" in error:
        return ErrorKind.TIMEOUT, None, None
    return ErrorKind.INTERNAL, None, None


# ---- what agents say of themselves --------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One answer to ReportNodeStatus. Empty texts: an original agent."""

    agent_id: str
    figures: NodeFigures
    instance_id: str = ""
    platform: Platform = ANYWHERE
    isolation: str = ""
    inventory_revision: int = 0


def report_to_message(report: NodeReport) -> pb.NodeStatusResponse:
    figures = report.figures
    return pb.NodeStatusResponse(
        agent_id=report.agent_id,
        cpu_percent=figures.cpu_percent,
        memory_percent=figures.memory_percent,
        memory_total_mb=figures.memory_total_mb,
        memory_used_mb=figures.memory_used_mb,
        active_tasks=figures.active_tasks,
        max_tasks=figures.max_tasks,
        uptime_seconds=figures.uptime_seconds,
        disk_free_mb=figures.disk_free_mb,
        instance_id=report.instance_id,
        os=report.platform.os,
        architecture=report.platform.architecture,
        isolation=report.isolation,
        inventory_revision=report.inventory_revision,
        problem=figures.problem,
        warnings=figures.warnings,
    )


def report_from_message(message: pb.NodeStatusResponse, at: float) -> NodeReport:
    figures = NodeFigures(
        cpu_percent=message.cpu_percent,
        memory_percent=message.memory_percent,
        memory_total_mb=message.memory_total_mb,
        memory_used_mb=message.memory_used_mb,
        active_tasks=message.active_tasks,
        max_tasks=message.max_tasks,
        uptime_seconds=message.uptime_seconds,
        collected_at=at,
        disk_free_mb=message.disk_free_mb,
        problem=message.problem,
        warnings=tuple(message.warnings),
    )
    platform = Platform(message.os, message.architecture)
    return NodeReport(
        message.agent_id, figures, message.instance_id, platform, message.isolation, message.inventory_revision
    )


def inventory_to_message(inventory: Inventory) -> pb.InventoryResponse:
    return pb.InventoryResponse(
        agent_id=inventory.agent_id,
        instance_id=inventory.instance_id,
        version=inventory.version,
        os=inventory.platform.os,
        architecture=inventory.platform.architecture,
        max_tasks=inventory.max_tasks,
        isolation=inventory.isolation,
        isolation_notes=inventory.isolation_notes,
        enforces=inventory.enforces,
        functions=[
            pb.FunctionState(name=state.name, spec_digest=state.spec_digest, code_digest=state.code_digest)
            for state in inventory.functions
        ],
        inventory_revision=inventory.revision,
        features=inventory.features,
        certificate_not_after=rfc3339(inventory.certificate_not_after) if inventory.certificate_not_after else "",
        open_executions=inventory.open_executions,
    )


def inventory_from_message(message: pb.InventoryResponse) -> Inventory:
    return Inventory(
        agent_id=message.agent_id,
        instance_id=message.instance_id,
        version=message.version,
        platform=Platform(message.os, message.architecture),
        max_tasks=message.max_tasks,
        isolation=message.isolation,
        isolation_notes=tuple(message.isolation_notes),
        enforces=tuple(message.enforces),
        functions=tuple(FunctionState(state.name, state.spec_digest, state.code_digest) for state in message.functions),
        revision=message.inventory_revision,
        features=tuple(message.features),
        certificate_not_after=_epoch(message.certificate_not_after),
        open_executions=tuple(message.open_executions),
    )


def _epoch(text: str) -> float:
    """0.0 for what is no time: it is only shown."""
    try:
        return epoch(text)
    except ValueError:
        return 0.0
