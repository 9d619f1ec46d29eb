"""From a running machine to an agent that answers: the bootstrap's steps over SSH, resumed where they stopped."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fluxlib
from fluxlib.config.agent import DEFAULT_UID_RANGE
from fluxlib.config.control import ControlConfig
from fluxlib.control.nodes.notes import NodeNotes
from fluxlib.errors import AgentError, Conflict, ProviderError
from fluxlib.pki import Authority
from fluxlib.providers import Cloud
from fluxlib.providers.base import Address
from fluxlib.providers.bootstrap import AgentFiles, Package, carry_out, last_words, plan
from fluxlib.providers.ssh import Shell

log = logging.getLogger(__name__)

CARRIED = Path("/usr/share/flux/agents")


@dataclass(frozen=True)
class Progress:
    """What the setup of one node tells while it goes on. Each may raise to stop it in between."""

    host_key: Callable[[str], None]  # once, at first sight, before anything is done there
    begins: Callable[[str], None]
    done: Callable[[str], None]


class NodeSetup:
    """What waits for SSH, and shells that are open, can be broken off from outside: that ends the step under way."""

    def __init__(
        self, config: ControlConfig, authority: Authority, *, tls: bool, private_key: str, carried: Path = CARRIED
    ) -> None:
        self._config = config
        self._authority = authority
        self._tls = tls
        self._private_key = private_key
        self._carried = carried
        self._lock = threading.Lock()
        self._shells: dict[str, Shell] = {}
        self._waits: dict[str, threading.Event] = {}  # set = it is not waited for any more

    def carry_out(
        self,
        cloud: Cloud,
        agent_id: str,
        notes: NodeNotes,
        progress: Progress,
        join: Callable[[], None],
        stopped: threading.Event,
    ) -> None:
        """All steps not done yet, then ``join``, whose failure is told with the agent's last words.

        Raises ProviderError naming the step.
        """
        address = Address(notes.reach, notes.private_ip, notes.public_ip)
        with self._connect(cloud, agent_id, notes, progress, stopped) as shell:
            with self._lock:
                self._shells[agent_id] = shell
            try:
                progress.host_key(shell.host_key)
                steps = plan(
                    self._files(agent_id),
                    address,
                    self.package(cloud),
                    cloud.config.agent_setup_commands,
                    provider=cloud.name,
                    uid_range=_default_uids(),
                )
                carry_out(steps, shell, notes.done, progress.begins, progress.done)
                progress.begins("wait for the agent")
                try:
                    join()
                except (AgentError, Conflict) as error:
                    raise ProviderError(f"the agent does not join: {error.message}{last_words(shell)}") from error
            finally:
                with self._lock:
                    self._shells.pop(agent_id, None)

    def _connect(
        self, cloud: Cloud, agent_id: str, notes: NodeNotes, progress: Progress, stopped: threading.Event
    ) -> Shell:
        step = "wait for SSH"
        given_up = threading.Event()
        with self._lock:
            self._waits[agent_id] = given_up
        if stopped.is_set():
            given_up.set()
        try:
            # Only now: a removal that is ordered before this is seen here, and one after it is told to the wait.
            progress.begins(step)
            return Shell.connect(
                notes.reach,
                cloud.provider.ssh_user,
                self._private_key,
                time.monotonic() + self._config.node_start_sec,
                port=cloud.config.ssh_port,
                expected_host_key=notes.host_key,
                stopped=given_up,
            )
        except ProviderError as error:
            raise ProviderError(f"bootstrap step '{step}' failed: {error.message}") from error
        finally:
            with self._lock:
                self._waits.pop(agent_id, None)

    def interrupt(self, agent_id: str = "") -> None:
        """Break off what is under way there, everywhere by default."""
        with self._lock:
            shells = [shell for name, shell in self._shells.items() if agent_id in ("", name)]
            waits = [wait for name, wait in self._waits.items() if agent_id in ("", name)]
        for wait in waits:
            wait.set()
        for shell in shells:
            shell.close()

    def package(self, cloud: Cloud) -> Package:
        """What is installed on this cloud's nodes."""
        config = self._config
        if config.agent_package_url:
            return Package(url=config.agent_package_url, sha256=config.agent_package_sha256)
        if config.agent_package:
            return Package(file=Path(config.agent_package))
        return Package(directory=self._carried, version=fluxlib.__version__)

    def warnings(self, clouds: list[Cloud]) -> list[str]:
        """Settings that do not do what they say."""
        return [
            f"{cloud.name}: agent_version is {cloud.config.agent_version}, and nodes get {fluxlib.__version__}, the one"
            " that came with Flux: set agent_package_url and agent_package_sha256 (or agent_package) to bring another"
            for cloud in clouds
            if cloud.config.agent_version not in ("", fluxlib.__version__)
            and not self._config.agent_package_url
            and not self._config.agent_package
        ]

    def _files(self, agent_id: str) -> AgentFiles:
        if not self._tls:
            return AgentFiles(agent_id, self._config.agent_port, redis_url=self._config.agent_redis_url)
        identity = self._authority.issue_agent(agent_id)
        return AgentFiles(
            agent_id,
            self._config.agent_port,
            ca_pem=identity.ca_pem,
            certificate_pem=identity.cert_pem,
            key_pem=identity.key_pem,
            redis_url=self._config.agent_redis_url,
        )


def _default_uids() -> tuple[int, int]:
    """The users of functions, as an agent.yaml without ``uid_range`` has them."""
    first, _, count = DEFAULT_UID_RANGE.partition("+")
    return int(first), int(count)
