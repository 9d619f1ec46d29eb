"""From a running original to this system: its Redis, certs_dir and flux.yaml, its agents going on, then each agent.

Needs the original programs, as ``test_originals`` does.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.need import need_root
from tests.support.original_authority import original_certificate
from tests.support.original_programs import DIRECTORY, FLUX_PORT, OriginalAgent, OriginalFlux
from tests.support.programs import Api, Program, wait_until
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.skipif(not DIRECTORY, reason="FLUX_ORIGINAL_DIR names no original programs")

SCRIPT = """#!/bin/sh
case "$1" in
  cat) exec cat ;;
  sleep) echo started; exec sleep "$2" ;;
  *) echo "$GREETING $1" ;;
esac
"""
SPEC: dict[str, Any] = {
    "name": "wired",
    "handler": "main.sh",
    "timeout": 2,
    "max_concurrency": 3,
    "max_concurrency_behavior": "wait",
    "env": {"GREETING": "hello"},
}


class OurFlux(Program):
    """On an original's flux.yaml, as it is."""

    def __init__(self, directory: Path, config_file: Path) -> None:
        super().__init__(
            directory, "flux", [], {"FLUX_CONFIG": str(config_file), "STATE_DIRECTORY": str(directory / "s")}
        )
        self.api = Api(f"http://127.0.0.1:{FLUX_PORT}")

    def ready(self) -> bool:
        super().ready()
        try:
            return self.api.request("GET", "/health", timeout=2)[0] == 200
        except OSError:
            return False

    def agent(self, agent_id: str) -> dict[str, Any]:
        _, agents = self.api.call("GET", "/agents")
        return next(agent for agent in agents if agent["id"] == agent_id)


class OurAgent(Program):
    """On an original's agent.yaml."""

    def __init__(self, directory: Path, original: OriginalAgent) -> None:
        variables = {
            "AGENT_CONFIG": str(original.config_file),
            "STATE_DIRECTORY": str(directory / f"{original.agent_id}-state"),
        }
        with original.config_file.open("a") as file:
            # The machine of the tests may have no cgroup v2.
            file.write("isolation: 'off'\n")
            if not original.tls:
                file.write("tls: {enabled: false}\n")
        super().__init__(directory, original.agent_id, ["agent"], variables)
        self._original = original

    def ready(self) -> bool:
        return super().ready() and self._original.answers()


def _runs_on(flux: OurFlux, agent_id: str, other: str) -> None:
    """A call is answered from this agent while the other one is drained."""
    assert flux.api.call("POST", f"/agents/{other}/drain")[0] == 200
    status, answer = flux.api.execute("wired", "you")
    assert (status, answer["output"], answer["agent_id"]) == (200, "hello you\n", agent_id), answer
    assert flux.api.call("POST", f"/agents/{other}/undrain")[0] == 200
    _online(flux, other)


def _is_ours(flux: OurFlux, agent_id: str) -> bool:
    return flux.agent(agent_id)["original"] is False


def _online(flux: OurFlux, agent_id: str) -> None:
    wait_until(lambda: flux.agent(agent_id)["status"] == "online", f"{agent_id} to be online", 60)


@pytest.mark.parametrize("with_tls", [True, False], ids=["tls", "plain"])
def test_from_a_running_original_to_this_system(tmp_path: Path, with_tls: bool) -> None:
    need_root()
    certs = tmp_path / "certs" if with_tls else None
    with ExitStack() as replacements, RedisServer(tmp_path) as redis, OriginalFlux(redis.address, certs) as before:
        tls = {name: original_certificate(certs, tmp_path / f"tls-{name}") if certs else None for name in ("a1", "a2")}
        with OriginalAgent("a1", tls["a1"]) as a1, OriginalAgent("a2", tls["a2"]) as a2:
            old = before.api
            for agent in (a1, a2):
                body = json.dumps({"address": agent.address, "tls": with_tls}).encode()
                status, answer, _ = old.request("POST", "/agents/register", body)
                assert status == 201, answer
            old.deploy(SPEC, {"main.sh": SCRIPT})
            heavy = {"name": "heavy", "handler": "run", "resources": {"cpu": 100, "memory": 64}}
            assert old.call("PUT", "/functions", yaml.safe_dump(heavy).encode())[0] == 201
            assert old.execute("wired", "you")[1]["output"] == "hello you\n"
            with redis.client() as client:
                theirs = {key: client.dump(key) for key in client.keys("*")}  # type: ignore[union-attr]

            # The original stops, and ours starts on what it had. Its agents go on.
            before.kill()
            with OurFlux(tmp_path, before.config_file) as flux:
                for agent in (a1, a2):
                    _online(flux, agent.agent_id)
                _, function = flux.api.call("GET", "/functions/wired")
                kept = {"timeout": 2, "max_concurrency": 3, "max_concurrency_behavior": "wait", "env": SPEC["env"]}
                assert {name: function[name] for name in kept} == kept, function
                # Declared, with no code yet.
                assert flux.api.call("GET", "/functions/heavy")[1]["resources"] == {"cpu": 100, "memory": 64}
                _runs_on(flux, "a1", "a2")
                _runs_on(flux, "a2", "a1")
                status, answer = flux.api.execute("wired", "sleep", "30")
                assert (status, answer["error"]) == (500, "execution timed out after 2s")

                # Each agent is replaced by ours, one after the other: on its agent.yaml, its certificate and its port.
                running = flux.api.call("POST", "/execute/wired/async", {"args": ["sleep", "1"]})[1]["execution_id"]
                assert flux.api.ended(running)["status"] == "success"
                for agent, other in ((a1, "a2"), (a2, "a1")):
                    assert flux.api.call("POST", f"/agents/{agent.agent_id}/drain")[0] == 200
                    # The other one takes over meanwhile.
                    assert flux.api.execute("wired", "you")[1]["agent_id"] == other
                    agent.kill()
                    replacements.enter_context(OurAgent(tmp_path, agent))
                    wait_until(partial(_is_ours, flux, agent.agent_id), "Flux to know it for one of ours", 60)
                    assert flux.api.call("POST", f"/agents/{agent.agent_id}/undrain")[0] == 200
                    _online(flux, agent.agent_id)
                    _runs_on(flux, agent.agent_id, other)
                # What only agents of ours can do.
                status, answer = flux.api.execute("wired", "cat", input="from standard input")
                assert (status, answer["output"]) == (200, "from standard input"), answer
                # Nothing of the original's was written.
                with redis.client() as client:
                    assert {key: client.dump(key) for key in theirs} == theirs
