"""The certificate directory: an original's taken over, two that start at once make one CA, secrets stay secret."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from fluxlib.errors import InvalidInput
from fluxlib.pki import Authority, Identity
from fluxlib.pki import authority as its_module
from fluxlib.pki import certificates as certs
from fluxlib.pki.files import CertificatesUnusable, as_owner_of, locked
from fluxlib.pki.identity import enrolled_at
from tests.support.need import need, need_root
from tests.support.original_authority import original_directory

NOW = datetime.now(UTC)


def parsed(identity: Identity) -> x509.Certificate:
    return x509.load_pem_x509_certificate(identity.cert_pem)


def secret_modes(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*")}


# -- made by us ----------------------------------------------------------------------


def test_a_new_directory_and_who_may_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    authority = Authority.open(directory)
    authority.flux_identity()
    authority.issue_agent("worker-1")
    authority.ssh_key()
    authority.installation_id()
    modes = secret_modes(directory)
    expected = {"ca/ca.pem", "ca/ca-key.pem", "flux/flux.pem", "flux/flux-key.pem", "ssh/flux-agent.pem"}
    expected |= {"ssh/flux-agent.pub", "installation"}
    assert expected <= set(modes)
    assert {mode for name, mode in modes.items() if name in expected} == {0o600}
    assert {mode for name, mode in modes.items() if (directory / name).is_dir()} == {0o700}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_opened_again_it_is_the_same(tmp_path: Path) -> None:
    first = Authority.open(tmp_path)
    second = Authority.open(tmp_path)
    assert first.ca_pem == second.ca_pem
    assert first.flux_identity() == second.flux_identity()
    assert first.installation_id() == second.installation_id()
    assert first.ssh_key().public == second.ssh_key().public


def test_what_the_certificates_say(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    ca = x509.load_pem_x509_certificate(authority.ca_pem)
    flux, agent = parsed(authority.flux_identity()), parsed(authority.issue_agent("worker-1"))
    assert certs.dns_names(flux) == ["flux"]
    assert certs.dns_names(agent)[:2] == ["flux-agent", "worker-1.agent.flux.internal"]
    assert abs(enrolled_at(certs.dns_names(agent), "worker-1") / 1000 - NOW.timestamp()) < 3600
    for leaf, days, use in (
        (flux, 1825, ExtendedKeyUsageOID.CLIENT_AUTH),
        (agent, 30, ExtendedKeyUsageOID.SERVER_AUTH),
    ):
        assert certs.is_signed_by(leaf, ca)
        assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
        assert timedelta(days=days - 1) < leaf.not_valid_after_utc - NOW <= timedelta(days=days, hours=1)
        # The other side's clock may be behind.
        assert leaf.not_valid_before_utc < NOW
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == [use]
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert "worker-1.agent.flux.internal; valid" in certs.describe_certificate(
        authority.issue_agent("worker-1").cert_pem
    )


def test_openssl_agrees(tmp_path: Path) -> None:
    need("openssl")
    authority = Authority.open(tmp_path)
    flux, agent = authority.flux_identity(), authority.issue_agent("worker-1")
    for leaf, its_purpose in ((flux, "sslclient"), (agent, "sslserver")):
        for purpose in ("sslclient", "sslserver"):
            command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca/ca.pem", "/dev/stdin"]
            done = subprocess.run(command, cwd=tmp_path, input=leaf.cert_pem.decode(), capture_output=True, text=True)
            assert (done.returncode == 0) is (purpose == its_purpose), done.stderr


def test_fluxs_own_is_renewed_before_it_ends_and_for_a_new_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority.open(tmp_path)
    first = authority.flux_identity()
    assert authority.flux_identity() == first
    monkeypatch.setattr(its_module, "utc_now", lambda: parsed(first).not_valid_after_utc - timedelta(days=29))
    second = authority.flux_identity()
    assert second.cert_pem != first.cert_pem
    assert second.key_pem != first.key_pem
    monkeypatch.undo()
    for name in ("ca.pem", "ca-key.pem"):
        (tmp_path / "ca" / name).unlink()
    other = Authority.open(tmp_path)
    third = other.flux_identity()
    assert certs.is_signed_by(parsed(third), x509.load_pem_x509_certificate(other.ca_pem))


def test_nothing_outlives_its_ca(tmp_path: Path) -> None:
    key = certs.new_key()
    ca = certs.make_ca(key, NOW - timedelta(days=3640))
    leaf = certs.sign(ca, key, certs.new_key().public_key(), "x", ["x"], certs.AGENT_LIFE, NOW, certs.AGENT_USES)
    assert leaf.not_valid_after_utc <= ca.not_valid_after_utc


def test_expiries(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    assert [one.name for one in authority.expiries()] == ["the CA's certificate"]
    authority.flux_identity()
    assert [one.name for one in authority.expiries()] == ["the CA's certificate", "Flux's certificate"]
    assert all(one.not_after > NOW.timestamp() for one in authority.expiries())


# -- signing requests ------------------------------------------------------------------


def test_a_request_is_signed_for_the_name_flux_chooses(tmp_path: Path) -> None:
    key = certs.new_key()
    pem, not_after = Authority.open(tmp_path).sign_agent_csr(certs.make_csr(key, "flux"), "worker-1")
    certificate = x509.load_pem_x509_certificate(pem)
    assert certs.dns_names(certificate)[:2] == ["flux-agent", "worker-1.agent.flux.internal"]
    assert all(name.endswith(".worker-1.agent.flux.internal") for name in certs.dns_names(certificate)[2:])
    assert certificate.public_key() == key.public_key()
    assert not_after == certificate.not_valid_after_utc.timestamp()


def rsa_request() -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(rsa.generate_private_key(65537, 2048), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def other_curve() -> bytes:
    return certs.make_csr(ec.generate_private_key(ec.SECP384R1()), "x")


def forged() -> bytes:
    """A request whose public key is somebody else's."""
    request = x509.load_pem_x509_csr(certs.make_csr(certs.new_key(), "x"))
    mine, theirs = certs.new_key(), request.public_key()
    encoding, point = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    mine_der = x509.load_pem_x509_csr(certs.make_csr(mine, "x")).public_bytes(serialization.Encoding.DER)
    swapped = mine_der.replace(mine.public_key().public_bytes(encoding, point), theirs.public_bytes(encoding, point))
    return x509.load_der_x509_csr(swapped).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("make", [lambda: b"", lambda: b"nonsense", rsa_request, other_curve, forged])
def test_requests_that_are_not_signed(tmp_path: Path, make: Callable[[], bytes]) -> None:
    with pytest.raises(InvalidInput, match="cannot be signed"):
        Authority.open(tmp_path).sign_agent_csr(make(), "worker-1")


@pytest.mark.parametrize("agent_id", ["", "flux", "flux-agent", "../x", "a/b", "A", "a.b", "-a", "a" * 64, "a\0"])
def test_ids_that_cannot_be_names(tmp_path: Path, agent_id: str) -> None:
    authority = Authority.open(tmp_path / "certs")
    before = secret_modes(tmp_path)
    for act in (authority.issue_agent, lambda one: authority.sign_agent_csr(b"", one)):
        with pytest.raises(InvalidInput, match="cannot be an agent's ID"):
            act(agent_id)
    assert secret_modes(tmp_path) == before


# -- an original's directory -------------------------------------------------------------


def test_an_originals_directory_is_taken_over_unchanged(tmp_path: Path) -> None:
    ca = original_directory(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.p*")}
    authority = Authority.open(tmp_path)
    assert x509.load_pem_x509_certificate(authority.ca_pem) == ca
    assert authority.flux_identity().cert_pem == before[tmp_path / "flux" / "flux.pem"]
    assert certs.is_signed_by(parsed(authority.issue_agent("worker-1")), ca)
    ssh = authority.ssh_key()
    assert ssh.public.startswith("ecdsa-sha2-nistp256 ")
    assert {path: path.read_bytes() for path in before} == before


def _verified(ca: Path, certificate: bytes) -> bool:
    """Whether OpenSSL, as gRPC's own TLS, finds the CA of a certificate."""
    need("openssl")
    done = subprocess.run(
        ["openssl", "verify", "-CAfile", str(ca), "/dev/stdin"], input=certificate, capture_output=True, check=False
    )
    return done.returncode == 0


def test_what_an_originals_ca_issues_repeats_its_key_identifier(tmp_path: Path) -> None:
    original_directory(tmp_path)
    ca = tmp_path / "ca" / "ca.pem"
    authority = Authority.open(tmp_path)
    assert _verified(ca, authority.issue_agent("worker-1").cert_pem)
    (tmp_path / "flux" / "flux.pem").unlink()
    assert _verified(ca, authority.flux_identity().cert_pem)


def test_a_certificate_of_flux_with_another_key_identifier_is_replaced(tmp_path: Path) -> None:
    """As Flux made them of an original's CA before: agents refuse it."""
    ca = original_directory(tmp_path)
    ca_key = certs.load_key((tmp_path / "ca" / "ca-key.pem").read_bytes())
    # The key identifier is then the SHA-1 of the key.
    without = x509.CertificateBuilder(
        ca.issuer, ca.subject, ca_key.public_key(), 1, ca.not_valid_before_utc, ca.not_valid_after_utc
    ).sign(ca_key, hashes.SHA256())
    key = certs.new_key()
    bad = certs.cert_pem(
        certs.sign(without, ca_key, key.public_key(), "flux", ["flux"], timedelta(days=365), NOW, certs.FLUX_USES)
    )
    assert not _verified(tmp_path / "ca" / "ca.pem", bad)
    (tmp_path / "flux" / "flux.pem").write_bytes(bad)
    (tmp_path / "flux" / "flux-key.pem").write_bytes(certs.key_pem(key))
    assert _verified(tmp_path / "ca" / "ca.pem", Authority.open(tmp_path).flux_identity().cert_pem)


def test_a_new_cas_key_has_the_form_an_original_reads(tmp_path: Path) -> None:
    Authority.open(tmp_path)
    assert b"BEGIN EC PRIVATE KEY" in (tmp_path / "ca" / "ca-key.pem").read_bytes()


def test_ec2_gets_a_key_it_takes_and_the_old_one_is_kept(tmp_path: Path) -> None:
    original_directory(tmp_path)
    old = (tmp_path / "ssh" / "flux-agent.pem").read_bytes()
    made = Authority.open(tmp_path).ssh_key(for_ec2=True)
    assert made.public.startswith("ssh-ed25519 ")
    assert (tmp_path / "ssh" / "flux-agent.pem.old").read_bytes() == old
    assert Authority.open(tmp_path).ssh_key(for_ec2=True).public == made.public
    assert made.private not in repr(made)


def test_ssh_agrees_about_the_key(tmp_path: Path) -> None:
    need("ssh-keygen")
    pair = Authority.open(tmp_path).ssh_key()
    done = subprocess.run(
        ["ssh-keygen", "-y", "-f", tmp_path / "ssh" / "flux-agent.pem"], capture_output=True, text=True
    )
    assert done.stdout.split()[:2] == pair.public.split()[:2]
    key = serialization.load_ssh_private_key(pair.private.encode(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)


# -- when it is not as it should be --------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "ca" / "ca-key.pem").unlink(), "restore it, or move"),
        (lambda d: (d / "ca" / "ca-key.pem").write_bytes(certs.key_pem(certs.new_key())), "is not the key of"),
        (lambda d: (d / "ca" / "ca.pem").write_bytes(b"nonsense"), "is no certificate"),
        (lambda d: (d / "ca" / "ca-key.pem").write_bytes(b"nonsense"), "is no usable private key"),
        (lambda d: (d / "ca" / "ca-key.pem").write_bytes(rsa_pem()), "is no usable private key"),
    ],
)
def test_damage_is_told_and_nothing_is_replaced(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    Authority.open(tmp_path)
    damage(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pem")}
    with pytest.raises(CertificatesUnusable, match=words):
        Authority.open(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pem")} == before


def rsa_pem() -> bytes:
    return rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def test_a_crash_between_key_and_certificate_is_finished(tmp_path: Path) -> None:
    Authority.open(tmp_path)
    key = (tmp_path / "ca" / "ca-key.pem").read_bytes()
    (tmp_path / "ca" / "ca.pem").unlink()
    authority = Authority.open(tmp_path)
    assert (tmp_path / "ca" / "ca-key.pem").read_bytes() == key
    assert certs.is_signed_by(parsed(authority.flux_identity()), x509.load_pem_x509_certificate(authority.ca_pem))


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificatesUnusable, match="certs_dir"):
        Authority.open(tmp_path / "file" / "certs")


def test_what_root_writes_belongs_to_the_directorys_owner(tmp_path: Path) -> None:
    need_root()
    directory = tmp_path / "certs"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    for name in ("ca", "agents"):
        (directory / name).mkdir()
        os.chown(directory / name, 65534, 65534)
    Authority.open(directory)
    assert (directory / "ca" / "ca-key.pem").stat().st_uid == 65534


def test_a_lock_is_one_at_a_time_and_survives_a_crash_of_its_holder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"locked\n"
    waiting = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert waiting.stdout is not None
    assert waiting.stdin is not None
    holder.kill()
    holder.wait(10)
    assert waiting.stdout.readline() == b"locked\n"
    waiting.stdin.close()
    waiting.wait(10)
    with locked(tmp_path):
        pass
    for process in (holder, waiting):
        process.stdout.close()  # type: ignore[union-attr]
    holder.stdin.close()


_HOLD = """
import sys
from pathlib import Path
from fluxlib.pki.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
_OPEN = """
import sys
from pathlib import Path
from fluxlib.pki import Authority
print("ready", flush=True)
sys.stdin.readline()
authority = Authority.open(Path(sys.argv[1]))
identity, ssh, installation = authority.flux_identity(), authority.ssh_key(), authority.installation_id()
sys.stdout.buffer.write(b"|".join([authority.ca_pem, identity.cert_pem, ssh.public.encode(), installation.encode()]))
"""


def test_processes_that_start_at_once_make_one_of_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _OPEN, str(tmp_path / "certs")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    answers = {process.communicate(timeout=30)[0] for process in started}
    assert len(answers) == 1
    assert b"BEGIN CERTIFICATE" in answers.pop()


def test_a_key_of_another_certificate_is_not_kept(tmp_path: Path) -> None:
    """As a crash leaves it between the key and the certificate of a renewal."""
    authority = Authority.open(tmp_path)
    authority.flux_identity()
    (tmp_path / "flux" / "flux-key.pem").write_bytes(certs.key_pem(certs.new_key()))
    mended = authority.flux_identity()
    assert parsed(mended).public_key() == certs.load_key(mended.key_pem).public_key()
    assert authority.flux_identity() == mended


def test_what_ends_with_its_ca_is_not_renewed_again_and_again(tmp_path: Path) -> None:
    ca_key = certs.new_key()
    now = certs.utc_now() - certs.CA_LIFE + timedelta(days=20)
    (tmp_path / "ca").mkdir()
    (tmp_path / "ca" / "ca-key.pem").write_bytes(certs.key_pem(ca_key))
    (tmp_path / "ca" / "ca.pem").write_bytes(certs.cert_pem(certs.make_ca(ca_key, now)))
    authority = Authority.open(tmp_path)
    assert authority.flux_identity() == authority.flux_identity()


def test_root_acts_as_the_owner_and_is_not_led_astray(tmp_path: Path) -> None:
    need_root()
    with tempfile.TemporaryDirectory(prefix="certs-") as name:
        directory = Path(name)
        os.chown(directory, 65534, 65534)
        with as_owner_of(directory):
            authority = Authority.open(directory)
            authority.issue_agent("w")
            assert os.geteuid() == 65534
        assert os.geteuid() == 0
        assert {path.stat().st_uid for path in directory.rglob("*")} == {65534}
        # Links such as a service that was taken over would leave for root.
        precious = tmp_path / "precious"
        precious.write_text("kept")
        precious.chmod(0o600)
        (directory / ".lock").unlink()
        (directory / ".lock").symlink_to(precious)
        with pytest.raises(CertificatesUnusable), as_owner_of(directory):
            Authority.open(directory)
        with pytest.raises(CertificatesUnusable):
            Authority.open(directory)
        assert precious.stat().st_uid == 0
        (directory / ".lock").unlink()
        shutil.rmtree(directory / "ssh")
        (directory / "ssh").symlink_to(tmp_path)
        with pytest.raises(CertificatesUnusable), as_owner_of(directory):
            Authority.open(directory).ssh_key()
        assert not (tmp_path / "flux-agent.pem").exists()


def _kept_by_an_earlier_version(agents: Path, agent_id: str) -> Path:
    directory = agents / agent_id
    directory.mkdir(parents=True)
    for name in ("agent-key.pem", "agent.pem"):
        (directory / name).write_text("secret")
    return directory


def test_no_agents_private_key_stays_with_the_authority(tmp_path: Path) -> None:
    authority = Authority.open(tmp_path)
    identity = authority.issue_agent("web-1")
    renewed, _ = authority.sign_agent_csr(certs.make_csr(certs.new_key(), "web-1"), "web-1")
    content = {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert content.isdisjoint({identity.key_pem, identity.cert_pem, renewed})


def test_agents_keys_that_an_earlier_version_kept_are_removed_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Authority.open(tmp_path)
    _kept_by_an_earlier_version(tmp_path / "agents", "web-1")
    (_kept_by_an_earlier_version(tmp_path / "agents", "web-2") / "notes.txt").write_text("an operator's own")
    with caplog.at_level("INFO"):
        assert Authority.open(tmp_path).ca_pem == first.ca_pem
    left = {str(path.relative_to(tmp_path / "agents")) for path in (tmp_path / "agents").rglob("*")}
    assert left == {"web-2", "web-2/notes.txt"}
    assert "removed the private keys of 2 agents" in caplog.text
    shutil.rmtree(tmp_path / "agents")
    _kept_by_an_earlier_version(tmp_path / "agents", "web-1")
    Authority.open(tmp_path)
    assert not (tmp_path / "agents").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_is_not_followed_to_keys_elsewhere(tmp_path: Path) -> None:
    kept = _kept_by_an_earlier_version(tmp_path / "elsewhere", "web-1")
    for link, target in (("agents", tmp_path / "elsewhere"), ("agents/web-1", kept)):
        certs_dir = tmp_path / link.replace("/", "-")
        (certs_dir / link).parent.mkdir(parents=True)
        (certs_dir / link).symlink_to(target)
        Authority.open(certs_dir)
        assert (kept / "agent-key.pem").read_text() == "secret"
