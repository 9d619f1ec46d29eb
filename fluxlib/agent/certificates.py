"""The agent's own certificate: renewed without a restart.

The private key never leaves the agent: Flux asks for a signing request, signs
it, and hands the certificate back. It is checked before it replaces anything.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fluxlib.errors import Conflict
from fluxlib.pki.files import read_file
from fluxlib.pki.identity import AGENT_DOMAIN, AGENT_NAME, Files, Identity, agent_server_name
from fluxlib.pki.reading import read_leaf

if TYPE_CHECKING:
    from fluxlib.agent.certificate_files import Request

log = logging.getLogger(__name__)


class Certificates:
    """The identity on disk and what the server has seen of it. Raises CertificatesUnusable."""

    def __init__(self, files: Files, agent_id: str) -> None:
        self._files = files
        self._agent_id = agent_id
        self._lock = threading.Lock()
        self._identity, faults = self._load()
        for fault in faults:
            log.warning("Flux will refuse this agent: its certificate %s; enrol it again (flux enroll)", fault)
        self._handed_out: bytes | None = None
        self._pending: Request | None = None

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
        from fluxlib.agent.certificate_files import Request

        with self._lock:
            self._pending = Request(self._agent_id)
            return self._pending.pem

    def install(self, certificate_pem: bytes, ca_pem: bytes) -> float:
        """Take the certificate for the last request; when it ends (epoch seconds). Raises InvalidInput, Conflict."""
        with self._lock:
            if self._pending is None:
                raise Conflict("no certificate was requested since this agent started")
            not_after = self._pending.install(self._files, certificate_pem, ca_pem, self._identity.ca_pem)
            self._pending = None
            self._identity, _ = self._load()
            return not_after

    def _load(self) -> tuple[Identity, list[str]]:
        """The identity and its faults, logged and no more: clocks get corrected, and a legacy Flux asks for no ID."""
        ca_pem = read_file(self._files.ca)
        found = None if ca_pem is None else read_leaf(self._files.certificate, self._files.key, ca_pem)
        if ca_pem is not None and found is not None:
            identity = Identity(found.cert_pem, found.key_pem, ca_pem, found.not_after)
            return identity, _wrong_names(found.names, self._agent_id)
        from fluxlib.agent.certificate_files import load

        identity, names, fault = load(self._files)
        return identity, [*([fault] if fault else []), *_wrong_names(names, self._agent_id)]


def _wrong_names(names: Sequence[str], agent_id: str) -> list[str]:
    faults = [] if AGENT_NAME in names else [f"lacks the name {AGENT_NAME}"]
    others = [name for name in names if name.endswith(AGENT_DOMAIN)]
    if others and agent_server_name(agent_id) not in others:
        faults.append(f"is that of {others[0].removesuffix(AGENT_DOMAIN)}, not of {agent_id}")
    return faults
