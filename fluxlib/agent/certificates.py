"""The agent's own certificate: renewed without a restart.

The private key never leaves the agent: Flux asks for a signing request, signs
it, and hands the certificate back. It is checked before it replaces anything.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fluxlib.errors import Conflict, InvalidInput
from fluxlib.pki import Identity
from fluxlib.pki import certificates as certs
from fluxlib.pki.files import CertificatesUnusable, read_file, write_secret

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Files:
    """Where agent.yaml says they are."""

    ca: Path
    certificate: Path
    key: Path


class Certificates:
    """The identity on disk and what the server has seen of it."""

    def __init__(self, files: Files, agent_id: str) -> None:
        self._files = files
        self._agent_id = agent_id
        self._lock = threading.Lock()
        self._identity = self._load()
        for fault in self._faults():
            log.warning("Flux will refuse this agent: its certificate %s; enrol it again (flux enroll)", fault)
        self._handed_out: bytes | None = None
        self._pending: ec.EllipticCurvePrivateKey | None = None

    @property
    def not_after(self) -> float:
        """Epoch seconds."""
        return self._identity.not_after

    def changed(self) -> Identity | None:
        """The identity when it is not the one handed out last; for every handshake, so no file is read."""
        with self._lock:
            if self._handed_out == self._identity.cert_pem:
                return None
            self._handed_out = self._identity.cert_pem
            return self._identity

    def create_request(self) -> bytes:
        """A signing request (PEM) for a new key, which is kept in memory until its certificate comes."""
        with self._lock:
            self._pending = certs.new_key()
            return certs.make_csr(self._pending, self._agent_id)

    def install(self, certificate_pem: bytes, ca_pem: bytes) -> float:
        """Take the certificate for the last request; when it ends (epoch seconds). Raises InvalidInput, Conflict."""
        with self._lock:
            key = self._pending
            if key is None:
                raise Conflict("no certificate was requested since this agent started")
            certificate = self._checked(certificate_pem, ca_pem, key)
            # Two files cannot change at once: whichever of these steps a crash falls between, the
            # next start finds a key that fits the certificate, the old pair or the new one.
            write_secret(self._new_key, certs.key_pem(key))
            write_secret(self._files.certificate, certificate_pem)
            os.replace(self._new_key, self._files.key)
            self._pending = None
            self._identity = self._load()
            return certificate.not_valid_after_utc.timestamp()

    def _checked(self, certificate_pem: bytes, ca_pem: bytes, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            ca = x509.load_pem_x509_certificate(self._identity.ca_pem)
        except ValueError as error:
            raise InvalidInput(f"the certificate cannot be read: {error}") from error
        faults = []
        if certificate.public_key() != key.public_key():
            faults.append("it is for another key")
        if not certs.is_signed_by(certificate, ca) or (ca_pem and ca_pem.strip() != self._identity.ca_pem.strip()):
            faults.append("it is not from the CA this agent trusts")
        wanted = {certs.AGENT_NAME, certs.agent_server_name(self._agent_id)}
        if not wanted <= set(certs.dns_names(certificate)):
            faults.append(f"it lacks the names {', '.join(sorted(wanted))}")
        if certificate.not_valid_after_utc <= certs.utc_now():
            faults.append("it has expired")
        if faults:
            raise InvalidInput("the certificate is refused", faults)
        return certificate

    def _faults(self) -> list[str]:
        """What Flux will not accept; told and no more: clocks are set right, and an original asks for no ID."""
        names = certs.dns_names(x509.load_pem_x509_certificate(self._identity.cert_pem))
        others = [name for name in names if name.endswith(certs.AGENT_DOMAIN)]
        faults = [certs.fault_of(self._identity)]
        if certs.AGENT_NAME not in names:
            faults.append(f"lacks the name {certs.AGENT_NAME}")
        if others and certs.agent_server_name(self._agent_id) not in others:
            faults.append(f"is that of {others[0].removesuffix(certs.AGENT_DOMAIN)}, not of {self._agent_id}")
        return [fault for fault in faults if fault]

    def _load(self) -> Identity:
        parts = {}
        for name, path in (("ca", self._files.ca), ("cert", self._files.certificate), ("key", self._files.key)):
            content = read_file(path)
            if content is None:
                raise CertificatesUnusable(f"{path} is missing: enrol this agent again (flux enroll)")
            parts[name] = content
        try:
            certificate = x509.load_pem_x509_certificate(parts["cert"])
            key = certs.load_key(parts["key"])
        except (ValueError, TypeError) as error:
            raise CertificatesUnusable(f"the agent's certificate files cannot be read: {error}") from error
        if certificate.public_key() != key.public_key():
            parts["key"] = self._renewed_key(certificate)
        not_after = certificate.not_valid_after_utc.timestamp()
        return Identity(parts["cert"], parts["key"], parts["ca"], not_after)

    @property
    def _new_key(self) -> Path:
        return self._files.key.with_name(f"{self._files.key.name}.new")

    def _renewed_key(self, certificate: x509.Certificate) -> bytes:
        """The key of a renewal that was cut off behind its certificate."""
        content = read_file(self._new_key)
        if content is not None and certs.load_key(content).public_key() == certificate.public_key():
            os.replace(self._new_key, self._files.key)
            return content
        raise CertificatesUnusable(f"{self._files.key} is not the key of {self._files.certificate}: enrol again")
