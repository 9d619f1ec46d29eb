"""Who may do what: every route, every role, guessing."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import pytest

from fluxlib.config.keys import ApiKey
from fluxlib.config.roles import ROLES
from fluxlib.control.http.auth import FailedAttempts, address_of
from fluxlib.control.http.route import Route
from fluxlib.control.services import AgentAway
from fluxlib.model import FunctionSpec
from tests.http.conftest import Client, Clock
from tests.http.fakes import ADMIN, Fakes, ended

PUBLIC = {("GET", "/health"), ("GET", "/agents"), ("GET", "/openapi.json")}


def api_key(name: str, role: str, *functions: str) -> ApiKey:
    return ApiKey(name, role, hashlib.sha256(f"key of {name}".encode()).hexdigest(), functions)


def all_routes(client: Client) -> tuple[Route, ...]:
    return client.app.routes


def filled(path: str) -> str:
    return path.replace("{name}", "hello").replace("{agent_id}", "worker-1").replace("{execution_id}", "execution-1")


def test_flask_and_the_fast_path_serve_the_table_and_nothing_else(client: Client, fast: bool) -> None:
    table = {(route.method, route.path) for route in all_routes(client)}
    served = {
        (method, str(rule).replace("<", "{").replace(">", "}"))
        for rule in client.app.flask.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD"}
    }
    assert served == table
    documented = {(method.upper(), path) for path, item in client.document.document["paths"].items() for method in item}
    assert documented == table
    if fast:
        hot = {(route.method, route.path) for route in client.app.fast_path.routes}
        assert ("POST", "/execute/{name}") in hot
        assert hot < table


def test_strangers_get_in_nowhere_but_where_it_says_so(client: Client) -> None:
    for route in all_routes(client):
        reply = client(route.method, filled(route.path), key=None)
        if (route.method, route.path) in PUBLIC:
            assert reply.status == 200
        else:
            assert reply.status == 401, route.path
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert client(route.method, filled(route.path), key="wrong", address=route.path).status == 401


@pytest.mark.parametrize("role", ROLES)
def test_each_role_reaches_what_it_should(role: str, make_client: Callable[[Fakes], Client]) -> None:
    fakes = Fakes(api_keys=(api_key("it", role),))
    client = make_client(fakes)
    for route in all_routes(client):
        fakes.executions.records["execution-1"] = ended_call()
        reply = client(route.method, filled(route.path), key="key of it")
        allowed = ROLES.index(role) <= ROLES.index(route.role)
        if route.public or allowed:
            assert reply.status not in (401, 403), (route.path, reply.json)
        else:
            assert reply.status == 403, route.path
            assert role in reply.json["error"]
            assert route.role in reply.json["error"]


def ended_call():  # type: ignore[no-untyped-def]
    from fluxlib.control.services import Call

    return ended(Call("hello"), 1)


def test_the_roles_are_as_the_configuration_tells_them(client: Client) -> None:
    least = {(route.method, route.path): route.role for route in all_routes(client)}
    assert least["POST", "/execute/{name}"] == "invoke"
    assert least["PUT", "/deploy/{name}"] == "deploy"
    assert least["GET", "/executions"] == "read"
    assert {role for (method, path), role in least.items() if path.startswith("/agents/")} == {"admin"}
    assert all(role != "read" for (method, _), role in least.items() if method != "GET")


def test_agents_can_be_closed(make_client: Callable[[Fakes], Client]) -> None:
    client = make_client(Fakes(public_agents=False))
    assert client("GET", "/agents", key=None).status == 401
    assert client("GET", "/agents").status == 200


def test_strangers_learn_the_originals_fields_only(client: Client) -> None:
    seen = client("GET", "/agents", key=None).json[0]
    assert set(seen) == {
        *("id", "address", "active_count", "status", "last_heartbeat"),
        *("provider_id", "instance_type", "provider", "node_status"),
    }
    assert {"problem", "in_step", "version"} <= set(client("GET", "/agents").json[0])


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": ADMIN},
        {"Authorization": f"Bearer {ADMIN}"},
        {"Authorization": f"bearer  {ADMIN} "},
        {"X-API-Key": ADMIN, "Authorization": "Bearer wrong"},
    ],
)
def test_both_headers_carry_a_key(client: Client, headers: dict[str, str]) -> None:
    assert client("GET", "/functions", key=None, headers=headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Basic {ADMIN}"},
        {"Authorization": ADMIN},
        {"Authorization": "Bearer "},
        {"X-API-Key": ADMIN[:-1]},
        {"X-API-Key": f"{ADMIN}x"},
        {"X-API-Key": "\xe4\xf6"},
        {"X-API-Key": hashlib.sha256(ADMIN.encode()).hexdigest()},
    ],
)
def test_other_headers_do_not(client: Client, headers: dict[str, str]) -> None:
    assert client("GET", "/functions", key=None, headers=headers).status == 401


class TestFunctionsOfAKey:
    @pytest.fixture
    def fakes(self) -> Fakes:
        fakes = Fakes(api_keys=(api_key("one", "deploy", "hello"), api_key("two", "invoke", "hello", "other")))
        fakes.functions.put(FunctionSpec("secret", "x"))
        return fakes

    def test_reach_only_those(self, client: Client) -> None:
        key = "key of one"
        assert client("POST", "/execute/hello", key=key).status == 200
        for method, path, data in [
            ("POST", "/execute/secret", None),
            ("POST", "/execute/secret/async", None),
            ("GET", "/functions/secret", None),
            ("DELETE", "/functions/secret", None),
            ("PUT", "/deploy/secret", b"zip"),
            ("PUT", "/functions", b"name: secret\nhandler: x"),
        ]:
            reply = client(method, path, data, key=key)
            assert reply.status == 403, path
            assert "hello" in reply.json["error"]
        assert [item["name"] for item in client("GET", "/functions", key=key).json["items"]] == ["hello"]

    def test_others_executions_do_not_exist(self, client: Client, fakes: Fakes) -> None:
        made = client("POST", "/execute/secret").json["execution_id"]
        for method, path in [("GET", f"/executions/{made}"), ("GET", f"/executions/{made}/output")]:
            assert client(method, path).status == 200
            assert client(method, path, key="key of one").status == 404
        assert client("DELETE", f"/executions/{made}", key="key of one").status == 404
        assert client("DELETE", f"/executions/{made}").status == 409

    @pytest.mark.parametrize(("method", "after"), [("GET", ""), ("GET", "/output"), ("DELETE", "")])
    def test_nor_when_their_agent_is_away(self, client: Client, fakes: Fakes, method: str, after: str) -> None:
        made = client("POST", "/execute/secret").json["execution_id"]
        record = fakes.executions.records[made]

        def away(*args: object, **how: object) -> None:
            raise AgentAway("worker-1 is offline", record, gone=False)

        for name in ("get", "output", "cancel"):
            setattr(fakes.executions, name, away)
        others, unknown = (client(method, f"/executions/{i}{after}", key="key of one") for i in (made, "execution-99"))
        assert others.status == unknown.status == 404
        assert others.body.replace(made.encode(), b"execution-99") == unknown.body
        assert client(method, f"/executions/{made}{after}").status == 503

    def test_lists_are_of_one_of_them(self, client: Client, fakes: Fakes) -> None:
        assert client("GET", "/executions", key="key of one").status == 200
        assert fakes.executions.lists[-1][0].function_name == "hello"
        assert client("GET", "/executions", key="key of two").status == 403
        assert client("GET", "/executions?function=other", key="key of two").status == 200
        assert client("GET", "/executions?function=secret", key="key of two").status == 403


class TestGuessing:
    def test_is_slowed_for_the_address_alone(self, client: Client, clock: Clock) -> None:
        for number in range(10):
            assert client("GET", "/functions", key=f"guess {number}", address="203.0.113.9").status == 401
        reply = client("GET", "/functions", key="guess 11", address="203.0.113.9")
        assert reply.status == 429
        assert 1 <= int(reply.headers["Retry-After"]) <= 61
        # The right one is not told apart while it lasts.
        assert client("GET", "/functions", address="203.0.113.9").status == 429
        assert client("GET", "/functions", address="203.0.113.10").status == 200
        clock.now += 61
        assert client("GET", "/functions", address="203.0.113.9").status == 200

    def test_does_not_shut_out_who_was_there_before(self, client: Client) -> None:
        assert client("GET", "/functions", address="203.0.113.9").status == 200
        for number in range(12):
            client("GET", "/functions", key=f"guess {number}", address="203.0.113.9")
        assert client("GET", "/functions", key="another guess", address="203.0.113.9").status == 429
        assert client("GET", "/functions", address="203.0.113.9").status == 200

    def test_never_locks_out_a_key_too_long_to_be_guessed(self, make_client: Callable[[Fakes], Client]) -> None:
        """Also just after a restart, when no key has been used yet: a function on the machine could do it otherwise."""
        client = make_client(Fakes(api_keys=(api_key("the data platform", "read"),)))
        for number in range(12):
            client("GET", "/functions", key=f"a wrong key of many characters {number}", address="127.0.0.1")
        wrong = client("GET", "/functions", key="another wrong key of many characters", address="127.0.0.1")
        assert wrong.status == 429
        assert client("GET", "/functions", key="key of the data platform", address="127.0.0.1").status == 200

    def test_counts_on_public_routes_too(self, client: Client) -> None:
        for number in range(10):
            assert client("GET", "/health", key=f"guess {number}", address="203.0.113.9").status == 200
        seen = client("GET", "/health", address="203.0.113.9").json
        assert "warnings" not in seen

    def test_no_key_at_all_is_no_guess(self, client: Client) -> None:
        for _ in range(15):
            assert client("GET", "/functions", key=None).status == 401
        assert client("GET", "/functions").status == 200

    def test_memory_is_bounded(self) -> None:
        attempts = FailedAttempts(lambda: 1.0)
        for number in range(10_050):
            attempts.failed(f"address {number}")
            attempts.succeeded(f"address {number}", "key")
        assert len(attempts._failures) == 10_000
        assert len(attempts._trusted) == 10_000

    def test_an_ipv6_network_is_one_address(self) -> None:
        one, other = ({"REMOTE_ADDR": f"2001:db8:1:2:{last}::1"} for last in ("a", "b"))
        assert address_of(one) == address_of(other)
        assert address_of({"REMOTE_ADDR": "2001:db8:1:3::1"}) != address_of(one)
        assert address_of({"REMOTE_ADDR": "::ffff:192.0.2.7"}) == "192.0.2.7"


class TestAudit:
    @pytest.fixture(autouse=True)
    def _info(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "fluxlib.audit")

    def test_says_who_what_which_and_how_it_went(
        self, make_client: Callable[[Fakes], Client], caplog: pytest.LogCaptureFixture
    ) -> None:
        client = make_client(Fakes(api_keys=(api_key("ci", "deploy"),)))
        client("PUT", "/functions", b"name: greet\nhandler: x", key="key of ci", address="192.0.2.7")
        client("DELETE", "/functions/absent", key="key of ci")
        client("DELETE", "/nodes", key="key of ci")
        lines = caplog.messages
        assert "ci from 192.0.2.7: PUT /functions greet: 201" in lines
        assert "ci from 192.0.2.1: DELETE /functions/absent: 404" in lines
        assert any(line.startswith("refused from 192.0.2.1: DELETE /nodes: 403") for line in lines)

    def test_every_change_but_a_call_leaves_a_line(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        for route in all_routes(client):
            caplog.clear()
            client(route.method, filled(route.path))
            changes = route.method != "GET" and not route.path.startswith("/execute/")
            assert bool(caplog.messages) == changes, route

    def test_no_key_is_ever_written(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        client("GET", "/functions", key="a-mistyped-key")
        client("PUT", "/functions", b"name: x\nhandler: y")
        assert caplog.messages
        assert not any("mistyped" in line or ADMIN in line for line in caplog.messages)
