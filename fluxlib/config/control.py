"""flux.yaml: every setting of the control plane with its unit, default and reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fluxlib.config.document import load_mapping
from fluxlib.config.files import (
    AGENT_PORT,
    API_PORT,
    LOG_LEVELS,
    absolute,
    address_problem,
    default_certs_dir,
    default_state_dir,
    open_to_all,
    read_file,
)
from fluxlib.config.keys import ApiKey, read_api_keys
from fluxlib.config.providers import AutoscalingConfig, AwsConfig, GcpConfig, NodeType, ProvidersConfig, read_providers
from fluxlib.config.reader import Faults, between, one_of, path_problem, setting, take, type_name, url_problem
from fluxlib.config.redis_address import redis_problem
from fluxlib.errors import ConfigInvalid

__all__ = [
    "ApiKey",
    "AutoscalingConfig",
    "AwsConfig",
    "ControlConfig",
    "GcpConfig",
    "NodeType",
    "ProvidersConfig",
    "RetentionConfig",
    "load_control",
    "read_control",
]

EXAMPLE_KEY = "change-me"
_SHORT_KEY = 16


def _origin(value: Any) -> str | None:
    if value == "*":
        return None
    try:
        url = urlsplit(value)
        fits = url.scheme in ("http", "https") and bool(url.hostname) and value == f"{url.scheme}://{url.netloc}"
    except ValueError:
        fits = False
    return None if fits and value.isprintable() else "is no origin: https://host[:port] without a path, or *"


def _sha256(value: Any) -> str | None:
    return None if re.fullmatch(r"[0-9A-Fa-f]{64}", value) else "must be 64 hexadecimal digits"


@dataclass(frozen=True)
class RetentionConfig:
    """How much is kept of executions that have ended."""

    max_records: int = setting(
        "max_records",
        "integer",
        200_000,
        unit="executions",
        why="ended ones that can be asked for; beyond that the oldest successes are forgotten first",
        check=between(1000, 10**8),
    )


@dataclass(frozen=True)
class ControlConfig:
    """Everything flux.yaml says. Paths are absolute."""

    api_key: str = setting("api_key", "string", why="the administrator's key; every change needs one", secret=True)
    api_keys: tuple[ApiKey, ...] = setting("api_keys", "section", (), why="more keys, each with a name and a role")
    path: Path = Path("flux.yaml")
    listen_host: str = setting(
        "listen_host", "string", "0.0.0.0", why="the address the HTTP API listens on", check=address_problem
    )
    port: int = setting("port", "integer", API_PORT, why="the port of the HTTP API", check=between(1, 65535))
    redis_addr: str = setting(
        "redis_addr",
        "string",
        "",
        why="host:port or a redis://, rediss:// or unix:// URL: state that several Flux share; absent = embedded store",
        check=redis_problem,
        secret=True,
    )
    agent_redis_url: str = setting(
        "agent_redis_url",
        "string",
        "",
        why="Redis for the agents' records; give them a database and user of their own",
        check=redis_problem,
        secret=True,
    )
    agent_port: int = setting(
        "agent_port", "integer", AGENT_PORT, why="the gRPC port of agents on nodes Flux makes", check=between(1, 65535)
    )
    state_dir: Path = setting(
        "state_dir", "string", Path(), why="where the embedded store lives", convert=Path, check=path_problem
    )
    certs_dir: Path = setting(
        "certs_dir", "string", Path(), why="the CA, the certificates and the SSH key", convert=Path, check=path_problem
    )
    disable_grpc_tls: bool = setting(
        "disable_grpc_tls", "boolean", False, why="speak to agents in plain text: private networks only"
    )
    cors_origins: tuple[str, ...] = setting(
        "cors_origins",
        "strings",
        (),
        why="web origins that may call the API from a browser; none by default",
        each=_origin,
    )
    public_agents: bool = setting(
        "public_agents",
        "boolean",
        True,
        why="GET /agents without a key, as the original; it tells the fleet's addresses",
    )
    max_archive_mb: int = setting(
        "max_archive_mb", "integer", 50, unit="MB", why="the largest zip taken", check=between(1, 2000)
    )
    max_blocking: int = setting(
        "max_blocking",
        "integer",
        1000,
        unit="requests",
        why="that may wait at a time (sync calls, followers); the next gets 503",
        check=between(1, 10000),
    )
    max_bodies_mb: int = setting(
        "max_bodies_mb",
        "integer",
        512,
        unit="MB",
        why="memory for the bodies of requests that are being served; the next gets 503",
        check=between(1, 10**6),
    )
    max_waiting: int = setting(
        "max_waiting",
        "integer",
        10000,
        unit="executions",
        why="that may queue for room; the next gets 503",
        check=between(0, 10**6),
    )
    max_backlog_mb: int = setting(
        "max_backlog_mb",
        "integer",
        1024,
        unit="MB",
        why="of requests that wait in the store; the next asynchronous one gets 503",
        check=between(1, 10**6),
    )
    execution_ttl_sec: float = setting(
        "execution_ttl",
        "number",
        3600.0,
        unit="s",
        why="how long an ended execution can be asked for",
        check=between(1, 10**7),
    )
    retention: RetentionConfig = setting(
        "retention", "section", RetentionConfig(), why="how much is kept of ended executions"
    )
    agent_lost_after_sec: float = setting(
        "agent_lost_after_sec",
        "number",
        300.0,
        unit="s",
        why="an agent offline for longer is given up with what it ran",
        check=between(1, 10**6),
    )
    health_interval_sec: float = setting(
        "health_interval_sec",
        "number",
        10.0,
        unit="s",
        why="how often agents are asked how they are",
        check=between(0.2, 300),
    )
    kill_grace_sec: float = setting(
        "kill_grace_sec",
        "number",
        2.0,
        unit="s",
        why="how long an agent lets a cancelled function end by itself",
        check=between(0, 60),
    )
    shutdown_sec: float = setting(
        "shutdown_sec",
        "number",
        30.0,
        unit="s",
        why="how long running calls may take to end when Flux stops",
        check=between(0, 3600),
    )
    drain_timeout_sec: float = setting(
        "drain_timeout_sec",
        "number",
        300.0,
        unit="s",
        why="how long a draining node may finish its work",
        check=between(0, 86400),
    )
    node_start_sec: float = setting(
        "node_start_sec",
        "number",
        600.0,
        unit="s",
        why="how long a new node may take to run, and again to answer over SSH",
        check=between(1, 7200),
    )
    end_strays: bool = setting(
        "end_strays", "boolean", False, why="end cloud nodes of this installation that Flux no longer knows"
    )
    agent_package: str = setting(
        "agent_package",
        "string",
        "",
        why="a flux-agent .deb for new nodes; absent = the one that came with Flux",
        check=path_problem,
    )
    agent_package_url: str = setting(
        "agent_package_url",
        "string",
        "",
        why="where nodes download the package themselves, with agent_package_sha256",
        check=url_problem,
    )
    agent_package_sha256: str = setting(
        "agent_package_sha256", "string", "", why="the SHA-256 the download must have", check=_sha256
    )
    log_level: str = setting("log_level", "string", "INFO", why="how much is logged", check=one_of(*LOG_LEVELS))
    providers: ProvidersConfig = setting("providers", "section", ProvidersConfig(), why="clouds to make nodes in")
    warnings: tuple[str, ...] = ()  # for people, at start and in check-config
    notes: tuple[str, ...] = ()  # worth a line in the log, nothing to mend

    @property
    def own_url(self) -> str:
        """Where the API answers somebody on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.listen_host, self.listen_host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def read_control(data: bytes | str, path: Path) -> ControlConfig:
    """flux.yaml's text. Raises ConfigInvalid with every fault."""
    document = load_mapping(data, str(path), ConfigInvalid)
    faults, warnings, notes = Faults(), list[str](), list[str]()
    values = take(ControlConfig, document, "", faults)
    values["providers"] = read_providers(document.get("providers"), faults)
    values["retention"] = _retention(document.get("retention"), faults)
    values["api_keys"] = read_api_keys(document.get("api_keys"), faults)
    if bool(document.get("agent_package_url")) != bool(document.get("agent_package_sha256")):
        faults.add("agent_package_url", "goes with agent_package_sha256, and the other way round")
    faults.raise_if_any(f"{path} cannot be used", ConfigInvalid)
    if "redis_addr" not in values:
        notes.append("redis_addr is not set: the embedded store is used (the original meant localhost:6379)")
    if EXAMPLE_KEY in values["api_key"]:
        warnings.append("api_key: is still the example's; put a long random text there")
    elif len(values["api_key"]) < _SHORT_KEY:
        warnings.append(f"api_key: has fewer than {_SHORT_KEY} characters; anybody who guesses it may do everything")
    beside = path.resolve().parent
    values["state_dir"] = absolute(values.get("state_dir") or default_state_dir("flux", beside), beside)
    values["certs_dir"] = absolute(values.get("certs_dir") or default_certs_dir(beside), beside)
    if "agent_package" in values:
        values["agent_package"] = str(absolute(Path(values["agent_package"]), beside))
    gcp = values["providers"].gcp
    if gcp is not None and gcp.credentials_file:
        gcp = replace(gcp, credentials_file=str(absolute(Path(gcp.credentials_file), beside)))
        values["providers"] = replace(values["providers"], gcp=gcp)
    return ControlConfig(path=path, warnings=tuple(warnings), notes=tuple(notes), **values)


def _retention(data: Any, faults: Faults) -> RetentionConfig:
    if data is None:
        return RetentionConfig()
    if not isinstance(data, dict):
        faults.add("retention", f"must be a mapping, is {type_name(data)}")
        return RetentionConfig()
    return RetentionConfig(**take(RetentionConfig, data, "retention.", faults))


def load_control(path: Path) -> ControlConfig:
    """The file's configuration. Raises ConfigInvalid, also when it cannot be read."""
    config = read_control(read_file(path), path)
    if not open_to_all(path):
        return config
    warning = f"the file can be read by every user of this machine, and it holds the key: chmod 600 {path}"
    return replace(config, warnings=(*config.warnings, warning))
