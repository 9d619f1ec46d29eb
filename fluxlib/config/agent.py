"""agent.yaml: every setting of an agent with its unit, default and reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxlib.config.document import load_mapping
from fluxlib.config.files import (
    AGENT_PORT,
    LOG_LEVELS,
    absolute,
    address_problem,
    default_state_dir,
    open_to_others,
    read_file,
)
from fluxlib.config.reader import Faults, between, one_of, path_problem, setting, take, user_problem
from fluxlib.config.redis_address import redis_problem
from fluxlib.errors import ConfigInvalid
from fluxlib.model import AGENT_ID, RESERVED_AGENT_IDS

DEFAULT_UID_RANGE = "1879048192+256"
_UID_RANGE = re.compile(r"(\d{1,10})\+(\d{1,5})")


def agent_id_problem(value: str) -> str | None:
    """What is wrong with an agent's ID, or None."""
    if value in RESERVED_AGENT_IDS:
        return f"{value} is reserved: choose another"
    if not AGENT_ID.fullmatch(value):
        return "must be 1 to 63 lower-case letters, digits and hyphens, with neither end a hyphen"
    return None


def _first_and_count(value: str) -> tuple[int, int]:
    first, _, count = value.partition("+")
    return int(first), int(count)


def _uid_range(value: Any) -> str | None:
    match = _UID_RANGE.fullmatch(value)
    if match is None:
        return "must be FIRST+COUNT, for example 1879048192+256"
    first, count = int(match.group(1)), int(match.group(2))
    if first < 1000 or count < 1 or first + count >= 2**32 - 1:
        return "must lie between 1000 and 4294967294"
    return None


@dataclass(frozen=True)
class AgentConfig:
    """Everything agent.yaml says. Paths are absolute."""

    agent_id: str = setting(
        "agent_id", "string", why="this agent's name in the fleet; the one in its certificate", check=agent_id_problem
    )
    path: Path = Path("agent.yaml")
    port: int = setting("port", "integer", AGENT_PORT, why="the port of its gRPC server", check=between(1, 65535))
    listen_host: str = setting(
        "listen_host", "string", "0.0.0.0", why="the address it listens on", check=address_problem
    )
    node_private_ip: str = setting(
        "network.node_private_ip", "string", "", why="told to functions as FLUX_NODE_PRIVATE_IP"
    )
    node_public_ip: str = setting(
        "network.node_public_ip", "string", "", why="told to functions as FLUX_NODE_PUBLIC_IP"
    )
    tls_enabled: bool = setting(
        "tls.enabled",
        "boolean",
        False,
        why="mutual TLS with Flux; false only where `insecure` or `isolation: off` says so",
    )
    insecure: bool = setting(
        "insecure",
        "boolean",
        False,
        why="run isolated functions without TLS: anybody who reaches the port can run programs here",
    )
    tls_ca_cert: Path | None = setting(
        "tls.ca_cert", "string", None, why="the CA's certificate", convert=Path, check=path_problem
    )
    tls_cert_file: Path | None = setting(
        "tls.cert_file", "string", None, why="this agent's certificate", convert=Path, check=path_problem
    )
    tls_key_file: Path | None = setting(
        "tls.key_file", "string", None, why="its private key", convert=Path, check=path_problem
    )
    state_dir: Path = setting(
        "state_dir", "string", Path(), why="functions, outputs and the embedded store", convert=Path, check=path_problem
    )
    store: str = setting(
        "store",
        "string",
        "sqlite",
        why="where records live: sqlite (embedded) or redis",
        check=one_of("sqlite", "redis"),
    )
    redis_addr: str = setting(
        "redis_addr",
        "string",
        "",
        why="host:port or a redis://, rediss:// or unix:// URL, with store: redis",
        check=redis_problem,
        secret=True,
    )
    max_tasks: int = setting(
        "max_tasks", "integer", 256, unit="executions", why="at a time, all functions together", check=between(1, 10000)
    )
    isolation: str = setting(
        "isolation",
        "string",
        "",
        why="the profile; absent = default as root, off otherwise",
        check=one_of("default", "strict", "minimal", "off"),
    )
    uid_range: str = setting(
        "uid_range",
        "string",
        DEFAULT_UID_RANGE,
        why="numeric users of the running slots, FIRST+COUNT, at least max_tasks",
        check=_uid_range,
    )
    runner_user: str = setting(
        "runner_user",
        "string",
        "flux-runner",
        why="runs the functions where root's agent has isolation: off; deployed code is root's",
        check=user_problem,
    )
    kill_grace_sec: float = setting(
        "kill_grace_sec",
        "number",
        2.0,
        unit="s",
        why="between asking a function to stop and killing it",
        check=between(0, 60),
    )
    detach_grace_sec: float = setting(
        "detach_grace_sec",
        "number",
        10.0,
        unit="s",
        why="sync runs of a vanished Flux are cancelled after it",
        check=between(1, 300),
    )
    max_output_mb: int = setting(
        "max_output_mb",
        "integer",
        10,
        unit="MB",
        why="output kept of one execution; the rest is dropped",
        check=between(1, 1000),
    )
    max_output_store_mb: int = setting(
        "max_output_store_mb",
        "integer",
        2048,
        unit="MB",
        why="outputs kept of all ended executions together; the oldest are removed first",
        check=between(1, 10**8),
    )
    execution_ttl_sec: float = setting(
        "execution_ttl",
        "number",
        3600.0,
        unit="s",
        why="how long ended records and outputs are kept",
        check=between(1, 10**7),
    )
    reserve_memory_mb: int = setting(
        "reserve_memory",
        "integer",
        0,
        unit="MB",
        why="memory that all functions together leave to the machine; 0 = a tenth of it, at least 512",
        check=between(0, 10**7),
    )
    max_memory_mb: int = setting(
        "limits.memory",
        "integer",
        0,
        unit="MB",
        why="of one execution; a function may ask for less, not for more; 0 = what it asks",
        check=between(0, 10**7),
    )
    max_cpu_millicores: int = setting(
        "limits.cpu",
        "integer",
        0,
        unit="millicores",
        why="of one execution; a function may ask for less, not for more; 0 = what it asks",
        check=between(0, 10**6),
    )
    max_timeout_sec: int = setting(
        "limits.timeout",
        "integer",
        0,
        unit="s",
        why="of one execution; a function may ask for less, not for more; 0 = what it asks",
        check=between(0, 7 * 86400),
    )
    max_processes: int = setting(
        "limits.processes",
        "integer",
        512,
        unit="processes",
        why="of one execution, unless its function says less",
        check=between(1, 10**6),
    )
    max_open_files: int = setting(
        "limits.open_files", "integer", 1024, unit="files", why="of one process", check=between(16, 10**6)
    )
    max_file_size_mb: int = setting(
        "limits.file_size",
        "integer",
        1024,
        unit="MB",
        why="the largest file a function may write",
        check=between(1, 10**7),
    )
    tmp_size_mb: int = setting(
        "limits.tmp_size", "integer", 256, unit="MB", why="its private /tmp and /dev/shm, each", check=between(1, 10**6)
    )
    shutdown_sec: float = setting(
        "shutdown_sec",
        "number",
        20.0,
        unit="s",
        why="how long running functions may take to end when the agent stops",
        check=between(0, 3600),
    )
    log_level: str = setting("log_level", "string", "INFO", why="how much is logged", check=one_of(*LOG_LEVELS))
    warnings: tuple[str, ...] = ()

    @property
    def open_door(self) -> str:
        """What to say of an agent without TLS, empty for one with it."""
        return (
            ""
            if self.tls_enabled
            else f"TLS is off: anybody who reaches {self.listen_host}:{self.port} can run programs"
        )

    @property
    def uid_first(self) -> int:
        return _first_and_count(self.uid_range)[0]

    @property
    def uid_count(self) -> int:
        return _first_and_count(self.uid_range)[1]


_TLS_FILES = ("tls_ca_cert", "tls_cert_file", "tls_key_file")


def read_agent(data: bytes | str, path: Path) -> AgentConfig:
    """agent.yaml's text. Raises ConfigInvalid with every fault.

    An unknown key is a fault: a misspelt `isolation` would run functions with less of it than was asked for.
    """
    document = load_mapping(data, str(path), ConfigInvalid)
    faults, warnings = Faults(), list[str]()
    if "redis_addr" in document and document.get("store") != "redis":
        del document["redis_addr"]
        warnings.append("redis_addr: ignored, records live in the embedded store (store: redis would use it)")
    values = take(AgentConfig, document, "", faults)
    if values.get("tls_enabled"):
        for name in _TLS_FILES:
            if name not in values:
                faults.add(f"tls.{name.removeprefix('tls_')}", "is required when tls.enabled is true")
    else:
        _require_consent(values, faults)
    if values.get("store") == "redis" and not document.get("redis_addr"):
        faults.add("redis_addr", "is required with store: redis")
    if 0 < values.get("max_cpu_millicores", 0) < 10:
        faults.add("limits.cpu", "must be 0 or at least 10 millicores")
    first, count = _first_and_count(values.get("uid_range", DEFAULT_UID_RANGE))
    max_tasks = values.get("max_tasks", AgentConfig.max_tasks)
    if max_tasks > count and "uid_range" in values:
        faults.add("uid_range", f"has {count} users, fewer than max_tasks ({max_tasks})")
    if faults.found:
        for warning in warnings:
            faults.add("", warning)
    faults.raise_if_any(f"{path} cannot be used", ConfigInvalid)
    values["uid_range"] = f"{first}+{max(count, max_tasks)}"
    beside = path.resolve().parent
    for name in _TLS_FILES:
        if name in values:
            values[name] = absolute(values[name], beside)
    values["state_dir"] = absolute(values.get("state_dir") or default_state_dir("flux-agent", beside), beside)
    config = AgentConfig(path=path, **values)
    if not config.tls_enabled:
        warnings.append(config.open_door)
    return replace(config, warnings=tuple(warnings))


def _require_consent(values: Mapping[str, Any], faults: Faults) -> None:
    """Without TLS the port runs programs for everybody who reaches it: not by leaving something out."""
    open_door = "without TLS anybody who reaches the agent's port can run programs on this machine"
    cure = "enrol the agent for certificates (`flux enroll` on the machine of Flux)"
    if "tls_enabled" not in values:
        faults.add("tls.enabled", f"is not said, and {open_door}: {cure}, or add the line `tls: {{enabled: false}}`")
    if not values.get("insecure") and values.get("isolation") != "off":
        faults.add("insecure", f"{open_door}: {cure}, or add the line `insecure: true`")


def load_agent(path: Path) -> AgentConfig:
    """The file's configuration. Raises ConfigInvalid, also when it or a certificate cannot be read."""
    config = read_agent(read_file(path), path)
    if not config.tls_enabled:
        return config
    faults = Faults()
    for name in _TLS_FILES:
        try:
            with getattr(config, name).open("rb"):
                pass
        except OSError as error:
            faults.add(f"tls.{name.removeprefix('tls_')}", f"{getattr(config, name)}: {error.strerror or error}")
    faults.raise_if_any(f"{path} cannot be used", ConfigInvalid)
    assert config.tls_key_file is not None
    if open_to_others(config.tls_key_file):
        # As ssh does: /etc is readable in functions' view, and the key makes its reader this agent.
        faults.add("tls.key_file", f"others can read the agent's private key: chmod 600 {config.tls_key_file}")
    faults.raise_if_any(f"{path} cannot be used", ConfigInvalid)
    return config
