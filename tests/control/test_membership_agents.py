"""Real agents over real mutual TLS: joining, restarting, vanishing and coming back under one Flux after another."""

from __future__ import annotations

import io
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509

from fluxlib.control.agents.client.connector import AgentConnector
from fluxlib.control.agents.enrolment import EnrolmentService
from fluxlib.control.agents.leadership import RENEW_EVERY
from fluxlib.control.agents.reconciler import revoked_at
from fluxlib.control.agents.renewal import OwnIdentity, Renewal
from fluxlib.errors import AgentRefused, AgentUnreachable, Conflict, InvalidInput
from fluxlib.lifecycle import Deadline, Loop, Timers
from fluxlib.model import AgentStatus
from fluxlib.pki import Authority
from fluxlib.pki import certificates as certs
from fluxlib.pki.identity import AGENT_NAME, agent_server_name
from fluxlib.store.base import ControlStore
from fluxlib.store.sqlite import SqliteControlStore
from tests.support.fleet import Fleet, spec
from tests.support.programs import Agent, Flux, make_zip, wait_until

CODE = make_zip({"run.sh": "#!/bin/sh\necho hello\n"})
DAY = 86400


class Lab:
    """Certificates, a store on disk, and as many lives of Flux as a test wants."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.flux = Flux(directory)  # never started: its certificates and the agents' configuration only
        self.authority = Authority.open(self.flux.certs)
        self.own = OwnIdentity(self.authority)
        self.store: ControlStore = SqliteControlStore(directory / "flux.db")
        self.lives = 0

    @contextmanager
    def life(self) -> Iterator[Fleet]:
        """One life of Flux, with the loop of the poller running."""
        self.lives += 1
        session = f"life-{self.lives}"
        timers = Timers("test-timers").start()
        connector = AgentConnector(self.own.current, session, timers, partial(revoked_at, self.store))
        fleet = Fleet(self.store, connector, session=session, clock=Now(), interval=0.2, lost_after=60)
        leading = Loop("leadership", fleet.leadership.tick, RENEW_EVERY).start()
        fleet.health.start()
        fleet.replication.loop.start()
        try:
            yield fleet
        finally:
            fleet.health.stop(Deadline(5))
            fleet.replication.loop.stop(Deadline(5))
            leading.stop(Deadline(5))
            fleet.close()
            timers.stop(Deadline(5))

    def agent(self, agent_id: str, **settings: object) -> Agent:
        return Agent(self.directory, self.flux, agent_id, **settings)

    def short_lived(self, agent: Agent, days: float) -> None:
        """Give the agent a certificate that ends soon."""
        certificates = agent.home / "certs"
        key = certs.load_key((certificates / "key_file.pem").read_bytes())
        names = [AGENT_NAME, agent_server_name(agent.agent_id)]
        ca = self.authority
        signed = certs.sign(
            ca._signer._ca,
            ca._signer._ca_key,
            key.public_key(),
            agent.agent_id,
            names,
            timedelta(days=days),
            certs.utc_now(),
            certs.AGENT_USES,
        )
        (certificates / "cert_file.pem").write_bytes(certs.cert_pem(signed))


class Now(list[float]):
    """A clock that goes, in the shape of the one that is set."""

    def __getitem__(self, index: object) -> float:  # type: ignore[override]
        return time.time()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # Not pytest's own directory: functions run as a user who must be able to walk to their code.
    with tempfile.TemporaryDirectory(prefix="fleet-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        made = Lab(directory)
        yield made
        made.store.close()


def placed(fleet: Fleet, agent_id: str) -> None:
    wait_until(lambda: fleet.state(agent_id).takes_work, f"{agent_id} to take work: {fleet.view(agent_id)}")


def test_agents_join_restart_vanish_and_are_remembered(lab: Lab) -> None:
    with lab.agent("worker-1") as agent:
        with lab.life() as fleet:
            fleet.functions.put(spec())
            result = fleet.functions.deploy("hello", CODE)
            assert result.done == 0
            view = fleet.membership.register(agent.address, legacy=False)
            assert (view.record.status, view.in_step) == (AgentStatus.ONLINE, True)
            assert view.record.platform.os == "linux"
            assert view.certificate_not_after > time.time() + 29 * DAY
            placed(fleet, "worker-1")
            digest = fleet.functions.lookup("hello").code_digest
            assert fleet.state("worker-1").holds["hello"].code_digest == digest

            # A restart: the same functions, another life; nothing is pushed twice.
            instance = fleet.state("worker-1").instance_id
            fleet.executions.calls.clear()
            agent.stop()
            agent.start()
            wait_until(lambda: fleet.state("worker-1").instance_id != instance, "the new life to be seen")
            placed(fleet, "worker-1")
            assert ("reconcile", "worker-1") in fleet.executions.calls

            # Killed: three questions without an answer, and what it missed is brought to it when it is back.
            agent.kill()
            wait_until(lambda: not fleet.state("worker-1").record.status.present, "it to be offline")
            assert "refused" in fleet.view("worker-1").problem
            wait_until(lambda: fleet.stored("worker-1").status is AgentStatus.OFFLINE, "the store to have it")
            assert [one.status for one in fleet.functions.put(spec("second")).agents] == ["skipped"]
            agent.start()
            placed(fleet, "worker-1")
            assert "second" in fleet.state("worker-1").holds
        with lab.life() as fleet:
            fleet.membership.start()
            placed(fleet, "worker-1")
            held = fleet.state("worker-1").holds
            assert {name: state.spec_digest for name, state in held.items()} == {
                "hello": spec().digest(),
                "second": spec("second").digest(),
            }
            fleet.membership.deregister("worker-1")
    with lab.life() as fleet:
        fleet.membership.start()
        assert fleet.membership.views() == []


def test_who_cannot_be_reached_or_is_another_is_refused_with_the_reason(lab: Lab) -> None:
    with lab.life() as fleet:
        with pytest.raises(AgentUnreachable, match="nothing listens"):
            fleet.membership.register("127.0.0.1:1", legacy=False)
        with pytest.raises(InvalidInput):
            fleet.membership.register("no address", legacy=False)
        with lab.agent("worker-2") as agent, lab.agent("worker-3") as other:
            fleet.membership.register(agent.address, legacy=False)
            # Another agent takes its ID, under its own certificate.
            config = other.config_file.read_text()
            other.stop()
            other.config_file.write_text(config.replace("agent_id: worker-3", "agent_id: worker-2"))
            other.start()
            with pytest.raises(AgentRefused, match="worker-3"):
                fleet.membership.register(other.address, legacy=False)
            assert fleet.view("worker-2").record.address == agent.address
            fleet.membership.deregister("worker-2")


def test_an_agents_certificate_is_renewed_while_it_works(lab: Lab) -> None:
    agent = lab.agent("worker-4")
    lab.short_lived(agent, days=5)
    with agent, lab.life() as fleet:
        fleet.membership.register(agent.address, legacy=False)
        process = agent.process
        renewal = Renewal(lab.authority, lab.own, fleet.agents, fleet.leadership)
        assert any("worker-4" in warning for warning in renewal.warnings())
        renewal.tick(time.time())
        assert renewal.warnings() == []
        wait_until(lambda: fleet.state("worker-4").certificate_not_after > time.time() + 29 * DAY, "the new end")
        # What the agent shows is the new one, to connections made from now on; the process is the same.
        shown = lab.directory / "worker-4" / "certs" / "cert_file.pem"
        certificate = x509.load_pem_x509_certificate(shown.read_bytes())
        assert certificate.not_valid_after_utc.timestamp() > time.time() + 29 * DAY
        fleet.connection_of("worker-4").reopen()
        inventory = fleet.connection_of("worker-4").inventory()
        assert inventory is not None
        assert inventory.certificate_not_after > time.time() + 29 * DAY
        assert agent.process is process
        placed(fleet, "worker-4")
        fleet.membership.deregister("worker-4")


def test_flux_takes_a_new_certificate_of_its_own_without_a_restart(lab: Lab) -> None:
    with lab.agent("worker-5") as agent, lab.life() as fleet:
        fleet.membership.register(agent.address, legacy=False)
        before = lab.own.current()
        (lab.flux.certs / "flux" / "flux.pem").unlink()  # as when it had run out: a new one is made
        renewal = Renewal(lab.authority, lab.own, fleet.agents, fleet.leadership)
        renewal.tick(time.time())
        assert lab.own.current().cert_pem != before.cert_pem
        assert fleet.connection_of("worker-5").inventory() is not None
        placed(fleet, "worker-5")
        renewal.tick(time.time())
        fleet.membership.deregister("worker-5")


def test_an_enrolled_directory_starts_an_agent(lab: Lab, tmp_path: Path) -> None:
    with lab.life() as fleet:
        service = EnrolmentService(lab.authority, fleet.agents, 50052, lambda agent_id: 0)
        for bad in ("flux", "flux-agent", "*.x", "../x", "Upper", ""):
            with pytest.raises(InvalidInput):
                service.bundle(bad)
        bundle = zipfile.ZipFile(io.BytesIO(service.bundle("worker-6")))
        assert sorted(bundle.namelist()) == ["agent-key.pem", "agent.pem", "agent.yaml", "ca.pem"]
        assert {stat.S_IMODE(info.external_attr >> 16) for info in bundle.infolist()} == {0o600}
        agent = lab.agent("worker-6")
        bundle.extractall(agent.home / "certs")
        (agent.home / "certs" / "agent-key.pem").chmod(0o600)  # Python's unzipping leaves out modes
        config = agent.config_file.read_text()
        for ours, theirs in (
            ("cert_file.pem", "agent.pem"),
            ("key_file.pem", "agent-key.pem"),
            ("ca_cert.pem", "ca.pem"),
        ):
            config = config.replace(ours, theirs)
        agent.config_file.write_text(config)
        with agent:
            fleet.membership.register(agent.address, legacy=False)
            with pytest.raises(Conflict, match="deregister it first"):
                service.bundle("worker-6")
            fleet.membership.deregister("worker-6")


def test_what_is_remembered_of_an_agent_is_what_the_store_answers(lab: Lab) -> None:
    """Followers and leaders compare records; what does not survive the store would look changed for ever."""
    with lab.agent("worker-7") as agent, lab.life() as fleet:
        fleet.membership.register(agent.address, legacy=False)
        fleet.membership.drain("worker-7")
        assert fleet.stored("worker-7") == fleet.state("worker-7").stored
        fleet.membership.deregister("worker-7")


def test_a_deregistered_agents_certificate_is_refused_by_every_flux_until_it_is_enrolled_again(lab: Lab) -> None:
    agent = lab.agent("worker-8")
    files = [agent.home / "certs" / name for name in ("cert_file.pem", "key_file.pem")]
    revoked = [file.read_bytes() for file in files]
    said = "was revoked when the agent was deregistered: enrol it again"
    with agent:
        with lab.life() as fleet:
            fleet.membership.register(agent.address, legacy=False)
            fleet.membership.deregister("worker-8")
            with pytest.raises(AgentRefused, match=said):
                fleet.membership.register(agent.address, legacy=False)
        with lab.life() as other, pytest.raises(AgentRefused, match=said):
            other.membership.register(agent.address, legacy=False)

        def restart_with(*contents: bytes) -> None:
            agent.stop()
            for file, content in zip(files, contents, strict=True):
                file.write_bytes(content)
            agent.start()

        enrolled = lab.authority.issue_agent("worker-8")
        restart_with(enrolled.cert_pem, enrolled.key_pem)
        with lab.life() as fleet:
            fleet.membership.register(agent.address, legacy=False)
            # A renewed certificate is that of the same enrolment: connections are made anew under it.
            soon = time.time() + 5 * DAY
            fleet.agents.set_certificate_end(fleet.state("worker-8"), soon)
            Renewal(lab.authority, lab.own, fleet.agents, fleet.leadership).tick(time.time())
            assert fleet.state("worker-8").certificate_not_after > soon
            fleet.connection_of("worker-8").reopen()
            assert fleet.connection_of("worker-8").inventory() is not None
            # The thief's turn, at the same address: a connection that is kept does not take it either.
            connection = fleet.connection_of("worker-8")
            restart_with(*revoked)
            with pytest.raises(AgentUnreachable):
                connection.inventory()
