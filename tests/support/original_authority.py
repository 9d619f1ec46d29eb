"""Certificates as the original control plane makes them, in its directory and with its forms."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fluxlib.pki.identity import utc_now

_BACKDATE = timedelta(minutes=5)


def sec1(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def original_directory(directory: Path) -> x509.Certificate:
    """A new certs_dir: SEC1 keys, a CA of its own name and key identifier, an ECDSA SSH key."""
    key = _new_key()
    builder = _builder(_name("flux-ca"), _name("flux-ca"), key.public_key(), timedelta(days=3650))
    ca = (
        builder.add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        # Go no longer takes the SHA-1 of the key.
        .add_extension(x509.SubjectKeyIdentifier(_truncated_sha256(key.public_key())), critical=False)
        .sign(key, hashes.SHA256())
    )
    flux_pem, flux_key_pem = _leaf(ca, key, "flux", ["flux"], timedelta(days=1825))
    ssh = _new_key()
    files = {
        "ca/ca.pem": ca.public_bytes(serialization.Encoding.PEM),
        "ca/ca-key.pem": sec1(key),
        "flux/flux.pem": flux_pem,
        "flux/flux-key.pem": flux_key_pem,
        "ssh/flux-agent.pem": sec1(ssh),
        "ssh/flux-agent.pub": ssh.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        ),
    }
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return ca


def original_certificate(certs_dir: Path, into: Path) -> tuple[str, str, str]:
    """An agent's files (CA, certificate, key) in ``into``: the name ``flux-agent`` and no ID."""
    ca_pem = (certs_dir / "ca" / "ca.pem").read_bytes()
    ca_key = serialization.load_pem_private_key((certs_dir / "ca" / "ca-key.pem").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    ca = x509.load_pem_x509_certificate(ca_pem)
    certificate, key = _leaf(ca, ca_key, "flux-agent", ["flux-agent"], timedelta(days=365))
    files = {"ca.pem": ca_pem, "agent.pem": certificate, "agent-key.pem": key}
    into.mkdir(parents=True, exist_ok=True)
    for name, pem in files.items():
        (into / name).write_bytes(pem)
        (into / name).chmod(0o600)
    return str(into / "ca.pem"), str(into / "agent.pem"), str(into / "agent-key.pem")


def _leaf(
    ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, common_name: str, names: Sequence[str], life: timedelta
) -> tuple[bytes, bytes]:
    """(certificate, key) as PEM."""
    key = _new_key()
    of_ca = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name(common_name), ca.subject, key.public_key(), life)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.AuthorityKeyIdentifier(of_ca.digest, None, None), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), sec1(key)


def _name(common_name: str) -> x509.Name:
    # Go compares an issuer with its subject byte for byte, and writes it so.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name, _ASN1Type.PrintableString)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = utc_now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_encipherment=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _truncated_sha256(key: ec.EllipticCurvePublicKey) -> bytes:
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return hashlib.sha256(point).digest()[:20]
