"""What `ssl` says of certificates is what `cryptography` says, or nothing when anything is out of order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fluxlib.pki import certificates as certs
from fluxlib.pki.identity import Files
from fluxlib.pki.reading import Read, normalised, read_authority, read_leaf

NOW = certs.utc_now()
DAY, YEAR = timedelta(days=1), timedelta(days=365)
PKCS8, SEC1 = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL


@dataclass
class Place:
    """A CA in memory, and the files under test."""

    files: Files
    ca: x509.Certificate
    ca_key: ec.EllipticCurvePrivateKey

    def signed(
        self, key: Any, start: timedelta = timedelta(0), life: timedelta = YEAR, *usages: x509.ObjectIdentifier
    ) -> bytes:
        """A leaf for a key of any kind."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])
        usage = usages or (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + start)
            .not_valid_after(NOW + start + life)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("leaf"), x509.DNSName("b.c")]), critical=False)
        )
        return certs.cert_pem(builder.sign(self.ca_key, hashes.SHA256()))

    def write(self, certificate: bytes, key: bytes) -> None:
        self.files.certificate.write_bytes(certificate)
        self.files.key.write_bytes(key)

    def read(self) -> Read | None:
        return read_leaf(self.files.certificate, self.files.key, self.files.ca.read_bytes())


def pem_of(key: Any, form: serialization.PrivateFormat = PKCS8, password: bytes = b"") -> bytes:
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, secret))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    ca_key = certs.new_key()
    made = Place(
        Files(tmp_path / "ca.pem", tmp_path / "leaf.pem", tmp_path / "key.pem"), certs.make_ca(ca_key, NOW), ca_key
    )
    made.files.ca.write_bytes(certs.cert_pem(made.ca))
    key = certs.new_key()
    made.write(made.signed(key, -DAY), pem_of(key))
    return made


def agrees(found: Read | None, certificate: Path, key: Path) -> None:
    assert found is not None
    known = x509.load_pem_x509_certificate(certificate.read_bytes())
    assert list(found.names) == certs.dns_names(known)
    assert found.not_before == known.not_valid_before_utc.timestamp()
    assert found.not_after == known.not_valid_after_utc.timestamp()
    assert (found.cert_pem, found.key_pem) == (certificate.read_bytes(), key.read_bytes())
    assert normalised(found.cert_pem) == certs.cert_pem(known)


# -- in order ------------------------------------------------------------------------


@pytest.mark.parametrize("form", [PKCS8, SEC1])
@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_the_same_facts(place: Place, curve: ec.EllipticCurve, form: serialization.PrivateFormat) -> None:
    key = ec.generate_private_key(curve)
    place.write(place.signed(key, -DAY), pem_of(key, form))
    agrees(place.read(), place.files.certificate, place.files.key)


def test_ours(place: Place) -> None:
    key = certs.new_key()
    ours = certs.sign(
        place.ca, place.ca_key, key.public_key(), "x", ["flux-agent", "x.agent"], YEAR, NOW, certs.AGENT_USES
    )
    place.write(certs.cert_pem(ours), certs.key_pem(key))
    agrees(place.read(), place.files.certificate, place.files.key)


@pytest.mark.parametrize(("uses", "sides"), [(certs.AGENT_USES, [True]), (certs.FLUX_USES, [False])])
def test_a_certificate_is_in_order_on_its_own_side_only(
    place: Place, uses: list[x509.ObjectIdentifier], sides: list[bool]
) -> None:
    key = certs.new_key()
    place.write(place.signed(key, -DAY, YEAR, *uses), pem_of(key))
    ca = place.files.ca.read_bytes()
    found = {server: read_leaf(place.files.certificate, place.files.key, ca, server=server) for server in (True, False)}
    assert [server for server, read in found.items() if read is not None] == sides
    agrees(found[sides[0]], place.files.certificate, place.files.key)


def test_one_for_both_sides_as_earlier_versions_made_them_is_in_order_on_both(place: Place) -> None:
    ca = place.files.ca.read_bytes()
    for server in (True, False):
        found = read_leaf(place.files.certificate, place.files.key, ca, server=server)
        agrees(found, place.files.certificate, place.files.key)


def test_no_names(place: Place) -> None:
    key = certs.new_key()
    bare = x509.CertificateBuilder(place.ca.subject, x509.Name([]), key.public_key(), 7, NOW - DAY, NOW + DAY)
    place.write(certs.cert_pem(bare.sign(place.ca_key, hashes.SHA256())), certs.key_pem(key))
    found = place.read()
    assert found is not None
    assert found.names == ()


def test_ends_of_lines_do_not_matter(place: Place) -> None:
    known = x509.load_pem_x509_certificate(place.files.certificate.read_bytes())
    place.files.certificate.write_bytes(certs.cert_pem(known).replace(b"\n", b"\r\n"))
    found = place.read()
    assert found is not None
    assert normalised(found.cert_pem) == certs.cert_pem(known)


@pytest.mark.parametrize("month", range(12))
def test_every_month(place: Place, month: int) -> None:
    key = certs.new_key()
    place.write(place.signed(key, -DAY, YEAR + month * timedelta(days=30)), pem_of(key))
    agrees(place.read(), place.files.certificate, place.files.key)


# -- out of order --------------------------------------------------------------------


def expired(place: Place) -> None:
    key = certs.new_key()
    place.write(place.signed(key, -YEAR, YEAR - DAY), pem_of(key))


def not_yet_valid(place: Place) -> None:
    key = certs.new_key()
    place.write(place.signed(key, DAY), pem_of(key))


def for_another_key(place: Place) -> None:
    place.files.key.write_bytes(pem_of(certs.new_key()))


def of_another_ca(place: Place) -> None:
    place.files.ca.write_bytes(certs.cert_pem(certs.make_ca(certs.new_key(), NOW)))


def of_an_expired_ca(place: Place) -> None:
    place.ca = certs.make_ca(place.ca_key, NOW - certs.CA_LIFE - DAY)
    place.files.ca.write_bytes(certs.cert_pem(place.ca))


def of_what_is_no_ca(place: Place) -> None:
    place.ca = x509.load_pem_x509_certificate(place.signed(place.ca_key, -DAY))
    place.files.ca.write_bytes(certs.cert_pem(place.ca))
    key = certs.new_key()
    place.write(place.signed(key, -DAY), pem_of(key))


def for_clients_only(place: Place) -> None:
    key = certs.new_key()
    place.write(place.signed(key, -DAY, YEAR, ExtendedKeyUsageOID.CLIENT_AUTH), pem_of(key))


def rsa_pair(place: Place) -> None:
    key = rsa.generate_private_key(65537, 2048)
    place.write(place.signed(key, -DAY), pem_of(key))


def edwards_pair(place: Place) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    place.write(place.signed(key, -DAY), pem_of(key))


def encrypted(form: serialization.PrivateFormat) -> Callable[[Place], None]:
    def encrypt(place: Place) -> None:
        key = certs.new_key()
        place.write(place.signed(key, -DAY), pem_of(key, form, b"secret"))

    return encrypt


def two_certificates(place: Place) -> None:
    place.files.certificate.write_bytes(place.files.certificate.read_bytes() + place.files.ca.read_bytes())


def two_authorities(place: Place) -> None:
    place.files.ca.write_bytes(place.files.ca.read_bytes() * 2)


def words_before(place: Place) -> None:
    place.files.certificate.write_bytes(b"Subject: leaf\n" + place.files.certificate.read_bytes())


def two_keys(place: Place) -> None:
    place.files.key.write_bytes(place.files.key.read_bytes() * 2)


def spoilt(name: str, content: bytes | None) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path: Path = getattr(place.files, name)
        path.unlink()
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)

    return spoil


FAULTS: dict[str, Callable[[Place], None]] = {
    one.__name__: one
    for one in (
        *(expired, not_yet_valid, for_another_key, of_another_ca, of_an_expired_ca, of_what_is_no_ca),
        *(for_clients_only, rsa_pair, edwards_pair, two_certificates, two_authorities, words_before, two_keys),
    )
}
FAULTS |= {"encrypted": encrypted(PKCS8), "encrypted SEC1": encrypted(SEC1), "a directory": spoilt("key", None)}
FAULTS |= {
    f"{what} for the {name}": spoilt(name, content)
    for name in ("ca", "certificate", "key")
    for what, content in (("nothing", b""), ("nonsense", b"nonsense"), ("binary", b"\xff\0"))
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_for_others_to_name(place: Place, fault: str) -> None:
    assert place.read() is not None
    FAULTS[fault](place)
    assert place.read() is None


def test_missing_files(place: Place) -> None:
    place.files.key.unlink()
    assert place.read() is None
    place.files.certificate.unlink()
    assert place.read() is None


def test_a_key_that_changes_meanwhile(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = Path.read_bytes, []

    def changing(path: Path) -> bytes:
        seen.append(path)
        return read(path) + (b"\n" if path == place.files.key and seen.count(path) == 2 else b"")

    monkeypatch.setattr(Path, "read_bytes", changing)
    assert place.read() is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
def test_an_encrypted_key_asks_nobody(place: Place) -> None:
    """OpenSSL would ask on the terminal, and an agent started by hand would wait there."""
    import pty

    encrypted(PKCS8)(place)
    ours, theirs = pty.openpty()
    arguments = [str(place.files.certificate), str(place.files.key), str(place.files.ca)]
    # A session of its own, whose terminal it is: what /dev/tty means to OpenSSL.
    code = "import fcntl, sys, termios; from pathlib import Path; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    code += "from fluxlib.pki.reading import read_leaf; found = [Path(one) for one in sys.argv[1:]];"
    code += "print(read_leaf(found[0], found[1], found[2].read_bytes()))"
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, stdin=theirs, capture_output=True, start_new_session=True, timeout=30)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout == b"None\n", done.stderr


# -- the CA ----------------------------------------------------------------------------


@pytest.fixture
def authority(place: Place) -> Place:
    place.files.key.write_bytes(pem_of(place.ca_key))
    return place


@pytest.mark.parametrize("age", [timedelta(0), certs.CA_LIFE + DAY])
@pytest.mark.parametrize("form", [PKCS8, SEC1])
def test_a_ca_says_when_it_ends_even_when_it_has(
    authority: Place, age: timedelta, form: serialization.PrivateFormat
) -> None:
    files = authority.files
    files.ca.write_bytes(certs.cert_pem(certs.make_ca(authority.ca_key, NOW - age)))
    files.key.write_bytes(pem_of(authority.ca_key, form))
    agrees(read_authority(files.ca, files.key), files.ca, files.key)


CA_FAULTS: dict[str, Callable[[Place], None]] = {
    name: FAULTS[name] for name in FAULTS if name.endswith(("for the ca", "for the key"))
}
CA_FAULTS |= {
    "another key": for_another_key,
    "two": two_authorities,
    "no CA": of_what_is_no_ca,
    "encrypted": lambda place: void(place.files.key.write_bytes(pem_of(place.ca_key, PKCS8, b"secret"))),
}


def void(_: object) -> None: ...


@pytest.mark.parametrize("fault", CA_FAULTS)
def test_every_fault_of_a_ca(authority: Place, fault: str) -> None:
    files = authority.files
    assert read_authority(files.ca, files.key) is not None
    CA_FAULTS[fault](authority)
    if fault == "no CA":
        files.key.write_bytes(pem_of(authority.ca_key))
    assert read_authority(files.ca, files.key) is None


def test_a_ca_of_another_kind(authority: Place) -> None:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "RSA")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, NOW - DAY, NOW + DAY)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    authority.files.ca.write_bytes(certs.cert_pem(builder.sign(key, hashes.SHA256())))
    authority.files.key.write_bytes(pem_of(key))
    assert read_authority(authority.files.ca, authority.files.key) is None
