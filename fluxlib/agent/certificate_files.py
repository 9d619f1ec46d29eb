"""An agent's certificate files looked at with `cryptography`: for renewals, and for the words when something is wrong.

Imported when it is needed: an agent whose files are in order needs it every twenty days.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography import x509

from fluxlib.errors import InvalidInput
from fluxlib.pki import certificates as certs
from fluxlib.pki.files import CertificatesUnusable, read_file, write_secret
from fluxlib.pki.identity import AGENT_NAME, Files, Identity, agent_server_name, utc_now


def load(files: Files) -> tuple[Identity, list[str], str]:
    """(identity, its DNS names, why nobody would accept it or nothing). Raises CertificatesUnusable.

    A renewal that was cut off is finished.
    """
    parts = {}
    for name, path in (("ca", files.ca), ("cert", files.certificate), ("key", files.key)):
        content = read_file(path)
        if content is None:
            raise CertificatesUnusable(f"{path} is missing: enrol this agent again (flux enroll)")
        parts[name] = content
    try:
        certificate = x509.load_pem_x509_certificate(parts["cert"])
        key = certs.load_key(parts["key"])
        not_after = certificate.not_valid_after_utc.timestamp()
        fault = certs.fault_of(Identity(parts["cert"], parts["key"], parts["ca"], not_after))
    except (ValueError, TypeError) as error:
        ours = f"{files.certificate}, {files.key} or {files.ca}"
        raise CertificatesUnusable(f"one of the agent's certificate files ({ours}) cannot be read: {error}") from error
    if certificate.public_key() != key.public_key():
        parts["key"] = _renewed_key(files, certificate)
    identity = Identity(parts["cert"], parts["key"], parts["ca"], not_after)
    return identity, certs.dns_names(certificate), fault


class Request:
    """A new key, kept in memory until its certificate comes. ``pem`` is the signing request."""

    def __init__(self, agent_id: str) -> None:
        self._agent_id = agent_id
        self._key = certs.new_key()
        self.pem = certs.make_csr(self._key, agent_id)

    def install(self, files: Files, certificate_pem: bytes, ca_pem: bytes, trusted_pem: bytes) -> float:
        """Write the certificate for this request, and the key; when it ends (epoch seconds). Raises InvalidInput."""
        certificate = self._checked(certificate_pem, ca_pem, trusted_pem)
        # Two files cannot change at once: whichever of these steps a crash falls between, the
        # next start finds a key that fits the certificate, the old pair or the new one.
        write_secret(_new_key(files), certs.key_pem(self._key))
        write_secret(files.certificate, certificate_pem)
        os.replace(_new_key(files), files.key)
        return certificate.not_valid_after_utc.timestamp()

    def _checked(self, certificate_pem: bytes, ca_pem: bytes, trusted_pem: bytes) -> x509.Certificate:
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            ca = x509.load_pem_x509_certificate(trusted_pem)
        except ValueError as error:
            raise InvalidInput(f"the certificate cannot be read: {error}") from error
        faults = []
        if certificate.public_key() != self._key.public_key():
            faults.append("it is for another key")
        if not certs.is_signed_by(certificate, ca) or (ca_pem and ca_pem.strip() != trusted_pem.strip()):
            faults.append("it is not from the CA this agent trusts")
        wanted = {AGENT_NAME, agent_server_name(self._agent_id)}
        if not wanted <= set(certs.dns_names(certificate)):
            faults.append(f"it lacks the names {', '.join(sorted(wanted))}")
        if certificate.not_valid_after_utc <= utc_now():
            faults.append("it has expired")
        if faults:
            raise InvalidInput("the certificate is refused", faults)
        return certificate


def _new_key(files: Files) -> Path:
    return files.key.with_name(f"{files.key.name}.new")


def _renewed_key(files: Files, certificate: x509.Certificate) -> bytes:
    """The key of a renewal that was cut off behind its certificate."""
    content = read_file(_new_key(files))
    if content is not None and certs.load_key(content).public_key() == certificate.public_key():
        os.replace(_new_key(files), files.key)
        return content
    raise CertificatesUnusable(f"{files.key} is not the key of {files.certificate}: enrol again")
