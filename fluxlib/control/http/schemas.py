"""The shapes of the answers, as JSON Schema (2020-12). Names are components of the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fluxlib.config.function import FunctionFile
from fluxlib.config.reader import Between, OneOf, Setting, settings_of
from fluxlib.control.http.fields import NAME

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_YES_NO: Schema = {"type": "boolean"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def page_of(item: Schema) -> Schema:
    return _object({"items": list_of(item), "next": _or_null(_TEXT)})


_STATUS: Schema = {"type": "string", "enum": ["running", "success", "failed", "cancelled"]}
_NODE = _object(
    {
        "cpu_percent": _NUMBER,
        "memory_percent": _NUMBER,
        "memory_total_mb": _COUNT,
        "memory_used_mb": _COUNT,
        "active_tasks": _COUNT,
        "uptime_seconds": _COUNT,
        "collected_at": _or_null(_TIME),
    },
    {"max_tasks": _COUNT, "disk_free_mb": _COUNT},
)
_AGENT = _object(
    {
        "id": _TEXT,
        "address": _TEXT,
        "active_count": _COUNT,
        "status": {"type": "string", "enum": ["provisioning", "online", "busy", "offline", "draining"]},
        "last_heartbeat": _or_null(_TIME),
        "provider_id": _TEXT,
        "instance_type": _TEXT,
        "provider": _TEXT,
        "node_status": {"anyOf": [ref("Node"), {"type": "null"}]},
    },
    {
        "platform": _TEXT,
        "version": _TEXT,
        "isolation": _TEXT,
        "isolation_notes": _TEXTS,
        "enforces": _TEXTS,
        "max_tasks": _COUNT,
        "original": _YES_NO,
        "legacy": _YES_NO,
        "in_step": _YES_NO,
        "problem": _TEXT,
        "warnings": _TEXTS,
        "registered_at": _or_null(_TIME),
        "certificate_expires_at": _or_null(_TIME),
    },
)
_RECORD = _object(
    {
        "execution_id": _TEXT,
        "agent_id": _TEXT,
        "function_name": _TEXT,
        "status": _STATUS,
        "phase": {"type": "string", "enum": ["queued", "starting", "running", "ending", "ended"]},
        "async": _YES_NO,
        "error": _TEXT,
        "duration_ms": _COUNT,
        "queue_ms": _COUNT,
        "started_at": _TIME,
    },
    {
        "error_kind": _or_null(_TEXT),
        "run_started_at": _or_null(_TIME),
        "status_at": _TIME,
        "exit_code": _or_null({"type": "integer"}),
        "signal": _or_null({"type": "integer"}),
        "timed_out": _YES_NO,
        "out_of_memory": _YES_NO,
        "truncated": _YES_NO,
        "output_bytes": _COUNT,
        "peak_memory_bytes": _or_null(_COUNT),
        "cpu_seconds": _or_null(_NUMBER),
        "warnings": _TEXTS,
        "output": _TEXT,
    },
)
_RESULT = _object(
    {
        "status": _STATUS,
        "execution_id": _TEXT,
        "agent_id": _TEXT,
        "output": _TEXT,
        "duration_ms": _COUNT,
        "queue_ms": _COUNT,
        "exit_code": _or_null({"type": "integer"}),
        "truncated": _YES_NO,
    },
    {
        "error": _TEXT,
        "error_kind": _or_null(_TEXT),
        "signal": _or_null({"type": "integer"}),
        "timed_out": _YES_NO,
        "out_of_memory": _YES_NO,
        "warnings": _TEXTS,
    },
)
_AGENT_RESULT = _object({"agent_id": _TEXT, "status": _TEXT, "message": _TEXT})
_PUSHED: Schema = {"status": _TEXT, "name": _TEXT, "total_agents": _COUNT, "agents": list_of(ref("AgentResult"))}
_PUSH_EXTRA: Schema = {
    "problem": {"type": "string", "description": "why none of the agents can run the function"},
    "warnings": _TEXTS,
    "message": _TEXT,
}

COMPONENTS: dict[str, Schema] = {
    "Error": _object(
        {"error": {"type": "string", "description": "what is wrong and what to do"}},
        {
            "faults": _TEXTS,
            "execution_id": _TEXT,
            "status": {**_STATUS, "description": "of the execution that has ended already and cannot be cancelled"},
            "error_id": {"type": "string", "description": "finds the fault in Flux's log"},
            "record": ref("Record"),
        },
    ),
    "Node": _NODE,
    "Agent": _AGENT,
    "Record": _RECORD,
    "Result": _RESULT,
    "AgentResult": _AGENT_RESULT,
    "Registered": _object({**_PUSHED, "registered_count": _COUNT}, _PUSH_EXTRA),
    "Deployed": _object({**_PUSHED, "deployed_count": _COUNT, "code_digest": _TEXT}, _PUSH_EXTRA),
    "Deleted": _object(_PUSHED, _PUSH_EXTRA),
    "Function": _object(
        {
            "name": _TEXT,
            "handler": _TEXT,
            "resources": _object({"cpu": _COUNT, "memory": _COUNT}),
            "timeout": _COUNT,
            "max_concurrency": _COUNT,
            "max_concurrency_behavior": _TEXT,
            "resource_pressure_behavior": _TEXT,
            "env": {"type": "object", "additionalProperties": _TEXT},
            "platforms": _TEXTS,
            "network": _TEXT,
            "cwd": _TEXT,
            "limits": {"type": "object", "additionalProperties": _COUNT},
            "detected_platforms": _TEXTS,
            "deployed": _YES_NO,
            "code_digest": _TEXT,
            "code_bytes": _COUNT,
            "updated_at": _or_null(_TIME),
        }
    ),
    "Health": _object(
        {
            "status": {"type": "string", "enum": ["ok", "connecting", "stopping", "store unreachable"]},
            "version": _TEXT,
            "store": {"type": "string", "enum": ["ok", "unreachable"]},
            "stopping": _YES_NO,
            "leader": _YES_NO,
            "warning_count": _COUNT,
            "loops": list_of(_object({"name": _TEXT, "alive": _YES_NO, "crashes": _COUNT}, {"last_error": _TEXT})),
        },
        {"warnings": _TEXTS, "error": _TEXT},
    ),
    "AgentRegistered": _object(
        {"status": _TEXT, "id": _TEXT, "address": _TEXT, "node": _AGENT["properties"]["node_status"]}
    ),
    "AgentChanged": _object({"status": _TEXT, "id": _TEXT}),
    "Accepted": _object({"status": {"const": "accepted"}, "execution_id": _TEXT}),
    "Cancelled": _object({"status": {"const": "cancelled"}, "execution_id": _TEXT}),
    "Initialized": _object(
        {"nodes": _object({"spawned": _COUNT, "failed": _COUNT})},
        {
            "present": _COUNT,
            "agents": list_of(_object({"agent_id": _TEXT, "provider": _TEXT, "status": _TEXT, "message": _TEXT})),
            "errors": _TEXTS,
        },
    ),
    "NodesRemoved": _object({"status": _TEXT, "removed": _COUNT}, {"errors": _TEXTS}),
    "Resources": _object(
        {
            "flux": _object({"node": ref("Node")}),
            "agents": list_of(
                _object(
                    {
                        "id": _TEXT,
                        "status": _TEXT,
                        "instance_type": _TEXT,
                        "node": {"anyOf": [ref("Node"), {"type": "null"}]},
                    }
                )
            ),
        }
    ),
}


def function_schema() -> Schema:
    """What PUT /functions takes, from the settings its reader checks by."""
    properties: Schema = {}
    required = []
    for _, declared in settings_of(FunctionFile):
        outer, _, inner = declared.key.partition(".")
        if inner:
            section = properties.setdefault(outer, {"type": "object", "properties": {}, "additionalProperties": False})
            section["properties"][inner] = _setting_schema(declared)
        else:
            properties[outer] = _setting_schema(declared)
        if declared.required:
            required.append(declared.key)
    properties["name"] |= NAME.schema
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _setting_schema(declared: Setting) -> Schema:
    kinds: dict[str, Schema] = {
        "string": _TEXT,
        "integer": {"type": "integer"},
        "number": _NUMBER,
        "boolean": _YES_NO,
        "strings": _TEXTS,
        "map": {"type": "object", "additionalProperties": _TEXT},
    }
    schema = {**kinds[declared.kind], "description": declared.why}
    if isinstance(declared.check, Between):
        schema |= {"minimum": int(declared.check.low), "maximum": int(declared.check.high)}
    elif isinstance(declared.check, OneOf):
        schema["enum"] = list(declared.check.allowed)
    elif declared.required:
        schema["minLength"] = 1
    return schema
