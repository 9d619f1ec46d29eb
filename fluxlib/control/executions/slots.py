"""Finding a slot: what functions need, who takes one more, and which agents are left alone for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from fluxlib.control.agents.registry import AgentState, Registry, Reservation
from fluxlib.control.executions.placement import Need, Refusal, chooser, need_of, refusal
from fluxlib.errors import AtCapacity, FluxError, Internal, NotFound, StoreUnavailable, Unenforceable
from fluxlib.lifecycle import Timers
from fluxlib.model import ErrorKind, ExecutionRecord, Function

log = logging.getLogger(__name__)

# An agent that could not be reached, or will not take a function, is left alone for so long (seconds).
_SHUN = 2.0
# A look at every agent that took longer than this (seconds) is not repeated before so many times what it took.
_LONG_WALK = 0.001
_REST = 2.0
_NEVER: tuple[float, Need | None, Refusal | None] = (0.0, None, None)

_REFUSALS: dict[ErrorKind, type[FluxError]] = {
    ErrorKind.UNENFORCEABLE: Unenforceable,
}


class Lookup(Protocol):
    """The functions, from memory."""

    def lookup(self, name: str) -> Function:
        """Raises NotFound, StoreUnavailable."""


class Slots:
    """The registry as dispatching uses it. ``retry(agent_id, function_name)``: an agent may be asked again."""

    def __init__(
        self, registry: Registry, functions: Lookup, timers: Timers, retry: Callable[[str, str | None], None]
    ) -> None:
        self._registry = registry
        self._functions = functions
        self._timers = timers
        self._retry = retry
        self._needs: dict[str, tuple[Function, Need]] = {}
        self._last_used: dict[str, str] = {}  # by function; an agent's ID
        self._fruitless: dict[str, float] = {}
        self._refusals: dict[str, tuple[float, Need | None, Refusal | None]] = {}
        self._shunned: dict[tuple[str, str], FluxError] = {}

    def need(self, function_name: str) -> Need:
        """What the function needs as it is declared now. Raises NotFound, StoreUnavailable."""
        try:
            function = self._functions.lookup(function_name)
        except NotFound:
            for known_of in (self._needs, self._last_used, self._fruitless, self._refusals):
                known_of.pop(function_name, None)
            raise
        known = self._needs.get(function_name)
        if known is not None and known[0] is function:
            return known[1]
        need = need_of(function)
        self._needs[function_name] = (function, need)
        return need

    def last_need(self, function_name: str) -> Need:
        """The same as it was looked up last, without looking again. Raises NotFound when it was deleted since."""
        known = self._needs.get(function_name)
        return known[1] if known is not None else self.need(function_name)

    def tidy(self) -> None:
        """Forget what is only known of functions that were deleted."""
        for name in list(self._needs):
            with suppress(NotFound, StoreUnavailable):
                self.need(name)

    def place(self, need: Need) -> Reservation | None:
        """A slot at the fitting agent with most headroom.

        None also while the last walk over a large fleet was fruitless just now: a flood of calls that
        nobody can take must not walk ten thousand agents each.
        """
        name, began = need.function_name, time.monotonic()
        if self._fruitless and began < self._fruitless.get(name, 0.0):
            return None
        reservation = self._reserve(need, "")
        if reservation is None:
            took = time.monotonic() - began
            if took > _LONG_WALK:
                self._fruitless[name] = began + took * (1 + _REST)
        return reservation

    def place_waiting(self, function_name: str, agent_id: str) -> Reservation | None:
        """A slot for one that waits, at this agent ("" = at any): what has freed must not be overlooked."""
        known = self._needs.get(function_name)
        return self._reserve(known[1], agent_id) if known is not None else None

    def _reserve(self, need: Need, only: str) -> Reservation | None:
        name = need.function_name
        reservation = self._registry.place(
            name,
            chooser(need, self._shunned),
            slots=need.slots,
            memory_mb=need.memory_mb,
            platforms=need.platforms,
            only=only,
        )
        if reservation is not None:
            self._last_used[name] = reservation.agent_id
        return reservation

    def refusal(self, need: Need) -> Refusal:
        """Why ``place`` found none."""
        began = time.monotonic()
        until, of, known = self._refusals.get(need.function_name, _NEVER)
        if known is None or of is not need or began >= until:
            known = refusal(need, self._agents(need.function_name), self._shunned)
            took = time.monotonic() - began
            if took <= _LONG_WALK:
                return known
            self._refusals[need.function_name] = (began + took * (1 + _REST), need, known)
        # An error of its own: the one kept is raised by many threads.
        return replace(known, error=type(known.error)(known.error.message, retry_after=known.error.retry_after))

    def _agents(self, function_name: str) -> Iterator[AgentState]:
        """Every agent; first the one used last, which most often explains a refusal at once."""
        last = self._registry.get(self._last_used.get(function_name, ""))
        if last is not None:
            yield last
        for agent in self._registry.agents():
            if last is None or agent.agent_id != last.agent_id:
                yield agent

    # -- giving back -------------------------------------------------------------------

    def release(self, reservation: Reservation) -> None:
        self._registry.release(reservation)

    def refused(self, reservation: Reservation, answer: ExecutionRecord) -> None:
        """The agent started nothing: give the slot back, and ask others for a while."""
        if answer.error_kind is ErrorKind.INVALID:
            # This call's arguments; the next call may well bring others.
            self._registry.release(reservation)
            return
        if answer.error_kind is not ErrorKind.AT_CAPACITY:
            error = _REFUSALS.get(answer.error_kind, Internal)
            self.unusable(reservation, error(f"{reservation.agent_id}: {answer.error}"))
            return
        # Giving the slot back announces it, and the next in the queue would be sent into the same refusal.
        key = (reservation.agent_id, reservation.function_name)
        self._shunned[key] = AtCapacity(answer.error)
        self._registry.release(reservation)
        self._registry.mark_full(reservation.agent_id, reservation.function_name)
        self._shunned.pop(key, None)
        connection = reservation.agent.connection
        if connection is not None and connection.original:
            # It will not say when it has room again, and a report of its tasks comes late.
            self._timers.after(_SHUN, lambda: self._registry.freed(*key))

    def unusable(self, reservation: Reservation, error: FluxError) -> None:
        """The agent cannot be reached, or will not take this function: give the slot back, try again later."""
        key = (reservation.agent_id, reservation.function_name)
        if key not in self._shunned:
            self._shunned[key] = error
            self._timers.after(_SHUN, lambda: self._forgive(key))
        self._registry.release(reservation)

    def _forgive(self, key: tuple[str, str]) -> None:
        self._shunned.pop(key, None)
        self._retry(*key)
