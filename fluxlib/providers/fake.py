"""A cloud in memory, for tests and the simulation: it breaks where it is told to.

It keeps the contract of :class:`fluxlib.providers.base.Provider` to the letter, also the
unpleasant parts: a launch that fails may have left a machine, a list may be refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fluxlib.errors import ProviderError, StrandedNode
from fluxlib.providers.base import Launch, Node, NodeState

# Of the public and private addresses; two clouds side by side never give the same one.
_NETWORKS = {"aws": ("192.0.2", "10.0"), "gcp": ("198.51.100", "10.1")}
_OTHER_NETWORK = ("203.0.113", "10.2")


@dataclass
class Faults:
    """What goes wrong, by agent ID or ("") for everybody. Taken away by whoever set it."""

    launch: dict[str, ProviderError] = field(default_factory=dict)  # refused: nothing was launched
    lost_answer: set[str] = field(default_factory=set)  # launched, and the answer never came
    half_way: dict[str, str] = field(default_factory=dict)  # launched, ended again: the reason
    terminate: dict[str, ProviderError] = field(default_factory=dict)  # by provider ID
    listing: ProviderError | None = None
    prepare: ProviderError | None = None


class FakeCloud:
    """``clock`` tells when machines are launched; ``on_launch`` sees every new one before the launch returns."""

    def __init__(
        self,
        name: str = "aws",
        installation_id: str = "here",
        *,
        clock: Callable[[], float] = time.time,
        on_launch: Callable[[Node], None] = lambda node: None,
    ) -> None:
        self.name = name
        self.ssh_user = "admin"
        self.faults = Faults()
        self.calls: list[tuple[str, str]] = []
        self._installation_id = installation_id
        self._clock = clock
        self._on_launch = on_launch
        self._lock = threading.Lock()
        self._machines: dict[str, Node] = {}
        self._installations: dict[str, str] = {}

    def prepare(self, ssh_public_key: str) -> None:
        self.calls.append(("prepare", ssh_public_key))
        if self.faults.prepare is not None:
            raise self.faults.prepare

    def launch(self, wanted: Launch, deadline: float) -> Node:
        self.calls.append(("launch", wanted.agent_id))
        refusal = self.faults.launch.get(wanted.agent_id) or self.faults.launch.get("")
        if refusal is not None:
            raise refusal
        node = self._machine(wanted)
        if self.faults.lost_answer & {wanted.agent_id, ""}:
            raise StrandedNode(f"{self.name}: the connection broke: it may have been launched all the same", "")
        reason = self.faults.half_way.get(wanted.agent_id) or self.faults.half_way.get("")
        if reason is not None:
            try:
                self.terminate(node.provider_id)
            except ProviderError as error:
                raise StrandedNode(f"{reason}; and {error.message}: it still runs", node.provider_id) from error
            raise ProviderError(reason)
        if node.state is not NodeState.RUNNING:
            raise ProviderError(f"{self.name}: {node.provider_id} does not run: it is {node.state.value}")
        self._on_launch(node)
        return node

    def terminate(self, provider_id: str) -> None:
        self.calls.append(("terminate", provider_id))
        fault = self.faults.terminate.get(provider_id) or self.faults.terminate.get("")
        if fault is not None:
            raise fault
        self.end(provider_id)

    def nodes(self) -> list[Node]:
        if self.faults.listing is not None:
            raise self.faults.listing
        with self._lock:
            return [
                node
                for node in self._machines.values()
                if node.state is not NodeState.ENDED and self._installations[node.provider_id] == self._installation_id
            ]

    # -- for whoever plays the cloud -----------------------------------------------------

    def put(
        self, agent_id: str, *, launched_at: float, installation_id: str = "", instance_type: str = "small"
    ) -> Node:
        """A machine that nobody here launched."""
        node = self._machine(Launch(agent_id, instance_type, ""), installation_id)
        return self._set(replace(node, launched_at=launched_at))

    def end(self, provider_id: str, state: NodeState = NodeState.ENDED) -> None:
        """The machine is gone, whoever wished it."""
        with self._lock:
            node = self._machines.get(provider_id)
            if node is not None:
                self._machines[provider_id] = replace(node, state=state)

    def running(self) -> list[str]:
        """The agent IDs of every machine that still costs, whoever's it is."""
        with self._lock:
            return sorted(node.agent_id for node in self._machines.values() if node.state is not NodeState.ENDED)

    def _machine(self, wanted: Launch, installation_id: str = "") -> Node:
        with self._lock:
            known = next((node for node in self._machines.values() if node.agent_id == wanted.agent_id), None)
            if known is not None:
                return known  # the client token: asked twice, there is one machine
            number = len(self._machines) + 1
            public, private = _NETWORKS.get(self.name, _OTHER_NETWORK)
            node = Node(
                provider=self.name,
                provider_id=f"i-{number:04d}",
                agent_id=wanted.agent_id,
                instance_type=wanted.instance_type,
                state=NodeState.RUNNING,
                public_ip=f"{public}.{number % 250 + 1}",
                private_ip=f"{private}.{number // 250}.{number % 250 + 1}",
                launched_at=self._clock(),
            )
            self._machines[node.provider_id] = node
            self._installations[node.provider_id] = installation_id or self._installation_id
            return node

    def _set(self, node: Node) -> Node:
        with self._lock:
            self._machines[node.provider_id] = node
        return node
