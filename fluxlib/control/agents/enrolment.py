"""Certificates for an agent added by hand, as one zip for those who have only the API."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable

from fluxlib.control.agents.fleet import Fleet
from fluxlib.errors import Conflict
from fluxlib.pki import Authority
from fluxlib.pki.authority import enrolment_files
from fluxlib.pki.identity import check_agent_id


class EnrolmentService:
    """services.Enrolment."""

    def __init__(
        self,
        authority: Authority,
        fleet: Fleet,
        agent_port: int,
        revoked_at: Callable[[str], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._authority = authority
        self._fleet = fleet
        self._agent_port = agent_port
        self._revoked_at = revoked_at
        self._clock = clock

    def bundle(self, agent_id: str) -> bytes:
        """agent.yaml and three PEM files, private to whoever unpacks them. Raises InvalidInput, Conflict."""
        check_agent_id(agent_id)
        if self._fleet.get(agent_id) is not None:
            # A second key for the ID of a living agent would let its holder play that agent.
            raise Conflict(f"agent {agent_id} is registered: deregister it first to give its ID to another machine")
        identity = self._authority.issue_agent(agent_id, after=self._revoked_at(agent_id))
        files = enrolment_files(identity, agent_id, self._agent_port)
        written = time.gmtime(self._clock())[:6]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, content in sorted(files.items()):
                entry = zipfile.ZipInfo(name, written)
                entry.create_system = 3  # Unix: only then do the mode bits below count
                entry.external_attr = 0o600 << 16
                bundle.writestr(entry, content)
        return buffer.getvalue()
