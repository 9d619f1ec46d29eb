"""The agent's gRPC server: its port, its TLS, its limits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc

from fluxlib.agent.certificates import Certificates
from fluxlib.agent.server import AgentService
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.listening import listen_problem, try_to_listen
from fluxlib.rpc import tls
from fluxlib.rpc.gen import flux_pb2_grpc

HANDSHAKE_MS = 5_000
MAX_CONNECTIONS = 1_000

_OPTIONS = [
    *tls.SIZE_OPTIONS,
    # Our Flux pings every 10 s to notice a vanished host; C-core's default answers that with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # And the other way round: a Flux whose host has vanished must not keep its session.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Anybody who reaches the port can connect without a certificate: such a connection is held for a moment only, and
    # there are not many of them. Each costs 20 to 50 KB, and a Flux needs less than ten.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    # Two agents on one port would share its connections by chance.
    ("grpc.so_reuseport", 0),
]


class Listener:
    """Serves from the moment it is made. Raises FluxError when the address is not available."""

    def __init__(
        self, service: AgentService, pool: ThreadPoolExecutor, host: str, port: int, certificates: Certificates | None
    ) -> None:
        interceptors = [tls.CallerCheck()] if certificates is not None else []
        self._server = grpc.server(pool, options=_OPTIONS, interceptors=interceptors)
        flux_pb2_grpc.add_AgentServiceServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, tls.server_credentials(certificates.changed))
        except RuntimeError as error:
            raise FluxError(_problem(host, port)) from error
        self.port = int(port)
        self._server.start()

    def stop(self, deadline: Deadline) -> None:
        self._server.stop(min(1.0, deadline.remaining())).wait(deadline.remaining())


def _problem(host: str, port: int) -> str:
    """gRPC keeps the reason for itself."""
    try:
        try_to_listen(host, port)
    except OSError as error:
        return listen_problem("the agent", host, port, error, "agent.yaml")
    return f"the agent cannot listen on {host}:{port}, and a moment later nothing was in its way: start it again"
