"""The certificate directory under whole programs: one CA whoever starts, agents enrolled by hand and by the API."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from fluxlib.config.agent import load_agent
from fluxlib.errors import ConfigInvalid
from fluxlib.pki import Authority
from tests.support.need import need_root
from tests.support.programs import TOP, Agent, Flux, wait_until

NOBODY = 65534


def test_two_that_start_together_on_one_directory_make_one_ca(directory: Path) -> None:
    certs = directory / "shared-certs"
    both = [Flux(directory, name, certs_dir=str(certs)) for name in ("one", "two")]
    for flux in both:
        with flux.log.open("ab") as log:
            flux.process = flux.spawn(log)
    try:
        for flux in both:
            wait_until(flux.ready, f"{flux.name} to be ready")
        assert sum(flux.log.read_text().count("made a new certificate authority") for flux in both) == 1
        # Each takes the same agent for one of its own.
        with Agent(directory, both[0], "shared") as agent:
            for flux in both:
                flux.register(agent)
    finally:
        for flux in both:
            flux.stop()


def test_what_is_written_is_private(flux: Flux) -> None:
    flux.api.request("POST", "/agents/private/enroll")
    for path in [flux.certs, *flux.certs.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE(flux.home.joinpath("state").stat().st_mode) & 0o077 == 0


def enroll_by_api(flux: Flux, agent_id: str, into: Path) -> None:
    status, body, headers = flux.api.request("POST", f"/agents/{agent_id}/enroll")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/zip", "no-store")
    zipfile.ZipFile(io.BytesIO(body)).extractall(into)
    (into / "agent-key.pem").chmod(0o600)  # as the head of agent.yaml says; Info-ZIP keeps the mode


def enroll_by_command(flux: Flux, agent_id: str, into: Path) -> None:
    done = command(flux, "enroll", agent_id, "--output", str(into.parent))
    assert done.returncode == 0, done.stderr


def command(flux: Flux, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **flux.environment, "PYTHONPATH": str(TOP)}
    return subprocess.run(
        [sys.executable, "-m", "flux", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("enroll", [enroll_by_api, enroll_by_command])
def test_an_enrolled_agent_joins(flux: Flux, directory: Path, enroll: Callable[[Flux, str, Path], None]) -> None:
    agent_id = f"by-{enroll.__name__.rpartition('_')[2]}"
    into = directory / "enrolled" / agent_id
    enroll(flux, agent_id, into)
    made = yaml.safe_load((into / "agent.yaml").read_text())
    assert made["agent_id"] == agent_id
    # The files as they are; only where this test's machine differs.
    agent = Agent(directory, flux, agent_id, tls={"enabled": False})
    settings = yaml.safe_load(agent.config_file.read_text())
    (into / "agent.yaml").write_text(yaml.safe_dump({**settings, "tls": made["tls"]}))
    agent.environment = {"AGENT_CONFIG": str(into / "agent.yaml")}
    with agent:
        assert flux.register(agent)["id"] == agent_id
        # A second key for a living agent's ID is not given away.
        assert flux.api.call("POST", f"/agents/{agent_id}/enroll")[0] == 409
        assert flux.api.call("DELETE", f"/agents/{agent_id}")[0] == 200


def test_a_key_unpacked_without_its_mode_is_refused_with_what_to_do(flux: Flux, directory: Path) -> None:
    """As Python's zipfile and others do; Info-ZIP keeps 0600."""
    into = directory / "open"
    enroll_by_api(flux, "open", into)
    assert "sudo install -m 600" in (into / "agent.yaml").read_text()
    for mode in (0o644, 0o640, 0o602):
        (into / "agent-key.pem").chmod(mode)
        with pytest.raises(ConfigInvalid, match=f"chmod 600 {into / 'agent-key.pem'}"):
            load_agent(into / "agent.yaml")
    (into / "agent-key.pem").chmod(0o600)
    assert load_agent(into / "agent.yaml").warnings == ()


@pytest.mark.parametrize("agent_id", ["flux", "flux-agent", "*.x", "../x", "..", "A", "x" * 64, "-x", "a.b", "a\nb"])
def test_what_can_be_no_id_is_not_enrolled(flux: Flux, agent_id: str) -> None:
    before = sorted(flux.certs.rglob("*"))
    status, answer = flux.api.call("POST", f"/agents/{quote(agent_id, safe='')}/enroll")
    assert status in (400, 404), answer
    if agent_id in ("flux", "*.x", "../x"):
        done = command(flux, "enroll", agent_id)
        assert done.returncode == 1
        assert "cannot be an agent's ID" in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(flux.certs.rglob("*")) == before


def test_root_enrols_as_the_owner_of_the_certificates(directory: Path) -> None:
    need_root()
    flux = Flux(directory, "owned")
    flux.certs.mkdir(mode=0o700)
    os.chown(flux.certs, NOBODY, NOBODY)
    into = directory / "by-root"
    done = command(flux, "enroll", "theirs", "--output", str(into))
    assert done.returncode == 0, done.stderr
    assert {path.stat().st_uid for path in flux.certs.rglob("*")} == {NOBODY}
    assert {path.stat().st_uid for path in into.rglob("*")} == {0}
    assert stat.S_IMODE((into / "theirs" / "agent-key.pem").stat().st_mode) == 0o600
    # The service's user can go on with it.
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        Authority.open(flux.certs).issue_agent("theirs")
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_one_state_directory_is_for_one_process(flux: Flux, directory: Path) -> None:
    other = Flux(directory, "second", state_dir=str(flux.home / "state"))
    done = command(other, "serve")
    assert done.returncode == 1
    assert flux.process is not None
    assert f"in use by process {flux.process.pid}" in done.stderr
    assert "state_dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert flux.api.call("GET", "/health")[0] == 200
