"""A real Flux, a real agent, and certificates such as this Flux would never issue."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from fluxlib.pki import Authority, Identity
from fluxlib.pki import certificates as certs
from fluxlib.rpc import tls
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.support.programs import Agent, Flux

MONTH = timedelta(days=30)


class Forge:
    """Signs whatever a test wants, with the key of the CA in ``certs_dir``."""

    def __init__(self, certs_dir: Path) -> None:
        self.authority = Authority.open(certs_dir)
        self._ca = x509.load_pem_x509_certificate((certs_dir / "ca" / "ca.pem").read_bytes())
        self._ca_key = certs.load_key((certs_dir / "ca" / "ca-key.pem").read_bytes())

    def identity(self, *names: str, start: timedelta = timedelta(0), life: timedelta = MONTH) -> Identity:
        """Valid from ``start`` from now, for ``life``."""
        key = certs.new_key()
        uses = certs.FLUX_USES + certs.AGENT_USES
        made = certs.sign(self._ca, self._ca_key, key.public_key(), "made", names, life, certs.utc_now() + start, uses)
        return Identity(
            certs.cert_pem(made), certs.key_pem(key), self.authority.ca_pem, made.not_valid_after_utc.timestamp()
        )


def trusting(identity: Identity, ca_pem: bytes) -> Identity:
    """The same one, which believes another CA."""
    return Identity(identity.cert_pem, identity.key_pem, ca_pem, identity.not_after)


class _Says(flux_pb2_grpc.AgentServiceServicer):
    def __init__(self, agent_id: str) -> None:
        self._agent_id = agent_id

    def ReportNodeStatus(self, request: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        return pb.NodeStatusResponse(agent_id=self._agent_id)

    def GetInventory(self, request: Any, context: Any) -> Any:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "as an original")


@contextmanager
def answering(agent_id: str, identity: Identity | None) -> Iterator[str]:
    """The address of what calls itself ``agent_id`` and shows this certificate; without one it speaks plain text."""
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    flux_pb2_grpc.add_AgentServiceServicer_to_server(_Says(agent_id), server)  # type: ignore[no-untyped-call]
    handed = [identity]
    if identity is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(lambda: handed.pop() if handed else None))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(5)
        pool.shutdown()


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # Not pytest's own: functions run as a user who must be able to walk to their code.
    with tempfile.TemporaryDirectory(prefix="trust-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def flux(directory: Path) -> Iterator[Flux]:
    with Flux(directory) as flux:
        yield flux


@pytest.fixture(scope="module")
def agent(directory: Path, flux: Flux) -> Iterator[Agent]:
    with Agent(directory, flux, "worker-1") as agent:
        yield agent


@pytest.fixture(scope="module")
def forge(flux: Flux) -> Forge:
    return Forge(flux.certs)


@pytest.fixture(scope="module")
def stranger(directory: Path) -> Forge:
    """Another installation's CA."""
    return Forge(directory / "elsewhere")


def names(agent_id: str) -> Sequence[str]:
    return ("flux-agent", f"{agent_id}.agent.flux.internal")
