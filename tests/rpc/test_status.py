"""Which failed calls were surely never received: whoever gets it wrong runs a function twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from fluxlib.errors import AgentLost, AgentRefused, AgentUnreachable, AtCapacity, InvalidInput
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from fluxlib.rpc.status import NotImplementedByPeer, abort, from_rpc_error, nobody_listens, surely_not_sent
from tests.support.programs import free_port


class Agent(flux_pb2_grpc.AgentServiceServicer):
    def __init__(self, answer: Callable[[grpc.ServicerContext], Any]) -> None:
        self._answer = answer

    def HealthCheck(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self._answer(context)


@contextmanager
def serving(answer: Callable[[grpc.ServicerContext], Any]) -> Iterator[tuple[grpc.Server, int]]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        flux_pb2_grpc.add_AgentServiceServicer_to_server(Agent(answer), server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield server, port
        finally:
            server.stop(0).wait()


def failure(port: int, timeout: float = 5) -> grpc.RpcError:
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_retries", 0)]) as channel:
        stub = flux_pb2_grpc.AgentServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.HealthCheck(pb.HealthCheckRequest(), timeout=timeout)
        return caught.value


def test_nobody_listens() -> None:
    error = failure(free_port())
    assert surely_not_sent(error)
    assert nobody_listens(error)
    translated = from_rpc_error(error, sent=False, agent_id="w")
    assert isinstance(translated, AgentUnreachable)
    assert "agent w" in translated.message
    assert "Connection refused" in translated.message


def test_a_server_that_stops_under_a_call() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hang(context: grpc.ServicerContext) -> Any:
        entered.set()
        leave.wait(10)
        return pb.HealthCheckResponse()

    with serving(hang) as (server, port):

        def stop() -> None:
            entered.wait(10)
            server.stop(0)

        stopper = threading.Thread(target=stop, name="stopper")
        stopper.start()
        error = failure(port)
        leave.set()
        stopper.join(10)
    assert not surely_not_sent(error)
    assert isinstance(from_rpc_error(error, sent=True), AgentLost)


def test_a_deadline_says_nothing_about_the_other_side() -> None:
    leave = threading.Event()

    def hang(context: grpc.ServicerContext) -> Any:
        leave.wait(10)
        return pb.HealthCheckResponse()

    with serving(hang) as (_, port):
        error = failure(port, timeout=0.2)
        leave.set()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert not surely_not_sent(error)


def test_an_answer_that_is_an_error() -> None:
    for raised, code in ((InvalidInput("odd"), "INVALID_ARGUMENT"), (AtCapacity("full"), "RESOURCE_EXHAUSTED")):
        with serving(lambda context, raised=raised: abort(context, raised)) as (_, port):  # type: ignore[misc]
            error = failure(port)
        assert not surely_not_sent(error)
        translated = from_rpc_error(error, sent=True, agent_id="w")
        assert isinstance(translated, AgentRefused)
        assert code in translated.message
        assert raised.message in translated.message


def test_a_call_the_other_side_lacks() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        error = failure(port)
        server.stop(0).wait()
    assert isinstance(from_rpc_error(error, sent=True), NotImplementedByPeer)
