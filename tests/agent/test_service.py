"""The calls beside executions: deploys of every kind, what the agent says of itself, its own certificate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fluxlib import archive as archives
from fluxlib.agent.certificates import Certificates, Files
from fluxlib.agent.monitor import Monitor
from fluxlib.errors import Conflict, InvalidInput
from fluxlib.lifecycle import Deadline
from fluxlib.model import FunctionSpec
from fluxlib.pki import Authority
from fluxlib.pki.files import CertificatesUnusable
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from tests.agent.running import CODE, Running, running
from tests.support.programs import make_zip

# One agent for the whole module: its pool of threads grows while a test runs.
pytestmark = pytest.mark.leaks("threads of the module's agent")

SPEC = FunctionSpec(name="hello", handler="main.sh", max_concurrency=3)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("agent")) as made:
        yield made


def inventory(agent: Running) -> Any:
    return codec.inventory_from_message(agent.stub.GetInventory(pb.InventoryRequest(), timeout=5))


def test_inventory_follows_what_is_pushed(agent: Running) -> None:
    before = inventory(agent)
    assert (before.agent_id, before.max_tasks, before.isolation) == ("worker-1", 256, "off")
    assert before.instance_id
    assert "renew" not in before.features, "this agent has no TLS"
    assert agent.stub.RegisterFunction(codec.spec_to_message(SPEC, "their-digest"), timeout=5).success
    digest = archives.digest_of(CODE)
    chunks = codec.deployment_chunks(SPEC, "their-digest", digest, CODE, size=100)
    assert agent.stub.DeployStream(iter(chunks), timeout=10).success
    state = next(one for one in inventory(agent).functions if one.name == "hello")
    assert (state.spec_digest, state.code_digest) == ("their-digest", digest)
    assert inventory(agent).revision > before.revision
    assert agent.stub.RemoveFunction(pb.RemoveFunctionRequest(function_name="hello"), timeout=5).success
    assert not any(one.name == "hello" for one in inventory(agent).functions)
    gone = agent.stub.RemoveFunction(pb.RemoveFunctionRequest(function_name="hello"), timeout=5)
    assert (gone.success, gone.error_kind) == (False, pb.ERROR_KIND_NOT_FOUND)


def test_limits_that_off_does_not_hold_are_named(agent: Running) -> None:
    answer = agent.deploy("heavy", memory_mb=64, cpu_millicores=500)
    assert answer.success
    assert [warning.split(" ")[0] for warning in answer.warnings] == ["resources.memory", "resources.cpu"]
    record = codec.record_from_json(agent.run("say", "x", name="heavy").record)
    assert len(record.warnings) == 2


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        (lambda: [pb.DeployChunk(header=pb.DeploymentPackage(function_name="x"), total_bytes=10)], "not arrive whole"),
        (
            lambda: [
                pb.DeployChunk(header=pb.DeploymentPackage(function_name="x"), total_bytes=10),
                pb.DeployChunk(data=b"x" * 11),
            ],
            "larger than was said",
        ),
        (lambda: [pb.DeployChunk(header=pb.DeploymentPackage(), total_bytes=1 << 40)], "larger than"),
    ],
)
def test_broken_chunked_deploys_are_refused(agent: Running, chunks: Any, words: str) -> None:
    before = inventory(agent)
    answer = agent.stub.DeployStream(iter(chunks()), timeout=10)
    assert (answer.success, words in answer.message) == (False, True)
    assert inventory(agent) == before


def test_a_chunked_deploy_without_its_header(agent: Running) -> None:
    for chunks in ([], [pb.DeployChunk(data=b"x")]):
        with pytest.raises(grpc.RpcError) as refused:
            agent.stub.DeployStream(iter(chunks), timeout=10)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_deploy_for_another_name_than_its_config(agent: Running) -> None:
    package = pb.DeploymentPackage(function_name="a", code_archive=CODE, config=codec.spec_to_message(SPEC))
    answer = agent.stub.DeployFunction(package, timeout=5)
    assert (answer.success, answer.error_kind) == (False, pb.ERROR_KIND_INVALID)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "../x"},
        {"handler": "main\0.sh"},
        {"handler": "a\nb"},
        {"handler": "/bin/sh"},
        {"env": {"A": "x\0y"}},
        {"env": {"A=B": "x"}},
        {"env": {"": "x"}},
    ],
)
def test_what_an_original_would_send_unchecked_is_refused(agent: Running, fields: dict[str, Any]) -> None:
    before = inventory(agent)
    config = pb.FunctionConfig(**{"name": "odd", "handler": "main.sh", **fields})
    answer = agent.stub.RegisterFunction(config, timeout=5)
    assert (answer.success, answer.error_kind) == (False, pb.ERROR_KIND_INVALID)
    package = pb.DeploymentPackage(function_name=config.name, code_archive=CODE, config=config)
    assert not agent.stub.DeployFunction(package, timeout=5).success
    assert inventory(agent) == before


def test_a_windows_program_is_refused_on_unix(agent: Running) -> None:
    program = make_zip({"main.exe": b"MZ" + bytes(100), "main.bat": "@echo off\r\n", "run.cmd": "#!/bin/sh\necho ok\n"})

    def deploy(handler: str, **more: Any) -> Any:
        config = pb.FunctionConfig(name="win", handler=handler, max_concurrency=1, **more)
        return agent.stub.DeployFunction(
            pb.DeploymentPackage(function_name="win", code_archive=program, config=config), timeout=5
        )

    for handler, words in {"main.exe": "is a Windows program", "main.bat": "is a script for Windows"}.items():
        answer = deploy(handler)
        assert (answer.success, words in answer.message) == (False, True), answer.message
    # What it is counts before what it is called, and what its owner says before both.
    assert deploy("run.cmd").success
    assert agent.run(name="win").output == b"ok\n"
    answer = agent.stub.RegisterFunction(
        pb.FunctionConfig(name="win", handler="main.bat", max_concurrency=1), timeout=5
    )
    assert (answer.success, "is a script for Windows" in answer.message) == (False, True)
    assert "is for windows/any" in deploy("run.cmd", platforms=["windows"]).message
    assert deploy("main.bat", platforms=["unix"]).success
    assert "is a script for Windows, which this machine" in agent.run(name="win").error


def test_a_call_with_an_endless_timeout_takes_nobody_elses_away(agent: Running) -> None:
    agent.deploy("endless")
    assert agent.run("say", "hello", name="endless", timeout_seconds=float("inf")).output == b"hello\n"
    answer = agent.run("sleep", "30", name="endless", timeout_seconds=0.2)
    assert answer.error == "execution timed out after 0.2s"


def test_the_figures(agent: Running) -> None:
    report = codec.report_from_message(agent.stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=5), 0)
    figures = report.figures
    assert figures.memory_total_mb > figures.memory_used_mb > 0
    assert 0 <= figures.cpu_percent <= 100
    assert figures.disk_free_mb > 0
    assert (figures.active_tasks, figures.max_tasks) == (0, 256)
    assert report.platform.os == "linux"
    assert report.instance_id == inventory(agent).instance_id
    assert agent.stub.HealthCheck(pb.HealthCheckRequest(), timeout=5).healthy


def test_a_monitor_does_not_judge_the_cpu_by_a_moment(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path)
    for _ in range(5):
        monitor.tick(1.0)
        assert monitor.figures(0, 1).cpu_percent == 0.0
    monitor.start()
    monitor.stop(Deadline(5))


def test_an_agent_without_tls_shows_it(agent: Running) -> None:
    """What GET /agents shows as isolation_notes."""
    assert any("TLS is off: anybody who reaches" in note for note in inventory(agent).isolation_notes)


def test_without_tls_there_is_nothing_to_renew(agent: Running) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        agent.stub.CreateCertificateRequest(pb.CertificateRequestRequest(), timeout=5)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


# -- renewal -------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    identity = Authority.open(tmp_path / "certs").issue_agent("worker-1")
    made = Files(tmp_path / "ca.pem", tmp_path / "agent.pem", tmp_path / "agent-key.pem")
    made.ca.write_bytes(identity.ca_pem)
    made.certificate.write_bytes(identity.cert_pem)
    made.key.write_bytes(identity.key_pem)
    return made


def renewed(certificates: Certificates, certs_dir: Path) -> tuple[bytes, bytes]:
    authority = Authority.open(certs_dir)
    return authority.sign_agent_csr(certificates.create_request(), "worker-1")[0], authority.ca_pem


def test_a_renewal_is_handed_out_and_survives_a_restart(files: Files, tmp_path: Path) -> None:
    certificates = Certificates(files, "worker-1")
    first = certificates.changed()
    assert first is not None
    assert certificates.changed() is None
    not_after = certificates.install(*renewed(certificates, tmp_path / "certs"))
    second = certificates.changed()
    assert second is not None
    assert second.cert_pem != first.cert_pem
    assert second.key_pem != first.key_pem
    assert certificates.not_after == not_after
    assert files.key.stat().st_mode & 0o777 == 0o600
    again = Certificates(files, "worker-1").changed()
    assert again == second
    assert not files.key.with_name("agent-key.pem.new").exists()


@pytest.mark.parametrize("step", ["before the certificate", "before the key"])
def test_a_renewal_that_was_cut_off_leaves_a_pair_that_fits(files: Files, tmp_path: Path, step: str) -> None:
    before = Certificates(files, "worker-1").changed()
    other = Authority.open(tmp_path / "certs").issue_agent("worker-1")
    files.key.with_name("agent-key.pem.new").write_bytes(other.key_pem)
    if step == "before the key":
        files.certificate.write_bytes(other.cert_pem)
    found = Certificates(files, "worker-1").changed()
    assert found is not None
    assert before is not None
    expected = before.cert_pem if step == "before the certificate" else other.cert_pem
    assert found.cert_pem == expected
    certificate = x509.load_pem_x509_certificate(found.cert_pem)
    key = serialization.load_pem_private_key(found.key_pem, None)
    assert key.public_key() == certificate.public_key()


def test_certificates_that_are_not_taken(files: Files, tmp_path: Path) -> None:
    certificates = Certificates(files, "worker-1")
    good, ca = renewed(certificates, tmp_path / "certs")
    stranger = Authority.open(tmp_path / "other")
    refused: list[tuple[bytes, bytes, str]] = [
        (b"nonsense", ca, "cannot be read"),
        (Authority.open(tmp_path / "certs").issue_agent("worker-1").cert_pem, ca, "another key"),
        (Authority.open(tmp_path / "certs").issue_agent("worker-2").cert_pem, ca, "lacks the names"),
        (stranger.issue_agent("worker-1").cert_pem, ca, "not from the CA"),
        (good, stranger.ca_pem, "not from the CA"),
    ]
    for certificate, its_ca, words in refused:
        with pytest.raises(InvalidInput, match=words):
            certificates.install(certificate, its_ca)
    certificates.install(good, ca)
    with pytest.raises(Conflict, match="no certificate was requested"):
        certificates.install(good, ca)


def test_files_that_are_no_certificates_are_named(files: Files) -> None:
    Certificates(files, "worker-1")
    files.certificate.write_text("nonsense")
    with pytest.raises(CertificatesUnusable) as refused:
        Certificates(files, "worker-1")
    assert str(files.certificate) in refused.value.message


def test_files_that_do_not_belong_together(files: Files, tmp_path: Path) -> None:
    files.key.write_bytes(Authority.open(tmp_path / "certs").issue_agent("worker-1").key_pem)
    with pytest.raises(CertificatesUnusable, match="is not the key of"):
        Certificates(files, "worker-1")
    files.key.unlink()
    with pytest.raises(CertificatesUnusable, match="is missing"):
        Certificates(files, "worker-1")


# -- limits of agent.yaml --------------------------------------------------------------


def test_a_function_that_asks_for_more_than_the_agent_gives_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, limits="{memory: 64, cpu: 500, timeout: 5}") as agent:
        for field, value, setting in (
            ("memory_mb", 65, "limits.memory"),
            ("cpu_millicores", 501, "limits.cpu"),
            ("timeout_seconds", 6, "limits.timeout"),
        ):
            answer = agent.deploy(**{field: value})
            assert not answer.success
            assert setting in answer.message
            assert answer.error_kind == pb.ERROR_KIND_UNENFORCEABLE
        assert inventory(agent).functions == ()
        assert agent.deploy(memory_mb=64, cpu_millicores=500, timeout_seconds=5).success


def test_a_function_without_a_timeout_gets_the_agents(tmp_path: Path) -> None:
    with running(tmp_path, limits="{timeout: 1}") as agent:
        assert agent.deploy().success
        assert "timed out after 1" in agent.run("sleep", "60").error
