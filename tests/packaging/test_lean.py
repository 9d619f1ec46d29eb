"""What a start imports: the clouds' SDKs cost a second and 200 MB, so nobody pays for one that is not configured.

And what a process that waits for work holds: `cryptography` costs 11 MB, and is for making certificates.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.programs import TOP, Agent, Api, Flux, Program, free_port, wait_until

CLOUD = {"boto3", "botocore", "google.cloud", "google.api_core", "google.auth", "paramiko"}
HTTP_SERVER = {"flask", "waitress", "werkzeug", "fluxlib.control"}
SETTINGS = {"fluxlib.config.control", "fluxlib.config.providers", "fluxlib.config.first_start"}


def _imported(command: list[str], environment: dict[str, str], log: Path, ready: Callable[[], bool]) -> set[str]:
    """Every module the program has imported by the time it is ready and has stopped again."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", "-m", "flux", *command],
            cwd=log.parent,
            env={**os.environ, **environment, "PYTHONPATH": str(TOP)},
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
        try:
            wait_until(lambda: process.poll() is not None or ready(), "the program to be ready")
        finally:
            process.terminate()
            code = process.wait(30)
    text = log.read_text(errors="replace")
    assert code == 0, text[-3000:]
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", text, re.MULTILINE))


def _among(modules: set[str], unwanted: set[str]) -> set[str]:
    return {name for name in modules if any(name == top or name.startswith(f"{top}.") for top in unwanted)}


def _answers(port: int) -> bool:
    try:
        return Api(f"http://127.0.0.1:{port}").request("GET", "/health", timeout=2)[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("providers", [False, True])
def test_flux_imports_no_sdk_unless_a_provider_asks_for_it(tmp_path: Path, providers: bool) -> None:
    port = free_port()
    text = f"api_key: test-key-of-the-programs\nlisten_host: 127.0.0.1\nport: {port}\nstate_dir: s\ncerts_dir: c\n"
    if providers:
        text += "providers:\n  aws:\n    region: eu-central-1\n    ami: ami-12345678\n    security_group_id: sg-1\n"
        text += "    access_key_id: none\n    secret_access_key: none\n"
    (tmp_path / "flux.yaml").write_text(text)
    environment = {"FLUX_CONFIG": str(tmp_path / "flux.yaml"), "AWS_EC2_METADATA_DISABLED": "true"}
    modules = _imported([], environment, tmp_path / "flux.log", lambda: _answers(port))
    assert "fluxlib.control.app" in modules
    found = _among(modules, CLOUD)
    if providers:
        # The other half of the test: it would see one. Google's and SSH's stay out even then.
        assert "boto3" in found
        assert not _among(modules, {"google.cloud"})
    else:
        assert not found


def test_the_agent_imports_neither_clouds_nor_anything_of_the_control_planes(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "agent.yaml").write_text(
        f"agent_id: lean\nport: {port}\nlisten_host: 127.0.0.1\nstate_dir: s\n"
        'isolation: "off"\ntls: {enabled: false}\n'
    )
    log = tmp_path / "agent.log"
    environment = {"AGENT_CONFIG": str(tmp_path / "agent.yaml")}
    modules = _imported(["agent"], environment, log, lambda: b"listens on" in log.read_bytes())
    assert "grpc" in modules
    assert not _among(modules, CLOUD | HTTP_SERVER | SETTINGS)


def test_a_version_is_told_without_reading_anything(tmp_path: Path) -> None:
    modules = _imported(["--version"], {}, tmp_path / "version.log", lambda: False)
    assert "fluxlib.cli" in modules
    assert not _among(modules, {"yaml", "logging", "fluxlib.config.control", "fluxlib.model"})


def _maps_cryptography(program: Program) -> bool:
    assert program.process is not None
    return "/cryptography/" in Path(f"/proc/{program.process.pid}/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_with_certificates_in_order_nobody_holds_what_makes_them(tmp_path: Path) -> None:
    with Flux(tmp_path) as flux:
        assert _maps_cryptography(flux)  # it has made the CA: the other half of the test
    with flux, Agent(tmp_path, flux, "worker-1") as agent:
        flux.register(agent)
        flux.api.deploy({"name": "hello", "handler": "hello.sh"}, {"hello.sh": "#!/bin/sh\necho hello"})
        assert flux.api.execute("hello")[0] == 200
        assert flux.api.call("GET", "/health")[0] == 200
        assert not _maps_cryptography(flux)
        assert not _maps_cryptography(agent)
