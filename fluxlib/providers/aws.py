"""Amazon EC2 through boto3.

Facts of the API (EC2 API reference, RunInstances, ImportKeyPair): a repeated
ClientToken answers with the instance of the first call, even when that has ended;
a key pair must be RSA or ED25519; a new instance may be unknown to
DescribeInstances for some seconds; ``HttpTokens=required`` turns IMDSv1 off.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from fluxlib.config.control import AwsConfig
from fluxlib.errors import ProviderError, StrandedNode
from fluxlib.lifecycle import pause
from fluxlib.providers.base import Launch, Node, NodeState

log = logging.getLogger(__name__)

ROLE, AGENT_ID, INSTALLATION = "flux:role", "flux:agent-id", "flux:installation"
_STATES = {
    "pending": NodeState.PENDING,
    "running": NodeState.RUNNING,
    "shutting-down": NodeState.ENDING,
    "stopping": NodeState.STOPPED,
    "stopped": NodeState.STOPPED,
    "terminated": NodeState.ENDED,
}
# Seconds between two looks, at an address and in the SDK's waiter.
_ADDRESS_POLL = 2.0
_WAITER_DELAY = 5
# Without a size EC2 answers with everything at once, or not at all.
_PAGE = 500
_UNKNOWN = "InvalidInstanceID.NotFound"
# Seconds after a launch in which an instance may be unknown and run all the same.
_KNOWN_WITHIN = 60.0


class Aws:
    """One region of one account. boto3 is imported here and nowhere else."""

    name = "aws"

    def __init__(self, config: AwsConfig, installation_id: str) -> None:
        try:
            import boto3
            import botocore.config
        except ImportError as error:
            raise ProviderError(f"aws: boto3 is missing ({error}): pip install 'flux[cloud]'") from error

        self._config = config
        self._installation_id = installation_id
        self.ssh_user = config.ssh_user
        self._key_name = f"flux-{installation_id}"
        self._unknown_until: dict[str, float] = {}  # instances launched lately; time.monotonic
        # "standard" mode retries throttling and server faults with exponential backoff.
        retries = {"mode": "standard", "max_attempts": 8}
        self._ec2 = boto3.client(
            "ec2",
            region_name=config.region,
            aws_access_key_id=config.access_key_id or None,
            aws_secret_access_key=config.secret_access_key or None,
            endpoint_url=config.endpoint_url or None,
            config=botocore.config.Config(retries=retries, connect_timeout=10, read_timeout=60),
        )

    def prepare(self, ssh_public_key: str) -> None:
        found = self._ask("looking for the key pair", self._key_pair)
        if found is not None:
            # Compared by the key itself: a fingerprint's form depends on the kind of key.
            if found.get("PublicKey", "").split()[:2] == ssh_public_key.split()[:2]:
                return
            log.warning("the key pair %s in %s is not ours any more: replacing it", self._key_name, self._config.region)
            self._ask("deleting the old key pair", lambda: self._ec2.delete_key_pair(KeyName=self._key_name))
        self._ask("importing the key pair", lambda: self._import_key_pair(ssh_public_key))

    def launch(self, wanted: Launch, deadline: float) -> Node:
        request = self._request(wanted)
        try:
            answer = self._ec2.run_instances(**request)
        except Exception as error:
            failed = _translated("launching an instance", error)
            if _refused(error):
                raise failed from error
            raise StrandedNode(f"{failed.message}: it may have been launched all the same", "") from error
        provider_id = str(answer["Instances"][0]["InstanceId"])
        self._remember(provider_id, time.monotonic())
        try:
            self._wait_running(provider_id, deadline)
            return self._wait_addresses(provider_id, deadline)
        except ProviderError as error:
            self._undo(provider_id, error)
            raise
        except Exception as error:
            unexpected = _translated(f"waiting for {provider_id}", error)
            self._undo(provider_id, unexpected)
            raise unexpected from error

    def terminate(self, provider_id: str) -> None:
        try:
            self._ec2.terminate_instances(InstanceIds=[provider_id])
        except Exception as error:
            if _code(error) == _UNKNOWN and time.monotonic() >= self._unknown_until.get(provider_id, 0.0):
                return
            raise _translated(f"ending {provider_id}", error) from error

    def nodes(self) -> list[Node]:
        filters = [
            {"Name": f"tag:{INSTALLATION}", "Values": [self._installation_id]},
            {"Name": "instance-state-name", "Values": ["pending", "running", "shutting-down", "stopping", "stopped"]},
        ]
        pages = self._ask(
            "listing instances",
            lambda: list(
                self._ec2.get_paginator("describe_instances").paginate(
                    Filters=filters, PaginationConfig={"PageSize": _PAGE}
                )
            ),
        )
        return [
            self._node(instance)
            for page in pages
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]

    # -- the steps -------------------------------------------------------------

    def _request(self, wanted: Launch) -> dict[str, Any]:
        config = self._config
        tags = {
            **config.tags,
            "Name": wanted.agent_id,
            ROLE: "agent",
            AGENT_ID: wanted.agent_id,
            INSTALLATION: self._installation_id,
        }
        tag_list = [{"Key": key, "Value": value} for key, value in tags.items()]
        request: dict[str, Any] = {
            "ImageId": config.ami,
            "InstanceType": wanted.instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "KeyName": self._key_name,
            # At most 64 ASCII characters: an agent ID has at most 63.
            "ClientToken": wanted.agent_id,
            "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled", "HttpPutResponseHopLimit": 1},
            "TagSpecifications": [
                {"ResourceType": "instance", "Tags": tag_list},
                {"ResourceType": "volume", "Tags": tag_list},
            ],
        }
        if config.security_group_id:
            request["SecurityGroupIds"] = [config.security_group_id]
        if config.subnet_id:
            request["SubnetId"] = config.subnet_id
        if config.volume_size_gb:
            request["BlockDeviceMappings"] = [
                {
                    "DeviceName": self._root_device(),
                    "Ebs": {"VolumeSize": config.volume_size_gb, "VolumeType": "gp3", "DeleteOnTermination": True},
                }
            ]
        if config.spot:
            request["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
        return request

    def _remember(self, provider_id: str, now: float) -> None:
        for old in [one for one, until in list(self._unknown_until.items()) if until <= now]:
            self._unknown_until.pop(old, None)
        self._unknown_until[provider_id] = now + _KNOWN_WITHIN

    def _root_device(self) -> str:
        """The image's own root device: a mapping under another name would add a second disk."""
        images = self._ask("reading the image", lambda: self._ec2.describe_images(ImageIds=[self._config.ami]))[
            "Images"
        ]
        if not images:
            raise ProviderError(f"aws: there is no image {self._config.ami} in {self._config.region}: check `ami`")
        return str(images[0].get("RootDeviceName", "/dev/xvda"))

    def _wait_running(self, provider_id: str, deadline: float) -> None:
        attempts = max(1, int((deadline - time.monotonic()) / _WAITER_DELAY))
        try:
            self._ec2.get_waiter("instance_running").wait(
                InstanceIds=[provider_id], WaiterConfig={"Delay": _WAITER_DELAY, "MaxAttempts": attempts}
            )
        except Exception as error:
            failed = _translated(f"waiting for {provider_id} to run", error)
            why = self._state_reason(provider_id)
            raise ProviderError(f"{failed.message}{f' ({why})' if why else ''}") from error

    def _state_reason(self, provider_id: str) -> str:
        """Why an instance ended by itself: the waiter only says that it did."""
        try:
            instance = self._describe(provider_id) or {}
        except ProviderError:
            return ""
        return str(instance.get("StateReason", {}).get("Message", ""))

    def _wait_addresses(self, provider_id: str, deadline: float) -> Node:
        while True:
            instance = self._describe(provider_id)
            node = self._node(instance) if instance is not None else None
            if node is not None and (node.public_ip or (self._config.use_private_ip and node.private_ip)):
                return node
            if time.monotonic() + _ADDRESS_POLL > deadline:
                raise ProviderError(
                    f"aws: {provider_id} has no public address: let its subnet assign one"
                    " (MapPublicIpOnLaunch), or set `use_private_ip: true` when Flux reaches the subnet"
                )
            pause(_ADDRESS_POLL)

    def _describe(self, provider_id: str) -> Mapping[str, Any] | None:
        """None: not known to the API yet."""

        def look() -> Mapping[str, Any] | None:
            try:
                answer = self._ec2.describe_instances(InstanceIds=[provider_id])
            except Exception as error:
                if _code(error) == _UNKNOWN:
                    return None
                raise
            found = [instance for reservation in answer["Reservations"] for instance in reservation["Instances"]]
            return dict(found[0]) if found else None

        found: Mapping[str, Any] | None = self._ask(f"reading {provider_id}", look)
        return found

    def _undo(self, provider_id: str, cause: ProviderError) -> None:
        try:
            self.terminate(provider_id)
        except ProviderError as error:
            raise StrandedNode(f"{cause.message}; and {error.message}: it still runs", provider_id) from error

    def _key_pair(self) -> Mapping[str, Any] | None:
        try:
            pairs = self._ec2.describe_key_pairs(KeyNames=[self._key_name], IncludePublicKey=True)["KeyPairs"]
        except Exception as error:
            if _code(error) == "InvalidKeyPair.NotFound":
                return None
            raise
        return dict(pairs[0]) if pairs else None

    def _import_key_pair(self, ssh_public_key: str) -> None:
        tags = [{"Key": INSTALLATION, "Value": self._installation_id}]
        try:
            self._ec2.import_key_pair(
                KeyName=self._key_name,
                PublicKeyMaterial=ssh_public_key.encode(),
                TagSpecifications=[{"ResourceType": "key-pair", "Tags": tags}],
            )
        except Exception as error:
            # Another Flux of this installation was quicker.
            if _code(error) != "InvalidKeyPair.Duplicate":
                raise

    def _node(self, instance: Mapping[str, Any]) -> Node:
        labels = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}
        launched = instance.get("LaunchTime")
        return Node(
            provider=self.name,
            provider_id=instance["InstanceId"],
            agent_id=labels.get(AGENT_ID, ""),
            instance_type=instance.get("InstanceType", ""),
            state=_STATES.get(instance["State"]["Name"], NodeState.PENDING),
            public_ip=instance.get("PublicIpAddress") or "",
            private_ip=instance.get("PrivateIpAddress") or "",
            launched_at=launched.timestamp() if launched else 0.0,
            labels=labels,
        )

    def _ask(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ProviderError:
            raise
        except Exception as error:
            raise _translated(doing, error) from error


def _translated(doing: str, error: Exception) -> ProviderError:
    return ProviderError(f"aws: {doing} failed: {error}")


def _code(error: Exception) -> str:
    """botocore's ClientError carries the service's error code; anything else has none."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _refused(error: Exception) -> bool:
    """Whether EC2 answered no. Anything else (a broken connection, a fault of the service) may hide a yes."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
    told = response.get("ResponseMetadata", {})
    # Of what the SDK asked before, a no to its last attempt says nothing.
    return int(told.get("HTTPStatusCode", 500)) < 500 and not told.get("RetryAttempts")
