"""Who may be taken for an agent, and what is said of one that may not. Real handshakes over sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fluxlib.errors import AgentRefused, AgentUnreachable, InvalidInput
from fluxlib.pki import Authority, Identity
from fluxlib.pki import certificates as certs
from tests.support.clients import Side, running_timers
from tests.support.programs import Agent, Flux, enrolled, free_port
from tests.wire.conftest import original_agent, original_environment

__all__ = ["original_agent", "original_environment"]

OriginalAgent = Callable[..., Any]


class Place:
    def __init__(self, directory: Path, flux: Flux, side: Side, plain: Side) -> None:
        self.directory, self.flux, self.side, self.plain = directory, flux, side, plain


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("introduction")
    flux = Flux(directory)
    with running_timers() as timers:
        yield Place(directory, flux, Side(flux.certs, timers), Side(None, timers))


@pytest.fixture(scope="module")
def agent(place: Place) -> Iterator[Agent]:
    with Agent(place.directory, place.flux, "worker-1") as agent:
        yield agent


@pytest.fixture(scope="module")
def bare_agent(place: Place) -> Iterator[Agent]:
    with Agent(place.directory, place.flux, "bare", tls={"enabled": False}) as agent:
        yield agent


def made(place: Place, into: Path, names: list[str], start: timedelta, life: timedelta) -> tuple[str, str, str]:
    """The files of a certificate such as this Flux would never issue."""
    key_file = place.flux.certs / "ca" / "ca-key.pem"
    from cryptography import x509

    ca = x509.load_pem_x509_certificate((place.flux.certs / "ca" / "ca.pem").read_bytes())
    key = certs.new_key()
    ca_key = certs.load_key(key_file.read_bytes())
    certificate = certs.sign(
        ca, ca_key, key.public_key(), "made", names, life, certs.utc_now() + start, certs.FLUX_USES + certs.AGENT_USES
    )
    into.mkdir()
    contents = {"ca": certs.cert_pem(ca), "cert": certs.cert_pem(certificate), "key": certs.key_pem(key)}
    for name, pem in contents.items():
        (into / f"{name}.pem").write_bytes(pem)
    return tuple(str(into / f"{name}.pem") for name in ("ca", "cert", "key"))  # type: ignore[return-value]


def test_an_agent_of_ours(place: Place, agent: Agent) -> None:
    found = place.side.connector.probe(agent.address)
    assert (found.agent_id, found.address, found.legacy_certificate) == ("worker-1", agent.address, False)
    assert found.inventory is not None
    assert "attach" in found.inventory.features
    assert place.side.connector.probe(agent.address, expected_id="worker-1").agent_id == "worker-1"
    # Asked for as a legacy one it is still held to the name it has.
    assert place.side.connector.probe(agent.address, legacy=True).legacy_certificate is False


def test_another_id_than_expected(place: Place, agent: Agent) -> None:
    with pytest.raises((AgentRefused, AgentUnreachable), match="worker-1") as caught:
        place.side.connector.probe(agent.address, expected_id="worker-2")
    assert isinstance(caught.value, AgentRefused)


def test_one_agent_cannot_play_another(place: Place, original_agent: OriginalAgent, tmp_path: Path) -> None:
    files = enrolled(place.flux.certs, "worker-2", tmp_path / "certs")
    tls = (files["ca_cert"], files["cert_file"], files["key_file"])
    with (
        original_agent("worker-1", tls=tls) as (_, address),
        pytest.raises(AgentRefused, match="calls itself worker-1, but its certificate is that of worker-2"),
    ):
        place.side.connector.probe(address, legacy=True)


def test_a_certificate_without_an_id_only_where_it_is_asked_for(
    place: Place, original_agent: OriginalAgent, tmp_path: Path
) -> None:
    tls = made(place, tmp_path / "certs", ["flux-agent"], timedelta(), timedelta(days=30))
    with original_agent("old-1", tls=tls) as (_, address):
        with pytest.raises(AgentRefused, match=r'carries no ID.*"legacy": true'):
            place.side.connector.probe(address)
        found = place.side.connector.probe(address, legacy=True)
        assert (found.legacy_certificate, found.inventory) == (True, None)
        with place.side.connected(address, legacy=True) as client:
            client.deploy()
            assert client.run("legacy-1", "echo", "x").output == b"[x]\n"


def test_an_id_that_is_none(place: Place, original_agent: OriginalAgent) -> None:
    for claimed in ("flux", "..", "A_b"):
        with original_agent(claimed) as (_, address), pytest.raises(AgentRefused, match="cannot be an agent's ID"):
            place.plain.connector.probe(address)


@pytest.mark.parametrize(
    ("start", "life", "said"),
    [
        (timedelta(days=-40), timedelta(days=30), "has expired"),
        (timedelta(days=2), timedelta(days=30), "not yet valid"),
    ],
)
def test_a_certificate_out_of_its_time(
    place: Place, original_agent: OriginalAgent, tmp_path: Path, start: timedelta, life: timedelta, said: str
) -> None:
    names = ["flux-agent", "worker-9.agent.flux.internal"]
    tls = made(place, tmp_path / "certs", names, start, life)
    with original_agent("worker-9", tls=tls) as (_, address), pytest.raises(AgentUnreachable, match=said):
        place.side.connector.probe(address)


def test_an_agent_of_another_ca(place: Place, original_agent: OriginalAgent, tmp_path: Path) -> None:
    files = enrolled(tmp_path / "other", "worker-1", tmp_path / "certs")
    tls = (files["ca_cert"], files["cert_file"], files["key_file"])
    with original_agent("worker-1", tls=tls) as (_, address), pytest.raises(AgentUnreachable, match="another CA"):
        place.side.connector.probe(address)


def test_a_flux_of_another_ca_is_told_so(place: Place, agent: Agent, tmp_path: Path) -> None:
    """Under TLS 1.3 the refusal looks like a dropped connection to gRPC."""
    ours, theirs = Authority.open(place.flux.certs), Authority.open(tmp_path / "other").flux_identity()
    mixed = Identity(theirs.cert_pem, theirs.key_pem, ours.ca_pem, theirs.not_after)
    with running_timers() as timers:
        side = Side(None, timers)
        side.identify(mixed)
        with pytest.raises(AgentUnreachable, match="Flux's own certificate, which is from another CA"):
            side.connector.probe(agent.address)


def test_an_agent_is_no_flux(place: Place, agent: Agent) -> None:
    with running_timers() as timers:
        side = Side(None, timers)
        side.identify(Authority.open(place.flux.certs).issue_agent("worker-3"))
        # Its certificate is not a client's. One for both sides, as earlier versions made them, is refused by its names.
        with pytest.raises(AgentUnreachable, match="refuses Flux's certificate"):
            side.connector.probe(agent.address)


def test_tls_on_one_side_only_is_named(place: Place, agent: Agent, bare_agent: Agent) -> None:
    with pytest.raises(AgentUnreachable, match=r"speaks TLS and Flux does not.*disable_grpc_tls"):
        place.plain.connector.probe(agent.address)
    with pytest.raises(AgentUnreachable, match=r"does not speak TLS.*tls.enabled"):
        place.side.connector.probe(bare_agent.address)
    assert place.plain.connector.probe(bare_agent.address).agent_id == "bare"


def test_nobody_there(place: Place) -> None:
    with pytest.raises(AgentUnreachable, match="nothing listens at"):
        place.side.connector.probe(f"127.0.0.1:{free_port()}")
    with pytest.raises(AgentUnreachable, match="no known host name"):
        place.side.connector.probe("no-such-host.invalid:50052")


def test_something_else_there(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, name="web-server")
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        try:
            with pytest.raises(AgentUnreachable, match="a web server answers"):
                place.plain.connector.probe(address)
            with pytest.raises(AgentUnreachable, match="a web server answers"):
                place.side.connector.probe(address)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":50052",
        "host:0",
        "host:65536",
        "host:x",
        "host:1e3",
        "::1:50052",
        "a b:1",
        "h/x:1",
        "h:-1",
    ],
)
def test_addresses_that_are_none(place: Place, address: str) -> None:
    with pytest.raises(InvalidInput, match="no address of an agent"):
        place.side.connector.probe(address)
