"""The nodes' SSH key: kept as it is found, made where there is none."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fluxlib.pki.files import CertificatesUnusable, read_file, write_secret

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SshKey:
    """The nodes' key: private in OpenSSH form, public as one line without a comment."""

    private: str = field(repr=False)
    public: str


def kept_or_made(private_path: Path, public_path: Path, *, for_ec2: bool) -> SshKey:
    """ED25519. An original's ECDSA key is kept, except for EC2, whose ImportKeyPair refuses it.

    Raises CertificatesUnusable. The caller holds the directory's lock.
    """
    found = read_file(private_path)
    if found is not None:
        key = _load(private_path, found)
        if isinstance(key, ed25519.Ed25519PrivateKey) or not for_ec2:
            return _pair(key)
        log.warning("%s is no ED25519 key, which EC2 needs: a new one is made, the old one kept", private_path)
        write_secret(private_path.with_suffix(".pem.old"), found)
    made = ed25519.Ed25519PrivateKey.generate()
    pair = _pair(made)
    write_secret(private_path, pair.private.encode())
    write_secret(public_path, f"{pair.public} flux\n".encode())
    return pair


def _load(path: Path, content: bytes) -> ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey:
    loader = serialization.load_ssh_private_key if b"OPENSSH" in content else serialization.load_pem_private_key
    try:
        key = loader(content, password=None)
    except (ValueError, TypeError) as error:
        raise CertificatesUnusable(f"{path} is no usable SSH key: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise CertificatesUnusable(f"{path} is neither an ED25519 nor an ECDSA key")
    return key


def _pair(key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> SshKey:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return SshKey(private.decode(), public.decode())
