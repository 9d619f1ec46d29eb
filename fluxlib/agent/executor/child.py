"""A program that runs, as the spawner knows it."""

from __future__ import annotations


class Child:
    """Its first process. ``cgroup`` is its cgroup's directory, -1 when it has none.

    ``slot`` is where the launcher finds why it did not come to run.
    """

    __slots__ = ("cgroup", "execution_id", "identifier", "pid", "slot")

    def __init__(self, identifier: int, pid: int, execution_id: bytes, cgroup: int = -1, slot: int = -1) -> None:
        self.identifier = identifier
        self.pid = pid
        self.execution_id = execution_id
        self.cgroup = cgroup
        self.slot = slot
