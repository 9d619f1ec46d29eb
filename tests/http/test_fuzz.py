"""schemathesis over the document, against the server on a real socket with services that do no harm.

Run by ``make fuzz``; FLUX_FUZZ_EXAMPLES says how many cases an operation gets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fluxlib.control.webserver import WebServer
from tests.http.fakes import ADMIN, FakeOutput, Fakes

pytestmark = pytest.mark.fuzz

EXAMPLES = int(os.environ.get("FLUX_FUZZ_EXAMPLES", "100"))


class _EndedOutputs(dict[str, FakeOutput]):
    """Followers of what nobody writes would wait for ever."""

    def setdefault(self, key: str, default: Any = None) -> FakeOutput:
        return FakeOutput(b"some output")


@pytest.mark.timeout(1800)
def test_no_request_gets_what_the_document_does_not_say(serve: Callable[..., WebServer]) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    fakes = Fakes()
    fakes.executions.outputs = _EndedOutputs()
    url = f"http://127.0.0.1:{serve(fakes).port}"
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    ]
    seen: dict[str, set[int]] = {}

    def probe(operation: Any) -> None:
        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def one(case: Any) -> None:
            response = case.call(headers={"X-API-Key": ADMIN})
            seen.setdefault(operation.label, set()).add(response.status_code)
            case.validate_response(response, checks=checks)

        one()

    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        # schemathesis makes no zips; tests/archive has them.
        if "application/zip" not in str(operation.definition.raw.get("requestBody", "")):
            probe(operation)
    # It must have got beyond the checks of shape, or it proves nothing.
    for label, status in [
        ("POST /execute/{name}", 200),
        ("POST /execute/{name}/async", 202),
        ("GET /executions", 200),
        ("GET /functions", 200),
        ("POST /agents/register", 201),
        ("GET /functions/{name}", 404),
    ]:
        assert status in seen[label], (label, seen[label])
