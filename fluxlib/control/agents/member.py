"""What this process remembers of one agent beside its record and the fleet: for its worker, and for who polls it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Flag, auto

from fluxlib.model import AgentRecord

# Seconds until what could not be brought to an agent is tried again: twice as long each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 30.0


class Wanted(Flag):
    """What is to be done about one agent, in the background."""

    NOTHING = 0
    STEP = auto()  # compare what it holds with what it should, push what differs
    RECONCILE = auto()  # it joined, came back or restarted: compare what it runs, too
    RECONNECT = auto()  # it is not the agent the connection was made for any more


STEP_IN = Wanted.STEP | Wanted.RECONCILE


@dataclass(slots=True)
class Polled:
    """The questions how it is, and how many in a row had no good answer. The health poller's thread only."""

    misses: int = 0
    question: int = 0  # the number of the last one: an answer to an earlier one is ignored
    asked_at: float = 0.0  # 0 = none is open
    counts: bool = False  # its uptime was seen to change: one that tells the same for ever says nothing of restarts

    def ask(self, now: float) -> int:
        """The number of a new question."""
        self.question += 1
        self.asked_at = now
        return self.question

    def answered(self, question: int) -> float | None:
        """When it was asked, which closes it; None for an earlier one."""
        if question != self.question:
            return None
        asked_at, self.asked_at = self.asked_at, 0.0
        return asked_at

    def begin_anew(self) -> None:
        self.misses, self.asked_at = 0, 0.0


@dataclass(slots=True)
class Retry:
    """What could not be brought to it, and when that is tried again. Guarded by its member's condition."""

    behind: bool = False
    failures: int = 0  # in a row
    at: float = 0.0

    def failed(self, now: float) -> None:
        self.behind = True
        self.at = now + min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self.failures, 10))
        self.failures += 1

    def succeeded(self) -> None:
        self.behind, self.failures = False, 0


@dataclass(eq=False, slots=True)
class Member:
    """One agent. ``condition`` guards every field but ``polled``."""

    agent_id: str
    stored: AgentRecord  # as the store has it
    condition: threading.Condition = field(default_factory=threading.Condition)
    wanted: Wanted = Wanted.NOTHING
    working: bool = False  # a worker is at it
    removed: bool = False
    unsaved: bool = False  # the store was away when something was to be written
    life: int = 0  # counts its connections: events of an earlier one are ignored
    features: tuple[str, ...] = ()
    reconciled: bool = False  # since it joined, what it runs was compared
    given_up: bool = False  # what it ran was failed
    checked_revision: int = -1  # of the functions it was last compared with
    retry: Retry = field(default_factory=Retry)
    polled: Polled = field(default_factory=Polled)
