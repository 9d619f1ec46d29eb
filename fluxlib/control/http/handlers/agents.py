"""Agents: the fleet as it is, joining it, leaving it."""

from __future__ import annotations

from typing import Any

from fluxlib.control.http.answers import Answer, json_answer
from fluxlib.control.http.handlers.nodes import nodes_of
from fluxlib.control.http.request import Request
from fluxlib.control.services import AgentView
from fluxlib.errors import Conflict
from fluxlib.model import rfc3339


def get_list(request: Request) -> Answer:
    """The original's fields for everyone; what else is known for those with a key."""
    return json_answer(200, [_agent(view, request.may_see_all) for view in request.services.agents.views()])


def register(request: Request) -> Answer:
    address: str = request.data["address"]
    request.subject = address
    view = request.services.agents.register(address, legacy=request.data["legacy"])
    request.subject = f"{view.record.agent_id} at {address}"
    return json_answer(
        201,
        {
            "status": "registered",
            "id": view.record.agent_id,
            "address": view.record.address,
            "node": view.figures.to_json() if view.figures else None,
        },
    )


def delete(request: Request) -> Answer:
    agent_id = request.params["agent_id"]
    if request.query["terminate"]:
        nodes_of(request).terminate(agent_id)
        return json_answer(200, {"status": "terminated", "id": agent_id})
    request.services.agents.deregister(agent_id)
    return json_answer(200, {"status": "deregistered", "id": agent_id})


def drain(request: Request) -> Answer:
    return _changed(request.services.agents.drain(request.params["agent_id"]))


def undrain(request: Request) -> Answer:
    return _changed(request.services.agents.undrain(request.params["agent_id"]))


def _changed(view: AgentView) -> Answer:
    return json_answer(200, {"status": view.record.status.value, "id": view.record.agent_id})


def enroll(request: Request) -> Answer:
    """A private key is inside: nothing on the way may keep it."""
    agent_id = request.params["agent_id"]
    if request.services.enrolment is None:
        raise Conflict("disable_grpc_tls is set: agents need no certificates; register them by their address")
    bundle = request.services.enrolment.bundle(agent_id)
    headers = (
        ("Content-Disposition", f'attachment; filename="{agent_id}.zip"'),
        ("Cache-Control", "no-store"),
    )
    return Answer(200, bundle, "application/zip", headers)


def resources(request: Request) -> Answer:
    agents = [
        {
            "id": view.record.agent_id,
            "status": view.record.status.value,
            "instance_type": view.record.instance_type,
            "node": view.figures.to_json() if view.figures else None,
        }
        for view in request.services.agents.views()
    ]
    return json_answer(200, {"flux": {"node": request.services.status.figures().to_json()}, "agents": agents})


def _time(seconds: float) -> str | None:
    return rfc3339(seconds) if seconds else None


def _agent(view: AgentView, with_all: bool) -> dict[str, Any]:
    record = view.record
    data: dict[str, Any] = {
        "id": record.agent_id,
        "address": record.address,
        "active_count": view.active_count,
        "status": record.status.value,
        "last_heartbeat": _time(record.last_heartbeat),
        "provider_id": record.provider_id,
        "instance_type": record.instance_type,
        "provider": record.provider,
        "node_status": view.figures.to_json() if view.figures else None,
    }
    if with_all:
        data |= {
            "platform": str(record.platform),
            "version": record.version,
            "isolation": record.isolation,
            "isolation_notes": list(view.isolation_notes),
            "enforces": list(record.enforces),
            "max_tasks": record.max_tasks,
            "original": record.original,
            "legacy": record.legacy_certificate,
            "in_step": view.in_step,
            "problem": view.problem,
            "warnings": list(view.figures.warnings) if view.figures else [],
            "registered_at": _time(record.registered_at),
            "certificate_expires_at": _time(view.certificate_not_after),
        }
    return data
