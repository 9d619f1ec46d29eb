"""Who is refused, by whom, and what is said of it: real handshakes over sockets, through the real API."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from fluxlib.control.agents.client.connector import AgentConnector
from fluxlib.errors import AgentError
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.pki import Identity
from fluxlib.rpc import tls
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.support.programs import Agent, Flux, free_port, wait_until
from tests.trust.conftest import Forge, answering, names, trusting

DAY = timedelta(days=1)


def refused(flux: Flux, address: str, status: int = 502, **fields: object) -> str:
    """What POST /agents/register says; the agent must not be there afterwards."""
    before = flux.api.call("GET", "/agents")[1]
    found, answer = flux.api.call("POST", "/agents/register", {"address": address, **fields})
    assert found == status, answer
    assert [agent["id"] for agent in flux.api.call("GET", "/agents")[1]] == [agent["id"] for agent in before]
    return str(answer["error"])


class TestFluxRefuses:
    def test_another_ca(self, flux: Flux, forge: Forge, stranger: Forge) -> None:
        theirs = trusting(stranger.identity(*names("w")), forge.authority.ca_pem)
        with answering("w", theirs) as address:
            assert "is from another CA than this Flux's" in refused(flux, address)

    @pytest.mark.parametrize(("start", "said"), [(-40 * DAY, "has expired"), (2 * DAY, "is not yet valid")])
    def test_a_certificate_out_of_its_time(self, flux: Flux, forge: Forge, start: timedelta, said: str) -> None:
        with answering("w", forge.identity(*names("w"), start=start)) as address:
            assert said in refused(flux, address)

    @pytest.mark.parametrize("shown", [("something",), ("flux",), ("w.agent.flux.internal",), ()])
    def test_what_is_no_agents(self, flux: Flux, forge: Forge, shown: tuple[str, ...]) -> None:
        with answering("w", forge.identity(*shown)) as address:
            assert "lacks the name flux-agent" in refused(flux, address)

    def test_one_agent_as_another(self, flux: Flux, forge: Forge) -> None:
        with answering("w", forge.identity(*names("v"))) as address:
            for fields in ({}, {"legacy": True}):
                assert "calls itself w, but its certificate is that of v" in refused(flux, address, **fields)

    @pytest.mark.parametrize("agent_id", ["flux", "flux-agent", "../x", "*.x", "A", ""])
    def test_an_id_that_is_none(self, flux: Flux, forge: Forge, agent_id: str) -> None:
        with answering(agent_id, forge.identity("flux-agent", "flux.agent.flux.internal")) as address:
            assert "cannot be an agent's ID" in refused(flux, address, legacy=True)

    def test_no_id_unless_it_was_said_and_never_again_after_one_was_shown(self, flux: Flux, forge: Forge) -> None:
        nameless, named = forge.identity("flux-agent"), forge.identity(*names("old"))
        with answering("old", nameless) as address:
            assert "carries no ID" in refused(flux, address)
            flux.register_at(address, legacy=True)
            (seen,) = [one for one in flux.api.call("GET", "/agents")[1] if one["id"] == "old"]
            assert seen["legacy"] is True
            assert flux.api.call("DELETE", "/agents/old")[0] == 200
        with answering("old", named) as address:
            flux.register_at(address)
            assert flux.api.call("DELETE", "/agents/old")[0] == 200
        with answering("old", nameless) as address:
            assert "has shown a certificate with its ID before" in refused(flux, address, status=409, legacy=True)

    def test_plain_text(self, flux: Flux) -> None:
        with answering("w", None) as address:
            said = refused(flux, address)
        assert "does not speak TLS" in said
        assert "tls.enabled" in said
        assert "disable_grpc_tls" in said

    def test_what_is_not_there(self, flux: Flux) -> None:
        assert "nothing listens" in refused(flux, f"127.0.0.1:{free_port()}")


@pytest.fixture(scope="module")
def timers() -> Iterator[Timers]:
    timers = Timers("trust-timers").start()
    yield timers
    timers.stop(Deadline(5))


def told(agent: Agent, identity: Identity | None, timers: Timers) -> str:
    """What a Flux with this identity says of the agent."""
    with pytest.raises(AgentError) as caught:
        AgentConnector(lambda: identity, "s", timers).probe(agent.address)
    return caught.value.message


def status(agent: Agent, identity: Identity | None) -> grpc.StatusCode:
    """How a bare call ends."""
    with closing(tls.channel(agent.address, identity, "flux-agent")) as channel:
        stub = flux_pb2_grpc.AgentServiceStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.RpcError) as caught:
            stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=5)
        code: grpc.StatusCode = caught.value.code()
        return code


class TestAnAgentRefuses:
    @pytest.mark.parametrize("start", [-40 * DAY, 2 * DAY])
    def test_a_flux_out_of_its_time(self, agent: Agent, forge: Forge, timers: Timers, start: timedelta) -> None:
        identity = forge.identity("flux", start=start)
        assert status(agent, identity) is grpc.StatusCode.UNAVAILABLE
        said = told(agent, identity, timers)
        assert "refuses Flux's own certificate, which" in said
        assert ("has expired" if start < timedelta(0) else "is not yet valid") in said

    @pytest.mark.parametrize(
        "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred")]
    )
    def test_a_flux_whose_first_write_meets_a_closed_connection(
        self, agent: Agent, forge: Forge, timers: Timers, monkeypatch: pytest.MonkeyPatch, error: OSError
    ) -> None:
        """The refusal is older than the write, as OpenSSL 3.5 usually has it: TLS is not what is wrong."""

        def refused_write(*_: object) -> None:
            raise error

        monkeypatch.setattr(ssl.SSLSocket, "sendall", refused_write)
        said = told(agent, forge.identity("flux", start=-40 * DAY), timers)
        assert "refuses Flux's own certificate, which has expired" in said
        assert "disable_grpc_tls" not in said

    def test_a_flux_of_another_ca(self, agent: Agent, forge: Forge, stranger: Forge, timers: Timers) -> None:
        identity = trusting(stranger.identity("flux"), forge.authority.ca_pem)
        assert status(agent, identity) is grpc.StatusCode.UNAVAILABLE
        assert "from another CA" in told(agent, identity, timers)

    def test_a_flux_it_does_not_know_the_ca_of(self, flux: Flux, forge: Forge, stranger: Forge) -> None:
        """It shows what this Flux would take, and trusts another CA itself."""
        with answering("w", trusting(forge.identity(*names("w")), stranger.authority.ca_pem)) as address:
            assert "it trusts another CA than this Flux's" in refused(flux, address)

    @pytest.mark.parametrize(
        ("shown", "said"),
        [
            (("fluxx",), "shows fluxx"),
            (("flux", "flux-agent"), "shows flux, flux-agent"),
            (("flux-agent", "worker-2.agent.flux.internal"), "shows flux-agent"),
            (("flux.internal", "*.flux"), "only Flux"),
            ((), "no DNS name"),
        ],
    )
    def test_whoever_is_not_flux(
        self, agent: Agent, forge: Forge, timers: Timers, shown: tuple[str, ...], said: str
    ) -> None:
        identity = forge.identity(*shown)
        assert status(agent, identity) is grpc.StatusCode.PERMISSION_DENIED
        assert said in told(agent, identity, timers)

    def test_whoever_is_not_flux_in_every_call(self, agent: Agent, forge: Forge) -> None:
        with closing(tls.channel(agent.address, forge.identity(*names("worker-2")), "flux-agent")) as channel:
            for method in pb.DESCRIPTOR.services_by_name["AgentService"].methods:
                sides = (method.client_streaming, method.server_streaming)
                shape = "_".join("stream" if streaming else "unary" for streaming in sides)
                call = getattr(channel, shape)(f"/flux.AgentService/{method.name}")
                asked = iter([b""]) if method.client_streaming else b""

                def all_of_it(
                    call: Callable[..., Any] = call, asked: Any = asked, streams: bool = method.server_streaming
                ) -> None:
                    answer = call(asked, timeout=5)
                    if streams:
                        list(answer)

                with pytest.raises(grpc.RpcError) as caught:
                    all_of_it()
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, method.name

    def test_nobody_without_a_certificate(self, agent: Agent, forge: Forge) -> None:
        credentials = grpc.ssl_channel_credentials(forge.authority.ca_pem)
        options = [("grpc.ssl_target_name_override", "flux-agent")]
        with closing(grpc.secure_channel(agent.address, credentials, options)) as channel:
            stub = flux_pb2_grpc.AgentServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError) as caught:
                stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    def test_plain_text(self, agent: Agent, timers: Timers) -> None:
        assert status(agent, None) is grpc.StatusCode.UNAVAILABLE
        said = told(agent, None, timers)
        assert "speaks TLS and Flux does not" in said
        assert "disable_grpc_tls" in said
        with socket.create_connection(("127.0.0.1", agent.port), 5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.settimeout(5)
            assert b"HTTP" not in connection.recv(100)

    def test_and_goes_on_serving_flux(self, flux: Flux, agent: Agent) -> None:
        assert flux.register(agent)["id"] == "worker-1"
        assert flux.api.call("DELETE", "/agents/worker-1")[0] == 200


def test_a_flux_without_tls_says_so_at_start_and_names_the_mismatch(directory: Path, agent: Agent) -> None:
    with Flux(directory, "plain-flux", tls=False) as plain:
        wait_until(lambda: "WITHOUT TLS (disable_grpc_tls)" in plain.log.read_text(), "the warning")
        found, answer = plain.api.call("POST", "/agents/register", {"address": agent.address})
        assert (found, "speaks TLS and Flux does not" in answer["error"]) == (502, True)
        with Agent(directory, plain, "bare") as bare:
            wait_until(lambda: "TLS" in bare.log.read_text(), "the warning")
            plain.register(bare)
            assert plain.api.call("POST", "/agents/x/enroll")[0] == 409
