"""Flux's own certificate authority, its certificates and its SSH key."""

from fluxlib.pki.authority import Authority, Expiry
from fluxlib.pki.identity import Identity, agent_server_name

__all__ = ["Authority", "Expiry", "Identity", "agent_server_name"]
