"""Answers with much output: the same JSON as small ones have, made without holding it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fluxlib.control.http.answers import json_bytes
from fluxlib.control.http.spooled import spooled_answer
from fluxlib.control.services import WHOLE_OUTPUT, Call
from fluxlib.errors import AgentLost
from fluxlib.model import ExecutionRecord
from tests.http.conftest import Client
from tests.http.fakes import FakeOutput, Fakes, ended

TEXT = 'say "é" \\ \n\t\x00\x1b\u2028 🦀'.encode() + b"\xff\xc3(\xe2\x82"


def body(data: dict[str, object], output: list[bytes]) -> bytes:
    answer = spooled_answer(200, data, output)
    assert answer.file is not None
    with answer.file:
        made = answer.file.read()
    assert answer.length == len(made)
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_json_is_that_of_a_small_answer(size: int) -> None:
    cut = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
    text = TEXT.decode("utf-8", "replace")
    for data in ({"output": ""}, {"a": 1, "output": ""}, {"output": "", "z": [None]}, {"a": 1, "output": "", "z": "}"}):
        assert body(data, cut) == json_bytes({**data, "output": text})
    assert body({"output": ""}, []) == json_bytes({"output": ""})


def test_what_fails_on_the_way_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = (tmp_path / "made").open("w+b")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: made)

    def broken() -> object:
        yield b"so far"
        raise AgentLost("gone")

    with pytest.raises(AgentLost):
        spooled_answer(200, {"output": ""}, broken())  # type: ignore[arg-type]
    assert made.closed


def large(fakes: Fakes, *, at_the_agent: bool) -> ExecutionRecord:
    """An execution with much output, which the record has or has not with it."""
    output = (TEXT + b" ") * (WHOLE_OUTPUT // len(TEXT) + 1)
    record = ended(Call("hello"), 1, output=output, output_bytes=len(output))
    fakes.executions.records["execution-1"] = replace(record, output=None) if at_the_agent else record
    fakes.executions.output = lambda *args, **how: FakeOutput(output)  # type: ignore[method-assign]
    return record


@pytest.mark.parametrize("at_the_agent", [True, False])
def test_a_record_with_much_output(client: Client, fakes: Fakes, at_the_agent: bool) -> None:
    record = large(fakes, at_the_agent=at_the_agent)
    reply = client("GET", "/executions/execution-1")
    assert reply.body == json_bytes(record.to_json())
    assert reply.headers["Content-Length"] == str(len(reply.body))
    head = client("HEAD", "/executions/execution-1")
    assert (head.body, head.headers["Content-Length"]) == (b"", str(len(reply.body)))


def test_a_call_with_much_output(client: Client, fakes: Fakes) -> None:
    record = large(fakes, at_the_agent=False)
    fakes.executions.run = lambda call, caller, number: record
    reply = client("POST", "/execute/hello")
    assert reply.json["output"] == (record.output or b"").decode("utf-8", "replace")
    assert list(json.loads(reply.body))[:3] == ["status", "output", "duration_ms"]


def test_an_agent_lost_while_its_output_is_read_is_an_answer(client: Client, fakes: Fakes) -> None:
    large(fakes, at_the_agent=True)
    stream = FakeOutput(b"the beginning", complete=False)
    stream.finish(AgentLost("the connection broke"))
    fakes.executions.output = lambda *args, **how: stream  # type: ignore[method-assign]
    reply = client("GET", "/executions/execution-1")
    assert reply.status == 503
    assert "the connection broke" in reply.json["error"]
    assert reply.json["record"]["status"] == "success"
    assert stream.closed.is_set()
