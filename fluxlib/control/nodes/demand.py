"""Executions that wait for room on nodes Flux could make, from every Flux of the store."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.nodes.scaling import Wait
from fluxlib.errors import FluxError, NotFound
from fluxlib.model import Function, Platform
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

# What a provider's nodes are, whichever type: Debian or Ubuntu; the architecture is the image's.
_NODES = Platform("linux")
_AGAIN_AFTER = 60.0


class Demand:
    """``publish`` in a process that follows, ``read`` in the one that leads."""

    def __init__(
        self,
        store: ControlStore,
        leadership: Leadership,
        waiting: Callable[[], Mapping[str, int]],
        lookup: Callable[[str], Function],
    ) -> None:
        self._store = store
        self._leadership = leadership
        self._waiting = waiting
        self._lookup = lookup
        self._published: Mapping[str, int] = {}
        self._published_at = 0.0
        self._forgotten: frozenset[str] = frozenset()

    def publish(self, now: float) -> None:
        """Tell the leader what waits here, when that has changed. Raises StoreUnavailable."""
        waiting = dict(self._waiting())
        # Told again: a process that was frozen for long was taken for gone, and what it had told was deleted.
        again = bool(waiting) and now - self._published_at >= _AGAIN_AFTER
        if waiting != self._published or again:
            self._store.set_note(_fact(self._leadership.session), json.dumps(waiting, separators=(",", ":")))
            self._published, self._published_at = waiting, now

    def read(self) -> tuple[Wait, ...]:
        """By function. Raises StoreUnavailable, LeaseLost."""
        self._forget_gone()
        counts = Counter(self._waiting())
        for session in self._leadership.others:
            counts.update(json.loads(self._store.note(_fact(session)) or "{}"))
        found = (self._wait(name, count) for name, count in sorted(counts.items()) if count > 0)
        return tuple(wait for wait in found if wait is not None)

    def _forget_gone(self) -> None:
        gone, lease = self._leadership.gone, self._leadership.lease
        self._forgotten &= gone
        for session in gone - self._forgotten if lease is not None else ():
            self._store.delete_note(_fact(session), lease)
            self._forgotten |= {session}

    def _wait(self, name: str, count: int) -> Wait | None:
        try:
            function = self._lookup(name)
        except NotFound:
            return None  # deleted meanwhile
        except FluxError as error:
            log.warning("what %s asks of a node cannot be read: %s", name, error.message)
            return None
        if function.platforms and not any(_NODES.matches(wanted) for wanted in function.platforms):
            return None
        spec = function.spec
        return Wait(name, count, memory_mb=spec.memory_mb, slots=spec.max_concurrency)


def _fact(session: str) -> str:
    return f"waiting/{session}"
