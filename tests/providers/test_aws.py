"""EC2 over HTTP: what is asked of it, what is told of it, and nothing left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fluxlib.config.control import AwsConfig
from fluxlib.errors import ProviderError, StrandedNode
from fluxlib.pki import Authority
from fluxlib.providers import aws as module
from fluxlib.providers.aws import Aws
from fluxlib.providers.base import Launch, NodeState
from tests.support.ec2 import REGION, Ec2


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Ec2]:
    with Ec2() as ec2:
        yield ec2


@pytest.fixture
def ec2(endpoint: Ec2) -> Ec2:
    endpoint.reset()
    return endpoint


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Authority.open(tmp_path_factory.mktemp("certs")).ssh_key(for_ec2=True).public


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITER_DELAY", 1)
    monkeypatch.setattr(module, "_ADDRESS_POLL", 0.05)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)


def config(ec2: Ec2, **settings: Any) -> AwsConfig:
    base = AwsConfig(
        region=REGION, ami=ec2.image(), access_key_id="flux", secret_access_key="secret", endpoint_url=ec2.url
    )
    return replace(base, **settings)


def provider(ec2: Ec2, installation: str = "here", **settings: Any) -> Aws:
    return Aws(config(ec2, **settings), installation)


def wanted(key: str, agent_id: str = "web-1") -> Launch:
    return Launch(agent_id, "t3.small", key)


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def instances(ec2: Ec2) -> list[dict[str, Any]]:
    answer = ec2.client().describe_instances()
    return [one for reservation in answer["Reservations"] for one in reservation["Instances"]]


def alive(ec2: Ec2) -> list[str]:
    return [one["InstanceId"] for one in instances(ec2) if one["State"]["Name"] not in ("shutting-down", "terminated")]


# -- the key pair ------------------------------------------------------------------------


def test_the_key_pair_is_imported_once(ec2: Ec2, key: str) -> None:
    cloud = provider(ec2)
    cloud.prepare(key)
    cloud.prepare(key)
    (pair,) = ec2.client().describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
    assert pair["KeyName"] == "flux-here"
    assert pair["PublicKey"].split()[:2] == key.split()[:2]
    assert pair["Tags"] == [{"Key": "flux:installation", "Value": "here"}]
    assert len(ec2.actions("ImportKeyPair")) == 1


def test_a_key_pair_that_is_not_ours_is_replaced(ec2: Ec2, key: str, tmp_path: Any) -> None:
    other = Authority.open(tmp_path / "other").ssh_key(for_ec2=True).public
    ec2.client().import_key_pair(KeyName="flux-here", PublicKeyMaterial=other.encode())
    provider(ec2).prepare(key)
    (pair,) = ec2.client().describe_key_pairs(IncludePublicKey=True)["KeyPairs"]
    assert pair["PublicKey"].split()[:2] == key.split()[:2]


def test_another_flux_that_imported_it_first_is_no_error(ec2: Ec2, key: str) -> None:
    ec2.fault("DescribeKeyPairs", "InvalidKeyPair.NotFound")
    ec2.client().import_key_pair(KeyName="flux-here", PublicKeyMaterial=key.encode())
    provider(ec2).prepare(key)


def test_a_missing_permission_is_named(ec2: Ec2, key: str) -> None:
    ec2.fault("ImportKeyPair", "UnauthorizedOperation", 403)
    with pytest.raises(ProviderError, match=r"importing the key pair failed: .*UnauthorizedOperation"):
        provider(ec2).prepare(key)


# -- launching ---------------------------------------------------------------------------


def test_a_launch_answers_with_a_running_node_and_its_addresses(ec2: Ec2, key: str) -> None:
    cloud = provider(ec2, tags={"team": "web", "Name": "not this"})
    cloud.prepare(key)
    node = cloud.launch(wanted(key), soon())
    (instance,) = instances(ec2)
    assert node.provider_id == instance["InstanceId"]
    assert (node.public_ip, node.private_ip) == (instance["PublicIpAddress"], instance["PrivateIpAddress"])
    assert (node.agent_id, node.instance_type, node.state) == ("web-1", "t3.small", NodeState.RUNNING)
    assert abs(node.launched_at - time.time()) < 60
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert tags == {
        "team": "web",
        "Name": "web-1",
        "flux:role": "agent",
        "flux:agent-id": "web-1",
        "flux:installation": "here",
    }
    assert instance["KeyName"] == "flux-here"


def test_imds_v2_is_required_and_the_launch_has_a_token(ec2: Ec2, key: str) -> None:
    provider(ec2).launch(wanted(key), soon())
    (asked,) = ec2.actions("RunInstances")
    assert asked["MetadataOptions.HttpTokens"] == ["required"]
    assert asked["MetadataOptions.HttpPutResponseHopLimit"] == ["1"]
    assert asked["ClientToken"] == ["web-1"]
    assert (asked["MinCount"], asked["MaxCount"]) == (["1"], ["1"])
    resources = {asked[f"TagSpecification.{n}.ResourceType"][0] for n in (1, 2)}
    assert resources == {"instance", "volume"}
    for optional in ("SubnetId", "InstanceMarketOptions.MarketType", "BlockDeviceMapping.1.DeviceName"):
        assert optional not in asked


def test_subnet_security_group_volume_and_spot_are_asked_for(ec2: Ec2, key: str) -> None:
    client = ec2.client()
    subnet = client.describe_subnets()["Subnets"][0]["SubnetId"]
    group = client.describe_security_groups()["SecurityGroups"][0]["GroupId"]
    cloud = provider(ec2, subnet_id=subnet, security_group_id=group, volume_size_gb=50, spot=True)
    cloud.launch(wanted(key), soon())
    (asked,) = ec2.actions("RunInstances")
    assert asked["SubnetId"] == [subnet]
    assert asked["SecurityGroupId.1"] == [group]
    assert asked["InstanceMarketOptions.MarketType"] == ["spot"]
    root = client.describe_images(ImageIds=[cloud._config.ami])["Images"][0]["RootDeviceName"]
    # Under another name it would be a second disk.
    assert asked["BlockDeviceMapping.1.DeviceName"] == [root]
    assert asked["BlockDeviceMapping.1.Ebs.VolumeSize"] == ["50"]
    assert asked["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == ["true"]


def test_throttling_is_retried(ec2: Ec2, key: str) -> None:
    ec2.fault("RunInstances", "RequestLimitExceeded", 503, times=3)
    ec2.fault("DescribeInstances", "Throttling", 400, times=2)
    provider(ec2).launch(wanted(key), soon())
    assert len(ec2.actions("RunInstances")) == 4
    assert {asked["ClientToken"][0] for asked in ec2.actions("RunInstances")} == {"web-1"}
    assert len(alive(ec2)) == 1


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "VcpuLimitExceeded", "InvalidAMIID.NotFound"])
def test_a_refusal_is_told_and_leaves_nothing(ec2: Ec2, key: str, code: str) -> None:
    ec2.fault("RunInstances", code, 400)
    with pytest.raises(ProviderError, match=code) as caught:
        provider(ec2).launch(wanted(key), soon())
    assert not isinstance(caught.value, StrandedNode)
    assert alive(ec2) == []


def test_a_lost_answer_may_have_been_a_yes(ec2: Ec2, key: str) -> None:
    ec2.fault("RunInstances", "InternalError", 500, times=20, after=True)
    with pytest.raises(StrandedNode) as caught:
        provider(ec2).launch(wanted(key), soon())
    assert caught.value.provider_id == ""
    # All those attempts carried one token: there is one machine, and it is found by its agent's ID.
    assert len({asked["ClientToken"][0] for asked in ec2.actions("RunInstances")}) == 1
    assert {node.agent_id for node in provider(ec2).nodes()} == {"web-1"}


def test_a_refusal_of_what_was_asked_before_says_nothing_of_that(ec2: Ec2, key: str) -> None:
    # The SDK asks again by itself; meanwhile the credentials ran out.
    ec2.fault("RunInstances", "InternalError", 500, after=True)
    ec2.fault("RunInstances", "RequestExpired", 400)
    with pytest.raises(StrandedNode, match="RequestExpired"):
        provider(ec2).launch(wanted(key), soon())
    assert {node.agent_id for node in provider(ec2).nodes()} == {"web-1"}


def test_an_endpoint_that_is_away_is_no_refusal(ec2: Ec2, key: str) -> None:
    cloud = Aws(config(ec2, endpoint_url="http://127.0.0.1:9"), "here")
    with pytest.raises(StrandedNode):
        cloud.launch(wanted(key), soon())


def test_a_machine_without_a_public_address_is_ended_and_the_setting_named(
    ec2: Ec2, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = provider(ec2)
    node = cloud._node
    monkeypatch.setattr(cloud, "_node", lambda instance: replace(node(instance), public_ip=""))
    with pytest.raises(ProviderError, match="MapPublicIpOnLaunch"):
        cloud.launch(wanted(key), soon(2))
    assert len(instances(ec2)) == 1
    assert alive(ec2) == []
    private = provider(ec2, use_private_ip=True)
    monkeypatch.setattr(private, "_node", lambda instance: replace(node(instance), public_ip=""))
    assert private.launch(wanted(key, "web-2"), soon()).private_ip


def test_a_machine_that_does_not_come_to_run_is_ended(ec2: Ec2, key: str) -> None:
    ec2.fault("DescribeInstances", "UnauthorizedOperation", 403, times=20)
    with pytest.raises(ProviderError, match="UnauthorizedOperation") as caught:
        provider(ec2).launch(wanted(key), soon())
    assert not isinstance(caught.value, StrandedNode)
    ec2._faults.clear()
    assert alive(ec2) == []


def test_one_that_cannot_be_ended_either_is_said_to_be_stranded(ec2: Ec2, key: str) -> None:
    ec2.fault("DescribeInstances", "UnauthorizedOperation", 403, times=20)
    ec2.fault("TerminateInstances", "UnauthorizedOperation", 403, times=20)
    with pytest.raises(StrandedNode, match="it still runs") as caught:
        provider(ec2).launch(wanted(key), soon())
    ec2._faults.clear()
    assert alive(ec2) == [caught.value.provider_id]


def test_one_that_is_too_new_to_be_known_is_not_taken_for_ended(
    ec2: Ec2, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ec2.fault("DescribeInstances", "UnauthorizedOperation", 403, times=2)
    ec2.fault("TerminateInstances", "InvalidInstanceID.NotFound", times=2)
    cloud = provider(ec2)
    with pytest.raises(StrandedNode, match="it still runs") as caught:
        cloud.launch(wanted(key), soon())
    # Whoever ends it then asks at once.
    with pytest.raises(ProviderError, match="NotFound"):
        cloud.terminate(caught.value.provider_id)
    assert alive(ec2) == [caught.value.provider_id]
    cloud.terminate(caught.value.provider_id)
    assert alive(ec2) == []
    # Later on what is unknown is gone.
    monkeypatch.setattr(module, "_KNOWN_WITHIN", 0.0)
    new = cloud.launch(wanted(key, "web-2"), soon()).provider_id
    ec2.fault("TerminateInstances", "InvalidInstanceID.NotFound")
    cloud.terminate(new)


def test_an_instance_that_describe_does_not_know_yet_is_waited_for(ec2: Ec2, key: str) -> None:
    ec2.fault("DescribeInstances", "InvalidInstanceID.NotFound", times=2)
    assert provider(ec2).launch(wanted(key), soon()).public_ip


# -- listing and ending ------------------------------------------------------------------


def test_two_installations_see_only_their_own(ec2: Ec2, key: str) -> None:
    here, there = provider(ec2), provider(ec2, "there")
    ours = here.launch(wanted(key, "web-1"), soon())
    theirs = there.launch(wanted(key, "web-2"), soon())
    image = ec2.image()
    ec2.client().run_instances(ImageId=image, MinCount=1, MaxCount=1)  # nobody's
    assert [node.provider_id for node in here.nodes()] == [ours.provider_id]
    assert [node.provider_id for node in there.nodes()] == [theirs.provider_id]


def test_every_page_of_a_long_list_is_read(ec2: Ec2, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 5)
    tags = [{"Key": "flux:installation", "Value": "here"}, {"Key": "flux:agent-id", "Value": "many"}]
    client, image = ec2.client(), ec2.image()
    for _ in range(12):
        specification = [{"ResourceType": "instance", "Tags": tags}]
        client.run_instances(ImageId=image, MinCount=1, MaxCount=1, TagSpecifications=specification)
    assert len(provider(ec2).nodes()) == 12
    assert len(ec2.actions("DescribeInstances")) == 3


def test_what_has_ended_is_not_listed_and_ending_twice_is_no_error(ec2: Ec2, key: str) -> None:
    cloud = provider(ec2)
    node = cloud.launch(wanted(key), soon())
    cloud.terminate(node.provider_id)
    assert cloud.nodes() == []
    cloud.terminate(node.provider_id)
    cloud.terminate("i-0123456789abcdef0")


def test_a_stopped_machine_is_listed_as_such(ec2: Ec2, key: str) -> None:
    cloud = provider(ec2)
    node = cloud.launch(wanted(key), soon())
    ec2.client().stop_instances(InstanceIds=[node.provider_id])
    assert [one.state for one in cloud.nodes()] == [NodeState.STOPPED]


def test_a_list_that_breaks_is_an_error_and_never_a_part(ec2: Ec2, key: str) -> None:
    cloud = provider(ec2)
    cloud.launch(wanted(key), soon())
    ec2.fault("DescribeInstances", "UnauthorizedOperation", 403)
    with pytest.raises(ProviderError, match="listing instances failed"):
        cloud.nodes()


def test_no_secret_is_in_an_error(ec2: Ec2, key: str) -> None:
    ec2.fault("RunInstances", "AuthFailure", 401)
    with pytest.raises(ProviderError) as caught:
        provider(ec2, secret_access_key="very-secret-words").launch(wanted(key), soon())
    assert "very-secret" not in str(caught.value)
