"""What a cloud is to Flux: machines that can be launched, listed and ended.

A provider knows no agents and no registry. It is asked by ``control.nodes``,
one thread per call, and tells the truth about the cloud: what it could not end
is said, not swallowed.

Every node carries three labels: ``flux:role``, ``flux:agent-id`` and
``flux:installation`` (spelt as each cloud allows). Only nodes with this
installation's ID are ever listed or ended, so that two installations and an
original's nodes in one account leave each other alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class NodeState(str, Enum):
    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"  # halted by somebody else: its disk still costs
    ENDING = "ending"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Launch:
    """What is asked for. ``agent_id`` makes the request idempotent: asked twice, there is one machine."""

    agent_id: str
    instance_type: str
    ssh_public_key: str  # OpenSSH form, without comment


@dataclass(frozen=True, slots=True)
class Node:
    """A machine as its cloud tells it."""

    provider: str
    provider_id: str
    agent_id: str
    instance_type: str
    state: NodeState
    public_ip: str = ""
    private_ip: str = ""
    launched_at: float = 0.0  # epoch seconds
    labels: dict[str, str] = field(default_factory=dict)


class Provider(Protocol):
    @property
    def name(self) -> str:
        """``aws`` or ``gcp``."""

    @property
    def ssh_user(self) -> str: ...

    def prepare(self, ssh_public_key: str) -> None:
        """What all nodes share (EC2's key pair), made once; replaced when it is not this installation's key.

        Raises ProviderError.
        """

    def launch(self, wanted: Launch, deadline: float) -> Node:
        """A running machine with the addresses it will keep.

        When anything fails after the cloud accepted the launch the machine is ended again; if that
        fails too, or nobody can say whether it was accepted, the error is a StrandedNode (whose
        ``provider_id`` is empty while it is unknown). ``deadline`` is time.monotonic.
        Raises ProviderError (StrandedNode among them), whose message names the step and the cloud's reason.
        """

    def terminate(self, provider_id: str) -> None:
        """Ends it; one that is gone already is no error. Raises ProviderError."""

    def nodes(self) -> list[Node]:
        """Every machine of this installation that has not ended. Raises ProviderError, never a part of the list."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where Flux reaches a node, and what the node is told about itself."""

    reach: str
    private_ip: str
    public_ip: str

    @classmethod
    def of(cls, node: Node, *, use_private_ip: bool) -> Address:
        reach = node.private_ip if use_private_ip and node.private_ip else node.public_ip
        return cls(reach, node.private_ip, node.public_ip)
