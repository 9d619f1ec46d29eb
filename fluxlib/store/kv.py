"""Typed tables over generic key-value ones: functions with their code, agents, and notes.

A backend implements :class:`KeyValues` once; what is kept in a table is JSON with named fields, read and written here.
A new kind of thing to keep is a table more, not a method more in each backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fluxlib.errors import Conflict
from fluxlib.model import AgentRecord, Function
from fluxlib.store.base import Lease
from fluxlib.store.rows import dump, load

FUNCTIONS, AGENTS, NOTES = "functions", "agents", "notes"


@dataclass(frozen=True, slots=True)
class Value:
    """An entry of a table. ``revision`` is another one after each change, and never 0."""

    text: str
    revision: int


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that an entry refers to by their digest; ``data`` None when the store has them already.

    Those that no entry refers to any more go with the write that orphans them.
    """

    digest: str = ""
    data: bytes | None = None


NO_BLOB = Blob()


class KeyValues(Protocol):
    """Tables of texts by key. Every write is one atomic, durable step, refused (LeaseLost) under a lease that is lost.

    Every method raises StoreUnavailable.
    """

    def get(self, table: str, key: str) -> Value | None: ...

    def all(self, table: str) -> dict[str, Value]:
        """By key, in the order of the keys."""

    def put(self, table: str, key: str, text: str, blob: Blob = NO_BLOB, lease: Lease | None = None) -> None: ...

    def update(self, table: str, key: str, text: str, lease: Lease | None = None) -> bool:
        """As ``put`` for one that is there; False, and nothing is written, when it is not."""

    def compare_and_set(
        self, table: str, key: str, text: str, revision: int, blob: Blob = NO_BLOB, lease: Lease | None = None
    ) -> bool:
        """As ``put`` if the entry still has this revision (0 = if there is none); False, and nothing is written, when
        it has not.
        """

    def delete(self, table: str, key: str, lease: Lease | None = None) -> bool:
        """False when there was none."""

    def revision(self, table: str) -> int:
        """Grows with every change of the table: what is kept in memory of it is compared with this."""

    def blob(self, digest: str) -> bytes | None: ...


class TypedTables:
    """The part of ControlStore that is the same for every backend."""

    def __init__(self, kv: KeyValues) -> None:
        self.kv = kv

    # -- functions and code

    def functions(self) -> list[Function]:
        return [_function(value.text) for value in self.kv.all(FUNCTIONS).values()]

    def function(self, name: str) -> Function | None:
        return self.function_and_revision(name)[0]

    def function_and_revision(self, name: str) -> tuple[Function | None, int]:
        found = self.kv.get(FUNCTIONS, name)
        return (_function(found.text), found.revision) if found is not None else (None, 0)

    def functions_revision(self) -> int:
        return self.kv.revision(FUNCTIONS)

    def save_function(self, function: Function, archive: bytes | None = None, *, revision: int | None = None) -> None:
        name, text, blob = function.spec.name, dump(function.to_fields()), Blob(function.code_digest, archive)
        if revision is None:
            self.kv.put(FUNCTIONS, name, text, blob)
        elif not self.kv.compare_and_set(FUNCTIONS, name, text, revision, blob):
            raise Conflict(f"function {name} was changed by somebody else at the same time: try again")

    def delete_function(self, name: str) -> bool:
        return self.kv.delete(FUNCTIONS, name)

    def archive(self, code_digest: str) -> bytes | None:
        return self.kv.blob(code_digest)

    # -- agents

    def agents(self) -> list[AgentRecord]:
        return [_agent(value.text) for value in self.kv.all(AGENTS).values()]

    def agent(self, agent_id: str) -> AgentRecord | None:
        found = self.kv.get(AGENTS, agent_id)
        return _agent(found.text) if found is not None else None

    def save_agent(self, agent: AgentRecord, lease: Lease | None = None) -> None:
        self.kv.put(AGENTS, agent.agent_id, dump(agent.to_fields()), lease=lease)

    def update_agent(self, agent: AgentRecord, lease: Lease | None = None) -> bool:
        return self.kv.update(AGENTS, agent.agent_id, dump(agent.to_fields()), lease)

    def delete_agent(self, agent_id: str, lease: Lease | None = None) -> bool:
        return self.kv.delete(AGENTS, agent_id, lease)

    # -- notes

    def note(self, key: str) -> str | None:
        found = self.kv.get(NOTES, key)
        return found.text if found is not None else None

    def set_note(self, key: str, text: str, lease: Lease | None = None) -> None:
        self.kv.put(NOTES, key, text, lease=lease)

    def delete_note(self, key: str, lease: Lease | None = None) -> None:
        self.kv.delete(NOTES, key, lease)


def _function(text: str) -> Function:
    return load(text, Function.from_fields)


def _agent(text: str) -> AgentRecord:
    return load(text, AgentRecord.from_fields)
