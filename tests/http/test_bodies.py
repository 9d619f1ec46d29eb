"""What is refused before anything happens, and that the refusal names the fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fluxlib.control.services import Call
from tests.http.conftest import Client
from tests.http.fakes import Fakes

JSON = {"Content-Type": "application/json"}
FORM = "application/x-www-form-urlencoded"


def call(client: Client, body: bytes, media: str | None = "application/json", path: str = "/execute/hello") -> Any:
    return client("POST", path, body, headers={"Content-Type": media} if media else {})


class TestACall:
    @pytest.mark.parametrize(
        ("body", "media", "expected"),
        [
            (b"", None, Call("hello")),
            (b"", "application/json", Call("hello")),
            (b"  \n", "application/json", Call("hello")),
            (b"{}", None, Call("hello")),
            (b'{"args": null}', "application/json", Call("hello")),
            (b'{"args": ["a", ""]}', "application/x-www-form-urlencoded", Call("hello", ("a", ""))),
            (
                '{"args": ["gr\u00fc\u00df"]}'.encode(),
                "application/json; charset=utf-8",
                Call("hello", ("gr\u00fc\u00df",)),
            ),
            (b'\xef\xbb\xbf{"input": "text"}', "application/json", Call("hello", stdin=b"text")),
            (b'{"timeout": 1.5}', "application/json", Call("hello", timeout_seconds=1.5)),
            (b"\x00\xff raw", "application/octet-stream", Call("hello", stdin=b"\x00\xff raw")),
            (b'{"args": ["no"]}', "application/octet-stream", Call("hello", stdin=b'{"args": ["no"]}')),
            *(
                (text, "text/plain; charset=ascii", Call("hello", stdin=text))
                for text in (b"no JSON", b"{}", b'{"args": 1, "more": 2}', b'{"args": [', b'{"name": "x"}', b'["args"]')
            ),
            (b"", "text/csv", Call("hello")),
        ],
    )
    def test_is_read_as_what_it_says_it_is(
        self, client: Client, fakes: Fakes, body: bytes, media: str | None, expected: Call
    ) -> None:
        assert call(client, body, media).status == 200
        assert fakes.executions.calls == [expected]

    @pytest.mark.parametrize(
        "body", [b'{"args": ["no"]}', b' {"input":"x"}', b'\n{ "timeout" : 3, "args": null }', b'{"args": "wrong"}']
    )
    @pytest.mark.parametrize("media", ["text/plain;charset=UTF-8", "text/plain"])
    def test_that_fetch_says_is_text_is_told_so(self, client: Client, fakes: Fakes, body: bytes, media: str) -> None:
        reply = call(client, body, media)
        assert reply.status == 415
        assert "a call in JSON, sent as text/plain" in reply.json["error"]
        assert "application/octet-stream" in reply.json["error"]
        assert fakes.executions.calls == []

    @pytest.mark.parametrize("body", [b"args=you", b"some text", b"a,b\nc,d\n"])
    def test_that_came_as_a_form_and_is_none_of_ours(self, client: Client, fakes: Fakes, body: bytes) -> None:
        reply = call(client, body, FORM)
        assert reply.status == 400
        assert "as curl -d sends it" in reply.json["error"]
        assert "Content-Type: application/octet-stream" in reply.json["error"]
        assert fakes.executions.calls == []

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"[]", "must be a JSON object"),
            (b'"text"', "must be a JSON object"),
            (b"{", "not valid JSON"),
            (b'{"args": ["a"],}', "not valid JSON"),
            (b"\xff\xfe", "not UTF-8"),
            (b'{"args": "a"}', "args: must be a list of strings"),
            (b'{"args": [1]}', "args: [0] must be a string"),
            (b'{"args": ["a", null]}', "args: [1] must be a string"),
            (b'{"args": ["a\\u0000b"]}', "must not contain NUL"),
            (b'{"args": ["\\ud800"]}', "half a surrogate pair"),
            (b'{"input": "\\udfff"}', "half a surrogate pair"),
            (b'{"input": 5}', "input: must be a string"),
            (b'{"timeout": "5"}', "timeout: must be a number"),
            (b'{"timeout": true}', "timeout: must be a number"),
            (b'{"timeout": -1}', "timeout: must be between"),
            (b'{"timeout": 1' + b"0" * 400 + b"}", "timeout: must be between"),
            (b'{"timeout": 1e400}', "timeout: must be a number"),
            (b'{"timeout": NaN}', "NaN"),
            (b'{"timeout": ' + b"9" * 5000 + b"}", "JSON"),
            (b'{"arg": []}', "did you mean args?"),
            (b'{"args": [], "args": ["x"]}', "appears twice"),
            (b'{"args": [], "x": {"y": 1, "y": 2}}', "appears twice"),
            (b'{"args": ' + b"[" * 100 + b"]" * 100 + b"}", "deep"),
            (b'{"a":' * 100_000, "deep"),
            (b"[" * 200_000, "deep"),
            (json.dumps({"args": ["x" * 131_072]}).encode(), "longer than 131071 bytes"),
            (json.dumps({"args": ["x" * 1000] * 2000}).encode(), "together"),
            (json.dumps({"args": [""] * 10_001}).encode(), "10000 arguments"),
        ],
        ids=range(28),
    )
    def test_with_a_fault_starts_nothing(self, client: Client, fakes: Fakes, body: bytes, words: str) -> None:
        reply = call(client, body)
        assert reply.status == 400
        assert words in reply.json["error"]
        assert len(reply.body) < 2000
        assert fakes.executions.calls == []

    def test_names_every_fault(self, client: Client) -> None:
        reply = call(client, b'{"args": 1, "input": 2, "timeout": "x", "argz": 3}')
        assert [fault.partition(":")[0] for fault in reply.json["faults"]] == ["argz", "args", "input", "timeout"]

    def test_with_thousands_of_unknown_keys_is_answered_briefly(self, client: Client) -> None:
        reply = call(client, json.dumps({f"key{number}": 1 for number in range(5000)}).encode())
        assert reply.status == 400
        assert len(reply.body) < 4000

    @pytest.mark.parametrize("media", ["multipart/form-data; boundary=x", "application/xml", "image/png", "nonsense"])
    def test_of_another_type_is_refused(self, client: Client, fakes: Fakes, media: str) -> None:
        reply = call(client, b"{}", media)
        assert reply.status == 415
        assert "application/octet-stream" in reply.json["error"]
        assert fakes.executions.calls == []

    def test_that_is_compressed_is_refused(self, client: Client) -> None:
        reply = client("POST", "/execute/hello", b"\x1f\x8b", headers={**JSON, "Content-Encoding": "gzip"})
        assert reply.status == 415

    def test_may_be_8_mb(self, client: Client, fakes: Fakes) -> None:
        assert call(client, bytes(8 * 2**20), "application/octet-stream").status == 200
        reply = call(client, bytes(8 * 2**20 + 1), "application/octet-stream")
        assert reply.status == 413
        assert "8 MB" in reply.json["error"]
        assert len(fakes.executions.calls) == 1

    def test_repeats_by_its_key_when_asynchronous_only(self, client: Client, fakes: Fakes) -> None:
        headers = {"Idempotency-Key": "order-17"}
        assert client("POST", "/execute/hello/async", headers=headers).status == 202
        assert fakes.executions.calls[-1].idempotency_key == "order-17"
        for synchronous in ("hello", "async"):
            assert client("POST", f"/execute/{synchronous}", headers=headers).status == 400
        assert client("POST", "/execute/async/async", headers=headers).status == 202
        for bad in ("x" * 256, "\xe4", "", "a b"):
            assert client("POST", "/execute/hello/async", headers={"Idempotency-Key": bad}).status == 400


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        [
            "/functions/a%2Fb",
            "/functions/..%2f..%2fetc",
            "/functions/%2e%2e",
            "/functions/x%00",
            "/functions/a%5cb",
            "/functions/a\\b",
            "/functions/./hello",
            "/functions/../health",
            "/functions//hello",
            "//health",
            "/execute/%2e%2e/async",
            "/execute/hello%2Fasync",
        ],
    )
    def test_with_tricks_are_refused(self, client: Client, fakes: Fakes, path: str) -> None:
        for method in ("GET", "POST"):
            reply = client(method, "/", REQUEST_URI=path, PATH_INFO=_unquoted(path))
            assert reply.status == 400
            assert "path" in reply.json["error"]
        assert fakes.executions.calls == []

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/health/"),
            ("GET", "/functions/"),
            ("GET", "/functions/hello/"),
            ("GET", "/executions/?limit=1"),
            ("POST", "/execute/hello/"),
            ("POST", "/execute/hello/async/"),
        ],
    )
    def test_may_end_with_a_slash(self, client: Client, method: str, path: str) -> None:
        reply = client(method, path, REQUEST_URI=path, headers={"Idempotency-Key": "k"} if "async" in path else {})
        assert reply.status in (200, 202), reply.body

    def test_with_a_slash_need_a_key_all_the_same(self, client: Client) -> None:
        assert client("GET", "/functions/", key=None).status == 401
        assert client("GET", "/functions//", REQUEST_URI="/functions//").status == 400

    @pytest.mark.parametrize("name", ["x" * 65, "-x", "x.", "a b", "a..b", "\u00fc", "a*"])
    def test_names_are_checked(self, client: Client, fakes: Fakes, name: str) -> None:
        for method, path in [("GET", f"/functions/{name}"), ("POST", f"/execute/{name}"), ("PUT", f"/deploy/{name}")]:
            assert client(method, path, b"x").status in (400, 415), (method, path)
        assert fakes.executions.calls == []
        assert fakes.functions.archives == {}

    @pytest.mark.parametrize("path", ["/executions/" + "x" * 65, "/executions/-", "/executions/a_b", "/agents/UPPER"])
    def test_ids_are_checked(self, client: Client, path: str) -> None:
        assert client("DELETE", path).status == 400

    @pytest.mark.parametrize(
        "path", ["/", "/nothing", "/agents//", "/execute", "/execute/", "/execute/hello/", "/Health"]
    )
    def test_unknown_ones_are_not_found(self, client: Client, path: str) -> None:
        assert client("GET", path).status in (400, 404, 405)

    def test_other_methods_are_told_which(self, client: Client) -> None:
        reply = client("PATCH", "/functions")
        assert reply.status == 405
        assert set(reply.headers["Allow"].split(", ")) == {"GET", "HEAD", "PUT"}
        assert "PATCH" in reply.json["error"]
        for method in ("DELETE", "GET", "PUT"):
            reply = client(method, "/agents/register")
            assert (reply.status, reply.headers["Allow"]) == (405, "POST")


def _unquoted(path: str) -> str:
    from urllib.parse import unquote

    return unquote(path)


class TestQueries:
    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("/executions?limit=0", "between 1 and 1000"),
            ("/executions?limit=1001", "between 1 and 1000"),
            ("/executions?limit=x", "whole number"),
            ("/executions?limit=%C2%B2", "whole number"),
            ("/executions?status=done", "must be one of"),
            ("/executions?status=sucess", "did you mean success?"),
            ("/executions?function=a/b", "letters"),
            ("/executions?functoin=hello", "did you mean function?"),
            ("/executions?limit=1&limit=2", "twice"),
            ("/executions?cursor=%0a", "`next` of a page"),
            ("/executions?cursor=" + "x" * 201, "`next` of a page"),
            ("/executions?%ff=1", "cannot be read"),
            ("/executions?" + "&".join(f"a{n}=" for n in range(60)), "cannot be read"),
            ("/executions?" + "x" * 5000, "4096"),
            ("/executions/execution-1/output?offset=-1", "offset"),
            ("/executions/execution-1/output?follow=perhaps", "follow"),
            ("/functions?force=1", "not known here"),
            ("/health?x=1", "not known here"),
        ],
    )
    def test_with_a_fault_are_refused(self, client: Client, path: str, words: str) -> None:
        reply = client("GET", path)
        assert reply.status == 400
        assert words in reply.json["error"]


class TestOtherBodies:
    @pytest.mark.parametrize(
        ("address", "fits"),
        [
            ("10.0.0.7:50052", True),
            ("worker.example:1", True),
            ("[2001:db8::1]:50052", True),
            ("10.0.0.7", False),
            ("10.0.0.7:0", False),
            ("10.0.0.7:65536", False),
            ("10.0.0.7:\u0665", False),
            (":50052", False),
            ("2001:db8::1:50052", False),
            ("http://10.0.0.7:50052", False),
            ("user@host:1", False),
            ("a b:1", False),
            ("h\n:1", False),
            ("", False),
            (7, False),
            (None, False),
        ],
    )
    def test_addresses_of_agents(self, client: Client, fakes: Fakes, address: Any, fits: bool) -> None:
        reply = client("POST", "/agents/register", json={"address": address, "tls": {"enabled": True}})
        assert reply.status == (201 if fits else 400)
        assert ("worker-2" in fakes.agents.kept) == fits

    def test_a_registration_needs_its_address(self, client: Client) -> None:
        assert "address: is missing" in client("POST", "/agents/register", json={"legacy": True}).json["error"]
        assert client("POST", "/agents/register", json={"address": "a:1", "legacy": 1}).status == 400
        assert client("POST", "/agents/register", b"x", headers={"Content-Type": "text/plain"}).status == 415

    @pytest.mark.parametrize(
        ("method", "path", "data", "what"),
        [
            ("POST", "/agents/register", b"", 'send JSON such as {"address":'),
            ("POST", "/agents/register", b"\n", 'send JSON such as {"address":'),
            ("PUT", "/functions", b"", "curl --data-binary @function.yaml"),
            ("PUT", "/functions", b" \r\n", "curl --data-binary @function.yaml"),
            ("PUT", "/deploy/hello", b"", "curl --data-binary @code.zip"),
        ],
    )
    def test_an_empty_one_is_called_empty(self, client: Client, method: str, path: str, data: bytes, what: str) -> None:
        reply = client(method, path, data, headers=JSON)
        assert reply.status == 400
        assert reply.json["error"].startswith("the body is empty: send ")
        assert what in reply.json["error"]

    @pytest.mark.parametrize(
        ("path", "data", "media", "words"),
        [
            ("/functions", b"PK\x03\x04\x14\0", FORM, "this is a zip: send it to PUT /deploy/NAME"),
            ("/functions", b"./function.yaml\n", FORM, "this is the name of a file: put an @ before it"),
            ("/functions", b"--x\r\n", "multipart/form-data; boundary=x", "curl --data-binary @function.yaml"),
            ("/deploy/hello", b"--x\r\n", "multipart/form-data; boundary=x", "curl --data-binary @code.zip"),
        ],
    )
    def test_a_wrong_one_is_recognized(self, client: Client, path: str, data: bytes, media: str, words: str) -> None:
        reply = client("PUT", path, data, headers={"Content-Type": media})
        assert reply.status == 400
        assert words in reply.json["error"]

    @pytest.mark.parametrize("media", ["application/yaml", "text/x-yaml", "application/x-www-form-urlencoded", ""])
    def test_a_function_may_come_under_any_type(self, client: Client, fakes: Fakes, media: str) -> None:
        reply = client("PUT", "/functions", b"name: greet\nhandler: run.sh\n", headers={"Content-Type": media})
        assert reply.status == 201
        assert fakes.functions.kept["greet"].spec.handler == "run.sh"

    def test_a_functions_faults_are_all_named(self, client: Client, fakes: Fakes) -> None:
        reply = client("PUT", "/functions", b"name: ../x\nhandler: /etc/passwd\ntimeout: soon\nmemroy: 5\n")
        assert reply.status == 400
        assert len(reply.json["faults"]) == 4
        assert list(fakes.functions.kept) == ["hello"]
        assert client("PUT", "/functions", b"x" * (256 * 1024 + 1)).status == 413
        # curl -d @function.yaml
        reply = client("PUT", "/functions", b"name: greethandler: run.sh", headers={"Content-Type": FORM})
        assert (reply.status, "--data-binary @function.yaml" in reply.json["error"]) == (400, True)
        reply = client("PUT", "/functions", b"name: greet\nhandler: /run.sh\n", headers={"Content-Type": FORM})
        assert (reply.status, "--data-binary" in reply.json["error"]) == (400, False)
        assert client("PUT", "/functions", b"").status == 400

    def test_an_archive_is_bounded_by_the_configuration(self, make_client: Any) -> None:
        fakes = Fakes(max_archive_mb=1)
        client = make_client(fakes)
        assert client("PUT", "/deploy/hello", bytes(2**20)).status == 201
        assert client("PUT", "/deploy/hello", bytes(2**20 + 1)).status == 413
        assert client("PUT", "/deploy/hello", b"").status == 400
        assert len(fakes.functions.archives["hello"]) == 2**20

    def test_what_nobody_reads_is_bounded_too(self, client: Client) -> None:
        assert client("POST", "/initialize", b"{}").status == 200
        assert client("POST", "/initialize", bytes(65 * 1024)).status == 413
