"""The CA's certificate with its key, and what is made with them: all that needs `cryptography`.

Whoever writes holds the directory's lock.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from fluxlib.errors import InvalidInput
from fluxlib.pki import certificates as certs
from fluxlib.pki.files import CertificatesUnusable, read_file, write_secret
from fluxlib.pki.identity import (
    AGENT_NAME,
    FLUX_NAME,
    Identity,
    agent_server_name,
    check_authority_time,
    enrolment_name,
    is_due,
    utc_now,
)

log = logging.getLogger(__name__)


class Signer:
    """Signs. Safe to use from several threads."""

    def __init__(self, ca_path: Path, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey) -> None:
        self._ca_path = ca_path
        self._ca = ca
        self._ca_key = ca_key
        self.ca_pem = certs.cert_pem(ca)
        self.not_before = ca.not_valid_before_utc.timestamp()
        self.not_after = ca.not_valid_after_utc.timestamp()

    @classmethod
    def open(cls, ca_path: Path, key_path: Path) -> Signer:
        """The authority in these files, made when there is none. Raises CertificatesUnusable."""
        ca_bytes, key_bytes = read_file(ca_path), read_file(key_path)
        if ca_bytes is not None and key_bytes is not None:
            return cls.load(ca_path, ca_bytes, key_path, key_bytes)
        certs_dir = ca_path.parent.parent
        if ca_bytes is not None:
            raise CertificatesUnusable(f"{key_path} is missing: restore it, or move {certs_dir} away for a new CA")
        if key_bytes is not None:
            key = _load_key(key_path, key_bytes)
            ca = certs.make_ca(key, utc_now())
        else:
            key = certs.new_key()
            ca = certs.make_ca(key, utc_now())
            # The key first: a crash in between leaves no CA without its key.
            write_secret(key_path, certs.ca_key_pem(key))
        write_secret(ca_path, certs.cert_pem(ca))
        if key_bytes is None:
            log.info("made a new certificate authority in %s", certs_dir)
        return cls(ca_path, ca, key)

    @classmethod
    def load(cls, ca_path: Path, ca_bytes: bytes, key_path: Path, key_bytes: bytes) -> Signer:
        """From what the files hold; the paths are for messages. Raises CertificatesUnusable."""
        ca, key = load_certificate(ca_path, ca_bytes), _load_key(key_path, key_bytes)
        if ca.public_key() != key.public_key():
            raise CertificatesUnusable(f"{key_path} is not the key of {ca_path}")
        return cls(ca_path, ca, key)

    def flux_identity(self, certificate_path: Path, key_path: Path, now: datetime) -> Identity:
        """What these files hold when Flux can go on with it, otherwise a new one. Raises CertificatesUnusable."""
        pem, key_bytes = read_file(certificate_path), read_file(key_path)
        if pem is not None and key_bytes is not None:
            certificate, key = load_certificate(certificate_path, pem), _load_key(key_path, key_bytes)
            unfit = self._unfit(certificate, key, now)
            if not unfit:
                return self._identity(certificate, key)
            log.info("renewing Flux's own certificate: it %s", unfit)
        key = certs.new_key()
        certificate = self._sign(key.public_key(), FLUX_NAME, [FLUX_NAME], certs.FLUX_LIFE, now, certs.FLUX_USES)
        identity = self._identity(certificate, key)
        write_secret(key_path, identity.key_pem)
        write_secret(certificate_path, identity.cert_pem)
        return identity

    def _unfit(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, now: datetime) -> str:
        """Why Flux cannot go on with this certificate of its own, as a clause; empty when it can."""
        if is_due(certificate.not_valid_after_utc.timestamp(), self.not_after, now.timestamp()):
            return "is about to expire"
        if certificate.not_valid_before_utc > now:
            return "is not yet valid"
        if certificate.public_key() != key.public_key():
            return "is for another key, as after a crash between writing the two"
        if not certs.is_signed_by(certificate, self._ca):
            return "is of another CA"
        if not certs.names_key_of(certificate, self._ca):
            return "gives the CA another key identifier than the CA itself, which agents refuse"
        if FLUX_NAME not in certs.dns_names(certificate):
            return f"lacks the name {FLUX_NAME}, by which agents know Flux"
        return ""

    def new_agent(self, agent_id: str, enrolled: int) -> Identity:
        """With a key made here."""
        key = certs.new_key()
        return self._identity(self._sign_agent(key.public_key(), agent_id, enrolled), key)

    def agent_of_request(self, csr_pem: bytes, agent_id: str, enrolled: int) -> tuple[bytes, float]:
        """(certificate PEM, not_after) for the key an agent made itself. Raises InvalidInput."""
        try:
            public_key = certs.public_key_of_csr(csr_pem)
        except ValueError as error:
            raise InvalidInput(f"the certificate request of {agent_id} cannot be signed: {error}") from error
        certificate = self._sign_agent(public_key, agent_id, enrolled)
        return certs.cert_pem(certificate), certificate.not_valid_after_utc.timestamp()

    def _sign_agent(self, public_key: ec.EllipticCurvePublicKey, agent_id: str, enrolled: int) -> x509.Certificate:
        names = [AGENT_NAME, agent_server_name(agent_id), enrolment_name(agent_id, enrolled)]
        # A common name holds 64 characters; IDs fit.
        return self._sign(public_key, agent_id, names, certs.AGENT_LIFE, utc_now(), certs.AGENT_USES)

    def _sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        dns_names: Sequence[str],
        life: timedelta,
        now: datetime,
        uses: Sequence[x509.ObjectIdentifier],
    ) -> x509.Certificate:
        """Raises CertificatesUnusable when the CA has ended meanwhile, or the clock was set to before its beginning."""
        check_authority_time(self._ca_path, self.not_before, self.not_after, now.timestamp())
        begins = self._ca.not_valid_before_utc
        return certs.sign(self._ca, self._ca_key, public_key, common_name, dns_names, life, now, uses, begins)

    def _identity(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Identity:
        not_after = certificate.not_valid_after_utc.timestamp()
        return Identity(certs.cert_pem(certificate), certs.key_pem(key), self.ca_pem, not_after)


def import_all() -> None:
    """What `cryptography` would import at its first use: for who goes on as a user that may not read this program."""
    certs.make_csr(certs.new_key(), "x")


def load_certificate(path: Path, pem: bytes) -> x509.Certificate:
    """Raises CertificatesUnusable."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.public_key()
        return certificate
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificatesUnusable(f"{path} is no certificate: {_in_words(error)}") from error


def _load_key(path: Path, pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        return certs.load_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificatesUnusable(f"{path} is no usable private key: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    """What `cryptography` says, without the page of its own that it names."""
    return re.split(r"\.? See https?:|, details:| \(0x", str(error) or type(error).__name__)[0].rstrip(".")
