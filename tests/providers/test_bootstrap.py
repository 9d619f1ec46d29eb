"""The bootstrap as data: its steps, their order, what is resumed and what is refused."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from fluxlib.config.agent import read_agent
from fluxlib.errors import ProviderError
from fluxlib.providers.base import Address, Node, NodeState
from fluxlib.providers.bootstrap import AgentFiles, Package, Step, Upload, carry_out, package_for, plan

FILES = AgentFiles("web-1", 50052, b"ca", b"certificate", b"private key", "redis://:secret@10.0.0.1/3")
ADDRESS = Address("203.0.113.7", "10.0.0.7", "203.0.113.7")
URL = 'https://mirror.example/flux-agent.deb?token=t0ken"\\'


@dataclass
class Recorder:
    """A shell that does nothing: what it was asked, and what it answers."""

    answers: dict[str, str] = field(default_factory=dict)  # by the command's first word
    fails: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)

    def run(self, words: Sequence[str], timeout: float) -> str:
        self.asked.append(" ".join(words))
        for word in words:
            if word in self.fails:
                raise ProviderError(self.fails[word])
        return self.answers.get(words[0], "")

    def run_script(self, script: str, timeout: float) -> str:
        self.asked.append(f"script: {script}")
        if script in self.fails:
            raise ProviderError(self.fails[script])
        return ""

    def upload(self, content: bytes, path: str, mode: int) -> None:
        self.asked.append(f"upload {path}")
        self.files[path] = (content, mode)


def steps(
    package: Package | None = None, setup: Sequence[str] = (), provider: str = "aws", files: AgentFiles = FILES
) -> list[Step]:
    return plan(files, ADDRESS, package or Package(), setup, provider=provider, uid_range=(1879048192, 256))


def done_by(shell: Recorder, some: list[Step], done: Sequence[str] = ()) -> list[str]:
    told: list[str] = []
    carry_out(some, shell, done, lambda name: None, told.append)
    return told


@pytest.fixture
def package(tmp_path: Path) -> Package:
    content = b"a package"
    (tmp_path / "flux-agent_1.2_amd64.deb").write_bytes(content)
    return Package(directory=tmp_path, version="1.2")


@pytest.fixture
def shell() -> Recorder:
    digest = hashlib.sha256(b"a package").hexdigest()
    return Recorder({"dpkg": "amd64\n", "sha256sum": f"{digest}  /var/cache/flux-agent.deb\n"})


def test_the_steps_in_their_order(shell: Recorder, package: Package) -> None:
    told = done_by(shell, steps(package, ["apt-get update", "echo two"]))
    assert told == [
        "check for dpkg",
        "setup command 1",
        "setup command 2",
        "install flux-agent",
        "write the certificates",
        "close the metadata service to functions",
        "write agent.yaml",
        "reload systemd",
        "enable flux-agent",
        "start flux-agent",
    ]
    assert shell.asked.index("script: apt-get update") < shell.asked.index("script: echo two")
    # The unit must not start before its configuration and its drop-in are there.
    assert shell.asked.index("systemctl daemon-reload") < shell.asked.index("systemctl restart flux-agent")


def test_what_a_node_is_told(shell: Recorder, package: Package, tmp_path: Path) -> None:
    done_by(shell, steps(package))
    content, mode = shell.files["/etc/flux-agent/agent.yaml"]
    assert mode == 0o600  # the URL of Redis carries a password
    config = read_agent(content, tmp_path / "agent.yaml")
    assert (config.agent_id, config.port) == ("web-1", 50052)
    assert (config.node_private_ip, config.node_public_ip) == ("10.0.0.7", "203.0.113.7")
    assert (config.store, config.redis_addr) == ("redis", "redis://:secret@10.0.0.1/3")
    assert config.tls_enabled
    assert {
        name: shell.files[f"/etc/flux-agent/certs/{name}"] for name in ("ca.pem", "agent.pem", "agent-key.pem")
    } == {
        "ca.pem": (b"ca", 0o600),
        "agent.pem": (b"certificate", 0o600),
        "agent-key.pem": (b"private key", 0o600),
    }
    assert yaml.safe_load(content)["tls"]["key_file"] == "certs/agent-key.pem"


def test_without_tls_and_redis_nothing_secret_is_sent(shell: Recorder, package: Package, tmp_path: Path) -> None:
    told = done_by(shell, steps(package, files=AgentFiles("web-1", 50052)))
    assert "write the certificates" not in told
    config = read_agent(shell.files["/etc/flux-agent/agent.yaml"][0], tmp_path / "agent.yaml")
    assert (config.tls_enabled, config.store) == (False, "sqlite")


# -- the cloud's credentials -------------------------------------------------------------


def test_on_ec2_the_unit_is_cut_off_from_both_addresses(shell: Recorder, package: Package) -> None:
    done_by(shell, steps(package, provider="aws"))
    content, _ = shell.files["/etc/systemd/system/flux-agent.service.d/50-metadata.conf"]
    assert content == b"[Service]\nIPAddressDeny=169.254.169.254 fd00:ec2::254\n"


def test_on_gce_only_the_functions_users_and_only_port_80(shell: Recorder, package: Package) -> None:
    done_by(shell, steps(package, provider="gcp"))
    rules = shell.files["/etc/nftables.d/flux-agent.nft"][0].decode()
    # The same address resolves names: port 53 must stay open.
    assert "meta skuid 1879048192-1879048447 ip daddr 169.254.169.254 tcp dport 80 reject" in rules
    assert "50-metadata.conf" not in " ".join(shell.files)
    unit = shell.files["/etc/systemd/system/flux-agent-metadata.service"][0].decode()
    assert "Before=flux-agent.service" in unit
    assert "RequiredBy=flux-agent.service" in unit
    # Wherever nft is, it takes them.
    nft = shutil.which("nft") or "/usr/sbin/nft"
    if Path(nft).exists():
        checked = subprocess.run([nft, "-c", "-f", "-"], input=rules, text=True, capture_output=True)
        assert "syntax error" not in checked.stderr


# -- the package -------------------------------------------------------------------------


def test_the_package_is_the_one_of_the_nodes_architecture(package: Package, tmp_path: Path) -> None:
    assert package_for(package, "amd64") == tmp_path / "flux-agent_1.2_amd64.deb"
    with pytest.raises(ProviderError, match=r"flux-agent_1\.2_arm64\.deb: set `agent_package`"):
        package_for(package, "arm64")
    for odd in ("../../etc/passwd", "", "amd64; rm", "a b"):
        with pytest.raises(ProviderError):
            package_for(package, odd)


def test_a_node_without_dpkg_is_refused_at_that_step(package: Package) -> None:
    shell = Recorder(fails={"dpkg": "exit status 127: sh: dpkg: not found"})
    with pytest.raises(ProviderError, match=r"step 'check for dpkg' failed: exit status 127: .*not found"):
        done_by(shell, steps(package, ["echo one"]))
    assert shell.files == {}
    assert len(shell.asked) == 1


def test_what_arrived_otherwise_than_it_was_sent_is_not_installed(shell: Recorder, package: Package) -> None:
    shell.answers["sha256sum"] = "0" * 64 + "  x\n"
    with pytest.raises(ProviderError, match="'install flux-agent' failed: the package's SHA-256 is 0000"):
        done_by(shell, steps(package))
    assert not any("-i /var/cache" in asked for asked in shell.asked)
    assert shell.asked[-1] == "rm -f -- /var/cache/flux-agent.deb"


def test_a_download_is_checked_and_its_address_is_on_no_command_line(shell: Recorder) -> None:
    digest = shell.answers["sha256sum"].split()[0]
    done_by(shell, steps(Package(url=URL, sha256=digest.upper())))
    assert not any("t0ken" in asked for asked in shell.asked)
    content, mode = shell.files["/run/flux-agent.curl"]
    assert mode == 0o600
    assert content.decode() == 'url = "https://mirror.example/flux-agent.deb?token=t0ken\\"\\\\"\n'
    assert "rm -f -- /run/flux-agent.curl" in shell.asked
    assert any("dpkg" in asked and "-i" in asked for asked in shell.asked)
    with pytest.raises(ProviderError, match="SHA-256"):
        done_by(shell, steps(Package(url=URL, sha256="1" * 64)))


def test_curl_reads_the_address_as_it_is(shell: Recorder, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    done_by(
        shell,
        steps(Package(url="http://127.0.0.1:9/a%20b?x=1&y=$HOME", sha256=hashlib.sha256(b"a package").hexdigest())),
    )
    config = tmp_path / "curl"
    config.write_bytes(shell.files["/run/flux-agent.curl"][0])
    told = subprocess.run(["curl", "-sS", "-w", "%{url}", "-K", config], capture_output=True, text=True)
    assert told.stdout == "http://127.0.0.1:9/a%20b?x=1&y=$HOME"


# -- going on ----------------------------------------------------------------------------


def test_a_resumed_bootstrap_goes_on_where_it_stopped(shell: Recorder, package: Package) -> None:
    every = [step.name for step in steps(package, ["echo one"])]
    for stopped in range(len(every)):
        again = Recorder(dict(shell.answers))
        assert done_by(again, steps(package, ["echo one"]), every[:stopped]) == every[stopped:]


def test_files_of_two_lives_are_never_mixed(package: Package) -> None:
    """A key without its certificate is worth nothing: they are one step."""
    certificates = [step for step in steps(package) if step.name == "write the certificates"]
    assert len(certificates) == 1
    alone = [step for step in steps(package) if isinstance(step.action, Upload) and "certs" in step.action.path]
    assert alone == []


def test_every_step_is_told_and_a_failing_one_named_with_its_output(shell: Recorder, package: Package) -> None:
    shell.fails["echo two"] = "exit status 100: E: Unable to locate package nothing"
    begun: list[str] = []
    told: list[str] = []
    with pytest.raises(ProviderError, match=r"bootstrap step 'setup command 2' failed: exit status 100: E: Unable"):
        carry_out(steps(package, ["echo one", "echo two", "echo three"]), shell, (), begun.append, told.append)
    assert begun == ["check for dpkg", "setup command 1", "setup command 2"]
    assert told == ["check for dpkg", "setup command 1"]


def test_an_agent_that_does_not_start_is_quoted(shell: Recorder, package: Package) -> None:
    shell.fails["restart"] = "exit status 1: Job for flux-agent.service failed"
    shell.answers["journalctl"] = "agent.yaml: port is no number\n"
    with pytest.raises(
        ProviderError, match=r"'start flux-agent' failed: .*its log ends: agent\.yaml: port is no number"
    ):
        done_by(shell, steps(package))


def test_keys_show_in_no_representation(package: Package) -> None:
    text = repr(steps(package))
    assert "private key" not in text
    assert "secret@" not in text
    assert "private key" not in repr(FILES)


def test_where_a_node_is_reached() -> None:
    node = Node("aws", "i-1", "web-1", "small", NodeState.RUNNING, public_ip="203.0.113.7", private_ip="10.0.0.7")
    assert Address.of(node, use_private_ip=False).reach == "203.0.113.7"
    assert Address.of(node, use_private_ip=True).reach == "10.0.0.7"
