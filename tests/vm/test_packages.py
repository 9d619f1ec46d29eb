"""The packages on a fresh Debian 12, from `dpkg -i` to a machine with nothing left of them.

One machine and one story: the tests run in the order they are written in, each from
where the one before left the machine.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fluxlib
from tests.support.lab import debian
from tests.support.machine import Machine
from tests.support.packages import package
from tests.support.programs import make_zip, wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900), pytest.mark.leaks("one machine lives through the whole module")]

OLDER = "0.0.9"
URL = "http://localhost:7227"
SLEEPER = '#!/bin/sh\necho started\nsleep "$1"\necho done\n'
ENVIRONMENT = "#!/bin/sh\nenv\necho uid=$(id -u)\ncat /proc/self/cgroup\n"


class Host:
    """The machine with Flux on it, and what a person there would type."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.run = machine.run

    def install(self, *names: str, version: str = "") -> str:
        for name in names:
            self.machine.put(package(name, version), f"/root/{name}.deb")
        return self.run(f"dpkg -i {' '.join(f'/root/{name}.deb' for name in names)}", timeout=300)

    @property
    def key(self) -> str:
        return self.run("sed -n 's/^api_key: *//p' /etc/flux/flux.yaml").strip()

    def call(self, method: str, path: str, data: bytes = b"", timeout: float = 120) -> tuple[int, Any]:
        """(status, JSON) by the machine's own curl."""
        command = f"curl -sS -X {method} -H 'X-API-Key: {self.key}' -w '\\n%{{http_code}}' {URL}{path}"
        if data:
            command += " --data-binary @-"
        body, _, status = self.run(command, stdin=data, timeout=timeout).rpartition("\n")
        return int(status), json.loads(body) if body else None

    def deploy(self, name: str, script: str) -> None:
        status, answer = self.call("PUT", "/functions", f"name: {name}\nhandler: run.sh\ntimeout: 600\n".encode())
        assert status == 201, answer
        status, answer = self.call("PUT", f"/deploy/{name}", make_zip({"run.sh": script}))
        assert status == 201, answer

    def execute(self, name: str, *args: str) -> tuple[int, Any]:
        return self.call("POST", f"/execute/{name}", json.dumps({"args": args}).encode())

    def start(self, name: str, *args: str) -> str:
        """An execution that is running when this returns; its ID."""
        status, answer = self.call("POST", f"/execute/{name}/async", json.dumps({"args": args}).encode())
        assert status == 202, answer
        execution = str(answer["execution_id"])
        wait_until(lambda: "started" in self.record(execution).get("output", ""), "its first output", 60)
        return execution

    def record(self, execution: str) -> dict[str, Any]:
        status, record = self.call("GET", f"/executions/{execution}")
        return dict(record) if status == 200 else {}

    def ended(self, execution: str, seconds: float = 120) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            record = self.record(execution)
            return record if record.get("status", "running") != "running" else None

        return dict(wait_until(look, f"{execution} to end", seconds))

    def active(self, *units: str) -> bool:
        return self.machine.status(f"systemctl is-active --quiet {' '.join(units)}") == 0

    def agent_is_online(self) -> bool:
        try:
            return [agent["status"] for agent in self.call("GET", "/agents")[1]] == ["online"]
        except AssertionError:  # curl: not up yet
            return False

    def started_at(self, unit: str) -> int:
        """Microseconds since boot."""
        return int(self.run(f"systemctl show -P ActiveEnterTimestampMonotonic {unit}"))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with Machine(debian(), tmp_path_factory.mktemp("packages"), name="packages", keeps=True) as machine:
        yield Host(machine)


def as_ada(host: Host, *lines: str) -> str:
    """What a user with sudo pastes into a shell, in the clone where `make deb` was run."""
    script = "\n".join(["set -eu", "cd ~/flux", *lines])
    return host.run("runuser -l ada -s /bin/bash -c 'bash -s'", stdin=script.encode(), timeout=400)


def install_lines(top: Path) -> list[str]:
    """README's "Install it", for Debian."""
    (block,) = re.findall(r"## Install it\n.*?```sh\n(.*?)```", (top / "README.md").read_text(), re.DOTALL)
    return str(block).splitlines()


def test_the_readme_installs_a_running_service(host: Host, top: Path) -> None:
    host.run("useradd -m ada && echo 'ada ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/ada")
    for name in ("flux", "flux-agent"):
        deb = package(name, OLDER)
        host.machine.put(deb, f"/home/ada/flux/dist/{deb.name}")
    host.run("chown -R ada: /home/ada")
    said = as_ada(host, install_lines(top)[0])
    assert "error" not in said.lower(), said
    # What is next, said by the packages themselves.
    assert "sudo sed -n 's/^api_key: *//p' /etc/flux/flux.yaml" in said
    assert "sudo flux enroll worker-1" in said
    # No waiting: systemctl start returns when Flux serves.
    host.run(f"curl -sS --fail {URL}/health")
    assert host.run("stat -c '%U:%G %a' /etc/flux/flux.yaml /etc/flux/certs /var/lib/flux").splitlines() == [
        "flux:flux 600",
        "flux:flux 700",
        "flux:flux 700",
    ]
    assert re.fullmatch(r"flux_[0-9a-f]{40}", host.key)
    assert host.run("ps -o user= -C flux").split() == ["flux"]
    assert host.run("flux --version").strip().endswith(OLDER)


def test_an_agent_without_configuration_waits(host: Host) -> None:
    assert not host.active("flux-agent")
    assert host.run("systemctl --failed --no-legend") == ""


def test_the_readme_ends_with_a_registered_agent(host: Host, top: Path) -> None:
    said = as_ada(host, *install_lines(top)[1:])
    assert '"registered"' in said, said
    modes = host.run("stat -c '%U %a' /etc/flux-agent/*").splitlines()
    assert modes == ["root 600"] * 4
    assert host.agent_is_online()


def test_the_lines_of_the_readme_work(host: Host, top: Path) -> None:
    readme = (top / "README.md").read_text()
    lines = [line.strip() for line in readme.splitlines()]
    lines = [line for line in lines if line.startswith(("python3 -m zipfile", "curl -H"))]
    assert len(lines) >= 5
    for file in (top / "examples/hello-shell").iterdir():
        host.machine.put(file, f"/root/readme/examples/hello-shell/{file.name}")
    script = "\n".join(["set -eux", "cd /root/readme", f"KEY={shlex.quote(host.key)}", *lines])
    said = host.run(script, timeout=180)
    assert "Hello, you, from hello on Linux" in said
    assert not re.search(r'"error": "[^"]', said), said


def test_the_frozen_agent_isolates_and_leaks_nothing_of_itself(host: Host) -> None:
    host.deploy("environment", ENVIRONMENT)
    status, answer = host.execute("environment")
    assert status == 200, answer
    output = answer["output"]
    assert "flux-agent.service" in host.run("systemctl show -P ControlGroup flux-agent")
    # What PyInstaller's start program needs for itself would break the programs that functions are.
    assert not re.search(r"LD_LIBRARY_PATH|_PYI|_MEI", output)
    (uid,) = re.findall(r"uid=(\d+)", output)
    assert int(uid) >= 1879048192, "a number of the pool, neither root nor flux-runner"


@pytest.mark.parametrize(("unit", "most"), [("flux", 1.2), ("flux-agent", 4.3)])
def test_the_units_score_as_the_documentation_says(host: Host, top: Path, unit: str, most: float) -> None:
    said = host.run(f"systemd-analyze security --no-pager {unit}.service")
    (score,) = re.findall(r"exposure level for \S+: ([\d.]+)", said)
    assert float(score) <= most
    documented = re.findall(
        rf"^\| `{unit}\.service` \|.*\| ([\d.]+) \|$", (top / "docs/packaging.md").read_text(), re.M
    )
    assert documented == [score]


def test_after_a_reboot_everything_is_back(host: Host) -> None:
    key = host.key
    host.machine.reboot()
    wait_until(host.agent_is_online, "the agent to be online again", 180)
    assert host.key == key
    status, answer = host.execute("hello", "again")
    assert (status, answer["output"]) == (200, "Hello, again, from hello on Linux\n")


_THIEF = """
import socket, sys
while True:
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                thief.bind((host, 7227))
                thief.listen()
            except OSError:
                continue
            print("stolen", host, flush=True)
"""


def test_nobody_gets_the_port_while_flux_restarts(host: Host) -> None:
    """A function on this machine would be sent the administrator's key by the next curl."""
    host.run("cat > /root/thief.py", stdin=_THIEF.encode())
    host.run("systemd-run -q --unit thief -p StandardOutput=file:/root/stolen python3 /root/thief.py")
    try:
        for command in ("systemctl restart flux", "systemctl kill -s KILL flux && systemctl restart flux"):
            host.run(command, timeout=120)
            wait_until(lambda: host.call("GET", "/health")[0] == 200, "Flux to answer")
    finally:
        host.run("systemctl stop thief")
    assert host.run("cat /root/stolen") == ""


def test_an_upgrade_of_the_control_plane_disturbs_no_execution(host: Host) -> None:
    host.deploy("sleeper", SLEEPER)
    execution = host.start("sleeper", "60")
    key, agent_start = host.key, host.started_at("flux-agent")
    host.install("flux")
    assert host.run("flux --version").strip().endswith(fluxlib.__version__)
    wait_until(host.agent_is_online, "Flux to be back", 120)
    assert host.key == key
    assert host.started_at("flux-agent") == agent_start
    assert host.ended(execution)["output"] == "started\ndone\n"


def test_an_upgrade_of_the_agent_accounts_for_what_ran(host: Host) -> None:
    execution = host.start("sleeper", "600")
    host.install("flux-agent")
    assert host.run("flux-agent --version").strip().endswith(fluxlib.__version__)
    record = host.ended(execution)
    assert record["status"] == "failed"
    assert "agent" in record["error"]
    # "online" may still be what Flux knew before the restart: the functions it runs again are the proof.
    wait_until(lambda: host.execute("hello", "you")[0] == 200, "functions and code to be there again", 120)
    assert host.run("pgrep -x sleep || true") == ""


def test_both_together_upgrade_and_come_back(host: Host) -> None:
    host.run("dpkg -i /root/flux.deb /root/flux-agent.deb", timeout=300)
    wait_until(host.agent_is_online, "both to be back", 120)
    assert host.execute("hello", "both")[1]["output"] == "Hello, both, from hello on Linux\n"


def test_a_new_authority_is_made_where_the_old_one_was_moved_away(host: Host) -> None:
    host.run("mv /etc/flux/certs /root/former && systemctl restart flux")
    host.run(f"curl -sS --retry 30 --retry-delay 1 --retry-connrefused --fail {URL}/health", timeout=90)
    assert host.run("stat -c '%U:%G %a' /etc/flux/certs /etc/flux/certs/ca").splitlines() == ["flux:flux 700"] * 2
    assert host.machine.status("cmp -s /etc/flux/certs/ca/ca.pem /root/former/ca/ca.pem") == 1
    host.run("rm -r /etc/flux/certs && mv /root/former /etc/flux/certs && systemctl restart flux")
    wait_until(host.agent_is_online, "the agent of the former authority to be back", 120)


def test_a_bad_configuration_is_told_at_the_start_and_not_restarted(host: Host) -> None:
    for unit, file in (("flux", "/etc/flux/flux.yaml"), ("flux-agent", "/etc/flux-agent/agent.yaml")):
        # The agent's has a port already.
        host.run(f"cp -p {file} /root/good.yaml && sed -i '/^port:/d' {file} && echo 'port: many' >>{file}")
        assert host.machine.status(f"systemctl restart {unit}") != 0
        # A unit that is going to be restarted is "activating".
        shown = host.run(f"systemctl show -p ActiveState -p ExecMainStatus {unit}").split()
        assert sorted(shown) == ["ActiveState=failed", "ExecMainStatus=78"]
        told = f"journalctl -u {unit} -o cat -n 20 | grep -q 'port: must be a whole number'"
        wait_until(lambda told=told: host.machine.status(told) == 0, f"the journal to have what {unit} said")
        host.run(f"cp -p /root/good.yaml {file} && systemctl start {unit}")
    wait_until(host.agent_is_online, "both to be back", 120)


def test_a_taken_port_fails_the_start_and_says_how_to_find_the_program(host: Host) -> None:
    host.run("systemctl stop flux && systemd-run --unit taker python3 -m http.server 7227 --bind 127.0.0.1")
    host.run("until curl -sf http://127.0.0.1:7227/ >/dev/null; do sleep 0.2; done", timeout=60)
    assert host.machine.status("systemctl start flux") != 0
    advice = re.compile(r"`(sudo ss [^`]*)` shows")
    found = wait_until(
        lambda: advice.findall(host.run("journalctl -u flux -o cat -n 50")), "the journal to have the advice"
    )
    assert "python3" in host.run(found[-1])
    host.run("systemctl stop taker")
    wait_until(host.agent_is_online, "Flux to have tried again", 120)


def test_removing_leaves_what_was_made(host: Host) -> None:
    host.run("dpkg -r flux flux-agent", timeout=300)
    assert not host.active("flux")
    assert not host.active("flux-agent")
    assert host.run("pgrep -l flux || true") == ""
    assert host.machine.status("test -e /usr/bin/flux -o -e /usr/lib/flux -o -e /usr/lib/flux-agent") != 0
    for kept in (
        "/etc/flux/flux.yaml",
        "/etc/flux/certs/ca/ca.pem",
        "/var/lib/flux/flux.db",
        "/etc/flux-agent/agent.yaml",
    ):
        assert host.machine.status(f"test -e {kept}") == 0, kept


def test_purging_leaves_nothing(host: Host) -> None:
    host.run("dpkg -P flux flux-agent", timeout=300)
    others = " ".join(f"-not -path '{directory}/*'" for directory in ("/root", "/home", "/opt", "/proc"))
    left = host.run(f"find / -xdev -name '*flux*' {others}")
    # systemd's journal and dpkg's own log are the machine's.
    assert left.split() == []
    assert host.machine.status("getent passwd flux flux-runner") != 0
    assert host.machine.status("getent group flux flux-runner") != 0
    assert host.run("systemctl list-unit-files --no-legend 'flux*' || true") == ""
    assert host.run("find /sys/fs/cgroup -name '*flux*'") == ""
