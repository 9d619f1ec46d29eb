"""The agents of one platform that take work, in order of headroom, and how many of them are full.

Written only by :class:`fluxlib.control.agents.fleet.Fleet`, under its lock.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

# (headroom, turn, agent ID): the greatest comes first.
Key = tuple[float, int, str]


class Ranking:
    """An order that is moved by one insertion, and counts that answer "is everybody full" without a walk."""

    __slots__ = ("full", "order")

    def __init__(self) -> None:
        self.order: list[Key] = []  # rising
        self.full: dict[str, int] = {}  # function → agents that are full for it; "" = as a whole

    def __len__(self) -> int:
        return len(self.order)

    def falling(self) -> Iterator[Key]:
        return reversed(self.order)

    def insert(self, key: Key, full: Iterable[str]) -> None:
        bisect.insort(self.order, key)
        self.count(full, 1)

    def remove(self, key: Key, full: Iterable[str]) -> None:
        del self.order[bisect.bisect_left(self.order, key)]
        self.count(full, -1)

    def count(self, full: Iterable[str], by: int) -> None:
        """An agent that is full as a whole counts once, under "": the sum below must not count it twice."""
        names = set(full)
        for name in ("",) if "" in names else names:
            count = self.full.get(name, 0) + by
            if count:
                self.full[name] = count
            else:
                del self.full[name]

    def all_full(self, function_name: str) -> bool:
        """Whether nobody here has a slot left for the function; so it is where nobody is."""
        return self.full.get(function_name, 0) + self.full.get("", 0) >= len(self.order)
