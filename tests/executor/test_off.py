"""Which user profile off runs functions as."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxlib.agent.executor import off
from fluxlib.agent.executor.spawned import SpawningExecutor
from fluxlib.config.agent import read_agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give functions another user")


@pytest.mark.parametrize(("user", "told"), [("no-such-user", True), ("root", True), ("nobody", False), ("", False)])
def test_a_user_that_cannot_be_had_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str, told: bool
) -> None:
    notes: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        SpawningExecutor, "__init__", lambda self, state, isolation, *arguments: notes.append(isolation.notes)
    )
    setting = f"runner_user: {user}\n" if user else ""
    config = read_agent(f"agent_id: w\nisolation: off\n{setting}", tmp_path / "agent.yaml")
    off.OffExecutor(config, tmp_path, "for a test")
    assert any(f"runner_user {user} is not used" in note for note in notes[0]) is told
