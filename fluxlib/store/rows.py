"""Records as text and back, the same for every backend."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fluxlib.model import (
    AgentRecord,
    AgentStatus,
    ExecutionRecord,
    ExecutionRequest,
    Function,
    FunctionSpec,
    Phase,
    Platform,
)

_ENCODER = json.JSONEncoder(separators=(",", ":"))


def dump(data: Any) -> str:
    return _ENCODER.encode(data)


def function_to_text(function: Function) -> str:
    return dump(
        {
            "spec": function.spec.to_json(),
            "spec_digest": function.spec_digest,
            "code_digest": function.code_digest,
            "code_bytes": function.code_bytes,
            "detected": [str(platform) for platform in function.detected_platforms],
            "updated_at": function.updated_at,
        }
    )


def function_from_text(text: str | bytes) -> Function:
    data = json.loads(text)
    return Function(
        spec=FunctionSpec.from_json(data["spec"]),
        spec_digest=data["spec_digest"],
        code_digest=data["code_digest"],
        code_bytes=data["code_bytes"],
        detected_platforms=tuple(Platform.parse(name) for name in data["detected"]),
        updated_at=data["updated_at"],
    )


def agent_to_text(agent: AgentRecord) -> str:
    data = asdict(agent)
    data["platform"] = str(agent.platform)
    data["status"] = agent.status.value
    return dump(data)


def agent_from_text(text: str | bytes) -> AgentRecord:
    data = json.loads(text)
    data["platform"] = Platform.parse(data["platform"])
    data["status"] = AgentStatus(data["status"])
    data["enforces"] = tuple(data["enforces"])
    return AgentRecord(**data)


def request_to_bytes(request: ExecutionRequest) -> bytes:
    """The arguments as JSON, then a newline (JSON has none of its own), then standard input as it is."""
    return dump([list(request.args), request.timeout_seconds]).encode() + b"\n" + request.stdin


def request_from_bytes(data: bytes, execution_id: str, function_name: str, asynchronous: bool) -> ExecutionRequest:
    head, _, stdin = data.partition(b"\n")
    args, timeout = json.loads(head)
    return ExecutionRequest(execution_id, function_name, tuple(args), stdin, timeout, asynchronous)


def record_to_text(record: ExecutionRecord) -> str:
    """Without output."""
    return dump(record.to_row())


def record_from_text(text: str | bytes) -> ExecutionRecord:
    return ExecutionRecord.from_row(json.loads(text))


def open_record(
    execution_id: str, function_name: str, agent_id: str, phase: str, asynchronous: bool, started_at: float
) -> ExecutionRecord:
    """A record that has not ended, from the few columns it needs."""
    return ExecutionRecord(
        execution_id,
        function_name,
        agent_id,
        phase=Phase(phase),
        asynchronous=asynchronous,
        started_at=started_at,
    )
