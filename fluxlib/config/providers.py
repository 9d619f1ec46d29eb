"""The ``providers`` section of flux.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fluxlib.config.reader import Faults, between, setting, take, type_name, url_problem, user_problem

T = TypeVar("T")


@dataclass(frozen=True)
class NodeType:
    """One machine type an autoscaler may launch."""

    instance_type: str = setting("instance_type", "string", why="the cloud's name of the type")
    vcpus: int = setting("vcpus", "integer", 0, unit="vCPUs", why="orders the types by size", check=between(0, 1024))
    memory_gb: float = setting(
        "memory_gb", "number", 0.0, unit="GB", why="orders the types by size", check=between(0, 65536)
    )


_PERCENT = between(0, 100)


@dataclass(frozen=True)
class AutoscalingConfig:
    """When a provider's fleet grows and shrinks."""

    enabled: bool = setting("enabled", "boolean", False, why="scale this provider's nodes by themselves")
    name: str = setting("name", "string", "", why="the beginning of its nodes' IDs")
    min_nodes: int = setting("min_nodes", "integer", 1, unit="nodes", why="never fewer", check=between(0, 10000))
    max_nodes: int = setting("max_nodes", "integer", 10, unit="nodes", why="never more", check=between(0, 10000))
    max_surge: int = setting(
        "max_surge", "integer", 0, why="1 = a replacement starts before its predecessor is drained", check=between(0, 1)
    )
    cpu_upper_threshold: float = setting(
        "cpu_upper_threshold", "number", 80.0, unit="%", why="hot above", check=_PERCENT
    )
    cpu_lower_threshold: float = setting(
        "cpu_lower_threshold", "number", 20.0, unit="%", why="cold below", check=_PERCENT
    )
    mem_upper_threshold: float = setting(
        "mem_upper_threshold", "number", 80.0, unit="%", why="hot above", check=_PERCENT
    )
    mem_lower_threshold: float = setting(
        "mem_lower_threshold", "number", 20.0, unit="%", why="cold below", check=_PERCENT
    )
    evaluation_window_sec: int = setting(
        "evaluation_window_sec",
        "integer",
        60,
        unit="s",
        why="hot or cold for this long before anything happens",
        check=between(1, 86400),
    )
    poll_interval_sec: int = setting(
        "poll_interval_sec", "integer", 10, unit="s", why="how often the decision is made", check=between(1, 3600)
    )
    cooldown_sec: int = setting(
        "cooldown_sec", "integer", 300, unit="s", why="rest after each growth or shrinkage", check=between(0, 86400)
    )
    node_types: tuple[NodeType, ...] = setting("node_types", "section", (), why="the types it may launch")


@dataclass(frozen=True)
class AwsConfig:
    """Nodes on Amazon EC2."""

    region: str = setting("region", "string", why="for example eu-central-1")
    ami: str = setting("ami", "string", why="the image; a Debian or Ubuntu")
    security_group_id: str = setting(
        "security_group_id", "string", "", why="must let Flux reach ports 22 and agent_port"
    )
    access_key_id: str = setting("access_key_id", "string", "", why="absent = the SDK's own search for credentials")
    secret_access_key: str = setting("secret_access_key", "string", "", why="goes with access_key_id", secret=True)
    ssh_user: str = setting("ssh_user", "string", "ec2-user", why="the image's user", check=user_problem)
    agent_version: str = setting(
        "agent_version",
        "string",
        "",
        why="expected of the package; another one than ours is a warning unless agent_package_url brings it",
    )
    tags: Mapping[str, str] = setting("tags", "map", {}, why="put on every node beside Flux's own")
    agent_setup_commands: tuple[str, ...] = setting(
        "agent_setup_commands", "strings", (), why="shell lines run as root on a new node before the agent is installed"
    )
    subnet_id: str = setting("subnet_id", "string", "", why="absent = the default one")
    volume_size_gb: int = setting(
        "volume_size_gb", "integer", 0, unit="GB", why="of the root disk; 0 = the image's", check=between(0, 16384)
    )
    spot: bool = setting("spot", "boolean", False, why="cheaper nodes that the cloud may take back")
    use_private_ip: bool = setting("use_private_ip", "boolean", False, why="reach nodes by their private address")
    endpoint_url: str = setting("endpoint_url", "string", "", why="another EC2 endpoint, for tests", check=url_problem)
    ssh_port: int = setting("ssh_port", "integer", 22, why="sshd's port on new nodes", check=between(1, 65535))
    autoscaling: AutoscalingConfig = setting("autoscaling", "section", AutoscalingConfig(), why="see autoscaling")


@dataclass(frozen=True)
class GcpConfig:
    """Nodes on Google Compute Engine."""

    project_id: str = setting("project_id", "string", why="the project")
    zone: str = setting("zone", "string", why="for example europe-west3-a")
    image: str = setting("image", "string", why="the image's path; a Debian or Ubuntu")
    credentials_file: str = setting("credentials_file", "string", "", why="absent = the SDK's own search")
    service_account_email: str = setting(
        "service_account_email", "string", "", why="the nodes' own account; absent = none, and functions get no token"
    )
    ssh_user: str = setting(
        "ssh_user", "string", "ubuntu", why="made by the image from the key's metadata", check=user_problem
    )
    agent_version: str = setting(
        "agent_version",
        "string",
        "",
        why="expected of the package; another one than ours is a warning unless agent_package_url brings it",
    )
    labels: Mapping[str, str] = setting("labels", "map", {}, why="put on every node beside Flux's own")
    agent_setup_commands: tuple[str, ...] = setting(
        "agent_setup_commands", "strings", (), why="shell lines run as root on a new node before the agent is installed"
    )
    network: str = setting("network", "string", "", why="absent = the default one")
    subnetwork: str = setting("subnetwork", "string", "", why="absent = the network's own")
    volume_size_gb: int = setting(
        "volume_size_gb", "integer", 0, unit="GB", why="of the root disk; 0 = the image's", check=between(0, 65536)
    )
    spot: bool = setting("spot", "boolean", False, why="cheaper nodes that the cloud may take back")
    use_private_ip: bool = setting("use_private_ip", "boolean", False, why="reach nodes by their private address")
    endpoint_url: str = setting(
        "endpoint_url", "string", "", why="another Compute endpoint, for tests", check=url_problem
    )
    ssh_port: int = setting("ssh_port", "integer", 22, why="sshd's port on new nodes", check=between(1, 65535))
    autoscaling: AutoscalingConfig = setting("autoscaling", "section", AutoscalingConfig(), why="see autoscaling")


@dataclass(frozen=True)
class ProvidersConfig:
    """The clouds that are configured; None = not."""

    aws: AwsConfig | None = None
    gcp: GcpConfig | None = None

    def any(self) -> bool:
        return self.aws is not None or self.gcp is not None


def read_providers(section: Any, faults: Faults) -> ProvidersConfig:
    if section is None:
        return ProvidersConfig()
    if not isinstance(section, dict):
        faults.add("providers", f"must be a mapping of aws and gcp, is {type_name(section)}")
        return ProvidersConfig()
    take(_Clouds, section, "providers.", faults)
    return ProvidersConfig(
        aws=_cloud(AwsConfig, section.get("aws"), "providers.aws", faults),
        gcp=_cloud(GcpConfig, section.get("gcp"), "providers.gcp", faults),
    )


@dataclass(frozen=True)
class _Clouds:
    aws: Any = setting("aws", "section", None, why="Amazon EC2")
    gcp: Any = setting("gcp", "section", None, why="Google Compute Engine")


def _cloud(cls: type[T], data: Any, path: str, faults: Faults) -> T | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        faults.add(path, f"must be a mapping, is {type_name(data)}")
        return None
    before = len(faults.found)
    values = take(cls, data, f"{path}.", faults)
    if bool(values.get("access_key_id")) != bool(values.get("secret_access_key")):
        faults.add(f"{path}.access_key_id", "goes with secret_access_key, and the other way round")
    values["autoscaling"] = _autoscaling(data.get("autoscaling"), f"{path}.autoscaling", faults)
    return cls(**values) if len(faults.found) == before else None


def _autoscaling(data: Any, path: str, faults: Faults) -> AutoscalingConfig:
    if data is None:
        return AutoscalingConfig()
    if not isinstance(data, dict):
        faults.add(path, f"must be a mapping, is {type_name(data)}")
        return AutoscalingConfig()
    values = take(AutoscalingConfig, data, f"{path}.", faults)
    types = data.get("node_types") or []
    if not isinstance(types, list):
        faults.add(f"{path}.node_types", f"must be a list, is {type_name(types)}")
        types = []
    taken = []
    for number, entry in enumerate(types):
        where = f"{path}.node_types[{number}]"
        if not isinstance(entry, dict):
            faults.add(where, "must be a mapping with instance_type")
            continue
        kind = take(NodeType, entry, f"{where}.", faults)
        if "instance_type" in kind:
            taken.append(NodeType(**kind))
    values["node_types"] = tuple(taken)
    config = AutoscalingConfig(**values)
    if config.enabled and not config.name:
        faults.add(f"{path}.name", "is required when autoscaling is enabled")
    if config.enabled and not types:
        faults.add(f"{path}.node_types", "needs at least one type when autoscaling is enabled")
    if config.min_nodes > config.max_nodes:
        faults.add(f"{path}.min_nodes", f"is {config.min_nodes} nodes, more than max_nodes ({config.max_nodes})")
    for kind_name in ("cpu", "mem"):
        low, high = getattr(config, f"{kind_name}_lower_threshold"), getattr(config, f"{kind_name}_upper_threshold")
        if low >= high:
            faults.add(f"{path}.{kind_name}_lower_threshold", f"is {low:g} %, not below the upper one ({high:g} %)")
    if config.poll_interval_sec > config.evaluation_window_sec:
        faults.add(
            f"{path}.poll_interval_sec",
            f"is {config.poll_interval_sec} s, longer than evaluation_window_sec ({config.evaluation_window_sec} s)",
        )
    return config
