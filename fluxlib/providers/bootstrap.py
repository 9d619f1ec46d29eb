"""What turns a fresh machine into an agent, as data: steps that can be read, tested and resumed.

``plan`` is pure. ``carry_out`` does the steps over one SSH connection and tells
each one that is done, so that a broken bootstrap goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import yaml

from fluxlib.errors import ProviderError
from fluxlib.providers.base import Address

log = logging.getLogger(__name__)

CONFIG_DIR = "/etc/flux-agent"
_CERTS_DIR = f"{CONFIG_DIR}/certs"
_PACKAGE = "/var/cache/flux-agent.deb"
_CURL = "/run/flux-agent.curl"
_DROP_IN = "/etc/systemd/system/flux-agent.service.d/50-metadata.conf"
_NFT_RULES = "/etc/nftables.d/flux-agent.nft"
_NFT_UNIT = "/etc/systemd/system/flux-agent-metadata.service"


@dataclass(frozen=True, slots=True)
class Run:
    """A command as words; never a string put together."""

    words: tuple[str, ...]
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class Script:
    """A line of the operator's own, for a shell."""

    text: str
    timeout: float = 900.0


@dataclass(frozen=True, slots=True)
class Upload:
    content: bytes = field(repr=False)  # it may be a key
    path: str = ""
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Uploads:
    """Files that belong together: a resumed bootstrap must not mix those of two lives."""

    files: tuple[Upload, ...]


@dataclass(frozen=True, slots=True)
class Package:
    """The agent's package for the node's architecture, uploaded, or downloaded there and checked."""

    directory: Path | None = None
    version: str = ""
    file: Path | None = None
    url: str = ""
    sha256: str = ""


Action = Run | Script | Upload | Uploads | Package


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do; its name is what an error and the progress say."""

    name: str
    action: Action


@dataclass(frozen=True, slots=True)
class AgentFiles:
    """What an agent is told: its certificates (empty without TLS) and where its store is."""

    agent_id: str
    port: int
    ca_pem: bytes = b""
    certificate_pem: bytes = b""
    key_pem: bytes = field(default=b"", repr=False)
    redis_url: str = field(default="", repr=False)


class RemoteShell(Protocol):
    def run(self, words: Sequence[str], timeout: float) -> str: ...

    def run_script(self, script: str, timeout: float) -> str: ...

    def upload(self, content: bytes, path: str, mode: int) -> None: ...


def plan(
    files: AgentFiles,
    address: Address,
    package: Package,
    setup_commands: Collection[str],
    *,
    provider: str,
    uid_range: tuple[int, int],
) -> list[Step]:
    """The whole bootstrap of one node, in order. ``uid_range`` is first and count of the functions' uids."""
    steps = [Step("check for dpkg", Run(("dpkg", "--print-architecture")))]
    steps += [Step(f"setup command {n}", Script(line)) for n, line in enumerate(setup_commands, 1)]
    steps += [
        # Without its configuration the unit does not start yet.
        Step("install flux-agent", package),
        *_certificates(files),
        *_metadata(provider, uid_range),
        Step("write agent.yaml", Upload(agent_yaml(files, address), f"{CONFIG_DIR}/agent.yaml", 0o600)),
        Step("reload systemd", Run(("systemctl", "daemon-reload"))),
        Step("enable flux-agent", Run(("systemctl", "enable", "flux-agent"))),
        # Not "start": a resumed bootstrap must see the new configuration too.
        Step("start flux-agent", Run(("systemctl", "restart", "flux-agent"))),
    ]
    return steps


def carry_out(
    steps: Sequence[Step],
    shell: RemoteShell,
    done: Collection[str],
    on_begin: Callable[[str], None],
    on_done: Callable[[str], None],
) -> None:
    """Every step not in ``done``, in order; ``on_begin(name)`` before and ``on_done(name)`` after each.

    Either may raise to stop in between. Raises ProviderError naming the step, with the output of what failed.
    """
    for step in steps:
        if step.name in done:
            continue
        on_begin(step.name)
        try:
            _do(step.action, shell)
        except ProviderError as error:
            hint = last_words(shell) if step.name == "start flux-agent" else ""
            raise ProviderError(f"bootstrap step '{step.name}' failed: {error.message}{hint}") from error
        on_done(step.name)


def last_words(shell: RemoteShell) -> str:
    """What the agent itself said, when it is the agent that does not run."""
    try:
        lines = shell.run(["journalctl", "-u", "flux-agent", "-n", "20", "--no-pager", "-o", "cat"], 30)
    except ProviderError:
        return ""
    return f"; its log ends: {lines.strip()[-1500:]}"


def agent_yaml(files: AgentFiles, address: Address) -> bytes:
    """The node's agent.yaml; relative certificate paths count from it."""
    config: dict[str, object] = {
        "agent_id": files.agent_id,
        "port": files.port,
        "network": {"node_private_ip": address.private_ip, "node_public_ip": address.public_ip},
    }
    if files.certificate_pem:
        config["tls"] = {
            "enabled": True,
            "ca_cert": "certs/ca.pem",
            "cert_file": "certs/agent.pem",
            "key_file": "certs/agent-key.pem",
        }
    else:
        config |= {"tls": {"enabled": False}, "insecure": True}
    if files.redis_url:
        config |= {"store": "redis", "redis_addr": files.redis_url}
    return yaml.safe_dump(config, sort_keys=False).encode()


def _certificates(files: AgentFiles) -> list[Step]:
    if not files.certificate_pem:
        return []
    certificates = (
        Upload(files.ca_pem, f"{_CERTS_DIR}/ca.pem", 0o600),
        Upload(files.certificate_pem, f"{_CERTS_DIR}/agent.pem", 0o600),
        Upload(files.key_pem, f"{_CERTS_DIR}/agent-key.pem", 0o600),
    )
    return [Step("write the certificates", Uploads(certificates))]


def _metadata(provider: str, uid_range: tuple[int, int]) -> list[Step]:
    """Functions must not reach the cloud's credentials.

    On Compute Engine the metadata address is the resolver too, so only its port 80 is closed,
    and only to the functions' own uids.
    """
    if provider == "aws":
        text = "[Service]\nIPAddressDeny=169.254.169.254 fd00:ec2::254\n"
        return [Step("close the metadata service to functions", Upload(text.encode(), _DROP_IN, 0o644))]
    if provider != "gcp":
        return []
    first, count = uid_range
    rules = (
        "table inet flux_agent\ndelete table inet flux_agent\ntable inet flux_agent {\n"
        "  chain output {\n    type filter hook output priority 0;\n"
        f"    meta skuid {first}-{first + count - 1} ip daddr 169.254.169.254 tcp dport 80 reject\n  }}\n}}\n"
    )
    unit = (
        "[Unit]\nDescription=Close the metadata service to Flux functions\nBefore=flux-agent.service\n\n"
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/sbin/nft -f {_NFT_RULES}\n\n"
        "[Install]\nRequiredBy=flux-agent.service\n"
    )
    install = "command -v nft >/dev/null || { apt-get update -q && apt-get install -y -q nftables; }"
    return [
        Step("install nftables", Script(install)),
        Step("write the metadata rules", Upload(rules.encode(), _NFT_RULES, 0o644)),
        Step("write the metadata unit", Upload(unit.encode(), _NFT_UNIT, 0o644)),
        Step("close the metadata service to functions", Run(("systemctl", "enable", "--now", "flux-agent-metadata"))),
    ]


def _do(action: Action, shell: RemoteShell) -> None:
    match action:
        case Run(words, timeout):
            shell.run(words, timeout)
        case Script(text, timeout):
            shell.run_script(text, timeout)
        case Upload(content, path, mode):
            shell.upload(content, path, mode)
        case Uploads(files):
            for file in files:
                shell.upload(file.content, file.path, file.mode)
        case Package():
            _install(action, shell)


def _install(package: Package, shell: RemoteShell) -> None:
    if package.url:
        # As a file: the address may carry a token, and command lines can be read by every user.
        quoted = package.url.replace("\\", "\\\\").replace('"', '\\"')
        shell.upload(f'url = "{quoted}"\n'.encode(), _CURL, 0o600)
        try:
            shell.run(["curl", "-fsSL", "--retry", "3", "--proto", "=https,http", "-o", _PACKAGE, "-K", _CURL], 600)
        finally:
            shell.run(["rm", "-f", "--", _CURL], 60)
        _check_sum(shell, package.sha256)
    else:
        architecture = shell.run(["dpkg", "--print-architecture"], 60).strip()
        path = package_for(package, architecture)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ProviderError(f"the agent's package {path} cannot be read: {error.strerror}") from error
        shell.upload(content, _PACKAGE, 0o600)
        _check_sum(shell, hashlib.sha256(content).hexdigest())
    # Keeps the agent.yaml written above, and asks nothing: there is nobody to answer.
    options = ["--force-confold", "--force-confdef"]
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    shell.run([*environment, "dpkg", *options, "-i", _PACKAGE], 600)
    shell.run(["rm", "-f", "--", _PACKAGE], 60)


def package_for(package: Package, architecture: str) -> Path:
    """The file to upload to a node of dpkg's ``architecture``. Raises ProviderError when there is none."""
    if not architecture.replace("-", "").isalnum():
        raise ProviderError(f"dpkg answered no architecture: {architecture[:80]!r}")
    if package.file is not None:
        return package.file
    if package.directory is None:
        raise ProviderError("no agent package is configured: set `agent_package`")
    path = package.directory / f"flux-agent_{package.version}_{architecture}.deb"
    if not path.is_file():
        raise ProviderError(f"there is no {path}: set `agent_package` to a flux-agent .deb for {architecture}")
    return path


def _check_sum(shell: RemoteShell, sha256: str) -> None:
    found = shell.run(["sha256sum", "--", _PACKAGE], 120).split()
    if not found or found[0].lower() != sha256.lower():
        shell.run(["rm", "-f", "--", _PACKAGE], 60)
        raise ProviderError(f"the package's SHA-256 is {found[0] if found else '?'}, not {sha256}: not installed")
