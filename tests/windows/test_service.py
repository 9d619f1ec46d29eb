"""flux.exe as a Windows service, in Wine's service manager."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.support.programs import Api, Flux, free_port, wait_until
from tests.windows.programs import built, need_port
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
    for name in ("flux", "flux-local-agent", "flux-agent"):
        for word in ("stop", "delete"):
            subprocess.run(["wine", "sc", word, name], env=lab.environment(), capture_output=True, timeout=60)
        shutil.rmtree(directory / name, ignore_errors=True)
    shutil.rmtree(installed(lab), ignore_errors=True)


def installed(lab: Lab) -> Path:
    """Where the services' programs are."""
    return lab.prefix / "drive_c" / "Program Files" / "Flux"


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


def test_install_brings_an_agent_and_remove_takes_everything_but_the_data(lab: Lab, program_data: Path) -> None:
    """Nothing is there before: the configuration is made, and says that only this computer is answered."""
    need_port()
    exe = built(lab) / "flux.exe"
    home, agent_home = program_data / "flux", program_data / "flux-local-agent"
    code, words = command(lab, exe, "service", "install")
    assert code == 0, words
    for made in (
        r"C:\Program Files\Flux\flux.exe",
        "the service flux, which answers at http://127.0.0.1:7227",
        "the service flux-local-agent, which runs functions on this computer",
        r"Your API key is in C:\ProgramData\flux\flux.yaml",
        "Only this computer reaches it",
        "service remove",
    ):
        assert made in words
    assert "not registered" not in words
    assert (installed(lab) / "flux.exe").read_bytes() == exe.read_bytes()
    config = yaml.safe_load((home / "flux.yaml").read_text())
    assert config["listen_host"] == "127.0.0.1"

    # At once: the command has waited for both.
    api = Api("http://127.0.0.1:7227", config["api_key"])
    assert [(one["id"], one["status"]) for one in api.call("GET", "/agents")[1]] == [("local", "online")]
    api.deploy({"name": "hello", "handler": "hello.bat"}, {"hello.bat": "@echo Hello, %~1\r\n"})
    status, answer = api.execute("hello", "you")
    assert (status, answer["output"].strip()) == (200, "Hello, you")

    code, words = command(lab, exe, "service", "install")
    assert code == 1
    assert "installed already" in words
    assert api.execute("hello", "again")[0] == 200, "a second installation disturbs nothing"

    code, words = command(lab, exe, "service", "remove")
    assert code == 0, words
    wait_until(lambda: not is_healthy(7227), "the service to be gone")
    assert not installed(lab).exists()
    for name in ("flux", "flux-local-agent"):
        assert f"the service {name}" in words
        assert rf"Remove-Item -Recurse -LiteralPath 'C:\ProgramData\{name}'" in words
    assert (home / "state").is_dir()
    assert "stopped" in (home / "flux.log").read_text()
    assert "stopped" in (agent_home / "flux-local-agent.log").read_text()
    code, words = command(lab, exe, "service", "remove")
    assert (code, "there is no service flux" in words) == (1, True)


def is_healthy(port: int) -> bool:
    try:
        return Api(f"http://127.0.0.1:{port}").request("GET", "/health", timeout=2)[0] == 200
    except OSError:
        return False


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
    assert not (installed(lab) / "flux.exe").exists()


def test_the_agent_of_another_machines_flux_is_a_service_too(lab: Lab, program_data: Path, tmp_path: Path) -> None:
    exe, home = built(lab) / "flux-agent.exe", program_data / "flux-agent"
    with Flux(tmp_path) as flux:
        _, bundle, _ = flux.api.request("POST", "/agents/worker-1/enroll")
        zipfile.ZipFile(io.BytesIO(bundle)).extractall(home)
        config, port = home / "agent.yaml", free_port()
        config.write_text(config.read_text().replace("port: 50052", f"port: {port}"))
        code, words = command(lab, exe, "service", "install")
        assert code == 0, words
        assert f"the service flux-agent, which listens on 0.0.0.0:{port}" in words
        assert "New-NetFirewallRule" in words
        status, answer = flux.api.call("POST", "/agents/register", {"address": f"127.0.0.1:{port}"})
        assert (status, answer["id"]) == (201, "worker-1"), answer
        code, words = command(lab, exe, "service", "remove")
        assert code == 0, words
    assert not installed(lab).exists()
    assert "stopped" in (home / "flux-agent.log").read_text()


def test_an_agent_without_configuration_is_told_how_to_get_one(lab: Lab, program_data: Path) -> None:
    code, words = command(lab, built(lab) / "flux-agent.exe", "service", "install")
    assert code == 78
    assert "flux enroll" in words


def test_run_is_not_for_people(lab: Lab, program_data: Path) -> None:
    (program_data / "flux").mkdir(parents=True)
    code, words = command(lab, built(lab) / "flux.exe", "service", "run")
    assert code == 1
    assert "service install" in words


def test_run_tells_so_where_no_service_was_ever_installed(lab: Lab, program_data: Path) -> None:
    for file, program in (("flux.py", "flux"), ("flux_agent.py", "flux-agent")):
        ran = lab.run([file, "service", "run"])
        words = ran.stdout.decode(errors="replace")
        assert (ran.returncode, words.strip()) == (
            1,
            f"{program}: `service run` is for the service manager: use `service install`",
        )
    assert not list(program_data.glob("flux*"))
