"""Making and reading certificates: P-256, DNS names as identities."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fluxlib.pki.identity import AGENT_DAYS, Identity, utc_now

CA_LIFE, FLUX_LIFE, AGENT_LIFE = timedelta(days=3650), timedelta(days=1825), timedelta(days=AGENT_DAYS)
# Flux calls and agents answer, never the other way round. An original agent obeys every client of its CA: an agent's
# stolen key must not make one.
FLUX_USES, AGENT_USES = [ExtendedKeyUsageOID.CLIENT_AUTH], [ExtendedKeyUsageOID.SERVER_AUTH]
# Machines' clocks differ, and are set back; a certificate must not be from the future then. What a CA signs begins when
# the CA does: one that is renewed while the clock is wrong is good all the same once it is right again.
_BACKDATE = timedelta(days=1)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def ca_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """SEC1: the original control plane reads its CA's key in no other form, so that it can go on with ours."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """PKCS#8, or SEC1 as the original writes it. Raises ValueError."""
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key")
    return key


def cert_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def make_ca(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Flux CA")])
    usage = _key_usage(signing_certificates=True)
    return (
        _builder(name, name, key.public_key(), now - _BACKDATE, now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )


def sign(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    common_name: str,
    dns_names: Sequence[str],
    life: timedelta,
    now: datetime,
    uses: Sequence[x509.ObjectIdentifier],
    begins: datetime | None = None,
) -> x509.Certificate:
    """A leaf; it never outlives its CA. It begins a little before ``now`` unless ``begins`` is given.

    ``uses`` are its extended key usages.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    left = ca.not_valid_after_utc - now
    return (
        _builder(subject, ca.subject, public_key, begins or now - timedelta(minutes=10), now + min(life, left))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signing_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in dns_names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(_key_identifier(ca), None, None), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def names_key_of(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether its authority key identifier, where it has one, is the CA's: OpenSSL and gRPC refuse any other."""
    try:
        named = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return True
    return named is None or named == _key_identifier(ca)


def _key_identifier(ca: x509.Certificate) -> bytes:
    """As the CA itself gives it: newer Go derives it from the key in another way than RFC 5280's SHA-1."""
    try:
        return ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return x509.SubjectKeyIdentifier.from_public_key(ca.public_key()).digest


def make_csr(key: ec.EllipticCurvePrivateKey, common_name: str) -> bytes:
    """A signing request as PEM. Only its public key counts: names are the CA's to give."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def public_key_of_csr(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Raises ValueError for a request that is broken, not P-256 or not signed by its own key."""
    request = x509.load_pem_x509_csr(pem)
    key = request.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the request's key is not P-256")
    if not request.is_signature_valid:
        raise ValueError("the request is not signed by its own key")
    return key


def dns_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def describe_certificate(pem: bytes) -> str:
    """A certificate for people: its names and when it is good."""
    certificate = x509.load_pem_x509_certificate(pem)
    names = ", ".join(dns_names(certificate)) or "no DNS name"
    return f"{names}; valid {certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"


def fault_of(identity: Identity) -> str:
    """Why nobody would accept it, as a clause ("has expired"); empty when it is in order by this machine's clock."""
    certificate, now = x509.load_pem_x509_certificate(identity.cert_pem), utc_now()
    if now > certificate.not_valid_after_utc:
        return "has expired"
    if now < certificate.not_valid_before_utc:
        return "is not yet valid by this machine's clock"
    if not is_signed_by(certificate, x509.load_pem_x509_certificate(identity.ca_pem)):
        return "is from another CA than the one it comes with"
    return ""


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signing_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signing_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signing_certificates,
        crl_sign=signing_certificates,
        encipher_only=False,
        decipher_only=False,
    )
