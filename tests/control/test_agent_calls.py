"""Who can be asked about an execution, and what is said of an agent that cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fluxlib.control.agents.registry import Registry
from fluxlib.control.executions.agent_calls import AgentCalls
from fluxlib.errors import StoreUnavailable
from fluxlib.model import AgentRecord, ExecutionRecord


def _away(agent_id: str) -> AgentRecord | None:
    raise StoreUnavailable("redis refused the connection")


@pytest.mark.parametrize(
    ("stored", "gone"),
    [(lambda agent_id: None, True), (lambda agent_id: AgentRecord(agent_id, "h:1"), False), (_away, False)],
)
def test_gone_is_who_is_not_in_the_store_either(stored: Callable[[str], AgentRecord | None], gone: bool) -> None:
    """Another Flux may have taken it in a moment ago."""
    away = AgentCalls(Registry(), 1.0, stored).away(ExecutionRecord("e", "hello", "w1"))
    assert away.http_status == (502 if gone else 503)
    assert ("is gone" in away.message) is gone
