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
from tests.support.need import need_root

UNIT = """[Service]
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
        for path in [self.home / "agent.yaml", *self.home.rglob("*.pem")]:
            path.chmod(0o600)
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


def _is_untouched(original: Original) -> bool:
    return (original.home / "agent.yaml").exists() and not (original.etc / "agent.yaml").exists()


@pytest.mark.parametrize(
    ("unit", "user"),
    [
        ("[Service]\nUser=ubuntu\nWorkingDirectory={home}\n", "ubuntu"),
        ("[Service]\nUser=root\n  User = ubuntu \nWorkingDirectory={home}\n", "ubuntu"),
        ("[Service]\nDynamicUser=yes\nWorkingDirectory={home}\n", "a user made"),
    ],
)
def test_what_ran_as_somebody_else_is_not_roots_configuration(top: Path, tmp_path: Path, unit: str, user: str) -> None:
    original = Original(top, tmp_path, unit)
    said = original.preinst()
    assert f"/home/ubuntu/agent.yaml is not taken over: the agent ran as {user}" in said
    assert _is_untouched(original)
    assert len(list(original.home.rglob("*.pem"))) == 3


@pytest.mark.parametrize("user", ["User=root", "User=0", "User=ubuntu\nUser="])
def test_root_may_be_named(top: Path, tmp_path: Path, user: str) -> None:
    original = Original(top, tmp_path, f"[Service]\n{user}\nWorkingDirectory={{home}}\n")
    original.preinst()
    assert (original.etc / "agent.yaml").exists()


def test_a_drop_in_counts(original: Original) -> None:
    drop_in = original.unit.parent / "flux-agent.service.d/user.conf"
    drop_in.parent.mkdir()
    drop_in.write_text("[Service]\nUser=ubuntu")
    assert "ran as ubuntu" in original.preinst()
    assert _is_untouched(original)


def test_what_was_uploaded_as_the_homes_owner_is_taken(original: Original) -> None:
    """The original copied its files there over SSH; root's unit ran with them."""
    need_root()
    for path in [original.home, *original.home.rglob("*")]:
        os.chown(path, 1000, 1000)
        path.chmod(0o775 if path.is_dir() else 0o664)
    original.preinst()
    taken = [original.etc / "agent.yaml", *(original.etc / "certs").iterdir()]
    assert len(taken) == 4
    assert all((path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600) for path in taken)
    assert not list(original.home.rglob("*.pem"))


def test_a_third_users_configuration_is_not_taken(original: Original) -> None:
    need_root()
    os.chown(original.home, 1000, 1000)
    os.chown(original.home / "agent.yaml", 1001, 1001)
    assert "/home/ubuntu/agent.yaml is not taken over" in original.preinst()
    assert _is_untouched(original)


def test_a_configuration_that_everybody_can_write_is_not_taken(original: Original) -> None:
    (original.home / "agent.yaml").chmod(0o646)
    assert "/home/ubuntu/agent.yaml is not taken over" in original.preinst()
    assert _is_untouched(original)


def _names(original: Original, ca: str) -> None:
    (original.home / "agent.yaml").write_text(CONFIG.format(ca=ca))


def _is_not_taken(original: Original, victim: Path) -> bool:
    content = victim.read_text()
    said = original.preinst()
    taken = sorted(path.name for path in (original.etc / "certs").iterdir())
    assert taken == ["cert_file.pem", "key_file.pem"], "the others are taken all the same"
    assert not list(original.etc.glob(".taking*"))
    return "is not taken over" in said and victim.read_text() == content


@pytest.mark.parametrize(
    "named", ["/etc/shadow", "../../etc/shadow", "/home/other/secret", "/home/ubuntu/../other/secret"]
)
def test_nothing_outside_that_home_is_read_or_removed(original: Original, named: str) -> None:
    victim = original.root / ("etc/shadow" if "shadow" in named else "home/other/secret")
    victim.parent.mkdir(exist_ok=True, parents=True)
    victim.write_text("secret\n")
    _names(original, named)
    assert _is_not_taken(original, victim)


@pytest.mark.parametrize("through", ["file", "directory", "relative"])
def test_no_link_leads_out_of_that_home(original: Original, through: str) -> None:
    victim = original.root / "etc/ca.pem"
    victim.write_text("secret\n")
    if through == "directory":
        (original.home / "way").symlink_to(victim.parent)
        _names(original, "/home/ubuntu/way/ca.pem")
    else:
        (original.home / "certs/ca.pem").unlink()
        (original.home / "certs/ca.pem").symlink_to("../../../etc/ca.pem" if through == "relative" else victim)
    assert _is_not_taken(original, victim)


def test_no_link_is_followed_to_a_configuration(original: Original) -> None:
    victim = original.root / "etc/shadow"
    victim.write_text("secret\n")
    (original.home / "agent.yaml").unlink()
    (original.home / "agent.yaml").symlink_to(victim)
    assert "is not taken over" in original.preinst()
    assert victim.exists()
    assert not (original.etc / "agent.yaml").exists()


def test_a_home_that_is_elsewhere_is_left_alone(original: Original) -> None:
    elsewhere = original.root / "srv"
    original.home.rename(elsewhere)
    original.home.symlink_to(elsewhere)
    assert "is not taken over" in original.preinst()
    assert (elsewhere / "agent.yaml").exists()


def test_what_another_owns_in_that_home_stays(original: Original) -> None:
    need_root()
    victim = original.home / "certs/ca.pem"
    os.chown(victim, 1000, 1000)
    assert _is_not_taken(original, victim)


def test_what_is_no_file_is_not_waited_for(original: Original) -> None:
    (original.home / "certs/ca.pem").unlink()
    os.mkfifo(original.home / "certs/ca.pem")
    assert "/home/ubuntu/certs/ca.pem is not taken over" in original.preinst()


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
