"""Connections that show no certificate and say nothing: few, and not for long."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil

from fluxlib.agent.listener import HANDSHAKE_MS, MAX_CONNECTIONS
from fluxlib.descriptors import raise_limit
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.agent.running import running
from tests.support.programs import wait_until


def test_idle_connections_are_few_and_short_and_a_flux_that_is_connected_goes_on(tmp_path: Path) -> None:
    raise_limit()
    with running(tmp_path) as agent, ExitStack() as opened:
        before = psutil.Process().num_fds()
        assert agent.stub.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy
        idle = []
        for _ in range(MAX_CONNECTIONS + 300):
            idle.append(opened.enter_context(socket.create_connection(("127.0.0.1", agent.agent.port), 10)))
        assert psutil.Process().num_fds() - before - len(idle) <= MAX_CONNECTIONS + 20
        assert agent.stub.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy
        # The agent ends those that say nothing, and has room for somebody who does.
        wait_until(
            lambda: psutil.Process().num_fds() - before - len(idle) < 20,
            "the idle connections to be closed",
            HANDSHAKE_MS / 1000 + 10,
        )
        with grpc.insecure_channel(f"127.0.0.1:{agent.agent.port}") as channel:
            stub = flux_pb2_grpc.AgentServiceStub(channel)
            assert stub.HealthCheck(pb.HealthCheckRequest(), timeout=10).healthy
