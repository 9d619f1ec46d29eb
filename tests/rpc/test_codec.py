"""Model to messages and back: what our two sides say to each other arrives whole, and an original's words are read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxlib.model import (
    Behavior,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    FunctionSpec,
    FunctionState,
    Inventory,
    Network,
    NodeFigures,
    Phase,
    Platform,
    WorkingDirectory,
    handler_path,
)
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb

# What UTF-8 can carry: HTTP lets no surrogates through.
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
amount = st.integers(0, 2**31 - 1)

specs = st.builds(
    FunctionSpec,
    name=text,
    handler=text.map(handler_path),
    cpu_millicores=amount,
    memory_mb=amount,
    timeout_seconds=amount,
    max_concurrency=st.integers(1, 1000),
    max_concurrency_behavior=st.sampled_from(Behavior),
    env=st.dictionaries(text, text, max_size=3),
    platforms=st.lists(
        st.builds(Platform, st.sampled_from(["linux", "windows", ""]), st.sampled_from(["arm64", ""])), max_size=2
    ).map(tuple),
    network=st.sampled_from(Network),
    working_directory=st.sampled_from(WorkingDirectory),
    max_processes=amount,
    max_open_files=amount,
    max_file_size_mb=amount,
    tmp_size_mb=amount,
)


def test_an_originals_handler_is_a_path_inside_the_zip() -> None:
    spec, _ = codec.spec_from_message(pb.FunctionConfig(name="f", handler="./bin//run.sh"))
    assert spec.handler == "bin/run.sh"


@given(specs)
def test_a_spec_arrives_whole_with_its_digest(spec: FunctionSpec) -> None:
    message = pb.FunctionConfig.FromString(codec.spec_to_message(spec, spec.digest()).SerializeToString())
    assert codec.spec_from_message(message) == (spec, spec.digest())


@given(
    st.builds(ExecutionRequest, text, text, st.lists(text).map(tuple), st.binary(), st.floats(0, 1e6), st.booleans())
)
def test_a_request_arrives_whole(request: ExecutionRequest) -> None:
    message = pb.ExecutionRequest.FromString(codec.request_to_message(request).SerializeToString())
    assert codec.request_from_message(message) == request


ended = st.builds(
    ExecutionRecord,
    execution_id=st.just("e-1"),
    function_name=text,
    agent_id=st.just("worker-1"),
    status=st.sampled_from([ExecutionStatus.SUCCESS, ExecutionStatus.FAILED, ExecutionStatus.CANCELLED]),
    phase=st.just(Phase.ENDED),
    asynchronous=st.booleans(),
    output=st.binary(),
    output_bytes=amount,
    truncated=st.booleans(),
    error=text,
    error_kind=st.sampled_from([kind for kind in ErrorKind if not kind.nothing_started]),
    exit_code=st.none() | st.integers(0, 255),
    signal=st.none() | st.integers(1, 64),
    duration_ms=amount,
    queue_ms=amount,
    started_at=st.integers(1, 2**40).map(lambda ms: ms / 1000),
    run_started_at=st.integers(0, 2**40).map(lambda ms: ms / 1000),
    status_at=st.integers(1, 2**40).map(lambda ms: ms / 1000),
    peak_memory_bytes=st.none() | amount,
    cpu_seconds=st.none() | st.floats(0, 1e6),
    warnings=st.lists(text).map(tuple),
)


@given(ended)
def test_an_end_arrives_whole(record: ExecutionRecord) -> None:
    message = pb.ExecutionResponse.FromString(codec.response_from_record(record).SerializeToString())
    request = ExecutionRequest("e-1", record.function_name)
    assert codec.record_from_response(message, request, "worker-1", 5.0) == record


@given(ended)
def test_an_end_is_stored_whole(record: ExecutionRecord) -> None:
    assert ExecutionRecord.from_fields(json.loads(record.to_text())) == replace(record, output=None)


@pytest.mark.parametrize("kind", [kind for kind in ErrorKind if kind.nothing_started])
def test_a_refusal_says_that_nothing_was_started(kind: ErrorKind) -> None:
    request = ExecutionRequest("e-1", "f", asynchronous=True)
    refused = ExecutionRecord("e-1", "f", "w", asynchronous=True).ended(
        ExecutionStatus.FAILED, at=5.0, error="no", kind=kind
    )
    answer = codec.record_from_response(codec.response_from_record(refused), request, "w", 5.0)
    assert answer.status is ExecutionStatus.FAILED
    assert answer.error_kind is kind


@pytest.mark.parametrize(
    ("words", "kind", "exit_code"),
    [
        ("exit code 7", ErrorKind.EXIT_CODE, 7),
        ("exit code -1", ErrorKind.SIGNAL, None),
        ("function f at capacity", ErrorKind.AT_CAPACITY, None),
        ("function not found", ErrorKind.NOT_FOUND, None),
        ("execution timed out after 3s", ErrorKind.TIMEOUT, None),
        ("fork/exec: permission denied", ErrorKind.INTERNAL, None),
        ("", ErrorKind.NONE, 0),
    ],
)
def test_an_originals_words(words: str, kind: ErrorKind, exit_code: int | None) -> None:
    answer = codec.record_from_response(pb.ExecutionResponse(error=words), ExecutionRequest("e", "f"), "w", 5.0)
    assert (answer.error_kind, answer.exit_code) == (kind, exit_code)
    assert answer.status is (ExecutionStatus.FAILED if kind else ExecutionStatus.SUCCESS)


def test_an_originals_acceptance_and_its_refusal_have_the_same_status() -> None:
    request = ExecutionRequest("e", "f", asynchronous=True)
    accepted = codec.record_from_response(pb.ExecutionResponse(), request, "w", 5.0)
    assert accepted.status is ExecutionStatus.RUNNING
    refused = codec.record_from_response(pb.ExecutionResponse(error="function f at capacity"), request, "w", 5.0)
    assert refused.error_kind.nothing_started


def test_an_originals_record() -> None:
    data = (
        b'{"execution_id":"e","agent_id":"w","function_name":"f","status":"success","output":"hi","error":"",'
        b'"duration_ms":12,"started_at":"2024-05-01T10:00:00.123456789Z","status_at":"2024-05-01T10:00:01+02:00"}'
    )
    record = codec.record_from_json(data)
    assert (record.status, record.output, record.phase) == (ExecutionStatus.SUCCESS, b"hi", Phase.ENDED)
    assert record.started_at == pytest.approx(1714557600.123456, abs=1e-5)
    assert record.status_at == 1714550401.0
    assert (record.output_bytes, record.exit_code) == (2, 0)


@pytest.mark.parametrize(
    ("status", "error", "kind", "exit_code"),
    [
        ("failed", "exit code 3", ErrorKind.EXIT_CODE, 3),
        ("failed", "execution timed out after 1s", ErrorKind.TIMEOUT, None),
        ("failed", "failed to start: function not found", ErrorKind.INTERNAL, None),
        ("cancelled", "execution cancelled", ErrorKind.CANCELLED, None),
    ],
)
def test_an_originals_record_of_a_failure(status: str, error: str, kind: ErrorKind, exit_code: int | None) -> None:
    fields = {"execution_id": "e", "agent_id": "w", "function_name": "f", "status": status, "error": error}
    record = codec.record_from_json(json.dumps({**fields, "started_at": "2024-05-01T10:00:00Z"}).encode())
    assert (record.error, record.error_kind, record.exit_code, record.output_bytes) == (error, kind, exit_code, 0)
    assert not record.error_kind.nothing_started


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b'{"status":"success"}', b"[1]", b"\xff"])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        codec.record_from_json(data)


def test_a_kind_of_a_newer_agent_is_an_error_all_the_same() -> None:
    message = pb.ExecutionResponse(error="odd", error_kind=99)  # type: ignore[arg-type]
    answer = codec.record_from_response(message, ExecutionRequest("e", "f"), "w", 5.0)
    assert (answer.status, answer.error_kind) == (ExecutionStatus.FAILED, ErrorKind.UNKNOWN)
    assert not answer.error_kind.nothing_started


@given(st.binary(max_size=50), st.integers(1, 7))
def test_a_deployment_in_pieces(archive: bytes, size: int) -> None:
    spec = FunctionSpec("f", "main.sh")
    first, *rest = codec.deployment_chunks(spec, "spec", "code", archive, size)
    assert first.total_bytes == len(archive)
    assert (first.header.code_digest, first.header.code_archive) == ("code", b"")
    assert codec.spec_from_message(first.header.config) == (spec, "spec")
    assert b"".join(chunk.data for chunk in rest) == archive
    assert all(len(chunk.data) <= size for chunk in rest)


def test_what_a_node_says_of_itself() -> None:
    figures = NodeFigures(12.5, 40.25, 8192, 4096, 3, 16, 99, 5.0, 1000, "no spawner", ("nearly full",))
    report = codec.NodeReport("w", figures, "instance", Platform("linux", "amd64"), "linux", 7)
    assert codec.report_from_message(codec.report_to_message(report), 5.0) == report
    inventory = Inventory(
        "w",
        "instance",
        "1.2.3",
        Platform("linux", "amd64"),
        16,
        "linux",
        ("a note",),
        ("cpu",),
        (FunctionState("f", "spec", "code"), FunctionState("g", "spec")),
        7,
        ("attach",),
        1714557600.5,
        ("e-1",),
    )
    message = codec.inventory_to_message(inventory)
    assert codec.inventory_from_message(message) == inventory
    message.certificate_not_after = "soon"
    assert codec.inventory_from_message(message) == replace(inventory, certificate_not_after=0.0)
