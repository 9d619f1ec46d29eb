"""What tests of the client need: an agent that says what it is told to, and timers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fluxlib.lifecycle import Timers
from tests.support.clients import running_timers
from tests.support.scripted_agent import ScriptedAgent


@pytest.fixture
def timers() -> Iterator[Timers]:
    with running_timers() as timers:
        yield timers


@pytest.fixture
def agent() -> Iterator[ScriptedAgent]:
    with ScriptedAgent() as agent:
        yield agent
