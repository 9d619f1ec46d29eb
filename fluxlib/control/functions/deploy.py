"""The desired state: which functions there are and with which code, saved first and pushed then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fluxlib import archive as archives
from fluxlib.control.agents.fleet import Agent, Fleet
from fluxlib.control.agents.pushes import FunctionPusher, Pushed
from fluxlib.control.services import PushResult
from fluxlib.errors import Conflict, InvalidInput, NotFound, TooLarge
from fluxlib.model import AgentStatus, Function, FunctionSpec
from fluxlib.store.base import ControlStore

log = logging.getLogger(__name__)

REFRESH_EVERY = 1.0
# How often a change is made again of what another Flux has saved meanwhile.
_TRIES = 5


class FunctionService:
    """services.Functions, and ``lookup`` for the path of an execution.

    The functions are kept in memory; ``tick`` (every :data:`REFRESH_EVERY` seconds where several Flux
    share the store) takes over what another process changed. ``refresh`` must have been called once before
    agents are joined. ``count_open(name)`` says how many executions of a function run or wait; by default
    the store is asked.
    """

    def __init__(
        self,
        store: ControlStore,
        fleet: Fleet,
        pusher: FunctionPusher,
        *,
        max_archive_bytes: int,
        count_open: Callable[[str], int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._pusher = pusher
        self._max_archive_bytes = max_archive_bytes
        self._count_open = count_open if count_open is not None else store.count_open
        self._clock = clock
        self._changing = threading.Lock()  # one change at a time in this process, however long it takes
        self._lock = threading.Lock()  # what is in memory; held for no longer than a read of the store
        self._functions: dict[str, Function] = {}
        self._stored_revision = -1
        self._revision = 0

    # -- reading -------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Grows in this process with every change it learns of; see :meth:`all`."""
        return self._revision

    def all(self) -> tuple[int, Sequence[Function]]:
        """(revision, every function by name): what agents should hold, as of that revision."""
        # The revision first: functions newer than it are looked at once more, older ones would be missed.
        revision = self._revision
        functions = self._functions
        return revision, [functions[name] for name in sorted(functions)]

    def lookup(self, name: str) -> Function:
        """From memory; an unknown name asks the store once. Raises NotFound."""
        found = self._functions.get(name)
        if found is None:
            if self._store.function(name) is None:
                raise NotFound(f"there is no function {name}: PUT /functions registers one")
            with self._lock:
                # Once more: it may have been deleted meanwhile, and would stay here for ever.
                found = self._store.function(name)
                if found is None:
                    raise NotFound(f"there is no function {name}: PUT /functions registers one")
                self._take(found)
        return found

    get = lookup

    def cached(self, name: str) -> Function | None:
        """From memory alone: never waits for the store or for a deploy."""
        return self._functions.get(name)

    def list(self) -> Sequence[Function]:
        return self.all()[1]

    def tick(self, now: float) -> None:
        """Take over what other processes changed. Raises StoreUnavailable."""
        del now
        self.refresh()

    def refresh(self) -> None:
        """Read everything if anything changed in the store; once before anything else starts."""
        revision = self._store.functions_revision()
        if revision == self._stored_revision:
            return
        with self._lock:
            self._functions = {function.spec.name: function for function in self._store.functions()}
            # Read before the functions: at worst they are read once more.
            self._stored_revision = revision
            self._revision += 1

    # -- changing ------------------------------------------------------------------

    def put(self, spec: FunctionSpec) -> PushResult:
        def made_of(known: Function | None) -> tuple[Function, None]:
            function = Function(spec, spec.digest(), updated_at=self._clock())
            return self._with_code_of(function, known) if known is not None and known.code_digest else function, None

        return self._push(self._change(spec.name, made_of))

    def deploy(self, name: str, archive: bytes) -> PushResult:
        if len(archive) > self._max_archive_bytes:
            raise TooLarge(f"the zip has {len(archive)} bytes, more than {self._max_archive_bytes} (max_archive_mb)")
        warnings: tuple[str, ...] = ()

        def made_of(known: Function | None) -> tuple[Function, bytes]:
            nonlocal warnings
            if known is None:
                raise NotFound(f"there is no function {name}: PUT /functions first, then deploy its code")
            info = archives.inspect(archive, known.spec.handler)
            warnings = info.warnings
            function = replace(
                known,
                code_digest=info.digest,
                code_bytes=len(archive),
                detected_platforms=info.platforms,
                updated_at=self._clock(),
            )
            return function, archive

        result = self._push(self._change(name, made_of))
        # What Flux saw in the zip, the agents saw as well.
        return replace(result, warnings=tuple(dict.fromkeys((*warnings, *result.warnings))))

    def _change(self, name: str, made_of: Callable[[Function | None], tuple[Function, bytes | None]]) -> Function:
        """Save what ``made_of`` makes of the function as it is stored; made again when another Flux was quicker.

        Raises Conflict when others are quicker each time.
        """
        with self._changing:
            for tries_left in reversed(range(_TRIES)):
                known, revision = self._store.function_and_revision(name)
                function, archive = made_of(known)
                try:
                    self._store.save_function(function, archive, revision=revision)
                except Conflict:
                    if not tries_left:
                        raise
                    continue
                with self._lock:
                    self._take(function)
                break
        self._fleet.function_changed(name)
        return function

    def delete(self, name: str, *, force: bool) -> PushResult:
        with self._changing:
            known = self._store.function(name)
            if known is None:
                raise NotFound(f"there is no function {name}")
            running = self._count_open(name)
            if running and not force:
                raise Conflict(f"{running} executions of {name} run or wait: cancel them, or delete with ?force=1")
            self._store.delete_function(name)
            with self._lock:
                self._functions = {one: function for one, function in self._functions.items() if one != name}
                self._revision += 1
        agents = self._agents()
        results = tuple(one.result for one in self._pusher.remove_all(agents, name))
        keeping = [agent.agent_id for agent in agents if agent.record.original]
        shown = ", ".join(keeping[:20]) + (" and others" if len(keeping) > 20 else "")
        warnings = (f"original agents keep the code, which Flux asks them to run no more: {shown}",) if keeping else ()
        return PushResult(known, results, len(results), warnings)

    def _agents(self) -> Sequence[Agent]:
        return [agent for agent in self._fleet.agents() if agent.record.status is not AgentStatus.PROVISIONING]

    def _push(self, function: Function) -> PushResult:
        pushed = self._pusher.push_all(self._agents(), function)
        warnings = dict.fromkeys(warning for one in pushed for warning in one.warnings)
        results = tuple(one.result for one in pushed)
        return PushResult(function, results, len(pushed), tuple(warnings), _problem(function.spec.name, pushed))

    def _with_code_of(self, function: Function, known: Function) -> Function:
        """The new spec with the code that is deployed. Raises InvalidInput when that lacks the new handler."""
        platforms = known.detected_platforms
        if known.spec.handler != function.spec.handler:
            archive = self._store.archive(known.code_digest)
            if archive is None:
                raise NotFound(f"the code of {known.spec.name} is not in the store: deploy it again")
            try:
                platforms = archives.inspect(archive, function.spec.handler).platforms
            except InvalidInput as error:
                raise InvalidInput(
                    f"handler: what is deployed does not fit: {error.message}. Deploy a zip with the old and the new"
                    " handler, then change it"
                ) from error
        return replace(
            function, code_digest=known.code_digest, code_bytes=known.code_bytes, detected_platforms=platforms
        )

    def _take(self, function: Function) -> None:
        # A new mapping: readers take no lock.
        self._functions = {**self._functions, function.spec.name: function}
        self._revision += 1


def _problem(name: str, pushed: Sequence[Pushed]) -> str:
    """Why none of the agents can run a function, however long one waits; empty where one can or may."""
    if not pushed or not all(one.unfit for one in pushed):
        return ""
    agents: dict[str, list[str]] = {}
    for one in pushed:
        agents.setdefault(one.unfit, []).append(one.result.agent_id)
    reasons = [
        f"{reason} ({', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''})"
        for reason, ids in agents.items()
    ]
    return f"no agent can run {name}: {'; '.join(reasons[:5])}{'; and others' if len(reasons) > 5 else ''}"
