"""The table of routes. Nothing is served that is not here."""

from __future__ import annotations

from fluxlib.config.control import ControlConfig
from fluxlib.control.http.answers import Answer, json_answer
from fluxlib.control.http.bodies import CALL_BODY, REGISTER_BODY, archive_body, function_body
from fluxlib.control.http.budget import Waits
from fluxlib.control.http.fields import CURSOR, FOLLOW, FORCE, FUNCTION, LIMIT, OFFSET, STATUS, TERMINATE
from fluxlib.control.http.handlers import agents, execute, functions, health, nodes
from fluxlib.control.http.openapi import document
from fluxlib.control.http.request import Request
from fluxlib.control.http.route import Content, Route
from fluxlib.control.http.schemas import function_schema, list_of, page_of, ref


def build_routes(config: ControlConfig) -> tuple[Route, ...]:
    """Every route of the API, in the order of the document."""
    table = (*_fleet(config), *_functions(config), *_executions(), *_nodes())
    return (*table, _openapi(table))


def _fleet(config: ControlConfig) -> tuple[Route, ...]:
    changed = {200: Content("done", ref("AgentChanged"))}
    return (
        Route(
            "GET", "/health", "how this Flux is", health.get, "read",
            {200: Content("it serves", ref("Health")), 503: Content("its store is away, or it stops", ref("Health"))},
            public=True, fast=True,
        ),
        Route(
            "GET", "/agents", "the fleet", agents.get_list, "read",
            {200: Content("every agent", list_of(ref("Agent")))},
            public=config.public_agents,
        ),
        Route(
            "POST", "/agents/register", "take an agent into the fleet", agents.register, "admin",
            {201: Content("it is in", ref("AgentRegistered"))},
            errors=(409, 502), body=REGISTER_BODY, waits=Waits.ASK, changes=True,
        ),
        Route(
            "DELETE", "/agents/{agent_id}", "take an agent out; what it runs fails", agents.delete, "admin",
            changed, errors=(404, 409, 502), query=(TERMINATE,), waits=Waits.ASK, changes=True,
        ),
        Route(
            "POST", "/agents/{agent_id}/drain", "let it finish, give it nothing new", agents.drain, "admin",
            changed, errors=(404, 409), changes=True,
        ),
        Route(
            "POST", "/agents/{agent_id}/undrain", "give it work again", agents.undrain, "admin",
            changed, errors=(404, 409), changes=True,
        ),
        Route(
            "POST", "/agents/{agent_id}/enroll", "make certificates for an agent", agents.enroll, "admin",
            {200: Content("agent.yaml and three PEM files", media_type="application/zip")},
            errors=(409,), changes=True,
        ),
        Route(
            "GET", "/resources", "figures of every machine", agents.resources, "read",
            {200: Content("Flux's own machine and the agents'", ref("Resources"))},
        ),
    )  # fmt: skip


def _functions(config: ControlConfig) -> tuple[Route, ...]:
    return (
        Route(
            "PUT", "/functions", "declare a function", functions.put, "deploy",
            {201: Content("saved, and pushed to the agents there are", ref("Registered"))},
            errors=(409,), body=function_body(function_schema()), waits=Waits.ASK, changes=True,
        ),
        Route(
            "GET", "/functions", "all functions by name", functions.get_list, "read",
            {200: Content("a page", page_of(ref("Function")))}, query=(CURSOR, LIMIT),
        ),
        Route(
            "GET", "/functions/{name}", "one function", functions.get_one, "read",
            {200: Content("the function", ref("Function"))}, errors=(404,),
        ),
        Route(
            "DELETE", "/functions/{name}", "remove a function and its code", functions.delete, "deploy",
            {200: Content("it is gone", ref("Deleted"))},
            errors=(404, 409), query=(FORCE,), waits=Waits.ASK, changes=True,
        ),
        Route(
            "PUT", "/deploy/{name}", "give a function its code", functions.deploy, "deploy",
            {201: Content("saved, and pushed to the agents there are", ref("Deployed"))},
            errors=(404, 409), body=archive_body(config.max_archive_mb), waits=Waits.ASK, changes=True,
        ),
    )  # fmt: skip


def _executions() -> tuple[Route, ...]:
    return (
        Route(
            "POST", "/execute/{name}", "run a function and wait for its end", execute.execute, "invoke",
            {
                200: Content("it succeeded", ref("Result")),
                500: Content("it failed or was cancelled (or Flux did)", {"anyOf": [ref("Result"), ref("Error")]}),
            },
            errors=(404, 409, 429, 502), body=CALL_BODY, waits=Waits.CALL, fast=True,
        ),
        Route(
            "POST", "/execute/{name}/async", "run a function, ask for it later", execute.submit, "invoke",
            {202: Content("an agent has it, or it is queued for good", ref("Accepted"))},
            errors=(404, 409, 429, 502), body=CALL_BODY, waits=Waits.CALL, fast=True, idempotent_key=True,
        ),
        Route(
            "GET", "/executions", "newest first", execute.get_list, "read",
            {200: Content("a page, without output", page_of(ref("Record")))},
            query=(FUNCTION, STATUS, CURSOR, LIMIT),
        ),
        Route(
            "GET", "/executions/{execution_id}", "one execution and its output so far", execute.get_one, "read",
            {200: Content("the record", ref("Record"))}, errors=(404, 502), waits=Waits.ASK,
        ),
        Route(
            "GET", "/executions/{execution_id}/output", "its output, byte for byte", execute.output, "read",
            {200: Content("the bytes", media_type="application/octet-stream")},
            errors=(404, 502), query=(OFFSET, FOLLOW), waits=Waits.ASK,
        ),
        Route(
            "DELETE", "/executions/{execution_id}", "cancel; answers when it is dead", execute.cancel, "invoke",
            {200: Content("it is dead", ref("Cancelled"))}, errors=(404, 409, 502), waits=Waits.ASK, changes=True,
        ),
    )  # fmt: skip


def _nodes() -> tuple[Route, ...]:
    return (
        Route(
            "POST", "/initialize", "make each provider's minimum of nodes", nodes.initialize, "admin",
            {200: Content("what was made", ref("Initialized"))}, errors=(409, 502), waits=Waits.ASK, changes=True,
        ),
        Route(
            "DELETE", "/nodes", "end every node Flux made", nodes.remove_all, "admin",
            {200: Content("how many", ref("NodesRemoved"))}, errors=(409, 502), waits=Waits.ASK, changes=True,
        ),
        Route(
            "GET", "/autoscaling", "samples, decisions and their reasons", nodes.autoscaling, "read",
            {200: Content("by provider", {"type": "object"})},
        ),
    )  # fmt: skip


def _openapi(table: tuple[Route, ...]) -> Route:
    def get(request: Request) -> Answer:
        return answer

    route = Route(
        "GET", "/openapi.json", "this document", get, "read", {200: Content("it", {"type": "object"})}, public=True
    )
    answer = json_answer(200, document((*table, route)))
    return route
