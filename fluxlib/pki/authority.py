"""The directory the original lays out, made on first start and loaded ever after.

certs_dir/
  ca/ca.pem, ca-key.pem          the authority
  flux/flux.pem, flux-key.pem    the control plane's own identity
  ssh/flux-agent.pem, .pub       the key for nodes Flux makes
  agents/<id>/agent.pem, agent-key.pem
  installation                   this installation's ID: labels cloud nodes
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fluxlib.errors import Conflict, InvalidInput
from fluxlib.model import AGENT_ID, RESERVED_AGENT_IDS
from fluxlib.pki import certificates as certs
from fluxlib.pki.certificates import Identity
from fluxlib.pki.files import CertificatesUnusable, locked, make_directory, read_file, write_secret

log = logging.getLogger(__name__)

RENEW_BEFORE = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Expiry:
    """When one certificate ends; ``not_after`` is epoch seconds."""

    name: str
    not_after: float


@dataclass(frozen=True, slots=True)
class SshKey:
    """The nodes' key: private in OpenSSH form, public as one line without a comment."""

    private: str = field(repr=False)
    public: str


class Authority:
    """The CA and what it has signed. Safe to use from several threads and processes."""

    def __init__(self, directory: Path, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey) -> None:
        self._directory = directory
        self._ca = ca
        self._ca_key = ca_key
        self.ca_pem = certs.cert_pem(ca)

    @classmethod
    def open(cls, certs_dir: Path) -> Authority:
        """The authority in ``certs_dir``, made when there is none. Raises CertificatesUnusable."""
        with locked(certs_dir):
            ca_path, key_path = certs_dir / "ca" / "ca.pem", certs_dir / "ca" / "ca-key.pem"
            ca_bytes, key_bytes = read_file(ca_path), read_file(key_path)
            if ca_bytes is None and key_bytes is None:
                key = certs.new_key()
                ca = certs.make_ca(key, certs.utc_now())
                # The key first: a crash in between leaves no CA without its key.
                write_secret(key_path, certs.key_pem(key))
                write_secret(ca_path, certs.cert_pem(ca))
                log.info("made a new certificate authority in %s", certs_dir)
            elif ca_bytes is None and key_bytes is not None:
                key = _load_key(key_path, key_bytes)
                ca = certs.make_ca(key, certs.utc_now())
                write_secret(ca_path, certs.cert_pem(ca))
            elif key_bytes is None or ca_bytes is None:
                raise CertificatesUnusable(f"{key_path} is missing: restore it, or move {certs_dir} away for a new CA")
            else:
                ca, key = _load_certificate(ca_path, ca_bytes), _load_key(key_path, key_bytes)
                if ca.public_key() != key.public_key():
                    raise CertificatesUnusable(f"{key_path} is not the key of {ca_path}")
            for name in ("flux", "ssh", "agents"):
                make_directory(certs_dir / name)
        return cls(certs_dir, ca, key)

    # -- identities ------------------------------------------------------------

    def flux_identity(self) -> Identity:
        """The control plane's own, made when missing, renewed within 30 days of its end."""
        certificate_path = self._directory / "flux" / "flux.pem"
        key_path = self._directory / "flux" / "flux-key.pem"
        with locked(self._directory):
            pem, key_bytes = read_file(certificate_path), read_file(key_path)
            if pem is not None and key_bytes is not None:
                certificate, key = _load_certificate(certificate_path, pem), _load_key(key_path, key_bytes)
                unfit = self._unfit(certificate, key)
                if not unfit:
                    return self._identity(certificate, key)
                log.info("renewing Flux's own certificate: it %s", unfit)
            key = certs.new_key()
            certificate = certs.sign(
                self._ca,
                self._ca_key,
                key.public_key(),
                certs.FLUX_NAME,
                [certs.FLUX_NAME],
                certs.FLUX_LIFE,
                certs.utc_now(),
            )
            write_secret(key_path, certs.key_pem(key))
            write_secret(certificate_path, certs.cert_pem(certificate))
            return self._identity(certificate, key)

    def _unfit(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> str:
        """Why Flux cannot go on with this certificate of its own, as a clause; empty when it can."""
        now = certs.utc_now()
        # One that ends with its CA cannot be had with a later end.
        if certificate.not_valid_after_utc - now <= RENEW_BEFORE and self.outlives(certificate.not_valid_after_utc):
            return "is about to expire"
        if certificate.not_valid_before_utc > now:
            return "is not yet valid"
        if certificate.public_key() != key.public_key():
            return "is for another key, as after a crash between writing the two"
        if not certs.is_signed_by(certificate, self._ca):
            return "is of another CA"
        if certs.FLUX_NAME not in certs.dns_names(certificate):
            return f"lacks the name {certs.FLUX_NAME}, by which agents know Flux"
        return ""

    def issue_agent(self, agent_id: str) -> Identity:
        """A new certificate and key for an agent, kept under ``agents/``. Raises InvalidInput for a bad ID."""
        check_agent_id(agent_id)
        key = certs.new_key()
        certificate = self._sign_agent(key.public_key(), agent_id)
        directory = self._directory / "agents" / agent_id
        with locked(self._directory):
            write_secret(directory / "agent-key.pem", certs.key_pem(key))
            write_secret(directory / "agent.pem", certs.cert_pem(certificate))
        return self._identity(certificate, key)

    def sign_agent_csr(self, csr_pem: bytes, agent_id: str) -> tuple[bytes, float]:
        """(certificate PEM, not_after) for the key an agent made itself. Raises InvalidInput."""
        check_agent_id(agent_id)
        try:
            public_key = certs.public_key_of_csr(csr_pem)
        except ValueError as error:
            raise InvalidInput(f"the certificate request of {agent_id} cannot be signed: {error}") from error
        certificate = self._sign_agent(public_key, agent_id)
        with locked(self._directory):
            write_secret(self._directory / "agents" / agent_id / "agent.pem", certs.cert_pem(certificate))
        return certs.cert_pem(certificate), certificate.not_valid_after_utc.timestamp()

    def enroll_agent(self, agent_id: str, directory: Path, *, port: int = 50052) -> None:
        """A ready directory: agent.yaml, ca.pem, agent.pem, agent-key.pem. Raises InvalidInput, Conflict."""
        check_agent_id(agent_id)
        if (directory / "agent.yaml").exists():
            raise Conflict(f"{directory} already holds an agent.yaml: choose another directory")
        for name, content in enrolment_files(self.issue_agent(agent_id), agent_id, port).items():
            write_secret(directory / name, content)

    def installation_id(self) -> str:
        """Made once: tells this installation's cloud nodes from everybody else's."""
        path = self._directory / "installation"
        with locked(self._directory):
            found = read_file(path)
            if found is not None:
                return found.decode("ascii", "replace").strip()
            made = secrets.token_hex(6)
            write_secret(path, made.encode() + b"\n")
            return made

    def ssh_key(self, *, for_ec2: bool = False) -> SshKey:
        """ED25519. An original's ECDSA key is kept, except for EC2, whose ImportKeyPair refuses it."""
        private_path = self._directory / "ssh" / "flux-agent.pem"
        public_path = self._directory / "ssh" / "flux-agent.pub"
        with locked(self._directory):
            found = read_file(private_path)
            if found is not None:
                key = _load_ssh(private_path, found)
                if isinstance(key, ed25519.Ed25519PrivateKey) or not for_ec2:
                    return _ssh_key(key)
                log.warning("%s is no ED25519 key, which EC2 needs: a new one is made, the old one kept", private_path)
                write_secret(private_path.with_suffix(".pem.old"), found)
            made = ed25519.Ed25519PrivateKey.generate()
            pair = _ssh_key(made)
            write_secret(private_path, pair.private.encode())
            write_secret(public_path, f"{pair.public} flux\n".encode())
            return pair

    def outlives(self, end: datetime) -> bool:
        """Whether the CA lasts longer than ``end``, so that a renewal brings something."""
        return self._ca.not_valid_after_utc - end > timedelta(days=1)

    def expiries(self) -> list[Expiry]:
        """The CA's and Flux's own; agents tell theirs themselves."""
        found = [Expiry("the CA's certificate", self._ca.not_valid_after_utc.timestamp())]
        pem = read_file(self._directory / "flux" / "flux.pem")
        if pem is not None:
            certificate = _load_certificate(self._directory / "flux" / "flux.pem", pem)
            found.append(Expiry("Flux's certificate", certificate.not_valid_after_utc.timestamp()))
        return found

    def _sign_agent(self, public_key: ec.EllipticCurvePublicKey, agent_id: str) -> x509.Certificate:
        names = [certs.AGENT_NAME, certs.agent_server_name(agent_id)]
        # A common name holds 64 characters; IDs fit.
        return certs.sign(self._ca, self._ca_key, public_key, agent_id, names, certs.AGENT_LIFE, certs.utc_now())

    def _identity(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Identity:
        not_after = certificate.not_valid_after_utc.timestamp()
        return Identity(certs.cert_pem(certificate), certs.key_pem(key), self.ca_pem, not_after)


def check_agent_id(agent_id: str) -> None:
    """Raises InvalidInput for what cannot be an agent's ID: it becomes a path and a DNS name."""
    if agent_id in RESERVED_AGENT_IDS or not AGENT_ID.fullmatch(agent_id):
        raise InvalidInput(
            f"{agent_id[:80]!r} cannot be an agent's ID: 1 to 63 lower-case letters, digits and inner hyphens,"
            f" and none of {', '.join(sorted(RESERVED_AGENT_IDS))}"
        )


def enrolment_files(identity: Identity, agent_id: str, port: int) -> dict[str, bytes]:
    """What an agent added by hand is given, by file name."""
    tls = {"enabled": True, "ca_cert": "ca.pem", "cert_file": "agent.pem", "key_file": "agent-key.pem"}
    config = yaml.safe_dump({"agent_id": agent_id, "port": port, "tls": tls}, sort_keys=False)
    return {
        "agent-key.pem": identity.key_pem,
        "agent.pem": identity.cert_pem,
        "ca.pem": identity.ca_pem,
        "agent.yaml": config.encode(),
    }


def _load_certificate(path: Path, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise CertificatesUnusable(f"{path} is no certificate: {error}") from error


def _load_key(path: Path, pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        return certs.load_key(pem)
    except (ValueError, TypeError) as error:
        raise CertificatesUnusable(f"{path} is no usable private key: {error}") from error


def _load_ssh(path: Path, content: bytes) -> ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey:
    loader = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
    try:
        key = loader(content, password=None)
    except (ValueError, TypeError) as error:
        raise CertificatesUnusable(f"{path} is no usable SSH key: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise CertificatesUnusable(f"{path} is neither an ED25519 nor an ECDSA key")
    return key


def _ssh_key(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> SshKey:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return SshKey(private.decode(), public.decode())
