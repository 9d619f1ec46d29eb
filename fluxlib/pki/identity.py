"""Who is who by certificate: the names, a certificate as it is handed around, and when it is due.

Nothing here or in ``reading`` needs `cryptography`, which costs a process 11 MB: it is imported by what makes or
signs certificates, when it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fluxlib.errors import InvalidInput
from fluxlib.model import AGENT_ID, RESERVED_AGENT_IDS
from fluxlib.pki.files import CertificatesUnusable

FLUX_NAME = "flux"
AGENT_NAME = "flux-agent"  # what the original checks; in every agent's certificate
AGENT_DOMAIN = ".agent.flux.internal"
_DAY = 86400.0
RENEW_BEFORE = 30 * _DAY  # Flux's own
# An agent's certificate is renewed by itself, at two thirds of its life: a stolen one is not of use for long.
AGENT_DAYS = 30
RENEW_AGENT_BEFORE = AGENT_DAYS / 3 * _DAY


@dataclass(frozen=True, slots=True)
class Files:
    """Where a certificate, its key and its CA lie."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its key and the CA that vouches for it, all PEM. ``not_after`` is epoch seconds."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)
    ca_pem: bytes
    not_after: float


def agent_server_name(agent_id: str) -> str:
    """The name by which Flux knows one agent from another."""
    return agent_id + AGENT_DOMAIN


def enrolment_name(agent_id: str, enrolled: int) -> str:
    """The name that says when the agent was enrolled (epoch milliseconds). Renewed certificates keep it.

    By it, certificates from before an agent was deregistered are told from later ones.
    """
    return f"e{enrolled}.{agent_server_name(agent_id)}"


def enrolled_at(names: Sequence[str], agent_id: str) -> int:
    """When the certificate with these names was enrolled; 0 for those of earlier versions."""
    suffix = "." + agent_server_name(agent_id)
    labels = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return min((int(one[1:]) for one in labels if one[:1] == "e" and one[1:].isdecimal()), default=0)


def check_agent_id(agent_id: str) -> None:
    """Raises InvalidInput for what cannot be an agent's ID: it becomes a path and a DNS name."""
    if agent_id in RESERVED_AGENT_IDS or not AGENT_ID.fullmatch(agent_id):
        raise InvalidInput(
            f"{agent_id[:80]!r} cannot be an agent's ID: 1 to 63 lower-case letters, digits and inner hyphens,"
            f" and none of {', '.join(sorted(RESERVED_AGENT_IDS))}"
        )


def outlives(ca_end: float, end: float) -> bool:
    """Whether the CA lasts longer than ``end`` (epoch seconds), so that a renewal brings something."""
    return ca_end - end > _DAY


def is_due(end: float, ca_end: float, now: float) -> bool:
    """Whether to renew what ends at ``end``. One that ends with its CA cannot be issued with a later end."""
    return end - now <= RENEW_BEFORE and outlives(ca_end, end)


def is_agent_due(end: float, ca_end: float, now: float) -> bool:
    """Whether to renew an agent's certificate that ends at ``end``: soon, or much later than any that is issued now.

    Those of earlier versions were valid for a year, and for Flux's side of a connection too.
    """
    left = end - now
    return (left <= RENEW_AGENT_BEFORE and outlives(ca_end, end)) or left > (AGENT_DAYS + 1) * _DAY


def check_authority_time(ca: Path, not_before: float, not_after: float, now: float) -> None:
    """Raises CertificatesUnusable for a CA under which nothing can be signed now; times are epoch seconds.

    Its first start was perhaps made while the clock was wrong, as on a small board before it has heard the time.
    """
    where, today = ca.parent, _day(now)
    if now > not_after:
        raise CertificatesUnusable(
            f"the certificate authority in {where} ended on {_day(not_after)}, and it is {today} by this machine's"
            f" clock: move {where} away for a new one, and enrol the agents again"
        )
    if now < not_before:
        raise CertificatesUnusable(
            f"the certificate authority in {where} begins on {_day(not_before)}, and it is {today} by this machine's"
            " clock: set the clock"
        )


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def utc_now() -> datetime:
    return datetime.now(UTC)
