"""Functions and their code: the desired state."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fluxlib.control.http.answers import Answer, json_answer
from fluxlib.control.http.request import Request
from fluxlib.control.services import PushResult
from fluxlib.model import Function, FunctionSpec, rfc3339

_HIDDEN = "***"


def put(request: Request) -> Answer:
    spec: FunctionSpec = request.data
    if request.principal:
        request.principal.demand_function(spec.name)
    result = request.services.functions.put(spec)
    return json_answer(201, {**_pushed("registered", result), "registered_count": result.done})


def deploy(request: Request) -> Answer:
    result = request.services.functions.deploy(request.params["name"], request.data)
    answer = _pushed("deployed", result)
    return json_answer(201, {**answer, "deployed_count": result.done, "code_digest": result.function.code_digest})


def delete(request: Request) -> Answer:
    result = request.services.functions.delete(request.params["name"], force=request.query["force"])
    return json_answer(200, _pushed("deleted", result))


def _pushed(status: str, result: PushResult) -> dict[str, Any]:
    data: dict[str, Any] = {
        # First, so that nobody overlooks it behind a long list of agents.
        **({"problem": result.problem} if result.problem else {}),
        "status": status,
        "name": result.function.spec.name,
        "total_agents": result.total_agents,
        "agents": [asdict(agent) for agent in result.agents],
    }
    if result.warnings:
        data["warnings"] = list(result.warnings)
    if status != "deleted" and not result.done:
        data["message"] = "saved; agents get it as they join or come back"
    return data


def get_one(request: Request) -> Answer:
    return json_answer(200, _function(request, request.services.functions.get(request.params["name"])))


def get_list(request: Request) -> Answer:
    """By name; the cursor is the last name of the page before."""
    cursor, limit, principal = request.query["cursor"], request.query["limit"], request.principal
    found = [
        function
        for function in request.services.functions.list()
        if function.spec.name > cursor and (principal is None or principal.may_use(function.spec.name))
    ]
    page = found[:limit]
    following = page[-1].spec.name if len(found) > limit else None
    return json_answer(200, {"items": [_function(request, function) for function in page], "next": following})


def _function(request: Request, function: Function) -> dict[str, Any]:
    """What is in the environment is shown to those who may set it: it is where secrets are kept."""
    data = function.spec.to_json()
    if request.principal is None or not request.principal.may("deploy"):
        data["env"] = dict.fromkeys(data["env"], _HIDDEN)
    data["detected_platforms"] = [str(platform) for platform in function.detected_platforms]
    data["deployed"] = bool(function.code_digest)
    data["code_digest"] = function.code_digest
    data["code_bytes"] = function.code_bytes
    data["updated_at"] = rfc3339(function.updated_at) if function.updated_at else None
    return data
