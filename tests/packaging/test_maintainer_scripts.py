"""What an installation does with an original agent: its files are moved, and nobody else's are believed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from fluxlib.config.agent import AgentConfig, load_agent
from fluxlib.config.control import ControlConfig

UNIT = """[Service]
User=ubuntu
WorkingDirectory={home}
ExecStart=/usr/bin/serverless-agent
"""
CONFIG = """agent_id: worker-1
port: "50052"
redis_addr: 10.0.0.5:6379
tls:
  enabled: true
  ca_cert: {ca}
  cert_file: "certs/agent.pem"
  key_file: certs/agent-key.pem # keep me
"""


class Original:
    """A machine's directory tree with an original agent in /home/ubuntu."""

    def __init__(self, top: Path, root: Path, unit: str = UNIT, directory: str = "etc/systemd/system") -> None:
        self.top, self.root = top, root
        self.home = root / "home/ubuntu"
        (self.home / "certs").mkdir(parents=True)
        for name in ("ca", "agent", "agent-key"):
            (self.home / f"certs/{name}.pem").write_text(f"{name}\n")
        (self.home / "agent.yaml").write_text(CONFIG.format(ca="/home/ubuntu/certs/ca.pem"))
        self.unit = root / directory / "flux-agent.service"
        self.unit.parent.mkdir(parents=True)
        self.unit.write_text(unit.format(home="/home/ubuntu"))
        self.etc = root / "etc/flux-agent"

    def preinst(self, *arguments: str) -> str:
        script = self.top / "debian/flux-agent.preinst"
        environment = {**os.environ, "DPKG_ROOT": str(self.root)}
        done = subprocess.run(
            ["sh", "-eu", script, *(arguments or ("install",))], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def original(top: Path, tmp_path: Path) -> Original:
    return Original(top, tmp_path)


def test_an_originals_configuration_is_moved(original: Original) -> None:
    said = original.preinst()
    assert "/home/ubuntu/agent.yaml" in said
    config = load_agent(original.etc / "agent.yaml")
    assert (config.agent_id, config.port, config.tls_enabled) == ("worker-1", 50052, True)
    assert config.tls_ca_cert is not None
    assert config.tls_key_file is not None
    assert config.tls_ca_cert.read_text() == "ca\n"
    assert config.tls_key_file.read_text() == "agent-key\n"
    assert not list(original.home.rglob("*.pem"))
    assert not (original.home / "agent.yaml").exists()


def test_what_is_moved_is_private(original: Original) -> None:
    original.preinst()
    for path in [original.etc / "agent.yaml", *(original.etc / "certs").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_originals_unit_no_longer_hides_ours(original: Original) -> None:
    wants = original.root / "etc/systemd/system/multi-user.target.wants/flux-agent.service"
    wants.parent.mkdir()
    wants.symlink_to("/etc/systemd/system/flux-agent.service")
    original.preinst()
    assert not original.unit.exists()
    assert not wants.is_symlink()
    assert (original.etc / "flux-agent.service.original").exists()


@pytest.mark.parametrize(
    "unit",
    [
        "[Service]\nEnvironment=AGENT_CONFIG={home}/agent.yaml\nExecStart=/usr/bin/flux-agent\n",
        '[Service]\nEnvironment="AGENT_CONFIG={home}/agent.yaml"\nExecStart=/usr/bin/flux-agent\n',
        "[Service]\nExecStart={home}/flux-agent\n",
        "[Service]\nExecStart=/usr/bin/flux-agent --config {home}/agent.yaml --verbose\n",
    ],
)
def test_every_way_a_unit_names_it_is_understood(top: Path, tmp_path: Path, unit: str) -> None:
    original = Original(top, tmp_path, unit)
    original.preinst()
    assert yaml.safe_load((original.etc / "agent.yaml").read_text())["agent_id"] == "worker-1"


def test_the_originals_own_package_is_recognised(top: Path, tmp_path: Path) -> None:
    original = Original(top, tmp_path, directory="lib/systemd/system")
    original.preinst("upgrade", "0.0.1")
    assert (original.etc / "agent.yaml").exists()
    assert original.unit.exists(), "dpkg's to replace"


def test_a_configuration_that_is_there_stays(original: Original) -> None:
    original.etc.mkdir(parents=True)
    (original.etc / "agent.yaml").write_text("agent_id: mine\n")
    original.preinst()
    assert (original.etc / "agent.yaml").read_text() == "agent_id: mine\n"
    assert (original.home / "agent.yaml").exists()


def test_no_users_file_is_believed_without_a_unit_of_roots(original: Original) -> None:
    original.unit.write_text((original.top / "debian/flux-agent.service").read_text())
    original.preinst()
    assert not original.etc.exists()
    assert (original.home / "agent.yaml").exists()


def test_a_missing_certificate_is_told_and_ends_nothing(original: Original) -> None:
    (original.home / "certs/agent.pem").unlink()
    assert "/home/ubuntu/certs/agent.pem is missing" in original.preinst()
    assert (original.etc / "certs/key_file.pem").exists()


def test_scripts_are_sound_shell(top: Path) -> None:
    scripts = [*(top / "debian").glob("*.p*inst"), *(top / "debian").glob("*.p*rm"), top / "scripts/deb"]
    assert len(scripts) >= 6
    for script in scripts:
        subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize(
    ("name", "shutdown"), [("flux", ControlConfig.shutdown_sec), ("flux-agent", AgentConfig.shutdown_sec)]
)
def test_systemd_waits_longer_than_the_program_takes(top: Path, name: str, shutdown: float) -> None:
    """Otherwise systemd kills it while it still writes down what it ended."""
    unit = (top / f"debian/{name}.service").read_text()
    (stop,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("TimeoutStopSec=")]
    assert float(stop) >= shutdown + 10


def test_systemd_takes_the_units(top: Path, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze")
    for name in ("flux", "flux-agent"):
        # The programs need not be installed here.
        unit = (top / f"debian/{name}.service").read_text().replace(f"/usr/bin/{name}", "/bin/true")
        (tmp_path / f"{name}.service").write_text(unit.replace("Documentation=man", "#"))
    done = subprocess.run([verify, "verify", *tmp_path.glob("*.service")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
