"""Cloud nodes: made, removed, scaled."""

from __future__ import annotations

from fluxlib.control.http.answers import Answer, json_answer
from fluxlib.control.http.request import Request
from fluxlib.control.services import Nodes
from fluxlib.errors import Unavailable


def nodes_of(request: Request) -> Nodes:
    """Raises Unavailable when flux.yaml names no provider."""
    if request.services.nodes is None:
        raise Unavailable("no providers configured: name one under `providers` in flux.yaml and start Flux again")
    return request.services.nodes


def initialize(request: Request) -> Answer:
    return json_answer(200, nodes_of(request).initialize())


def remove_all(request: Request) -> Answer:
    return json_answer(200, nodes_of(request).remove_all())


def autoscaling(request: Request) -> Answer:
    return json_answer(200, nodes_of(request).autoscaling())
