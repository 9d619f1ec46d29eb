"""Mutual TLS for the wire: who may call whom, by name.

An agent's certificate carries ``flux-agent`` (what the original checks) and
``<id>.agent.flux.internal``, by which Flux tells agents apart. Flux's carries
``flux``. Reasons for a failed handshake are found by ``rpc.diagnosis``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

from fluxlib.pki import Identity
from fluxlib.pki.identity import AGENT_NAME, FLUX_NAME

# 50 MiB of archive or output, and what is wrapped around it. The original's
# limit is exactly 50 MiB: what is larger is never sent to an original.
MESSAGE_LIMIT = 50 * 1024 * 1024
MESSAGE_SLACK = 4 * 1024 * 1024
SIZE_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT + MESSAGE_SLACK),
    ("grpc.max_send_message_length", MESSAGE_LIMIT + MESSAGE_SLACK),
]


def channel(
    address: str, identity: Identity | None, server_name: str, options: Sequence[tuple[str, Any]] = ()
) -> grpc.Channel:
    """A channel to an agent; plain text when ``identity`` is None."""
    settings = [*SIZE_OPTIONS, ("grpc.enable_retries", 0), *options]
    if identity is None:
        return grpc.insecure_channel(address, settings)
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.cert_pem)
    # Several agents may share one address in tests and behind NAT: never share their connections.
    settings += [("grpc.ssl_target_name_override", server_name), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(address, credentials, settings)


def server_credentials(read: Callable[[], Identity | None]) -> grpc.ServerCredentials:
    """Credentials that follow the files: ``read`` answers a new Identity when it changed, else None.

    It is called at every handshake, so it must be cheap. The first call must answer one.
    """
    first = read()
    if first is None:
        raise ValueError("there is no identity to start with")

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        identity = read()
        return None if identity is None else _configuration(identity)

    return grpc.dynamic_ssl_server_credentials(_configuration(first), fetch, require_client_authentication=True)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.cert_pem)], identity.ca_pem)


def peer_names(context: grpc.ServicerContext) -> list[str]:
    """The DNS names of the caller's certificate; empty on a plain connection."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    return [name.decode("utf-8", "replace") for name in names]


class CallerCheck(grpc.ServerInterceptor):  # type: ignore[misc]
    """Only Flux may call an agent.

    The original lets any certificate of the CA call any agent; one agent's
    stolen key would own the fleet.
    """

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = continuation(details)
        return None if handler is None else _guarded(handler)


def _guarded(handler: Any) -> Any:
    """The handler behind a check of its caller's names, whatever its shape."""
    shape = (
        ("stream" if handler.request_streaming else "unary")
        + "_"
        + ("stream" if handler.response_streaming else "unary")
    )
    inner = getattr(handler, shape)

    def checked(request: Any, context: grpc.ServicerContext) -> Any:
        names = peer_names(context)
        if FLUX_NAME not in names or AGENT_NAME in names:
            shown = ", ".join(names[:4]) or "no DNS name"
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"only Flux may call an agent; this certificate shows {shown}"
            )
        return inner(request, context)

    make = getattr(grpc, f"{shape}_rpc_method_handler")
    return make(checked, handler.request_deserializer, handler.response_serializer)
