"""Every command of the frozen programs, once: what flux.spec leaves out is missed by nothing but who needs it."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.conftest import Package
from tests.support.programs import API_KEY, Api, free_port, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GOOD = {
    "flux": f"api_key: {API_KEY}\n",
    "flux-agent": "agent_id: worker-1\ntls: {enabled: false}\nisolation: 'off'\n",
}


def _call(package: Package, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    link = package.root / "usr/bin" / package.name
    return subprocess.run([link, *arguments], capture_output=True, text=True, env=environment, timeout=60)


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


def _serves(package: Package, *arguments: str | Path, ready: Callable[[str], bool], **environment: str) -> None:
    """It comes up, and ends when it is told to."""
    link = package.root / "usr/bin" / package.name
    log = Path(environment.pop("LOG"))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [link, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: process.poll() is not None or ready(log.read_text()), f"{link.name} to come up", 90)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    said = log.read_text()
    assert code == 0, said
    assert "Traceback" not in said


def _is_healthy(port: int) -> bool:
    try:
        return Api(f"http://127.0.0.1:{port}").request("GET", "/health", timeout=2)[0] == 200
    except OSError:
        return False


def test_it_offers_what_is_tried_here(package: Package) -> None:
    tried = {
        "flux": {"serve", "run", "enroll", "keys", "agent", "check-config"},
        "flux-agent": {"agent", "check-config"},
    }
    done = _call(package, "--help", COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(re.findall(r"^    ([a-z-]+)(?:  |$)", done.stdout, re.MULTILINE)) == tried[package.name]


def test_a_configuration_is_checked(package: Package, tmp_path: Path) -> None:
    good = _written(tmp_path / "good.yaml", GOOD[package.name])
    fine = _call(package, "check-config", good)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert f"{good} is fine" in fine.stdout
    faulty = _call(package, "check-config", _written(tmp_path / "bad.yaml", "port: 0\n"))
    assert (faulty.returncode, faulty.stderr) == (1, "")
    assert "port: must be between" in faulty.stdout
    missing = _call(package, "check-config", tmp_path / "nowhere.yaml")
    assert (missing.returncode, missing.stderr) == (1, "")
    assert "there is no" in missing.stdout


def test_the_settings_are_told(package: Package) -> None:
    done = _call(package, "check-config", "--settings")
    assert (done.returncode, done.stderr) == (0, "")
    assert "`runner_user`" in done.stdout
    assert ("`api_key`" in done.stdout) == (package.name == "flux")


def test_an_agent_comes_up(package: Package, tmp_path: Path) -> None:
    text = f'agent_id: worker-1\nport: {free_port()}\nlisten_host: 127.0.0.1\nstate_dir: state\nisolation: "off"\n'
    config = _written(tmp_path / "agent.yaml", text + "tls: {enabled: false}\n")
    for arguments in [["agent"], []] if package.name == "flux-agent" else [["agent"]]:
        _serves(
            package,
            *arguments,
            ready=lambda said: "listens on" in said,
            AGENT_CONFIG=str(config),
            LOG=str(tmp_path / "log"),
        )


@pytest.fixture
def flux_yaml(package: Package, tmp_path: Path) -> Path:
    if package.name != "flux":
        pytest.skip("the control plane's commands")
    text = f"api_key: {API_KEY}\nlisten_host: 127.0.0.1\nport: {free_port()}\nstate_dir: s\ncerts_dir: c\n"
    return _written(tmp_path / "state/flux.yaml", text)


def _port(config: Path) -> int:
    return int(config.read_text().partition("port: ")[2].split()[0])


def test_flux_serves(package: Package, tmp_path: Path, flux_yaml: Path) -> None:
    port = _port(flux_yaml)
    _serves(package, ready=lambda _: _is_healthy(port), FLUX_CONFIG=str(flux_yaml), LOG=str(tmp_path / "log"))
    _serves(package, "serve", ready=lambda _: _is_healthy(port), FLUX_CONFIG=str(flux_yaml), LOG=str(tmp_path / "log"))


def test_flux_runs_with_an_agent_of_its_own(package: Package, tmp_path: Path, flux_yaml: Path) -> None:
    api = Api(f"http://127.0.0.1:{_port(flux_yaml)}")

    def has_agent(_: str) -> bool:
        try:
            return b'"online"' in api.request("GET", "/agents", timeout=2)[1]
        except OSError:
            return False

    _serves(package, "run", "--state", flux_yaml.parent, ready=has_agent, LOG=str(tmp_path / "log"))


def test_flux_enrols_and_keeps_keys(package: Package, tmp_path: Path, flux_yaml: Path) -> None:
    environment = {"FLUX_CONFIG": str(flux_yaml)}
    enrolled = _call(package, "enroll", "worker-1", "--output", tmp_path, **environment)
    assert (enrolled.returncode, enrolled.stderr) == (0, "")
    assert _call(package, "check-config", "--agent", tmp_path / "worker-1/agent.yaml").returncode == 0
    assert _call(package, "keys", "add", "ci", "--role", "invoke", **environment).stdout.startswith("flux_")
    assert "ci: invoke" in _call(package, "keys", "list", **environment).stdout
    assert _call(package, "keys", "remove", "ci", **environment).returncode == 0
    assert "ci" not in _call(package, "keys", "list", **environment).stdout
