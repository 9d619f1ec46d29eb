"""Whatever happens to agents, functions and the store, in whatever order: in the end everything is as it should be."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fluxlib.errors import AgentError, InvalidInput, NotFound, StoreUnavailable
from fluxlib.model import AgentStatus
from tests.support.fleet import Fleet, Machine, spec
from tests.support.memory_store import MemoryControlStore
from tests.support.programs import make_zip

CODES = [make_zip({"run.sh": f"#!/bin/sh\necho {number}\n"}) for number in range(3)]
AGENTS = ["w1", "w2", "old"]
FUNCTIONS = ["f", "g"]

agents = st.sampled_from(AGENTS)
functions = st.sampled_from(FUNCTIONS)


_FAILING = frozenset(
    {"save_agent", "update_agent", "delete_agent", "save_function", "delete_function", "archive", "note"}
)


def _refuse(*_: object, **__: object) -> None:
    raise StoreUnavailable("away")


class Shaky(MemoryControlStore):
    """A store that is away at times."""

    away = False

    def __getattribute__(self, name: str) -> Any:
        if name in _FAILING and object.__getattribute__(self, "away"):
            return _refuse
        return object.__getattribute__(self, name)


class FleetMachine(RuleBasedStateMachine):
    """One Flux, two agents of ours and an original."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Shaky()
        self.fleet = Fleet(self.store)
        for agent_id in AGENTS:
            self.fleet.wire.add(agent_id, original=agent_id == "old")

    def machine(self, agent_id: str) -> Machine:
        found: Machine = self.fleet.wire.machines[f"{agent_id}:50052"]
        return found

    @rule(agent_id=agents)
    def register(self, agent_id: str) -> None:
        try:
            self.fleet.membership.register(f"{agent_id}:50052", legacy=False)
        except (AgentError, StoreUnavailable):
            assert not self.machine(agent_id).up or self.store.away

    @rule(agent_id=agents, what=st.sampled_from(["deregister", "drain", "undrain"]))
    def ask(self, agent_id: str, what: str) -> None:
        try:
            getattr(self.fleet.membership, what)(agent_id)
        except NotFound:
            assert self.fleet.agents.get(agent_id) is None
        except StoreUnavailable:
            assert self.store.away

    @rule(agent_id=agents, up=st.booleans())
    def power(self, agent_id: str, up: bool) -> None:
        machine = self.machine(agent_id)
        if up and not machine.up:
            self.fleet.time[0] += 2  # no restart is done within a second
            machine.restart()
        machine.up = up

    @rule(agent_id=agents)
    def wipe(self, agent_id: str) -> None:
        self.fleet.time[0] += 2
        self.machine(agent_id).restart()
        self.machine(agent_id).functions.clear()

    @rule(name=functions, timeout=st.integers(0, 3))
    def put(self, name: str, timeout: int) -> None:
        try:
            self.fleet.functions.put(spec(name, timeout_seconds=timeout))
        except StoreUnavailable:
            assert self.store.away

    @rule(name=functions, code=st.sampled_from(CODES))
    def deploy(self, name: str, code: bytes) -> None:
        try:
            self.fleet.functions.deploy(name, code)
        except (NotFound, InvalidInput):
            assert self.store.function(name) is None
        except StoreUnavailable:
            assert self.store.away

    @rule(name=functions)
    def delete(self, name: str) -> None:
        try:
            self.fleet.functions.delete(name, force=True)
        except NotFound:
            assert self.store.function(name) is None
        except StoreUnavailable:
            assert self.store.away

    @rule(away=st.booleans())
    def store_goes(self, away: bool) -> None:
        self.store.away = away

    @rule(seconds=st.sampled_from([10.0, 10.0, 10.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.fleet.round(seconds)

    @rule()
    def flux_restarts(self) -> None:
        if self.store.away:
            return
        self.fleet.close()
        self.fleet = Fleet(self.store, self.fleet.wire, session=f"s{self.fleet.now}", clock=self.fleet.time)
        self.fleet.start()

    @invariant()
    def whoever_takes_work_is_joined_and_known(self) -> None:
        for state in self.fleet.agents.agents():
            if state.takes_work:
                assert state.record.status is AgentStatus.ONLINE
                assert state.connection is not None
                assert any(record.agent_id == state.agent_id for record in self.store.agents())

    def teardown(self) -> None:
        try:
            self.store.away = False
            for agent_id in AGENTS:
                self.power(agent_id, True)
            for _ in range(3):
                self.fleet.round(40)
            wanted = {name: function for name in FUNCTIONS if (function := self.store.function(name)) is not None}
            for state in self.fleet.agents.agents():
                machine = self.machine(state.agent_id)
                held = {name: (one.spec_digest, one.code_digest) for name, one in machine.functions.items()}
                expected = {name: (one.spec_digest, one.code_digest) for name, one in wanted.items()}
                if machine.original:
                    # It keeps what was deleted, and is told of nothing before there is code.
                    expected = {name: one for name, one in expected.items() if one[1]}
                    held = {name: one for name, one in held.items() if name in expected}
                assert held == expected, state.agent_id
                draining = state.record.status is AgentStatus.DRAINING
                assert state.takes_work != draining
                assert state.problem == ""
                assert state.missing_functions.keys() == (wanted.keys() - expected.keys())
            stored = {record.agent_id: record.status for record in self.store.agents()}
            assert stored == {state.agent_id: state.record.status for state in self.fleet.agents.agents()}
        finally:
            self.fleet.close()


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
