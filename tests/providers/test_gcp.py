"""Compute Engine over HTTP: what is asked of it, what is told of it, and nothing left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fluxlib.config.control import GcpConfig
from fluxlib.errors import ProviderError, StrandedNode
from fluxlib.providers import gcp as module
from fluxlib.providers.base import Launch, NodeState
from fluxlib.providers.gcp import Gcp
from tests.support.compute import Compute

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO3quXImZKlzCu/GXWiAzp0Rb+A7Qfb7XgmLu9MJROCO"


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compute]:
    monkeypatch.setattr(module, "_RETRY_FIRST", 0.01)
    monkeypatch.setattr(module, "_RETRY_LONGEST", 0.05)
    monkeypatch.setattr(module, "_STATE_POLL", 0.01)
    monkeypatch.setattr(module, "_CALL_TIMEOUT", 5.0)
    with Compute() as server:
        yield server


def provider(compute: Compute, installation: str = "here", **settings: Any) -> Gcp:
    base = GcpConfig(
        project_id=compute.project,
        zone=compute.zone,
        image="projects/debian-cloud/global/images/family/debian-12",
        endpoint_url=compute.url,
    )
    return Gcp(replace(base, **settings), installation)


def wanted(agent_id: str = "web-1") -> Launch:
    return Launch(agent_id, "e2-small", KEY)


def soon(seconds: float = 10) -> float:
    return time.monotonic() + seconds


# -- launching ---------------------------------------------------------------------------


def test_a_launch_answers_with_a_running_node_and_its_addresses(compute: Compute) -> None:
    compute.slow_waits = 2
    cloud = provider(compute)
    cloud.prepare(KEY)
    node = cloud.launch(wanted(), soon())
    assert (node.provider_id, node.agent_id, node.instance_type) == ("web-1", "web-1", "e2-small")
    assert (node.public_ip, node.private_ip, node.state) == ("192.0.2.2", "10.156.0.2", NodeState.RUNNING)
    assert abs(node.launched_at - time.time()) < 60
    assert compute.count("wait") == 3


def test_what_a_machine_is_made_of(compute: Compute) -> None:
    provider(compute, labels={"Team": "Web & Mobile", "flux-role": "mine"}).launch(wanted(), soon())
    made = compute.instances["web-1"]
    assert made["machineType"].endswith("zones/europe-west3-a/machineTypes/e2-small")
    assert made["labels"] == {
        "team": "web---mobile",
        "flux-role": "agent",
        "flux-agent-id": "web-1",
        "flux-installation": "here",
    }
    metadata = {item["key"]: item["value"] for item in made["metadata"]["items"]}
    assert metadata["ssh-keys"] == f"ubuntu:{KEY} ubuntu"
    assert metadata["enable-oslogin"] == "FALSE"
    assert metadata["block-project-ssh-keys"] == "TRUE"
    (disk,) = made["disks"]
    assert disk["autoDelete"] is True
    assert disk["initializeParams"] == {"sourceImage": "projects/debian-cloud/global/images/family/debian-12"}
    # No account: a function that asks the metadata server gets no token.
    assert "serviceAccounts" not in made
    assert "scheduling" not in made


def test_account_network_disk_and_spot_are_asked_for(compute: Compute) -> None:
    cloud = provider(
        compute,
        service_account_email="nodes@proj.iam.gserviceaccount.com",
        network="global/networks/flux",
        subnetwork="regions/europe-west3/subnetworks/flux",
        volume_size_gb=40,
        spot=True,
        ssh_user="debian",
    )
    cloud.launch(wanted(), soon())
    made = compute.instances["web-1"]
    assert made["serviceAccounts"] == [
        {
            "email": "nodes@proj.iam.gserviceaccount.com",
            "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
        }
    ]
    assert made["networkInterfaces"][0]["network"] == "global/networks/flux"
    assert made["networkInterfaces"][0]["subnetwork"] == "regions/europe-west3/subnetworks/flux"
    assert made["disks"][0]["initializeParams"]["diskSizeGb"] == "40"
    assert made["scheduling"]["provisioningModel"] == "SPOT"
    assert made["scheduling"]["instanceTerminationAction"] == "DELETE"
    assert made["metadata"]["items"][0]["value"].startswith("debian:")


def test_asked_twice_there_is_one_machine(compute: Compute) -> None:
    cloud = provider(compute)
    first = cloud.launch(wanted(), soon())
    again = provider(compute).launch(wanted(), soon())
    assert again == first
    tokens = {request.query["requestId"][0] for request in compute.asked if request.method == "POST" and request.body}
    assert len(tokens) == 1
    # The cloud forgets a request's ID after a while: then the name is taken, by ourselves.
    compute._by_request.clear()
    assert provider(compute).launch(wanted(), soon()) == first


def test_a_name_that_somebody_else_has_is_a_refusal(compute: Compute) -> None:
    provider(compute, "there").launch(wanted(), soon())
    with pytest.raises(ProviderError, match="already exists") as caught:
        provider(compute, "here").launch(wanted(), soon())
    assert not isinstance(caught.value, StrandedNode)
    assert "web-1" in compute.instances


def test_a_machine_without_a_public_address_is_ended_and_the_setting_named(compute: Compute) -> None:
    compute.public = False
    with pytest.raises(ProviderError, match="use_private_ip"):
        provider(compute).launch(wanted(), soon())
    assert compute.instances == {}
    node = provider(compute, use_private_ip=True).launch(wanted("web-2"), soon())
    assert (node.public_ip, node.private_ip) == ("", "10.156.0.2")
    assert "accessConfigs" not in compute.instances["web-2"]["networkInterfaces"][0]


# -- refusals and faults -----------------------------------------------------------------


def test_a_quota_that_the_operation_tells_of_is_in_the_error(compute: Compute) -> None:
    compute.operation_fault("insert", "QUOTA_EXCEEDED", "Quota 'CPUS' exceeded. Limit: 8.0 in region europe-west3.")
    with pytest.raises(ProviderError, match=r"QUOTA_EXCEEDED: Quota 'CPUS' exceeded") as caught:
        provider(compute).launch(wanted(), soon())
    assert not isinstance(caught.value, StrandedNode)
    assert compute.instances == {}


@pytest.mark.parametrize(
    ("status", "reason"), [(403, "forbidden"), (400, "invalid"), (404, "notFound"), (403, "quotaExceeded")]
)
def test_a_refused_insert_launches_nothing(compute: Compute, status: int, reason: str) -> None:
    compute.fault("insert", status, reason, "Required 'compute.instances.create' permission")
    with pytest.raises(ProviderError, match=r"inserting web-1 failed: .*compute\.instances\.create") as caught:
        provider(compute).launch(wanted(), soon())
    assert not isinstance(caught.value, StrandedNode)
    assert compute.count("insert") == 1


@pytest.mark.parametrize(("status", "reason"), [(429, "x"), (503, "x"), (500, "x"), (403, "rateLimitExceeded")])
@pytest.mark.parametrize("what", ["insert", "get", "wait"])
def test_what_passes_is_tried_again(compute: Compute, what: str, status: int, reason: str) -> None:
    compute.fault(what, status, reason, times=2)
    provider(compute).launch(wanted(), soon())
    assert compute.count(what) == 3
    assert list(compute.instances) == ["web-1"]


def test_a_lost_answer_may_have_been_a_yes(compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALL_TIMEOUT", 0.3)
    compute.fault("insert", 503, times=1000, after=True)
    with pytest.raises(StrandedNode) as caught:
        provider(compute).launch(wanted(), soon())
    assert caught.value.provider_id == "web-1"
    assert list(compute.instances) == ["web-1"]


def test_a_refusal_of_what_was_asked_before_says_nothing_of_that(compute: Compute) -> None:
    compute.fault("insert", 503, after=True)
    compute.fault("insert", 403, "forbidden", "Required permission")
    with pytest.raises(StrandedNode, match="Required permission"):
        provider(compute).launch(wanted(), soon())
    assert [node.agent_id for node in provider(compute).nodes()] == ["web-1"]


def test_an_endpoint_that_is_away_is_no_refusal(compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALL_TIMEOUT", 0.3)
    with pytest.raises(StrandedNode):
        provider(compute, endpoint_url="http://127.0.0.1:9").launch(wanted(), soon())


def test_an_operation_that_never_ends_is_given_up_at_the_deadline(compute: Compute) -> None:
    compute.slow_waits = 10**6
    monkey_deadline = time.monotonic() + 0.5
    with pytest.raises(ProviderError) as caught:
        _launch_with_quick_delete(provider(compute), compute, monkey_deadline)
    assert "did not end in time" in str(caught.value)
    assert compute.instances == {}


def _launch_with_quick_delete(cloud: Gcp, compute: Compute, deadline: float) -> None:
    delete = cloud._instances.delete

    def deleted(*args: Any, **options: Any) -> Any:
        compute.slow_waits = 0
        return delete(*args, **options)

    cloud._instances.delete = deleted
    cloud.launch(wanted(), deadline)


def test_one_that_cannot_be_ended_either_is_said_to_be_stranded(compute: Compute) -> None:
    compute.public = False
    compute.fault("delete", 403, "forbidden", "Required 'compute.instances.delete' permission")
    with pytest.raises(StrandedNode, match=r"public address.*compute\.instances\.delete") as caught:
        provider(compute).launch(wanted(), soon())
    assert caught.value.provider_id == "web-1"
    assert list(compute.instances) == ["web-1"]


def test_a_machine_that_stops_at_once_is_ended(compute: Compute) -> None:
    compute.status = "TERMINATED"
    with pytest.raises(ProviderError, match="does not run: it is stopped"):
        provider(compute).launch(wanted(), soon())
    assert compute.instances == {}


# -- listing and ending ------------------------------------------------------------------


def test_two_installations_see_only_their_own_whatever_the_pages(compute: Compute) -> None:
    compute.page = 2
    here, there = provider(compute), provider(compute, "there")
    for number in range(5):
        here.launch(wanted(f"web-{number}"), soon())
    there.launch(wanted("other-1"), soon())
    assert [node.agent_id for node in here.nodes()] == [f"web-{number}" for number in range(5)]
    assert [node.agent_id for node in there.nodes()] == ["other-1"]
    assert compute.count("list") == 4


def test_states_are_told(compute: Compute) -> None:
    cloud = provider(compute)
    for number, status in enumerate(["RUNNING", "STAGING", "TERMINATED", "STOPPING"]):
        cloud.launch(wanted(f"web-{number}"), soon())
        compute.instances[f"web-{number}"]["status"] = status
    states = [node.state for node in cloud.nodes()]
    assert states == [NodeState.RUNNING, NodeState.PENDING, NodeState.STOPPED, NodeState.ENDING]


def test_ending_is_waited_for_and_ending_twice_is_no_error(compute: Compute) -> None:
    cloud = provider(compute)
    cloud.launch(wanted(), soon())
    waited = compute.count("wait")
    cloud.terminate("web-1")
    assert compute.count("wait") == waited + 1
    assert cloud.nodes() == []
    cloud.terminate("web-1")


def test_a_deletion_that_fails_after_it_was_accepted_is_an_error(compute: Compute) -> None:
    cloud = provider(compute)
    cloud.launch(wanted(), soon())
    compute.operation_fault("delete", "RESOURCE_IN_USE", "deletion protection is on")
    with pytest.raises(ProviderError, match="deletion protection is on"):
        cloud.terminate("web-1")


def test_a_list_that_breaks_is_an_error_and_never_a_part(compute: Compute) -> None:
    compute.page = 1
    cloud = provider(compute)
    for number in range(3):
        cloud.launch(wanted(f"web-{number}"), soon())
    answer, looks = compute._list, []

    def second_page_refused(rest: str, request: Any) -> Any:
        looks.append(request)
        return (403, {"error": {"code": 403, "message": "no more"}}) if len(looks) == 2 else answer(rest, request)

    compute._list = second_page_refused  # type: ignore[method-assign]
    with pytest.raises(ProviderError, match="listing instances failed"):
        cloud.nodes()


def test_a_credentials_file_that_is_none_is_named(compute: Compute, tmp_path: Any) -> None:
    path = tmp_path / "key.json"
    with pytest.raises(ProviderError, match=r"credentials_file .*key\.json cannot be used"):
        provider(compute, credentials_file=str(path))
    path.write_text('{"type": "service_account"}')
    with pytest.raises(ProviderError, match=r"key\.json cannot be used"):
        provider(compute, credentials_file=str(path))
