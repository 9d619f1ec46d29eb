"""The API's own description, OpenAPI 3.1, made from the table of routes."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import fluxlib
from fluxlib.control.http.fields import PARAMS, Field
from fluxlib.control.http.route import Content, Route
from fluxlib.control.http.schemas import COMPONENTS, ref

_RETRY_LATER = (429, 503)
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "a repeated submission with the same key answers the first one's ID",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """The whole document, as GET /openapi.json answers it."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Flux",
            "version": fluxlib.__version__,
            "description": "Serverless without containers: zip an executable, send it, run it on a fleet.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": COMPONENTS,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{"key": []}, {"bearer": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    parameters = [_parameter(PARAMS[name], "path") for name in route.parameter_names]
    parameters += [_parameter(field, "query") for field in route.query]
    if route.idempotent_key:
        parameters.append(_IDEMPOTENCY_KEY)
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.about,
        "description": f"Needs the role {route.role}." if not route.public else "Needs no key; with one it says more.",
        "responses": {str(status): _response(status, route.answers.get(status)) for status in route.statuses},
    }
    if parameters:
        operation["parameters"] = parameters
    if route.body.content:
        content = {media: {"schema": schema} if schema else {} for media, schema in route.body.content.items()}
        operation["requestBody"] = {"required": route.body.required, "content": content}
    if route.public:
        operation["security"] = [{}, {"key": []}, {"bearer": []}]
    return operation


def _parameter(field: Field, place: str) -> dict[str, Any]:
    return {
        "name": field.name,
        "in": place,
        "required": place == "path" or field.required,
        "description": field.about,
        "schema": field.schema,
    }


def _response(status: int, content: Content | None) -> dict[str, Any]:
    if content is None:
        content = Content(HTTPStatus(status).phrase, ref("Error"))
    elif status == 503:
        # Beside what the route itself says with it.
        content = Content(content.about, {"anyOf": [content.schema, ref("Error")]})
    response: dict[str, Any] = {
        "description": content.about,
        "content": {content.media_type: {"schema": content.schema} if content.schema else {}},
    }
    if status in _RETRY_LATER:
        response["headers"] = {
            "Retry-After": {"description": "seconds, where it is known", "schema": {"type": "integer", "minimum": 1}}
        }
    return response
