"""Cloud nodes through the API of a real Flux and a real EC2 endpoint; kill -9 in between leaves no orphan."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fluxlib.pki import Authority
from tests.support.ec2 import REGION, Ec2
from tests.support.programs import Flux, free_port, wait_until

# A loopback address where nothing answers on the port that Flux is told.
NOBODY = ("127.0.0.21", "127.0.0.22")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Ec2]:
    with Ec2(NOBODY) as ec2:
        yield ec2


@pytest.fixture
def ec2(endpoint: Ec2) -> Ec2:
    endpoint.reset()
    return endpoint


def flux(directory: Path, ec2: Ec2, start_seconds: float, **settings: Any) -> Flux:
    scaling = {
        "name": "web",
        "min_nodes": 1,
        "node_types": [{"instance_type": "t3.micro"}],
        **settings.pop("scaling", {}),
    }
    aws = {
        "region": REGION,
        "ami": ec2.image(),
        "access_key_id": "flux",
        "secret_access_key": "very-secret-words",
        "endpoint_url": ec2.url,
        "ssh_port": free_port(),
        "autoscaling": scaling,
    }
    return Flux(directory, node_start_sec=start_seconds, providers={"aws": aws}, **settings)


def alive(ec2: Ec2) -> list[str]:
    answer = ec2.client().describe_instances()
    instances = [one for reservation in answer["Reservations"] for one in reservation["Instances"]]
    return [one["InstanceId"] for one in instances if one["State"]["Name"] not in ("shutting-down", "terminated")]


def nodes(running: Flux) -> dict[str, str]:
    return {agent["id"]: agent.get("problem", "") for agent in running.api.call("GET", "/agents")[1]}


def test_a_failed_initialize_says_why_and_leaves_nothing(ec2: Ec2, tmp_path: Path) -> None:
    with flux(tmp_path, ec2, 1, scaling={"min_nodes": 2}) as running:
        status, answer = running.api.call("POST", "/initialize")
        assert (status, answer["nodes"]) == (200, {"spawned": 0, "failed": 2})
        assert all("bootstrap step 'wait for SSH' failed" in error for error in answer["errors"])
        assert (alive(ec2), nodes(running)) == ([], {})
        report = running.api.call("GET", "/autoscaling")[1]
        assert report["providers"]["aws"]["enabled"] is False
        assert running.api.call("DELETE", "/nodes") == (200, {"status": "removed", "removed": 0, "errors": []})
        status, answer = running.api.call("DELETE", "/agents/web-1?terminate=true")
        assert status == 404
        text = running.log.read_text()
        assert "very-secret-words" not in text
        assert "PRIVATE KEY" not in text


def test_a_flux_killed_while_it_makes_a_node_goes_on_with_it(ec2: Ec2, tmp_path: Path) -> None:
    running = flux(tmp_path, ec2, 60).start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.api.call, "POST", "/initialize")
        wait_until(
            lambda: any("wait for SSH" in problem for problem in nodes(running).values()), "SSH to be waited for"
        )
        (agent_id,) = nodes(running)
        running.kill()
        assert asked.exception(20) is not None
    (instance,) = alive(ec2)
    with flux(tmp_path, ec2, 8, port=running.port) as again:
        wait_until(lambda: any("wait for SSH" in problem for problem in nodes(again).values()), "it to be gone on with")
        assert list(nodes(again)) == [agent_id]
        assert alive(ec2) == [instance]
        wait_until(lambda: nodes(again) == {}, "it to be given up", 30)
        assert alive(ec2) == []
        assert len(ec2.actions("RunInstances")) == 1


def test_a_flux_killed_while_it_launches_asks_with_the_same_token(ec2: Ec2, tmp_path: Path) -> None:
    gate = ec2.hold("RunInstances")
    running = flux(tmp_path, ec2, 60).start()
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(running.api.call, "POST", "/initialize")
            wait_until(lambda: alive(ec2), "the machine to run")
            running.kill()
            assert asked.exception(20) is not None
    finally:
        gate.set()
    with flux(tmp_path, ec2, 2, port=running.port) as again:
        wait_until(lambda: nodes(again) == {}, "it to be given up", 30)
        tokens = [asked["ClientToken"] for asked in ec2.actions("RunInstances")]
        assert len(tokens) == 2
        assert tokens[0] == tokens[1]


def test_strays_are_in_the_warnings_from_the_start(ec2: Ec2, tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    tags = [
        {"Key": "flux:installation", "Value": Authority.open(certs).installation_id()},
        {"Key": "flux:agent-id", "Value": "web-lost"},
    ]
    ec2.client().run_instances(
        ImageId=ec2.image(), MinCount=1, MaxCount=1, TagSpecifications=[{"ResourceType": "instance", "Tags": tags}]
    )
    with flux(tmp_path, ec2, 1, certs_dir=str(certs), end_strays=True) as running:
        found = wait_until(lambda: running.api.call("GET", "/health")[1]["warnings"], "the warning")
        assert any("web-lost" in warning for warning in found)
        # Older than this store: whatever end_strays says.
        assert len(alive(ec2)) == 1


def test_without_a_provider_there_are_no_nodes(tmp_path: Path) -> None:
    with Flux(tmp_path) as running:
        for method, path in (("POST", "/initialize"), ("DELETE", "/nodes"), ("GET", "/autoscaling")):
            status, answer = running.api.call(method, path)
            assert status == 503
            assert "providers" in answer["error"]
