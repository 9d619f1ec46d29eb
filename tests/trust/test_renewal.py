"""Certificates are renewed under a whole control plane and a real agent that work meanwhile; nobody restarts."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fluxlib.config.control import load_control
from fluxlib.control.app import Control
from fluxlib.lifecycle import Deadline
from fluxlib.pki import certificates as certs
from tests.support.programs import Agent, Flux, wait_until
from tests.trust.conftest import Forge, names

DAY = timedelta(days=1)


class Running:
    """The control plane in this process, so that a test need not wait for its hourly looks."""

    def __init__(self, directory: Path) -> None:
        self.flux = Flux(directory, "here")  # its configuration and the client; the process is this one
        self.api = self.flux.api
        self.control = Control(load_control(self.flux.config_file))
        self.control.start()

    def renew(self) -> None:
        (loop,) = [loop for loop in self.control._loops if loop.report().name == "renewal"]
        loop._body(time.time())

    def warnings(self) -> str:
        return " | ".join(self.api.call("GET", "/health")[1]["warnings"])


@pytest.fixture
def running(directory: Path) -> Iterator[Running]:
    running = Running(directory)
    yield running
    running.control.stop(Deadline(10))


def shown(address: str, forge: Forge, name: str) -> x509.Certificate:
    """What the agent shows to a new handshake; it closes it for want of a certificate of ours."""
    context = ssl.create_default_context(cadata=forge.authority.ca_pem.decode())
    context.set_alpn_protocols(["h2"])
    import socket

    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def days_left(certificate: x509.Certificate) -> float:
    return (certificate.not_valid_after_utc - certs.utc_now()) / DAY


def started(running: Running, *args: str) -> Callable[[], dict[str, object]]:
    """Begin an execution that lasts a moment; the call waits for its record."""
    status, answer = running.api.call("POST", "/execute/slow/async", {"args": list(args)})
    assert status == 202, answer
    execution_id = answer["execution_id"]
    where = f"/executions/{execution_id}/output"
    wait_until(lambda: running.api.request("GET", where)[1] == b"begun\n", "it to begin")
    return lambda: running.api.ended(execution_id)


def test_both_sides_get_new_certificates_while_they_work(running: Running, directory: Path) -> None:
    forge = Forge(running.flux.certs)
    agent = Agent(directory, running.flux, "worker-1")
    soon = forge.identity(*names("worker-1"), life=5 * DAY)
    (agent.home / "certs" / "cert_file.pem").write_bytes(soon.cert_pem)
    (agent.home / "certs" / "key_file.pem").write_bytes(soon.key_pem)
    go = directory / "go"
    script = f"#!/bin/sh\necho begun\nwhile [ ! -e {go} ]; do sleep 0.05; done\necho ended\n"
    name = "worker-1.agent.flux.internal"
    with agent:
        running.flux.register(agent)
        running.api.deploy({"name": "slow", "handler": "run.sh"}, {"run.sh": script})
        assert "the certificate of agent worker-1 ends on" in running.warnings()
        assert days_left(shown(agent.address, forge, name)) < 6
        before_all = started(running)

        running.renew()
        assert "worker-1" not in running.warnings()
        assert days_left(shown(agent.address, forge, name)) > 29
        key = (agent.home / "certs" / "key_file.pem").read_bytes()
        assert key != soon.key_pem
        assert (agent.home / "certs" / "key_file.pem").stat().st_mode & 0o777 == 0o600

        # Flux's own: about to end, then taken from disk and renewed.
        ending = forge.identity("flux", life=20 * DAY)
        (running.flux.certs / "flux" / "flux.pem").write_bytes(ending.cert_pem)
        (running.flux.certs / "flux" / "flux-key.pem").write_bytes(ending.key_pem)
        assert "Flux's certificate ends on" in running.warnings()
        between = started(running)
        running.renew()
        assert running.warnings() == "" or "certificate" not in running.warnings()
        after_all = started(running)
        go.write_text("")
        for ended in (before_all, between, after_all):
            record = ended()
            assert (record["status"], record["output"]) == ("success", "begun\nended\n")
        assert agent.process is not None
        assert agent.process.poll() is None
        log = agent.log.read_text()
        assert log.count("listens on") == 1
        assert "took a new certificate" in log
