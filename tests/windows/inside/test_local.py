"""The agent that Flux starts beside itself: its files as Windows writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxlib.config.control import load_control
from fluxlib.errors import CannotStart
from fluxlib.filelock import ExclusiveLock
from fluxlib.lifecycle import StopSignal
from fluxlib.local import LOCK, greet, prepare_agent, serve_local

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


def test_a_second_double_click_says_that_it_runs_already(tmp_path: Path) -> None:
    (tmp_path / "flux.yaml").write_text("api_key: 0123456789abcdef0123\nstate_dir: state\ncerts_dir: certs\n")
    config = load_control(tmp_path / "flux.yaml")
    lock = ExclusiveLock(tmp_path / LOCK, "")
    try:
        with pytest.raises(
            CannotStart, match=rf"already running here \(process {os.getpid()}\), it answers at http://"
        ):
            serve_local(config, tmp_path, StopSignal(), greet)
    finally:
        lock.release()
