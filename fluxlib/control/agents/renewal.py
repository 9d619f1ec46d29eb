"""Certificates are renewed before they end, without a restart on either side.

Agents make their own new key and are given a certificate for it; Flux's own is
read again when it changed, and every connection reopened under it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from fluxlib.control.agents.connection import AgentConnection
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.errors import FluxError, Unavailable
from fluxlib.pki import Authority, Identity
from fluxlib.pki.identity import RENEW_BEFORE

log = logging.getLogger(__name__)

CHECK_EVERY = 60.0
_RETRY_AFTER = 3600.0
_WARN_AGENT_BEFORE = 7 * 86400.0
# Seconds between the clocks of Flux and an agent from which on one of them is wrong, and nothing is to be dated by it.
_CLOCKS_APART = 86400.0


class OwnIdentity:
    """Flux's own certificate, as every new connection shows it."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._identity = authority.flux_identity()

    def current(self) -> Identity:
        return self._identity

    def reload(self) -> bool:
        """Take what lies on disk now, renewed when it is about to end; whether it is another one."""
        identity = self._authority.flux_identity()
        changed = identity.cert_pem != self._identity.cert_pem
        self._identity = identity
        return changed


class Renewal:
    """``tick`` every :data:`CHECK_EVERY` seconds."""

    def __init__(
        self,
        authority: Authority,
        own: OwnIdentity,
        fleet: Fleet,
        leadership: Leadership,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authority = authority
        self._own = own
        self._fleet = fleet
        self._leadership = leadership
        self._clock = clock
        self._failed: dict[str, tuple[float, str]] = {}  # agent → when, why

    def tick(self, now: float) -> None:
        """Renew what is due at ``now``."""
        if self._own.reload():
            log.info("Flux has a new certificate of its own: connections are reopened under it")
            for agent in self._fleet.agents():
                if agent.connection is not None:
                    agent.connection.reopen()
        if not self._leadership.leads:
            return
        for agent in self._fleet.agents():
            connection = agent.connection
            if connection is None or not _renewable(agent):
                continue
            if not self._authority.is_agent_due(agent.certificate_not_after, now):
                continue
            failed_at, _ = self._failed.get(agent.agent_id, (0.0, ""))
            # Apart, in whichever direction: the wall clock, which certificates need, may have been set back.
            if abs(now - failed_at) >= _RETRY_AFTER:
                self._renew(agent, connection, now)

    def warnings(self) -> Sequence[str]:
        """What ends soon, and why it was not renewed; and certificates that cannot be read any more.

        "Soon" is 30 days for the CA and Flux, 7 for an agent: it is renewed 10 days before its end, so one that has
        less was not there, or its renewal failed.
        """
        now = self._clock()
        found, ending = list[str](), list[tuple[str, float, str]]()
        try:
            ending += [(one.name, one.not_after, "") for one in self._authority.expiries()]
        except FluxError as error:
            found.append(error.message)
        for agent in self._fleet.agents():
            if agent.certificate_not_after:
                ending.append(
                    (f"the certificate of agent {agent.agent_id}", agent.certificate_not_after, agent.agent_id)
                )
        for name, not_after, agent_id in ending:
            _, reason = self._failed.get(agent_id, (0.0, ""))
            if reason or not_after - now <= (_WARN_AGENT_BEFORE if agent_id else RENEW_BEFORE):
                day = time.strftime("%Y-%m-%d", time.gmtime(not_after))
                found.append(f"{name} ends on {day}" + (f" and was not renewed: {reason}" if reason else ""))
        return found

    def _renew(self, agent: Agent, connection: AgentConnection, now: float) -> None:
        try:
            request, agent_now = connection.create_certificate_request()
            if agent_now and abs(agent_now - now) > _CLOCKS_APART:
                days = (now - agent_now) / 86400
                raise Unavailable(
                    f"Flux's clock is {abs(days):.1f} days {'ahead of' if days > 0 else 'behind'} the agent's:"
                    " set the wrong one right"
                )
            certificate, not_after = self._authority.sign_agent_csr(
                request, agent.agent_id, enrolled=connection.enrolled
            )
            connection.install_certificate(certificate, self._authority.ca_pem)
        except FluxError as error:
            log.warning("the certificate of agent %s could not be renewed: %s", agent.agent_id, error)
            self._failed[agent.agent_id] = (now, error.message)
            return
        self._failed.pop(agent.agent_id, None)
        self._fleet.set_certificate_end(agent, not_after)
        log.info(
            "agent %s has a new certificate, good until %s",
            agent.agent_id,
            time.strftime("%Y-%m-%d", time.gmtime(not_after)),
        )


def _renewable(agent: Agent) -> bool:
    """Agents of ours that are there and use TLS."""
    return agent.record.status.present and not agent.record.original and agent.certificate_not_after > 0
