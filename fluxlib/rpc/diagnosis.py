"""Why a connection to an agent failed: one handshake with ``ssl``, told in a sentence.

gRPC says "failed to connect" for everything; under TLS 1.3 a refused client
certificate even looks like a dropped connection, because the alert arrives only
with the first read after a handshake that went well.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile

from fluxlib.pki import Identity
from fluxlib.pki.identity import AGENT_NAME

_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def diagnose(address: str, identity: Identity | None, server_name: str, timeout: float = 5.0) -> str:
    """The reason in a sentence, with what to do; "" when the handshake goes well now."""
    host, _, port = address.rpartition(":")
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), timeout)
    except ConnectionRefusedError:
        return f"nothing listens at {address}: is flux-agent running, and is this its port?"
    except TimeoutError:
        return f"{address} does not answer within {timeout:.0f} s: a firewall, or no such machine"
    except socket.gaierror as error:
        return f"{host} is no known host name ({error.strerror})"
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached: {error}"
    with plain:
        plain.settimeout(timeout)
        reason = _plain(plain, address) if identity is None else _tls(plain, address, identity, server_name)
    if reason and _is_web_server(host.strip("[]"), int(port)):
        return f"a web server answers at {address}, no agent: agents listen on 50052 unless agent.yaml says otherwise"
    return reason


def _is_web_server(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1) as connection:
        connection.settimeout(1)
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return connection.recv(5) == b"HTTP/"
    return False


def _plain(connection: socket.socket, address: str) -> str:
    """A gRPC server answers the preface with a SETTINGS frame; a TLS server with an alert or nothing."""
    try:
        connection.sendall(_HTTP2_PREFACE)
        answer = connection.recv(16)
    except (ConnectionError, TimeoutError):
        answer = b""
    if len(answer) >= 4 and answer[3] == 4:
        return ""
    if not answer or answer[:1] == b"\x15":
        return (
            f"the agent at {address} speaks TLS and Flux does not: remove `disable_grpc_tls` from flux.yaml,"
            " or set `tls.enabled: false` in agent.yaml"
        )
    return f"what listens at {address} is no gRPC server"


def names_shown(address: str, identity: Identity, server_name: str, timeout: float = 5.0) -> list[str]:
    """The DNS names of the certificate at ``address``; empty when there is none to be had under ``server_name``."""
    host, _, port = address.rpartition(":")
    context = _context(identity)
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout) as plain,
            context.wrap_socket(plain, server_hostname=server_name) as secured,
        ):
            certificate = secured.getpeercert() or {}
    except (OSError, ValueError):
        return []
    names: list[str] = [str(entry[1]) for entry in certificate.get("subjectAltName", ()) if entry[0] == "DNS"]
    return names


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=identity.ca_pem.decode())
    with tempfile.TemporaryDirectory() as directory:
        # ssl reads a client's own certificate from files only.
        path = os.path.join(directory, "identity.pem")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(identity.cert_pem + identity.key_pem)
        context.load_cert_chain(path)
    return context


def _tls(plain: socket.socket, address: str, identity: Identity, server_name: str) -> str:
    context = _context(identity)
    try:
        secured = context.wrap_socket(plain, server_hostname=server_name)
    except ssl.SSLCertVerificationError as error:
        return _verification(error, address, server_name)
    except ssl.SSLError as error:
        return _alert(error, address, identity)
    except TimeoutError:
        return f"{address} does not answer the TLS handshake: {_plaintext_hint()}"
    except (ConnectionError, OSError) as error:
        return f"the agent at {address} broke the TLS handshake off ({error}): {_plaintext_hint()}"
    with secured:
        return _after_handshake(secured, address, identity)


def _after_handshake(secured: ssl.SSLSocket, address: str, identity: Identity) -> str:
    """The agent has shown its certificate, so it speaks TLS; under TLS 1.3 it may refuse Flux's only now."""
    # A server that has closed already breaks the pipe of whoever writes first; its alert can still be read.
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        secured.sendall(_HTTP2_PREFACE)
    try:
        if secured.recv(1):
            return ""
    except TimeoutError:
        return f"the agent at {address} finished the TLS handshake and does not answer gRPC: it may be overloaded"
    except (ssl.SSLEOFError, ConnectionError):
        pass
    except ssl.SSLError as error:
        return _alert(error, address, identity)
    return _refused(address, identity)


def _refused(address: str, identity: Identity) -> str:
    """A server of gRPC's drops a client it refuses without an alert: what is wrong must be seen from here."""
    shown, fault = _own(identity)
    if fault:
        return f"the agent at {address} refuses Flux's own certificate, which {fault} ({shown})"
    return (
        f"the agent at {address} refuses Flux's certificate ({shown}): it trusts another CA than this Flux's (enrol it"
        " here), or its clock is wrong"
    )


def _own(identity: Identity) -> tuple[str, str]:
    """What Flux's own certificate says, and its fault or nothing."""
    from fluxlib.pki.certificates import describe_certificate, fault_of

    return describe_certificate(identity.cert_pem), fault_of(identity)


def _verification(error: ssl.SSLCertVerificationError, address: str, server_name: str) -> str:
    reason = error.verify_message or str(error)
    if "expired" in reason:
        return f"the certificate of the agent at {address} has expired: enrol it again"
    if "not yet valid" in reason:
        return f"the certificate of the agent at {address} is not yet valid: compare both machines' clocks"
    if server_name == AGENT_NAME and _is_mismatch(reason):
        return f"the certificate shown at {address} lacks the name {AGENT_NAME}: it is no agent's; enrol one here"
    if _is_mismatch(reason):
        return f"the certificate of the agent at {address} is not that of {server_name}: another agent answers there"
    if "self-signed" in reason or "self signed" in reason or "unable to get" in reason or "signature" in reason:
        return f"the certificate of the agent at {address} is from another CA than this Flux's: enrol it here"
    return f"the certificate of the agent at {address} is refused: {reason}"


def _is_mismatch(reason: str) -> bool:
    return "mismatch" in reason.lower() or "doesn't match" in reason


def _alert(error: ssl.SSLError, address: str, identity: Identity) -> str:
    reason = (error.reason or str(error)).lower().replace("_", " ")
    with contextlib.suppress(ValueError):
        if "wrong version number" in reason or "record layer" in reason or "unexpected eof" in reason:
            return f"the agent at {address} does not speak TLS: {_plaintext_hint()}"
    if "unknown ca" in reason:
        return f"the agent at {address} trusts another CA than this Flux's: enrol it here"
    if "certificate" in reason:
        shown, fault = _own(identity)
        if fault:
            return f"the agent at {address} refuses Flux's own certificate, which {fault} ({shown})"
        if "expired" in reason:
            return f"the agent at {address} says that Flux's own certificate ({shown}) has expired: check both clocks"
        return f"the agent at {address} refuses Flux's certificate ({shown}): {reason}"
    return f"the TLS handshake with {address} failed: {reason}"


def _plaintext_hint() -> str:
    return "set `tls.enabled: true` in its agent.yaml, or `disable_grpc_tls: true` in flux.yaml"
