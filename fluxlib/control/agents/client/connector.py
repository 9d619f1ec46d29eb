"""Getting to know an agent by its certificate, and a connection to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from fluxlib.control.agents.client.channels import Line, check_address, server_name
from fluxlib.control.agents.client.client import AgentClient
from fluxlib.control.agents.connection import ConnectionEvents, ProbeResult
from fluxlib.errors import AgentLost, AgentRefused, AgentRevoked, AgentUnreachable, InvalidInput
from fluxlib.lifecycle import Timers
from fluxlib.model import Inventory
from fluxlib.pki import Identity
from fluxlib.pki.identity import AGENT_DOMAIN, AGENT_NAME, check_agent_id, enrolled_at, enrolment_name
from fluxlib.rpc import codec
from fluxlib.rpc.codec import NodeReport
from fluxlib.rpc.diagnosis import diagnose, names_shown
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.status import NotImplementedByPeer

_TIMEOUT = 5.0  # seconds, of each call and of the handshake that finds a reason


class AgentConnector:
    """See connection.Connector. ``identity`` answers the certificate Flux has now; None = plain text.

    ``session`` names this life of Flux to the agents. ``revoked_at(agent_id)``: certificates of this agent enrolled at
    or before that time (epoch milliseconds) are refused; 0 = none. It may raise StoreUnavailable.
    """

    def __init__(
        self,
        identity: Callable[[], Identity | None],
        session: str,
        timers: Timers,
        revoked_at: Callable[[str], int] = lambda agent_id: 0,
    ) -> None:
        self._identity = identity
        self._revoked_at = revoked_at
        self._session = session
        self._timers = timers

    def probe(self, address: str, *, legacy: bool = False, expected_id: str = "") -> ProbeResult:
        check_address(address)
        identity = self._identity()
        if identity is None:
            with self._opened(address, None, AGENT_NAME) as line:
                return self._probe_result(address, line, expected_id, legacy_certificate=legacy)
        agent_id = expected_id
        if not agent_id:
            # By the name every agent of this Flux has: only to learn the ID it claims.
            with self._opened(address, identity, AGENT_NAME) as line:
                agent_id = self._report(line).agent_id
            _check_id(agent_id, address)
        name = server_name(agent_id, legacy=False)
        revoked_at = self._revoked_at(agent_id)
        try:
            if revoked_at:
                return self._probe_enrolled_after(revoked_at, address, identity, agent_id)
            with self._opened(address, identity, name) as line:
                return self._probe_result(address, line, agent_id, legacy_certificate=False)
        except AgentUnreachable as error:
            shown = names_shown(address, identity, AGENT_NAME, _TIMEOUT)
            if not shown or name in shown:
                raise
            other = next((one for one in shown if one.endswith(AGENT_DOMAIN)), "")
            if other:
                raise AgentRefused(
                    f"what answers at {address} calls itself {agent_id}, but its certificate is that of"
                    f" {other.removesuffix(AGENT_DOMAIN)}: set its own `agent_id`, or enrol it again"
                ) from error
            if not legacy:
                raise AgentRefused(
                    f"the certificate of the agent at {address} carries no ID, as an original's: enrol it here with"
                    f' `flux enroll {agent_id}`, or register it with "legacy": true'
                ) from error
        with self._opened(address, identity, AGENT_NAME) as line:
            return self._probe_result(address, line, agent_id, legacy_certificate=True)

    def _probe_enrolled_after(self, revoked_at: int, address: str, identity: Identity, agent_id: str) -> ProbeResult:
        """Where certificates were revoked: by the name of one enrolled later, which every handshake checks anew."""
        name = server_name(agent_id, legacy=False)
        shown = names_shown(address, identity, name, _TIMEOUT)
        if not shown:
            raise AgentUnreachable(
                diagnose(address, identity, name, _TIMEOUT) or f"the certificate of the agent at {address} is not shown"
            )
        enrolled = enrolled_at(shown, agent_id)
        if enrolled <= revoked_at:
            raise AgentRevoked(
                f"the certificate of agent {agent_id} at {address} was revoked when the agent was deregistered:"
                f" enrol it again (flux enroll {agent_id}), and restart it with the new files",
                revoked_at,
            )
        with self._opened(address, identity, enrolment_name(agent_id, enrolled)) as line:
            found = self._probe_result(address, line, agent_id, legacy_certificate=False)
            return replace(found, enrolled=enrolled)

    def connect(self, probe: ProbeResult, events: ConnectionEvents) -> AgentClient:
        def new_line() -> Line:
            agent_id, enrolled = probe.agent_id, probe.enrolled
            name = server_name(agent_id, legacy=probe.legacy_certificate)
            return Line(
                probe.address,
                self._identity(),
                enrolment_name(agent_id, enrolled) if enrolled else name,
                self._timers,
                agent_id=agent_id,
                keepalive=probe.inventory is not None,
            )

        return AgentClient(probe.agent_id, probe.inventory, new_line, self._session, events, probe.enrolled)

    @contextmanager
    def _opened(self, address: str, identity: Identity | None, name: str) -> Iterator[Line]:
        """A channel for a few questions; when it fails, a handshake of our own finds out why."""
        line = Line(address, identity, name, self._timers)
        try:
            yield line
        except (AgentUnreachable, AgentLost) as error:
            reason = diagnose(address, identity, name, _TIMEOUT)
            raise AgentUnreachable(reason or f"the agent at {address} cannot be reached: {error.message}") from error
        finally:
            line.close()

    def _probe_result(self, address: str, line: Line, expected_id: str, *, legacy_certificate: bool) -> ProbeResult:
        report = self._report(line)
        _check_id(report.agent_id, address)
        if expected_id and report.agent_id != expected_id:
            raise AgentRefused(f"the agent at {address} is {report.agent_id}, not {expected_id}")
        return ProbeResult(report.agent_id, address, report, self._inventory(line), legacy_certificate)

    def _report(self, line: Line) -> NodeReport:
        with line.call() as stub:
            answer = stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=_TIMEOUT)
        return codec.report_from_message(answer, time.time())

    def _inventory(self, line: Line) -> Inventory | None:
        try:
            with line.call() as stub:
                answer = stub.GetInventory(pb.InventoryRequest(), timeout=_TIMEOUT)
        except NotImplementedByPeer:
            return None
        return codec.inventory_from_message(answer)


def _check_id(agent_id: str, address: str) -> None:
    try:
        check_agent_id(agent_id)
    except InvalidInput as error:
        raise AgentRefused(
            f"the agent at {address} cannot be registered: {error.message}: set its `agent_id`"
        ) from error
