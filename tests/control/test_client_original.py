"""Driving an agent that knows the original contract only."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from fluxlib.control.agents.client.unary import UnaryExecutions
from fluxlib.control.agents.connection import ConnectionEvents
from fluxlib.errors import AgentLost, AgentRefused, AgentUnreachable, NotFound
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionRequest, ExecutionStatus
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.support.clients import Client, Side, running_timers
from tests.support.programs import make_zip, wait_until
from tests.wire.conftest import original_agent, original_environment

__all__ = ["original_agent", "original_environment"]

OriginalAgent = Callable[..., Any]


@pytest.fixture(scope="module")
def side() -> Iterator[Side]:
    with running_timers() as timers:
        yield Side(None, timers)


@pytest.fixture(scope="module")
def address(original_agent: OriginalAgent, side: Side) -> Iterator[str]:
    with original_agent("old-1") as (_, address):
        with side.connected(address) as client:
            client.deploy()
            client.deploy(name="narrow", max_concurrency=1)
        yield str(address)


@pytest.fixture
def client(address: str, side: Side) -> Iterator[Client]:
    with side.connected(address) as client:
        yield client


def test_it_is_recognised(client: Client, side: Side, address: str) -> None:
    probe = side.connector.probe(address)
    assert probe.inventory is None
    assert probe.agent_id == "old-1"
    assert client.connection.original
    assert client.connection.inventory() is None


def test_its_words_become_kinds(client: Client) -> None:
    assert client.run("o-1", "bytes").output == b"\xff\x00\xfe"
    failed = client.run("o-2", "exit", "3")
    assert (failed.error_kind, failed.exit_code) == (ErrorKind.EXIT_CODE, 3)
    missing = client.run("o-3", name="nobody")
    assert missing.error_kind is ErrorKind.NOT_FOUND
    assert missing.error_kind.nothing_started


def test_a_refusal_at_capacity_is_told_first_also_of_an_asynchronous_call(client: Client) -> None:
    first = client.start("o-full-1", "sleep", "60", name="narrow")
    wait_until(lambda: _active(client) == 1, "the slot to be taken")
    for number, asynchronous in enumerate((False, True)):
        refused = client.run(f"o-full-2-{number}", "echo", name="narrow", asynchronous=asynchronous)
        assert refused.error_kind is ErrorKind.AT_CAPACITY
    assert [name for name, _ in client.told.said] == ["full", "answer", "full", "answer"]
    assert client.connection.cancel("o-full-1", reason="room", timeout=10) is ExecutionStatus.CANCELLED
    assert first.record(0).status is ExecutionStatus.CANCELLED
    wait_until(lambda: _active(client) == 0, "its program to be killed")


def _active(client: Client) -> int:
    import threading

    arrived = threading.Event()
    box: list[Any] = []
    client.connection.report_async(lambda report: (box.append(report), arrived.set()))  # type: ignore[func-returns-value]
    assert arrived.wait(10)
    return int(box[0].figures.active_tasks)


def test_an_asynchronous_end_is_found_by_asking(client: Client) -> None:
    assert client.run("o-async", "drip", asynchronous=True).status is ExecutionStatus.RUNNING

    def ended() -> Any:
        record = client.connection.record("o-async", with_output=True)
        return record if record is not None and record.status.ended else None

    record = wait_until(ended, "the end")
    assert (record.status, record.output) == (ExecutionStatus.SUCCESS, b"one\ntwo\nthree\n")
    assert client.connection.record("o-nobody", with_output=True) is None


def test_cancelling_an_asynchronous_one(client: Client) -> None:
    client.run("o-cancel", "sleep", "60", asynchronous=True)
    assert client.connection.cancel("o-cancel", reason="x", timeout=5) is ExecutionStatus.CANCELLED
    assert client.connection.cancel("o-nobody", reason="x", timeout=5) is None


def test_output_is_followed_by_asking(client: Client) -> None:
    client.run("o-follow", "drip", asynchronous=True)
    assert b"".join(client.connection.output("o-follow", 0, follow=True)) == b"one\ntwo\nthree\n"
    assert b"".join(client.connection.output("o-follow", 4, follow=False)) == b"two\nthree\n"
    with pytest.raises(NotFound):
        client.connection.output("o-nobody", 0, follow=True)


def test_what_it_would_ignore_is_refused(client: Client) -> None:
    for fields in ({"stdin": b"x"}, {"timeout_seconds": 1.0}):
        record = client.run("o-unknown", "cat", **fields)
        assert record.error_kind is ErrorKind.UNENFORCEABLE
        assert "original agent" in record.error
    assert client.connection.remove_function("f") is False
    with pytest.raises(AgentRefused, match="no call"):
        client.connection.create_certificate_request()


def test_an_archive_beyond_its_limit_is_never_sent(client: Client) -> None:
    with pytest.raises(AgentRefused, match="at most 50 MB"):
        client.deploy(bytes(51 << 20), name="huge")


def test_killed_under_a_run_it_is_lost_not_unreachable(original_agent: OriginalAgent, side: Side) -> None:
    with original_agent("old-2") as (process, address), side.connected(address) as client:
        client.deploy()
        answer = client.start("o-lost", "sleep", "5")
        wait_until(lambda: _active(client) == 1, "the run to begin")
        process.send_signal(signal.SIGKILL)
        assert isinstance(answer.get(10), AgentLost)
        process.wait(10)
        # Once the channel has noticed nothing can have been started any more: another agent may be asked.
        numbers = itertools.count()
        wait_until(lambda: isinstance(client.start(f"o-gone-{next(numbers)}", "echo").get(10), AgentUnreachable), "it")


def test_giving_up_and_closing(address: str, side: Side) -> None:
    with side.connected(address) as client:
        answer = client.start("o-fail", "sleep", "60")
        wait_until(lambda: _active(client) >= 1, "the run to begin")
        client.connection.fail_in_flight("three misses")
        assert isinstance(answer.get(0), AgentLost)
        quick = client.start("o-close", "sleep", "0.3")
        client.connection.close(Deadline(10))
        assert quick.record(0).status is ExecutionStatus.SUCCESS
        assert isinstance(client.start("o-closed", "echo").get(0), AgentUnreachable)


def test_a_new_channel_disturbs_nothing(client: Client) -> None:
    answer = client.start("o-reopen", "sleep", "0.5")
    client.connection.reopen()
    assert client.run("o-reopened", "echo", "x").output == b"[x]\n"
    assert answer.record().status is ExecutionStatus.SUCCESS


def test_archives_are_deployed_in_one_message(client: Client) -> None:
    client.deploy(make_zip({"main.sh": "#!/bin/sh\necho second"}), name="again")
    assert client.run("o-again", name="again").output == b"second\n"


def test_it_takes_no_code_of_what_was_not_registered(client: Client, address: str) -> None:
    """The imitation refuses what the original refuses: our client always registers first."""
    with grpc.insecure_channel(address) as channel:
        stub = flux_pb2_grpc.AgentServiceStub(channel)  # type: ignore[no-untyped-call]
        package = pb.DeploymentPackage(function_name="never", code_archive=b"", config=pb.FunctionConfig(name="never"))
        answer = stub.DeployFunction(package)
    assert (answer.success, answer.message) == (False, "function not registered")
    client.deploy(name="never")
    assert client.run("o-never", "echo", "x", name="never").output == b"[x]\n"


def test_output_beyond_a_message_is_told(client: Client) -> None:
    client.deploy(make_zip({"main.sh": "#!/bin/sh\nhead -c 53000000 /dev/zero\n"}), name="large")
    answer = client.start("o-large", name="large").get(30)
    assert isinstance(answer, AgentLost)
    assert "larger than 50 MB" in answer.message


def test_one_that_is_given_up_while_it_is_being_sent_is_ended() -> None:
    cancelled: list[str] = []

    class Future:
        def cancel(self) -> None:
            cancelled.append("cancelled")

    class Sending:
        """The connection is given up between the table and the wire."""

        def future(self, start: object, on_done: object) -> Future:
            calls.fail("it is offline")
            return Future()

    calls = UnaryExecutions("w1", Sending(), ConnectionEvents())  # type: ignore[arg-type]
    answers: list[object] = []
    calls.execute(ExecutionRequest("e1", "f"), answers.append)
    assert [type(answer) for answer in answers] == [AgentLost]
    assert cancelled == ["cancelled"]
