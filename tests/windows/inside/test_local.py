"""The agent that Flux starts beside itself: its files as Windows writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxlib.config.control import load_control
from fluxlib.local import prepare_agent

pytestmark = pytest.mark.windows


def test_a_second_start_takes_the_certificate_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "flux.yaml").write_text("api_key: 0123456789abcdef0123\nstate_dir: state\ncerts_dir: certs\n")
    config = load_control(tmp_path / "flux.yaml")
    certificate = prepare_agent(config, tmp_path / "agent").with_name("agent.pem")
    first = certificate.read_bytes()
    prepare_agent(config, tmp_path / "agent")
    assert certificate.read_bytes() == first
    certificate.with_name("ca.pem").write_bytes(b"nothing of the kind")
    prepare_agent(config, tmp_path / "agent")
    assert certificate.read_bytes() != first
