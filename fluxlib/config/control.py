"""flux.yaml: every setting of the control plane with its unit, default and reason."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxlib.config.environment import program_data
from fluxlib.config.providers import AutoscalingConfig, AwsConfig, GcpConfig, NodeType, ProvidersConfig, read_providers
from fluxlib.config.reader import Faults, between, load_mapping, not_blank, one_of, setting, take
from fluxlib.errors import ConfigInvalid

__all__ = [
    "AutoscalingConfig",
    "AwsConfig",
    "ControlConfig",
    "GcpConfig",
    "NodeType",
    "ProvidersConfig",
    "load_control",
    "read_control",
]

API_PORT = 7227
AGENT_PORT = 50052
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _address(value: Any) -> str | None:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return "must be an IP address of this machine (0.0.0.0 = all)"
    return None


def redis_address(value: Any) -> str | None:
    """``host:port`` or a redis URL."""
    if value.startswith(("redis://", "rediss://", "unix://")):
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        return "must be host:port, or a redis:// or rediss:// URL"
    return None


def _origin(values: Any) -> str | None:
    wrong = [value for value in values if value != "*" and not value.startswith(("http://", "https://"))]
    return f"{wrong[0]!r} is no origin (https://host[:port], or *)" if wrong else None


@dataclass(frozen=True)
class ControlConfig:
    """Everything flux.yaml says. Paths are absolute."""

    api_key: str = setting(
        "api_key", "string", why="the key of the administrator; every change needs it", check=not_blank
    )
    path: Path = Path("flux.yaml")
    listen_host: str = setting(
        "listen_host", "string", "0.0.0.0", why="the address the HTTP API listens on", check=_address
    )
    port: int = setting("port", "integer", API_PORT, why="the port of the HTTP API", check=between(1, 65535))
    redis_addr: str = setting(
        "redis_addr",
        "string",
        "",
        why="host:port or redis:// URL of the state that several Flux share; absent = the embedded store",
        check=redis_address,
    )
    agent_redis_url: str = setting(
        "agent_redis_url",
        "string",
        "",
        why="Redis for the agents' records; give them a database and user of their own",
        check=redis_address,
    )
    agent_port: int = setting(
        "agent_port", "integer", AGENT_PORT, why="the gRPC port of agents on nodes Flux makes", check=between(1, 65535)
    )
    state_dir: Path = setting(
        "state_dir", "string", Path(), why="where the embedded store lives", convert=Path, check=not_blank
    )
    certs_dir: Path = setting(
        "certs_dir", "string", Path(), why="the CA, the certificates and the SSH key", convert=Path, check=not_blank
    )
    disable_grpc_tls: bool = setting(
        "disable_grpc_tls", "boolean", False, why="speak to agents in plain text: private networks only"
    )
    cors_origins: tuple[str, ...] = setting(
        "cors_origins",
        "strings",
        (),
        why="web origins that may call the API from a browser; none by default",
        check=_origin,
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
        why="requests that may wait at a time (sync calls, followers); the next gets 503",
        check=between(1, 10000),
    )
    max_waiting: int = setting(
        "max_waiting",
        "integer",
        10000,
        why="executions that may queue for room; the next gets 503",
        check=between(0, 10**6),
    )
    execution_ttl_sec: float = setting(
        "execution_ttl",
        "number",
        3600.0,
        unit="s",
        why="how long an ended execution can be asked for",
        check=between(1, 10**7),
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
    end_strays: bool = setting(
        "end_strays", "boolean", False, why="end cloud nodes of this installation that Flux no longer knows"
    )
    agent_package: str = setting(
        "agent_package", "string", "", why="a flux-agent .deb for new nodes; by default the one that came with Flux"
    )
    agent_package_url: str = setting(
        "agent_package_url", "string", "", why="where nodes download the package themselves, with agent_package_sha256"
    )
    agent_package_sha256: str = setting("agent_package_sha256", "string", "", why="the SHA-256 the download must have")
    log_level: str = setting("log_level", "string", "INFO", why="how much is logged", check=one_of(*LOG_LEVELS))
    providers: ProvidersConfig = setting("providers", "section", ProvidersConfig(), why="clouds to make nodes in")
    warnings: tuple[str, ...] = ()


def default_state_dir(beside: Path) -> Path:
    """/var/lib/flux for root, %PROGRAMDATA% on Windows, otherwise beside the configuration."""
    if sys.platform == "win32":
        return program_data() / "flux" / "state"
    return Path("/var/lib/flux") if os.geteuid() == 0 else beside / "state"


def default_certs_dir(beside: Path) -> Path:
    """The original's directory for root, beside the configuration otherwise."""
    if sys.platform == "win32":
        return program_data() / "flux" / "certs"
    return Path("/etc/flux/certs") if os.geteuid() == 0 else beside / "certs"


def read_control(data: bytes | str, path: Path) -> ControlConfig:
    """flux.yaml's text. Raises ConfigInvalid with every fault."""
    document = load_mapping(data, str(path), ConfigInvalid)
    faults, warnings = Faults(), list[str]()
    values = take(ControlConfig, document, "", faults)
    values["providers"] = read_providers(document.get("providers"), faults)
    if bool(values.get("agent_package_url")) != bool(values.get("agent_package_sha256")):
        faults.add("agent_package_url", "goes with agent_package_sha256, and the other way round")
    sha256 = values.get("agent_package_sha256", "")
    if sha256 and not re.fullmatch(r"[0-9A-Fa-f]{64}", sha256):
        faults.add("agent_package_sha256", "must be 64 hexadecimal digits")
    faults.raise_if_any(f"{path} cannot be used", ConfigInvalid)
    if "redis_addr" not in document:
        warnings.append("redis_addr is not set: the embedded store is used (the original meant localhost:6379)")
    beside = path.resolve().parent
    state_dir = _absolute(values.pop("state_dir", None) or default_state_dir(beside), beside)
    certs_dir = _absolute(values.pop("certs_dir", None) or default_certs_dir(beside), beside)
    config = ControlConfig(path=path, warnings=tuple(warnings), **values)
    return replace(config, state_dir=state_dir, certs_dir=certs_dir)


def load_control(path: Path) -> ControlConfig:
    """The file's configuration. Raises ConfigInvalid, also when it cannot be read."""
    return read_control(read_file(path), path)


def read_file(path: Path) -> bytes:
    """A configuration file's bytes. Raises ConfigInvalid with the reason."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror or error}") from error


def _absolute(path: Path, beside: Path) -> Path:
    return path if path.is_absolute() else beside / path
