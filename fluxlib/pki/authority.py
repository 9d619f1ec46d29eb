"""The directory the original lays out, made on first start and loaded ever after.

certs_dir/
  ca/ca.pem, ca-key.pem          the authority
  flux/flux.pem, flux-key.pem    the control plane's own identity
  ssh/flux-agent.pem, .pub       the key for nodes Flux makes
  installation                   this installation's ID: labels cloud nodes

Agents' certificates and keys are handed out and not kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fluxlib.pki.files import locked, make_directory, read_file, remove_kept_agents, write_secret
from fluxlib.pki.identity import (
    FLUX_NAME,
    Identity,
    check_agent_id,
    check_authority_time,
    is_agent_due,
    is_due,
    utc_now,
)
from fluxlib.pki.reading import Read, normalised, read_authority, read_leaf

if TYPE_CHECKING:
    from fluxlib.pki.signer import Signer
    from fluxlib.pki.ssh import SshKey


@dataclass(frozen=True, slots=True)
class Expiry:
    """When one certificate ends; ``not_after`` is epoch seconds."""

    name: str
    not_after: float


class Authority:
    """The CA and what it has signed. Safe to use from several threads and processes.

    What is in order is read without `cryptography` (see ``identity``), which is imported by the first signature.
    """

    def __init__(self, directory: Path, ca_pem: bytes, ca_not_after: float, load: Callable[[], Signer]) -> None:
        self._directory = directory
        self.ca_pem = ca_pem
        self._ca_not_after = ca_not_after
        self._load = load
        # What flux.pem held when it was last looked at, and when that ends.
        self._own: tuple[bytes, float] = (b"", 0.0)

    @classmethod
    def open(cls, certs_dir: Path) -> Authority:
        """The authority in ``certs_dir``, made when there is none. Raises CertificatesUnusable."""
        with locked(certs_dir):
            ca_path, key_path = certs_dir / "ca" / "ca.pem", certs_dir / "ca" / "ca-key.pem"
            found = read_authority(ca_path, key_path)
            signer = None if found is not None else _signer_class().open(ca_path, key_path)
            for name in ("flux", "ssh"):
                make_directory(certs_dir / name)
            remove_kept_agents(certs_dir / "agents")
        now = utc_now().timestamp()
        if signer is not None:
            check_authority_time(ca_path, signer.not_before, signer.not_after, now)
            return cls(certs_dir, signer.ca_pem, signer.not_after, lambda: signer)
        assert found is not None
        check_authority_time(ca_path, found.not_before, found.not_after, now)
        ca, key = found.cert_pem, found.key_pem
        return cls(certs_dir, normalised(ca), found.not_after, lambda: _signer_class().load(ca_path, ca, key_path, key))

    @staticmethod
    def check(certs_dir: Path) -> None:
        """Look at the authority in ``certs_dir``, if there is one, and change nothing. Raises CertificatesUnusable."""
        ca_path, key_path = certs_dir / "ca" / "ca.pem", certs_dir / "ca" / "ca-key.pem"
        ca, key = read_file(ca_path), read_file(key_path)
        if ca is None or key is None:
            return
        found: Read | Signer = read_authority(ca_path, key_path) or _signer_class().load(ca_path, ca, key_path, key)
        check_authority_time(ca_path, found.not_before, found.not_after, utc_now().timestamp())

    @cached_property
    def _signer(self) -> Signer:
        return self._load()

    # -- identities ------------------------------------------------------------

    def flux_identity(self) -> Identity:
        """The control plane's own, made when missing, renewed within 30 days of its end."""
        certificate, key = self._directory / "flux" / "flux.pem", self._directory / "flux" / "flux-key.pem"
        with locked(self._directory):
            now = utc_now()
            found = read_leaf(certificate, key, self.ca_pem, server=False)
            if found is not None and self._fits(found, now.timestamp()):
                self._own = (found.cert_pem, found.not_after)
                return Identity(normalised(found.cert_pem), found.key_pem, self.ca_pem, found.not_after)
            identity = self._signer.flux_identity(certificate, key, now)
            self._own = (identity.cert_pem, identity.not_after)
            return identity

    def _fits(self, found: Read, now: float) -> bool:
        due = is_due(found.not_after, self._ca_not_after, now)
        return not due and found.not_before <= now and FLUX_NAME in found.names

    def issue_agent(self, agent_id: str, *, after: int = 0) -> Identity:
        """A new certificate and key for an agent; neither is kept. Raises InvalidInput for a bad ID.

        It is enrolled now, or just after ``after`` (epoch milliseconds) when the clock was set back since.
        """
        check_agent_id(agent_id)
        return self._signer.new_agent(agent_id, max(_now_ms(), after + 1))

    def sign_agent_csr(self, csr_pem: bytes, agent_id: str, *, enrolled: int = 0) -> tuple[bytes, float]:
        """(certificate PEM, not_after) for the key an agent made itself. Raises InvalidInput.

        ``enrolled``: when it was enrolled, to be kept; 0 = now.
        """
        check_agent_id(agent_id)
        return self._signer.agent_of_request(csr_pem, agent_id, enrolled or _now_ms())

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
        from fluxlib.pki.ssh import kept_or_made

        directory = self._directory / "ssh"
        with locked(self._directory):
            return kept_or_made(directory / "flux-agent.pem", directory / "flux-agent.pub", for_ec2=for_ec2)

    def is_agent_due(self, end: float, now: float) -> bool:
        """Whether to renew an agent's certificate that ends at ``end`` (epoch seconds)."""
        return is_agent_due(end, self._ca_not_after, now)

    def expiries(self) -> list[Expiry]:
        """The CA's and Flux's own; agents tell theirs themselves."""
        found = [Expiry("the CA's certificate", self._ca_not_after)]
        path = self._directory / "flux" / "flux.pem"
        pem = read_file(path)
        if pem is not None:
            known, not_after = self._own
            found.append(Expiry("Flux's certificate", not_after if pem == known else _end_of(path, pem)))
        return found


# Not every program that unpacks a zip keeps its modes, so the file says itself what to do.
_INSTRUCTIONS = """\
# Made by Flux for one agent, with the three PEM files beside it. Nobody else may read agent-key.pem. On that machine:
#   sudo install -m 600 agent.yaml ca.pem agent.pem agent-key.pem /etc/flux-agent/
#   sudo systemctl start flux-agent
# On Windows: copy all four to C:\\ProgramData\\flux-agent, then `flux-agent.exe service install` as administrator.
# Then register its address with Flux: POST /agents/register.
"""


def enrolment_files(identity: Identity, agent_id: str, port: int) -> dict[str, bytes]:
    """What an agent added by hand is given, by file name."""
    tls = {"enabled": True, "ca_cert": "ca.pem", "cert_file": "agent.pem", "key_file": "agent-key.pem"}
    config = _INSTRUCTIONS + yaml.safe_dump({"agent_id": agent_id, "port": port, "tls": tls}, sort_keys=False)
    return {
        "agent-key.pem": identity.key_pem,
        "agent.pem": identity.cert_pem,
        "ca.pem": identity.ca_pem,
        "agent.yaml": config.encode(),
    }


def _now_ms() -> int:
    return int(utc_now().timestamp() * 1000)


def _signer_class() -> type[Signer]:
    from fluxlib.pki.signer import Signer

    return Signer


def _end_of(path: Path, pem: bytes) -> float:
    from fluxlib.pki.signer import load_certificate

    return load_certificate(path, pem).not_valid_after_utc.timestamp()
