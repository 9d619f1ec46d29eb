"""What each route answers, errors included, held against http.md's contract."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fluxlib.control.services import AgentAway, Call
from fluxlib.errors import (
    AgentLost,
    AgentUnreachable,
    AtCapacity,
    Conflict,
    FluxError,
    InvalidInput,
    NoAgentFits,
    Stopping,
    StoreUnavailable,
)
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus, Phase
from tests.http.conftest import Client
from tests.http.fakes import Fakes, ended


def raising(error: Exception) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        raise error

    return run


class TestExecute:
    def test_success(self, client: Client) -> None:
        reply = client("POST", "/execute/hello", json={"args": ["a", "b"]})
        assert reply.status == 200
        assert reply.json == {
            "status": "success",
            "output": "a b",
            "duration_ms": 7,
            "agent_id": "worker-1",
            "execution_id": "execution-1",
            "queue_ms": 0,
            "exit_code": 0,
            "truncated": False,
        }

    def test_output_that_is_no_text_is_shown_as_text(self, client: Client) -> None:
        raw = b"\xff\x00 \xc3\xa9"
        reply = client("POST", "/execute/hello", raw, headers={"Content-Type": "application/octet-stream"})
        assert reply.json["output"] == "\ufffd\0 \u00e9"
        output = client("GET", "/executions/execution-1/output")
        assert output.body == raw
        assert output.headers["X-Content-Type-Options"] == "nosniff"

    @pytest.mark.parametrize(
        ("fields", "seen"),
        [
            (
                {
                    "status": ExecutionStatus.FAILED,
                    "error": "exit code 3",
                    "error_kind": ErrorKind.EXIT_CODE,
                    "exit_code": 3,
                },
                {"status": "failed", "error": "exit code 3", "error_kind": "exit_code", "exit_code": 3},
            ),
            (
                {"status": ExecutionStatus.CANCELLED, "error": "cancelled", "error_kind": ErrorKind.CANCELLED},
                {"status": "cancelled", "error": "cancelled"},
            ),
            (
                {"status": ExecutionStatus.FAILED, "error": "", "error_kind": ErrorKind.TIMEOUT, "exit_code": None},
                {"status": "failed", "error": "failed", "timed_out": True, "out_of_memory": False},
            ),
        ],
    )
    def test_failure_is_500_with_the_same_body(
        self, client: Client, fakes: Fakes, fields: dict[str, Any], seen: dict[str, Any]
    ) -> None:
        fakes.executions.run = lambda call, caller, number: ended(call, number, **fields)
        reply = client("POST", "/execute/hello", json={"args": ["out"]})
        assert reply.status == 500
        assert reply.json["output"] == "out"
        assert {name: reply.json[name] for name in seen} == seen

    @pytest.mark.parametrize(
        ("error", "status", "retry"),
        [
            (InvalidInput("x"), 400, None),
            (NoAgentFits("x"), 429, "1"),
            (AtCapacity("x"), 503, "1"),
            (AtCapacity("x", retry_after=9), 503, "9"),
            (Stopping("x"), 503, "1"),
            (StoreUnavailable("x"), 503, "1"),
            (AgentUnreachable("x"), 502, None),
            (Conflict("x"), 409, None),
            (FluxError("x"), 500, None),
        ],
    )
    def test_each_error_has_its_status(
        self, client: Client, fakes: Fakes, error: FluxError, status: int, retry: str | None
    ) -> None:
        fakes.executions.run = raising(error)
        reply = client("POST", "/execute/hello")
        assert reply.status == status
        assert reply.json["error"] == "x"
        assert reply.headers.get("Retry-After") == retry

    def test_a_lost_agent_leaves_the_executions_id(self, client: Client, fakes: Fakes) -> None:
        error = AgentLost("worker-1 was lost")
        error.execution_id = "execution-9"  # type: ignore[attr-defined]
        fakes.executions.run = raising(error)
        reply = client("POST", "/execute/hello")
        assert reply.status == 502
        assert reply.json["execution_id"] == "execution-9"

    def test_what_nobody_expected_is_found_in_the_log(
        self, client: Client, fakes: Fakes, caplog: pytest.LogCaptureFixture
    ) -> None:
        fakes.executions.run = raising(KeyError("the secret detail"))
        reply = client("POST", "/execute/hello")
        assert reply.status == 500
        assert b"secret" not in reply.body
        assert b"Traceback" not in reply.body
        record = next(record for record in caplog.records if reply.json["error_id"] in record.getMessage())
        assert record.levelno == logging.ERROR
        assert record.exc_info is not None

    def test_async_is_accepted(self, client: Client) -> None:
        reply = client("POST", "/execute/hello/async")
        assert reply.status == 202
        assert reply.json == {"status": "accepted", "execution_id": "execution-1"}


class TestExecutions:
    def test_the_record(self, client: Client) -> None:
        client("POST", "/execute/hello", json={"args": ["x"]})
        record = client("GET", "/executions/execution-1").json
        assert (record["status"], record["output"], record["async"]) == ("success", "x", False)
        assert record["started_at"].endswith("Z")
        assert client("GET", "/executions/absent").status == 404

    @pytest.mark.parametrize(("gone", "status"), [(False, 503), (True, 502)])
    def test_of_an_agent_that_is_away_the_last_state_is_told(
        self, client: Client, fakes: Fakes, gone: bool, status: int
    ) -> None:
        record = ExecutionRecord("execution-5", "hello", "worker-1", phase=Phase.RUNNING, started_at=1.0)
        fakes.executions.get = raising(AgentAway("worker-1 is offline", record, gone=gone))  # type: ignore[method-assign]
        reply = client("GET", "/executions/execution-5")
        assert reply.status == status
        assert reply.json["error"] == "worker-1 is offline"
        assert reply.json["record"]["phase"] == "running"

    def test_lists_are_filtered_and_paged(self, client: Client, fakes: Fakes) -> None:
        for _ in range(3):
            client("POST", "/execute/hello")
        reply = client("GET", "/executions?function=hello&status=queued&limit=2&cursor=abc")
        assert [item["execution_id"] for item in reply.json["items"]] == ["execution-1", "execution-2"]
        assert "output" not in reply.json["items"][0]
        assert reply.json["next"] == "more"
        where, cursor, limit = fakes.executions.lists[-1]
        assert (where.function_name, where.status, where.queued, cursor, limit) == ("hello", None, True, "abc", 2)
        assert client("GET", "/executions?status=failed").json["next"] is None
        assert fakes.executions.lists[-1][0].status is ExecutionStatus.FAILED

    def test_output_from_an_offset(self, client: Client) -> None:
        client("POST", "/execute/hello", json={"args": ["0123456789"]})
        assert client("GET", "/executions/execution-1/output?offset=4").body == b"456789"
        assert client("GET", "/executions/execution-1/output?offset=99").status == 400
        assert client("GET", "/executions/absent/output?follow=1").status == 404

    def test_head_tells_no_length_but_the_one_of_get(self, client: Client) -> None:
        client("POST", "/execute/hello", json={"args": ["0123456789"]})
        for query in ("", "?offset=4", "?follow=1"):
            reply = client("HEAD", f"/executions/execution-1/output{query}")
            assert (reply.status, reply.body, reply.headers.get("Content-Length")) == (200, b"", None)
        record = client("GET", "/executions/execution-1")
        assert client("HEAD", "/executions/execution-1").headers["Content-Length"] == str(len(record.body))

    def test_cancel(self, client: Client, fakes: Fakes) -> None:
        running = replace(ended(Call("hello"), 7), status=ExecutionStatus.RUNNING, phase=Phase.RUNNING)
        fakes.executions.records["execution-7"] = running
        reply = client("DELETE", "/executions/execution-7")
        assert (reply.status, reply.json) == (200, {"status": "cancelled", "execution_id": "execution-7"})
        again = client("DELETE", "/executions/execution-7")
        assert again.status == 409
        assert again.json["status"] == "cancelled"


class TestFunctions:
    def test_put_tells_how_far_it_got(self, client: Client, fakes: Fakes) -> None:
        reply = client("PUT", "/functions", b"name: greet\nhandler: x")
        assert reply.status == 201
        assert reply.json == {
            "status": "registered",
            "name": "greet",
            "registered_count": 1,
            "total_agents": 1,
            "agents": [{"agent_id": "worker-1", "status": "success", "message": ""}],
        }
        reply = client("PUT", "/deploy/greet", b"zip")
        assert (reply.status, reply.json["deployed_count"], reply.json["total_agents"]) == (201, 1, 1)
        assert "problem" not in reply.json
        fakes.functions.problem = "no agent can run greet: it is empty"
        for path, body in (("/deploy/greet", b"zip"), ("/functions", b"name: greet\nhandler: run.sh\n")):
            reply = client("PUT", path, body)
            assert reply.status == 201
            assert next(iter(reply.json.items())) == ("problem", "no agent can run greet: it is empty")
        assert client("PUT", "/deploy/absent", b"zip").status == 404

    def test_pages_by_name(self, client: Client) -> None:
        for name in ("a", "b", "c"):
            client("PUT", "/functions", f"name: {name}\nhandler: x".encode())
        first = client("GET", "/functions?limit=3").json
        assert [item["name"] for item in first["items"]] == ["a", "b", "c"]
        second = client("GET", f"/functions?limit=3&cursor={first['next']}").json
        assert ([item["name"] for item in second["items"]], second["next"]) == (["hello"], None)

    def test_secrets_are_shown_to_those_who_set_them(self, make_client: Callable[[Fakes], Client]) -> None:
        import hashlib

        from fluxlib.config.keys import ApiKey

        client = make_client(Fakes(api_keys=(ApiKey("eye", "read", hashlib.sha256(b"eye's").hexdigest()),)))
        assert client("GET", "/functions/hello").json["env"] == {"TOKEN": "secret"}
        assert client("GET", "/functions/hello", key="eye's").json["env"] == {"TOKEN": "***"}
        assert b"secret" not in client("GET", "/functions", key="eye's").body

    def test_delete(self, client: Client) -> None:
        client("PUT", "/functions", b"name: busy\nhandler: x")
        assert client("DELETE", "/functions/busy").status == 409
        assert client("DELETE", "/functions/busy?force=0").status == 409
        assert client("DELETE", "/functions/busy?force=1").json["status"] == "deleted"
        assert client("DELETE", "/functions/busy?force=1").status == 404
        assert client("GET", "/functions/busy").status == 404


class TestFleet:
    def test_agents_come_and_go(self, client: Client, fakes: Fakes) -> None:
        reply = client("POST", "/agents/register", json={"address": "10.0.0.9:50052"})
        assert reply.status == 201
        assert {name: reply.json[name] for name in ("status", "id", "address")} == {
            "status": "registered",
            "id": "worker-2",
            "address": "10.0.0.9:50052",
        }
        assert reply.json["node"]["cpu_percent"] == 12.5
        assert client("POST", "/agents/worker-2/drain").json == {"status": "draining", "id": "worker-2"}
        assert client("POST", "/agents/worker-2/undrain").json["status"] == "online"
        assert client("DELETE", "/agents/worker-2").json["status"] == "deregistered"
        assert client("DELETE", "/agents/worker-2").status == 404
        assert client("DELETE", "/agents/worker-1?terminate=1").json["status"] == "terminated"
        assert fakes.nodes is not None
        assert fakes.nodes.terminated == ["worker-1"]

    def test_enrolment_gives_a_zip_nobody_keeps(self, client: Client) -> None:
        reply = client("POST", "/agents/worker-3/enroll")
        assert reply.status == 200
        assert reply.headers["Content-Type"] == "application/zip"
        assert reply.headers["Cache-Control"] == "no-store"
        for name in ("flux", "flux-agent", "*.x", "-x", "X"):
            assert client("POST", f"/agents/{name}/enroll").status == 400

    def test_without_tls_there_is_nothing_to_enrol(self, make_client: Callable[[Fakes], Client]) -> None:
        assert make_client(Fakes(tls=False))("POST", "/agents/worker-3/enroll").status == 409

    def test_clouds(self, client: Client, make_client: Callable[[Fakes], Client]) -> None:
        assert client("POST", "/initialize").json == {"nodes": {"spawned": 2, "failed": 0}}
        assert client("DELETE", "/nodes").json == {"status": "removed", "removed": 2}
        assert client("GET", "/autoscaling").json["aws"]["enabled"]
        without = make_client(Fakes(clouds=False))
        for method, path in [("POST", "/initialize"), ("DELETE", "/nodes"), ("GET", "/autoscaling")]:
            reply = without(method, path)
            assert reply.status == 503
            assert "no providers configured" in reply.json["error"]

    def test_resources(self, client: Client) -> None:
        data = client("GET", "/resources").json
        assert data["flux"]["node"]["memory_total_mb"] == 8000
        assert [agent["id"] for agent in data["agents"]] == ["worker-1"]


class TestHealth:
    def test_is_ok(self, client: Client) -> None:
        reply = client("GET", "/health", key=None)
        assert (reply.status, reply.json["status"]) == (200, "ok")
        assert reply.json["loops"] == [{"name": "health", "alive": True, "crashes": 2}]
        assert reply.json["warning_count"] == 1

    def test_says_more_to_those_with_a_key(self, client: Client) -> None:
        seen = client("GET", "/health").json
        assert seen["warnings"] == ["the agents' certificates expire soon"]
        assert "secret path" in seen["loops"][0]["last_error"]

    def test_is_503_when_the_store_is_away(self, client: Client, fakes: Fakes) -> None:
        fakes.status.store_error = "redis at 10.0.0.3 refuses"
        reply = client("GET", "/health", key=None)
        assert (reply.status, reply.json["store"]) == (503, "unreachable")
        assert b"10.0.0.3" not in reply.body
        assert "10.0.0.3" in client("GET", "/health").json["error"]

    def test_is_503_while_stopping(self, client: Client, fakes: Fakes) -> None:
        fakes.status.is_stopping = True
        assert client("GET", "/health").status == 503
        assert client("GET", "/health").json["status"] == "stopping"

    def test_is_503_with_retry_after_until_each_agent_was_tried_once(self, client: Client, fakes: Fakes) -> None:
        fakes.status.connecting_to = ["w1", "w2"]
        reply = client("GET", "/health", key=None)
        assert (reply.status, reply.json["status"], reply.headers["Retry-After"]) == (503, "connecting", "1")
        assert "2 agents" in reply.json["error"]
        fakes.status.connecting_to = []
        assert client("GET", "/health").status == 200


class TestBrowsers:
    def test_are_let_in_nowhere_by_default(self, client: Client) -> None:
        reply = client("GET", "/health", headers={"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert client("OPTIONS", "/execute/hello").status == 405

    def test_of_named_origins_are(self, make_client: Callable[[Fakes], Client]) -> None:
        client = make_client(Fakes(cors_origins=("https://panel.example",)))
        origin = {"Origin": "https://panel.example"}
        preflight = client("OPTIONS", "/execute/hello", key=None, headers=origin)
        assert preflight.status == 204
        assert preflight.headers["Access-Control-Allow-Methods"] == "POST"
        assert "X-API-Key" in preflight.headers["Access-Control-Allow-Headers"]
        for path, method in [("/execute/hello", "POST"), ("/health", "GET"), ("/nowhere", "GET")]:
            reply = client(method, path, headers=origin)
            assert reply.headers["Access-Control-Allow-Origin"] == "https://panel.example"
            assert reply.headers["Vary"] == "Origin"
        other = client("GET", "/health", headers={"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in other.headers
        assert client("OPTIONS", "/nowhere", headers=origin).status == 404

    def test_of_all_origins(self, make_client: Callable[[Fakes], Client]) -> None:
        client = make_client(Fakes(cors_origins=("*",)))
        reply = client("GET", "/health", headers={"Origin": "https://any.example"})
        assert reply.headers["Access-Control-Allow-Origin"] == "*"
