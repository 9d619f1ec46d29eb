"""Nodes from RunInstances to an execution in a cgroup: moto's EC2, whose instances are the lab's Debian machines.

One story on two machines: made, scaled up under load, scaled down when idle, removed; then nodes that
fail on the way. An instance that is terminated gives its machine back with nothing of Flux on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fluxlib.pki import Authority
from tests.support.ec2 import REGION, Ec2
from tests.support.lab import debian
from tests.support.machine import Machine
from tests.support.packages import package
from tests.support.programs import Flux, wait_until

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(600),
    pytest.mark.leaks("two machines live through the whole module"),
]

ADDRESSES = ("127.0.0.5", "127.0.0.6")
NOBODY = "127.0.0.9"  # no machine is there
SSH_PORT, AGENT_PORT = 2222, 50052
PATIENCE = 240.0
WIPE = "dpkg -P flux-agent; rm -rf /etc/flux-agent /var/lib/flux-agent /etc/systemd/system/flux-agent*"
BURN = "#!/bin/sh\necho started\nwhile :; do :; done\n"
WHERE = "#!/bin/sh\ncat /proc/self/cgroup\nid -u\n"
METADATA = "#!/bin/sh\ncurl -sS -m 5 http://169.254.169.254/ 2>&1\n"


class Rig:
    """The machines, the cloud they are instances of, and Flux processes that use it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        image = debian()
        self.machines = {
            address: Machine(
                image,
                directory,
                name=f"node-{number}",
                address=address,
                forwards={SSH_PORT: 22, AGENT_PORT: AGENT_PORT},
                memory_mb=768,
                processors=1,
            )
            for number, address in enumerate(ADDRESSES, 1)
        }
        self.ec2 = Ec2(ADDRESSES)
        self.ec2.on_terminate = self._wipe
        self.certs = directory / "certs"

    def start(self) -> None:
        key = Authority.open(self.certs).ssh_key(for_ec2=True).public
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda machine: self._boot(machine, key), self.machines.values()))

    def flux(self, name: str, **settings: Any) -> Flux:
        """A control plane with this cloud; ``autoscaling`` and other settings of it as given."""
        scaling = {"name": "lab", "min_nodes": 1, "node_types": [{"instance_type": "t3.micro"}]}
        scaling |= settings.pop("autoscaling", {})
        aws = {
            "region": REGION,
            "ami": self.ec2.image(),
            "access_key_id": "flux",
            "secret_access_key": "secret",
            "endpoint_url": self.ec2.url,
            "ssh_user": "admin",
            "ssh_port": SSH_PORT,
            "agent_setup_commands": ["test $(id -u) = 0", "echo 'it''s set up' >/etc/made-by-flux"],
            "autoscaling": scaling,
        }
        defaults = {
            "certs_dir": str(self.certs),
            "agent_package": str(package("flux-agent")),
            "health_interval_sec": 2,
            "agent_lost_after_sec": 20,
            "providers": {"aws": aws},
        }
        return Flux(self.directory, name, **{**defaults, **settings})

    def alive(self) -> list[str]:
        """The instances that still cost."""
        answer = self.ec2.client().describe_instances(
            Filters=[{"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}]
        )
        return [one["InstanceId"] for reservation in answer["Reservations"] for one in reservation["Instances"]]

    def used(self) -> list[Machine]:
        """The machines that are instances now."""
        return [self.machines[address] for address in self.ec2.given() if address in self.machines]

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()

    def _boot(self, machine: Machine, key: str) -> None:
        machine.boot()
        # What cloud-init does with the key pair on a real instance.
        machine.run("useradd -m -s /bin/bash admin && mkdir -p -m 0700 ~admin/.ssh && chown admin: ~admin/.ssh")
        machine.write("/home/admin/.ssh/authorized_keys", f"{key}\n", 0o644)
        machine.write("/etc/sudoers.d/admin", "admin ALL=(ALL) NOPASSWD:ALL\n", 0o440)

    def _wipe(self, address: str) -> None:
        machine = self.machines.get(address)
        if machine is not None and machine.is_on:
            machine.run(WIPE, check=False)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(tmp_path_factory.mktemp("fleet"))
    with made.ec2:
        try:
            made.start()
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def flux(rig: Rig) -> Iterator[Flux]:
    scaling = {
        "enabled": True,
        "max_nodes": 2,
        "cpu_upper_threshold": 70,
        "cpu_lower_threshold": 50,
        "mem_upper_threshold": 99,
        "mem_lower_threshold": 98,
        "evaluation_window_sec": 8,
        "poll_interval_sec": 2,
        "cooldown_sec": 5,
    }
    with rig.flux("flux", autoscaling=scaling) as running:
        yield running


def nodes(flux: Flux) -> dict[str, str]:
    return {agent["id"]: agent["status"] for agent in flux.api.call("GET", "/agents")[1]}


def test_initialize_makes_a_node_that_runs_a_function_in_a_cgroup(rig: Rig, flux: Flux) -> None:
    status, answer = flux.api.call("POST", "/initialize", timeout=PATIENCE)
    assert (status, answer["nodes"]) == (200, {"spawned": 1, "failed": 0}), answer
    ((agent_id, state),) = nodes(flux).items()
    assert state == "online"
    flux.api.deploy({"name": "where", "handler": "run.sh", "resources": {"memory": 64}}, {"run.sh": WHERE})
    status, answer = flux.api.execute("where")
    assert (status, answer["agent_id"]) == (200, agent_id), answer
    group, user = answer["output"].split()
    assert "/system.slice/flux-agent.service/fn/" in group
    assert int(user) >= 1879048192
    (machine,) = rig.used()
    assert machine.read("/etc/made-by-flux") == b"its set up\n"
    assert (
        machine.run("stat -c %a /etc/flux-agent/certs/agent-key.pem /etc/flux-agent/agent.yaml").split() == ["600"] * 2
    )
    assert machine.run("systemctl is-enabled flux-agent").strip() == "enabled"
    # Over TLS only: who has no certificate of this CA gets nothing.
    view = next(agent for agent in flux.api.call("GET", "/agents")[1] if agent["id"] == agent_id)
    assert view["certificate_expires_at"]
    assert view["provider"] == "aws"


def test_a_function_does_not_reach_the_clouds_metadata(rig: Rig, flux: Flux) -> None:
    (machine,) = rig.used()
    machine.run("ip addr add 169.254.169.254/32 dev lo && cd /srv && echo credentials >index.html")
    machine.run("systemd-run --unit imds python3 -m http.server --bind 169.254.169.254 80 -d /srv")
    try:
        reads = "curl -sS -m 5 http://169.254.169.254/"
        wait_until(lambda: "credentials" in machine.run(reads, check=False), "the metadata service", 60)
        flux.api.deploy({"name": "metadata", "handler": "run.sh"}, {"run.sh": METADATA})
        _, answer = flux.api.execute("metadata")
        assert answer["status"] == "failed", answer
        assert "credentials" not in answer["output"]
    finally:
        machine.run("systemctl stop imds; ip addr del 169.254.169.254/32 dev lo", check=False)


def test_real_load_makes_a_second_node_and_idleness_ends_one(rig: Rig, flux: Flux) -> None:
    flux.api.deploy({"name": "burn", "handler": "run.sh", "max_concurrency": 1}, {"run.sh": BURN})
    status, burning = flux.api.call("POST", "/execute/burn/async", {"args": []})
    assert status == 202, burning
    wait_until(lambda: list(nodes(flux).values()).count("online") == 2, "a second node", PATIENCE)
    report = flux.api.call("GET", "/autoscaling")[1]["providers"]["aws"]
    assert any("every online node was hot" in decision["reason"] for decision in report["decisions"]), report
    assert len(rig.alive()) == 2
    status, answer = flux.api.call("DELETE", f"/executions/{burning['execution_id']}")
    assert status == 200, answer
    wait_until(lambda: len(nodes(flux)) == 1, "one to go", PATIENCE)
    wait_until(lambda: len(rig.alive()) == 1, "its machine to end", 30)
    assert list(nodes(flux).values()) == ["online"]
    report = flux.api.call("GET", "/autoscaling")[1]["providers"]["aws"]
    assert any("every online node was cold" in decision["reason"] for decision in report["decisions"]), report
    assert flux.api.execute("where")[0] == 200


def test_a_node_that_dies_while_draining_leaves_no_orphan(rig: Rig, flux: Flux) -> None:
    flux.api.call("POST", "/execute/burn/async", {"args": []})
    (agent_id,) = nodes(flux)
    (machine,) = rig.used()
    with ThreadPoolExecutor(1) as pool:
        removed = pool.submit(flux.api.call, "DELETE", "/nodes", timeout=PATIENCE)
        wait_until(lambda: nodes(flux).get(agent_id) == "draining", "it to drain", 30)
        machine.power_off()
        status, answer = removed.result()
    assert (status, answer["status"], answer["removed"]) == (200, "removed", 1), answer
    assert (rig.alive(), nodes(flux)) == ([], {})
    assert f"node {agent_id} went offline while draining" in flux.log.read_text()
    # Not healed: it was asked for.
    assert "POST /initialize" in flux.api.call("GET", "/autoscaling")[1]["providers"]["aws"]["last_decision"]["reason"]
    assert flux.api.call("GET", "/health")[1]["warnings"] == []


def test_a_node_that_never_answers_ssh_is_ended_and_says_so(rig: Rig) -> None:
    rig.ec2.addresses = [NOBODY]
    with rig.flux("silent", node_start_sec=6) as flux:
        answer = flux.api.call("POST", "/initialize", timeout=PATIENCE)[1]
        assert answer["nodes"] == {"spawned": 0, "failed": 1}
        assert "'wait for SSH' failed" in answer["errors"][0]
        assert NOBODY in answer["errors"][0]
        assert (rig.alive(), nodes(flux)) == ([], {})


@pytest.mark.parametrize("broken", ["install", "setup command"])
def test_a_node_whose_start_fails_is_ended_and_says_at_which_step(rig: Rig, broken: str, tmp_path: Path) -> None:
    rig.ec2.addresses = [address for address, machine in rig.machines.items() if machine.is_on]
    settings: dict[str, Any] = {}
    if broken == "install":
        garbage = tmp_path / "flux-agent_0_amd64.deb"
        garbage.write_bytes(b"this is no package")
        settings["agent_package"] = str(garbage)
    name = broken.partition(" ")[0]
    with rig.flux(f"broken-{name}", **settings) as flux:
        if broken != "install":
            (machine,) = [one for one in rig.machines.values() if one.is_on]
            machine.run("chattr +i /etc/made-by-flux")
        try:
            answer = flux.api.call("POST", "/initialize", timeout=PATIENCE)[1]
        finally:
            if broken != "install":
                machine.run("chattr -i /etc/made-by-flux")
        assert answer["nodes"] == {"spawned": 0, "failed": 1}
        if broken == "install":
            assert "'install flux-agent' failed" in answer["errors"][0]
            assert "dpkg-deb: error" in answer["errors"][0]
        else:
            assert "'setup command 2' failed" in answer["errors"][0]
            assert "/etc/made-by-flux: " in answer["errors"][0]
        assert (rig.alive(), nodes(flux)) == ([], {})
