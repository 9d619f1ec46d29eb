"""What certificates in good order say, by ``ssl`` alone.

``ssl`` shows a certificate to whoever has just verified it in a handshake, so
this shakes hands with itself in memory: that checks key, CA and time, too. What
is not in order in whatever way is None here; ``certificates`` finds the reason.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# id-ecPublicKey, without which the public key is of another kind.
_ELLIPTIC = bytes.fromhex("06072a8648ce3d0201")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# TLS 1.3 takes two, TLS 1.2 three, another curve than the one expected one more.
_ROUNDS = 6


@dataclass(frozen=True, slots=True)
class Read:
    """A certificate with its key, the PEM as the files have it. ``names`` are DNS names, times epoch seconds."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    names: tuple[str, ...]
    not_before: float
    not_after: float


def read_leaf(certificate: Path, key: Path, ca_pem: bytes, *, server: bool = True) -> Read | None:
    """A certificate and its key, in order for a TLS server (or a client) whose peer trusts only this CA; or None."""
    try:
        cert_pem, key_pem = certificate.read_bytes(), key.read_bytes()
        shown, facts = _handshake(certificate, key, _der(ca_pem), server=server)
        return _read(certificate, key, cert_pem, key_pem, shown, facts)
    except (OSError, ValueError):
        return None


def read_authority(certificate: Path, key: Path) -> Read | None:
    """A CA's certificate, expired or not, and its key; or None. Its names are empty."""
    try:
        cert_pem, key_pem = certificate.read_bytes(), key.read_bytes()
        context = _with_key(certificate, key)
        context.load_verify_locations(cadata=_der(cert_pem))
        # None are told that may not sign certificates.
        (shown,), (facts,) = context.get_ca_certs(binary_form=True), context.get_ca_certs()
        return _read(certificate, key, cert_pem, key_pem, shown, facts)
    except (OSError, ValueError):
        return None


def normalised(cert_pem: bytes) -> bytes:
    """One PEM for one certificate, whatever its lines' lengths and ends. Raises ValueError."""
    return ssl.DER_cert_to_PEM_cert(_der(cert_pem)).encode()


def _read(certificate: Path, key: Path, cert_pem: bytes, key_pem: bytes, shown: bytes, facts: dict[str, Any]) -> Read:
    """Raises ValueError."""
    if shown != _der(cert_pem) or (certificate.read_bytes(), key.read_bytes()) != (cert_pem, key_pem):
        raise ValueError("the files changed while OpenSSL read them")
    if _ELLIPTIC not in shown or key_pem.count(b"-----BEGIN") != 1:
        raise ValueError("not an elliptic-curve key and nothing else")
    names = tuple(value for kind, value in facts.get("subjectAltName", ()) if kind == "DNS")
    return Read(cert_pem, key_pem, names, _seconds(facts["notBefore"]), _seconds(facts["notAfter"]))


def _with_key(certificate: Path, key: Path) -> ssl.SSLContext:
    """Raises OSError unless the files can be read and fit each other, ValueError for an encrypted key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key, password=_no_password)
    return context


def _no_password() -> bytes:
    # Without a callback OpenSSL would ask on the terminal.
    raise ValueError("the key is encrypted")


def _handshake(certificate: Path, key: Path, ca: bytes, *, server: bool) -> tuple[bytes, dict[str, Any]]:
    """The certificate (DER, and what it says) as a peer that trusts ``ca`` verifies it for a server, or for a client.

    Raises OSError, ValueError.
    """
    server_context = _with_key(certificate, key)
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    if server:
        client_context.load_verify_locations(cadata=ca)
    else:
        # A server needs a certificate of its own: it shows the same one, which this client does not look at.
        client_context.verify_mode = ssl.CERT_NONE
        client_context.load_cert_chain(certificate, key, password=_no_password)
        server_context.verify_mode = ssl.CERT_REQUIRED
        server_context.load_verify_locations(cadata=ca)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    serving = server_context.wrap_bio(to_server, to_client, server_side=True)
    verifying = client if server else serving
    for _ in range(_ROUNDS):
        client_ended, server_ended = _goes_on(client), _goes_on(serving)
        if client_ended if server else server_ended:
            return verifying.getpeercert(binary_form=True) or b"", verifying.getpeercert() or {}
    raise OSError("the handshake does not end")


def _goes_on(side: ssl.SSLObject) -> bool:
    """Whether this side has ended its handshake, or waits for the other."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _der(pem: bytes) -> bytes:
    """Raises ValueError unless it is one certificate and nothing else."""
    text = pem.decode("ascii")
    if text.count("-----BEGIN") != 1:
        raise ValueError("more than one")
    return ssl.PEM_cert_to_DER_cert(text)


def _seconds(text: str) -> float:
    """Epoch seconds of OpenSSL's "Jan  5 09:34:43 2018 GMT". Raises ValueError.

    ``ssl.cert_time_to_seconds`` imports strptime at its first call, which fails where root acts as the directory's
    owner and that user may not read this program's files.
    """
    month, day, clock, year, zone = text.split()
    if zone != "GMT":
        raise ValueError("not in UTC")
    hour, minute, second = (int(part) for part in clock.split(":"))
    return datetime(int(year), _MONTHS.index(month) + 1, int(day), hour, minute, second, tzinfo=UTC).timestamp()
