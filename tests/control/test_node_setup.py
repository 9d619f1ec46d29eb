"""From a machine to an agent over a real SSH connection; only dpkg, systemd and the root of its files are played."""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

import fluxlib
from fluxlib.config.control import AwsConfig, ControlConfig, read_control
from fluxlib.control.nodes.notes import NodeNotes
from fluxlib.control.nodes.setup import NodeSetup, Progress
from fluxlib.errors import AgentUnreachable, ProviderError
from fluxlib.pki import Authority
from fluxlib.providers import Cloud
from fluxlib.providers import ssh as ssh_module
from fluxlib.providers.fake import FakeCloud
from tests.support.programs import free_port, wait_until
from tests.support.sshd import Sshd

# What Flux writes below /etc, /var and /run lands in a directory of the test.
IN_ROOT = """#!/bin/sh
n=$#
while [ $n -gt 0 ]; do
    a=$1; shift
    case $a in /etc/*|/var/*|/run/*) a={root}$a; mkdir -p "$(dirname "$a")";; esac
    set -- "$@" "$a"; n=$((n-1))
done
exec {program} "$@"
"""
DPKG = """#!/bin/sh
echo "dpkg $*" >>{root}/did
case $1 in --print-architecture) echo riscv64; exit;; esac
[ -e {root}/broken ] && echo "dpkg: error: no space left on device" >&2 && exit 1
exit 0
"""
SYSTEMCTL = '#!/bin/sh\necho "systemctl $*" >>{root}/did\n'
JOURNALCTL = "#!/bin/sh\necho the port is in use\n"


class Node:
    """The machine, and the setup that makes an agent of it."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        self.authority = Authority.open(directory / "certs")
        key = self.authority.ssh_key(for_ec2=True)
        programs = {
            name: IN_ROOT.format(root=self.root, program=f"/usr/bin/{name}")
            for name in ("install", "mv", "rm", "sha256sum", "sh")
        }
        for name, text in (("dpkg", DPKG), ("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            programs[name] = text.format(root=self.root)
        programs["curl"] = "#!/bin/sh\nexit 22\n"
        self.sshd = Sshd(directory, key.public, programs)
        carried = directory / "agents"
        carried.mkdir()
        self.package = carried / f"flux-agent_{fluxlib.__version__}_riscv64.deb"
        self.package.write_bytes(b"the package")
        text = yaml.safe_dump(
            {"api_key": "k" * 20, "certs_dir": str(directory / "certs"), "node_start_sec": 20, **settings}
        )
        self.config: ControlConfig = read_control(text, directory / "flux.yaml")
        provider = FakeCloud("aws")
        provider.ssh_user = self.sshd.user
        aws = AwsConfig(
            region="here",
            ami="ami",
            ssh_port=self.sshd.port,
            agent_setup_commands=("echo one >/tmp/$$ && rm /tmp/$$", f"echo it was $((1 + 1)) >{self.root}/setup"),
        )
        self.cloud = Cloud(provider, aws)
        self.setup = NodeSetup(
            self.config, self.authority, tls=not self.config.disable_grpc_tls, private_key=key.private, carried=carried
        )
        self.notes = NodeNotes(reach="127.0.0.1", private_ip="10.0.0.7", public_ip="127.0.0.1")
        self.steps: list[str] = []
        self.done: list[str] = []
        self.keys: list[str] = []
        self.stopped = threading.Event()
        self.join_fails: Exception | None = None

    def make(self) -> None:
        progress = Progress(self.keys.append, self.steps.append, self.done.append)
        self.setup.carry_out(self.cloud, "web-1", self.notes, progress, self._join, self.stopped)

    def did(self) -> list[str]:
        return (self.root / "did").read_text().splitlines()

    def _join(self) -> None:
        if self.join_fails is not None:
            raise self.join_fails


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(ssh_module, "_FIRST_PAUSE", 0.05)
    made = Node(tmp_path)
    with made.sshd:
        yield made


def test_a_machine_becomes_an_agent(node: Node) -> None:
    node.make()
    assert node.steps[0] == "wait for SSH"
    assert node.steps[-1] == "wait for the agent"
    assert node.done == node.steps[1:-1]
    etc = node.root / "etc/flux-agent"
    config = yaml.safe_load((etc / "agent.yaml").read_bytes())
    assert config["agent_id"] == "web-1"
    certificate = x509.load_pem_x509_certificate((etc / "certs/agent.pem").read_bytes())
    assert "web-1" in certificate.subject.rfc4514_string()
    assert (etc / "certs/ca.pem").read_bytes() == node.authority.ca_pem
    for secret in ("agent.yaml", "certs/agent-key.pem"):
        assert stat.S_IMODE((etc / secret).stat().st_mode) == 0o600
    drop_in = node.root / "etc/systemd/system/flux-agent.service.d/50-metadata.conf"
    assert "IPAddressDeny=169.254.169.254" in drop_in.read_text()
    assert (node.root / "setup").read_text() == "it was 2\n"
    assert [line for line in node.did() if line.startswith("systemctl")] == [
        "systemctl daemon-reload",
        "systemctl enable flux-agent",
        "systemctl restart flux-agent",
    ]
    assert any(" -i " in line for line in node.did())
    # Nothing of it stays behind: neither the package nor what was staged.
    assert not (node.root / "var/cache/flux-agent.deb").exists()
    assert list((node.root / "run").glob("*")) == []


def test_a_failing_install_is_told_with_its_output_and_can_be_gone_on_with(node: Node) -> None:
    (node.root / "broken").touch()
    with pytest.raises(ProviderError, match="'install flux-agent' failed: exit status 1: dpkg: error: no space left"):
        node.make()
    assert node.done == ["check for dpkg", "setup command 1", "setup command 2"]
    (node.root / "broken").unlink()
    (node.root / "setup").unlink()
    node.notes = replace(node.notes, done=tuple(node.done), host_key=node.keys[0])
    node.make()
    assert not (node.root / "setup").exists()
    assert node.done[3] == "install flux-agent"


def test_another_host_key_is_refused_before_anything_is_done(node: Node) -> None:
    node.make()
    node.sshd.stop()
    node.sshd.new_host_key()
    node.sshd.start()
    (node.root / "did").unlink()
    node.notes = replace(node.notes, host_key=node.keys[0])
    with pytest.raises(ProviderError, match=r"'wait for SSH' failed: .*another SSH host key"):
        node.make()
    assert not (node.root / "did").exists()


def test_an_agent_that_does_not_join_is_quoted(node: Node) -> None:
    node.join_fails = AgentUnreachable("127.0.0.1:50052 refused the connection")
    with pytest.raises(
        ProviderError, match=r"does not join: .*refused the connection; its log ends: the port is in use"
    ):
        node.make()


def test_interrupting_breaks_off_the_step_under_way(node: Node) -> None:
    started = node.root / "started"
    slow = replace(node.cloud.config, agent_setup_commands=(f"touch {started}; exec sleep 4",))
    node.cloud = Cloud(node.cloud.provider, slow)
    failures: list[Exception] = []

    def make() -> None:
        try:
            node.make()
        except ProviderError as error:
            failures.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    wait_until(started.exists, "the slow command")
    began = time.monotonic()
    node.setup.interrupt("another")
    node.setup.interrupt("web-1")
    thread.join(20)
    assert time.monotonic() - began < 3
    assert "setup command 1" in str(failures[0])


def test_interrupting_breaks_off_waiting_for_ssh(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens there: a firewall that was forgotten.
    monkeypatch.setattr(ssh_module, "_FIRST_PAUSE", 5.0)
    node.cloud = Cloud(node.cloud.provider, replace(node.cloud.config, ssh_port=free_port()))
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(node.make)
        wait_until(lambda: node.steps == ["wait for SSH"], "it to wait")
        began = time.monotonic()
        node.setup.interrupt("another")
        node.setup.interrupt("web-1")
        with pytest.raises(ProviderError, match="given up while waiting for SSH"):
            made.result(20)
        assert time.monotonic() - began < 3


def test_versions_that_do_not_come_are_a_warning(tmp_path: Path) -> None:
    node = Node(tmp_path)
    other = Cloud(node.cloud.provider, replace(node.cloud.config, agent_version="9.9"))
    same = Cloud(node.cloud.provider, replace(node.cloud.config, agent_version=fluxlib.__version__))
    (warning,) = node.setup.warnings([node.cloud, other, same])
    assert "agent_version is 9.9" in warning
    assert node.setup.package(other).version == fluxlib.__version__
    brought = replace(node.config, agent_package_url="https://x/y.deb", agent_package_sha256="0" * 64)
    setup = NodeSetup(brought, node.authority, tls=True, private_key="")
    assert setup.warnings([other]) == []
    assert setup.package(other).url == "https://x/y.deb"
