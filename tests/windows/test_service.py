"""flux.exe as a Windows service, in Wine's service manager."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.support.programs import Api, free_port, wait_until
from tests.windows.programs import built
from windows.lab import Lab

pytestmark = [pytest.mark.windows, pytest.mark.timeout(480)]


@pytest.fixture
def program_data(lab: Lab) -> Iterator[Path]:
    """Where the services keep their things; empty, and nothing is installed, before and after."""
    directory = lab.prefix / "drive_c" / "ProgramData"
    clean(lab, directory)
    yield directory
    clean(lab, directory)


def clean(lab: Lab, directory: Path) -> None:
    for name in ("flux", "flux-agent"):
        for word in ("stop", "delete"):
            subprocess.run(["wine", "sc", word, name], env=lab.environment(), capture_output=True, timeout=60)
        shutil.rmtree(directory / name, ignore_errors=True)


def command(lab: Lab, exe: Path, *words: str) -> tuple[int, str]:
    ran = subprocess.run(
        ["wine", exe, *words],
        env=lab.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    return ran.returncode, ran.stdout.decode(errors="replace")


def test_install_serves_and_remove_leaves_the_data(lab: Lab, program_data: Path) -> None:
    exe = built(lab) / "flux.exe"
    home = program_data / "flux"
    home.mkdir(parents=True)
    port = free_port()
    config = {"api_key": "k" * 32, "port": port, "listen_host": "127.0.0.1", "state_dir": "state", "certs_dir": "certs"}
    (home / "flux.yaml").write_text(yaml.safe_dump(config))
    code, words = command(lab, exe, "service", "install")
    assert code == 0, words
    assert "starts with Windows" in words
    installed = lab.prefix / "drive_c" / "Program Files" / "Flux" / "flux.exe"
    assert installed.read_bytes() == exe.read_bytes()

    def healthy() -> bool:
        try:
            return Api(f"http://127.0.0.1:{port}").request("GET", "/health", timeout=2)[0] == 200
        except OSError:
            return False

    wait_until(healthy, "the service to answer", 60)
    code, words = command(lab, exe, "service", "install")
    assert code == 1
    assert "installed already" in words
    code, words = command(lab, exe, "service", "remove")
    assert code == 0, words
    wait_until(lambda: not healthy(), "the service to be gone")
    assert (home / "state").is_dir()
    assert "stopped" in (home / "flux.log").read_text()
    code, words = command(lab, exe, "service", "remove")
    assert (code, "there is no service flux" in words) == (1, True)


def test_a_service_that_cannot_start_is_not_left_installed(lab: Lab, program_data: Path) -> None:
    home = program_data / "flux"
    home.mkdir(parents=True)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = {"api_key": "k" * 32, "port": taken.getsockname()[1], "listen_host": "127.0.0.1"}
        config |= {"state_dir": "state", "certs_dir": "certs"}
        (home / "flux.yaml").write_text(yaml.safe_dump(config))
        code, words = command(lab, built(lab) / "flux.exe", "service", "install")
    assert code == 1
    assert "flux.log" in words
    assert "the port is in use by" in (home / "flux.log").read_text()
    assert "there is no service flux" in command(lab, built(lab) / "flux.exe", "service", "remove")[1]


def test_an_agent_without_configuration_is_told_how_to_get_one(lab: Lab, program_data: Path) -> None:
    code, words = command(lab, built(lab) / "flux-agent.exe", "service", "install")
    assert code == 1
    assert "flux enroll" in words


def test_run_is_not_for_people(lab: Lab, program_data: Path) -> None:
    (program_data / "flux").mkdir(parents=True)
    code, words = command(lab, built(lab) / "flux.exe", "service", "run")
    assert code == 1
    assert "service install" in words


def test_run_tells_so_where_no_service_was_ever_installed(lab: Lab, program_data: Path) -> None:
    for name in ("flux", "flux_agent"):
        ran = lab.run([f"{name}.py", "service", "run"])
        words = ran.stdout.decode(errors="replace")
        assert (ran.returncode, words.strip()) == (
            1,
            "flux: `service run` is for the service manager: use `service install`",
        )
    assert not list(program_data.glob("flux*"))
