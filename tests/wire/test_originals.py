"""The original Go programs themselves in the other side's place, where somebody has them.

``FLUX_ORIGINAL_DIR`` names a directory with ``serverless-flux`` and ``serverless-agent``. Without it these are
skipped, also in CI: the programs are not ours to ship. The contract is held without them by the tests beside this.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.programs import API_KEY, Agent, Api, Flux, free_port, wait_until
from tests.support.redis_server import RedisServer
from tests.wire.test_our_flux import SCRIPT, SPEC, original_certificate

DIRECTORY = os.environ.get("FLUX_ORIGINAL_DIR", "")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="FLUX_ORIGINAL_DIR names no original programs")


@contextmanager
def _original(name: str, home: Path, variable: str, config: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    home.mkdir(exist_ok=True)
    file = home / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [Path(DIRECTORY) / name], cwd=home, env={**os.environ, variable: str(file)}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        print((home / "log").read_text(errors="replace")[-3000:])


def _serves(api: Api) -> bool:
    try:
        return api.request("GET", "/health", timeout=2)[0] == 200
    except OSError:
        return False


def _works(api: Api, agent_id: str) -> None:
    """A function goes there, runs, fails and is cancelled."""
    api.deploy(SPEC, {"main.sh": SCRIPT})
    status, answer = api.execute("wired", "you")
    assert (status, answer["output"], answer["agent_id"]) == (200, "hello you\n", agent_id), answer
    status, answer = api.execute("wired", "exit", "3")
    assert (status, answer["error"]) == (500, "exit code 3")
    status, answer = api.call("POST", "/execute/wired/async", {"args": ["sleep", "30"]})
    assert status == 202, answer
    status, cancelled = api.call("DELETE", f"/executions/{answer['execution_id']}")
    assert (status, cancelled["status"]) == (200, "cancelled"), cancelled


@pytest.mark.parametrize("with_tls", [True, False], ids=["tls", "plain"])
def test_the_original_agent_under_our_flux(tmp_path: Path, with_tls: bool) -> None:
    with RedisServer(tmp_path) as redis, Flux(tmp_path, tls=with_tls, health_interval_sec=1) as flux:
        port = free_port()
        config: dict[str, Any] = {"agent_id": "old-1", "port": str(port), "redis_addr": redis.address}
        config["tls"] = {"enabled": False}
        if with_tls:
            files = original_certificate(flux.certs, tmp_path)
            config["tls"] = {"enabled": True, **dict(zip(("ca_cert", "cert_file", "key_file"), files, strict=True))}
        with _original("serverless-agent", tmp_path / "original", "AGENT_CONFIG", config):
            body = {"address": f"127.0.0.1:{port}", "legacy": True}
            wait_until(lambda: flux.api.call("POST", "/agents/register", body)[0] == 201, "it to be registered", 30)
            _works(flux.api, "old-1")


@pytest.mark.parametrize("with_tls", [True, False], ids=["tls", "plain"])
def test_our_agent_under_the_original_flux(tmp_path: Path, with_tls: bool) -> None:
    # The original listens on 7227 and keeps its certificates where it is told.
    ours = Flux(tmp_path, tls=with_tls)  # for its certificates only: it is never started
    config = {"api_key": API_KEY, "certs_dir": str(ours.certs), "disable_grpc_tls": not with_tls}
    with (
        RedisServer(tmp_path) as redis,
        Agent(tmp_path, ours, "new-1") as agent,
        _original("serverless-flux", tmp_path / "original", "FLUX_CONFIG", {**config, "redis_addr": redis.address}),
    ):
        api = Api("http://127.0.0.1:7227")
        wait_until(lambda: _serves(api), "the original to answer", 30)
        status, answer = api.call("POST", "/agents/register", {"address": agent.address})
        assert status == 201, answer
        _works(api, "new-1")
