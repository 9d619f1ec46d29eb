"""The control plane's store in memory: the semantics in their plainest form, for tests and for trying things out."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from fluxlib.errors import LeaseLost, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.store.base import (
    COMMIT_TIMEOUT,
    LEASE_MEMORY,
    SMALL_REQUEST,
    Commit,
    Committed,
    ExecutionEntry,
    ExecutionFilter,
    Lease,
    Page,
    QueuedExecutions,
)
from fluxlib.store.kv import NO_BLOB, Blob, TypedTables, Value
from fluxlib.store.rows import not_current, request_to_bytes

_DONE = Committed()


class Refused:
    """A conditional write whose condition did not hold."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self, timeout: float = COMMIT_TIMEOUT) -> None:
        raise self._error

    def value(self, timeout: float = COMMIT_TIMEOUT) -> Any:
        raise self._error

    def then(self, call: Callable[[Exception | None], None]) -> None:
        call(self._error)


class MemoryKeyValues:
    """KeyValues under the lock and the leases of its store."""

    def __init__(self, store: MemoryControlStore) -> None:
        self._store = store
        self._tables: dict[str, dict[str, tuple[Value, str]]] = {}
        self._blobs: dict[str, bytes] = {}
        self._revisions: dict[str, int] = {}

    def get(self, table: str, key: str) -> Value | None:
        return self.all(table).get(key)

    def all(self, table: str) -> dict[str, Value]:
        with self._store._lock:
            self._store.ping()
            entries = self._tables.get(table, {})
            return {key: entries[key][0] for key in sorted(entries)}

    def put(self, table: str, key: str, text: str, blob: Blob = NO_BLOB, lease: Lease | None = None) -> None:
        with self._store._lock:
            self._store._check(lease)
            revision = self._revisions[table] = self._revisions.get(table, 0) + 1
            self._tables.setdefault(table, {})[key] = Value(text, revision), blob.digest
            if blob.data is not None:
                self._blobs[blob.digest] = blob.data
            self._drop_orphans()

    def update(self, table: str, key: str, text: str, lease: Lease | None = None) -> bool:
        with self._store._lock:
            self._store._check(lease)
            known = self._tables.get(table, {}).get(key)
            if known is not None:
                self.put(table, key, text, Blob(known[1]), lease)
            return known is not None

    def compare_and_set(
        self, table: str, key: str, text: str, revision: int, blob: Blob = NO_BLOB, lease: Lease | None = None
    ) -> bool:
        with self._store._lock:
            self._store._check(lease)
            known = self.get(table, key)
            if revision != (known.revision if known is not None else 0):
                return False
            self.put(table, key, text, blob, lease)
            return True

    def delete(self, table: str, key: str, lease: Lease | None = None) -> bool:
        with self._store._lock:
            self._store._check(lease)
            found = self._tables.get(table, {}).pop(key, None)
            self._revisions[table] = self._revisions.get(table, 0) + (found is not None)
            self._drop_orphans()
            return found is not None

    def revision(self, table: str) -> int:
        self._store.ping()
        return self._revisions.get(table, 0)

    def blob(self, digest: str) -> bytes | None:
        self._store.ping()
        return self._blobs.get(digest)

    def _drop_orphans(self) -> None:
        used = {digest for entries in self._tables.values() for _, digest in entries.values()}
        self._blobs = {digest: data for digest, data in self._blobs.items() if digest in used}


class MemoryControlStore(TypedTables):
    """ControlStore with nothing behind it. One lock; every operation is a few dictionary steps."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        super().__init__(MemoryKeyValues(self))
        self._entries: dict[str, ExecutionEntry] = {}  # by order of acceptance
        self._sequence = 0
        self._keys: dict[tuple[str, str], str] = {}
        self._open: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._leases: dict[str, tuple[Lease, float]] = {}  # and when it runs out
        self._tokens = 0
        self._closed = False

    # -- executions

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        with self._lock:
            self.ping()
            key = (entry.record.function_name, entry.idempotency_key)
            if entry.idempotency_key:
                known = self._keys.get(key)
                if known is not None:
                    return known, _DONE
            if entry.execution_id in self._entries:
                return entry.execution_id, _DONE
            if entry.idempotency_key:
                self._keys[key] = entry.execution_id
            self._sequence += 1
            entry = replace(
                entry,
                sequence=self._sequence,
                rank=entry.rank or float(self._sequence),
                request_bytes=len(request_to_bytes(entry.request)) if entry.request is not None else 0,
                record=replace(entry.record, output=None),
            )
            self._entries[entry.execution_id] = entry
            self._open[entry.record.agent_id][entry.execution_id] = None
            return entry.execution_id, _DONE

    def claim_executions(self, owner: str, function_name: str, limit: int) -> list[ExecutionEntry]:
        with self._lock:
            self.ping()
            ready = [one for one in self._queue() if not one.owner and one.record.function_name == function_name]
            claimed = sorted(ready, key=lambda one: (one.rank, one.sequence))[:limit]
            for entry in claimed:
                self._entries[entry.execution_id] = replace(entry, owner=owner)
            return [
                replace(one, owner=owner, request=one.request if one.request_bytes <= SMALL_REQUEST else None)
                for one in claimed
            ]

    def assign_attempt(self, execution_id: str, attempt: int, agent_id: str, owner: str) -> Commit:
        return self._move(execution_id, attempt, owner, agent_id, Phase.STARTING, owner)

    def return_execution(self, execution_id: str, attempt: int, owner: str, *, claimed: bool = False) -> Commit:
        return self._move(execution_id, attempt, owner, "", Phase.QUEUED, owner if claimed else "")

    def _move(self, execution_id: str, attempt: int, owner: str, agent_id: str, phase: Phase, new_owner: str) -> Commit:
        with self._lock:
            self.ping()
            entry = self._entries.get(execution_id)
            if entry is None or entry.record.status.ended or entry.owner != owner or not _at(entry, attempt):
                return Refused(not_current(execution_id))
            del self._open[entry.record.agent_id][execution_id]
            self._open[agent_id][execution_id] = None
            record = replace(entry.record, agent_id=agent_id, phase=phase)
            self._entries[execution_id] = replace(entry, record=record, owner=new_owner)
            return _DONE

    def end_attempt(
        self, record: ExecutionRecord, attempt: int, keep_for: float, *, keep_request: bool = False
    ) -> Commit:
        with self._lock:
            self.ping()
            entry = self._entries.get(record.execution_id)
            if entry is None or entry.record.status.ended or not _at(entry, attempt):
                return Committed(False)
            self._open[entry.record.agent_id].pop(record.execution_id, None)
            self._entries[record.execution_id] = replace(
                entry,
                record=replace(record, output=None, phase=Phase.ENDED),
                request=entry.request if keep_request else None,
                request_bytes=entry.request_bytes if keep_request else 0,
                keep_until=time.time() + keep_for,
            )
            return Committed(True)

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        with self._lock:
            self.ping()
            entry = self._entries.get(execution_id)
            if entry is not None and entry.owner == owner:
                self._forget(execution_id)
            return _DONE

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        self.ping()
        entry = self._entries.get(execution_id)
        return replace(entry, request=None) if entry is not None else None

    def request(self, execution_id: str) -> ExecutionRequest | None:
        self.ping()
        entry = self._entries.get(execution_id)
        return entry.request if entry is not None else None

    def execution_by_key(self, function_name: str, idempotency_key: str) -> ExecutionEntry | None:
        with self._lock:
            self.ping()
            return self.execution(self._keys.get((function_name, idempotency_key), ""))

    def executions(self, where: ExecutionFilter, cursor: str, limit: int) -> Page:
        with self._lock:
            self.ping()
            before = int(cursor) if cursor else self._sequence + 1
            found: list[ExecutionEntry] = []
            for entry in reversed(self._entries.values()):
                if entry.sequence < before and _matches(entry, where):
                    found.append(replace(entry, request=None))
                    if len(found) > limit:
                        break
            more = len(found) > limit
            return Page(tuple(found[:limit]), str(found[limit - 1].sequence) if more else "")

    def open_executions(self, agent_id: str) -> list[ExecutionEntry]:
        with self._lock:
            self.ping()
            return self._listed(self._open[agent_id])

    def executions_of(self, owner: str, after: int = 0, limit: int = 0) -> list[ExecutionEntry]:
        with self._lock:
            self.ping()
            found = self._listed([one for ids in self._open.values() for one in ids])
            return [one for one in found if one.owner == owner and one.sequence > after][: limit or None]

    def _listed(self, ids: Iterable[str]) -> list[ExecutionEntry]:
        return sorted((replace(self._entries[one], request=None) for one in ids), key=lambda entry: entry.sequence)

    def open_ids(self, owner: str) -> set[str]:
        return {entry.execution_id for entry in self.executions_of(owner)}

    def _queue(self) -> list[ExecutionEntry]:
        return [entry for one in self._open[""] if (entry := self._entries[one]).record.phase is Phase.QUEUED]

    def queued(self) -> dict[str, QueuedExecutions]:
        with self._lock:
            self.ping()
            found: dict[str, QueuedExecutions] = {}
            for entry in self._queue():
                name = entry.record.function_name
                of = found.get(name, QueuedExecutions())
                found[name] = QueuedExecutions(
                    of.waiting + 1, of.ready + (not entry.owner), of.request_bytes + entry.request_bytes
                )
            return found

    def adopt_session(self, dead_owner: str, owner: str, lease: Lease | None = None) -> int:
        with self._lock:
            self._check(lease)
            ids = self.open_ids(dead_owner)
            for one in ids:
                entry = self._entries[one]
                waits = entry.record.phase is Phase.QUEUED and entry.record.asynchronous
                self._entries[one] = replace(entry, owner="" if waits else owner)
            return len(ids)

    def expire_executions(self, max_records: int = 0, limit: int = 1000) -> int:
        with self._lock:
            self.ping()
            ended = [one for one in self._entries.values() if one.record.status.ended]
            gone = [one for one in ended if one.keep_until <= time.time()][:limit]
            if max_records:
                kept = sorted(
                    (one for one in ended if one not in gone),
                    key=lambda one: (one.record.status is not ExecutionStatus.SUCCESS, one.sequence),
                )
                gone += kept[: max(0, min(limit - len(gone), len(kept) - max_records))]
            for entry in gone:
                self._forget(entry.execution_id)
            return len(gone)

    def _forget(self, execution_id: str) -> None:
        entry = self._entries.pop(execution_id, None)
        if entry is not None:
            self._open[entry.record.agent_id].pop(execution_id, None)
            self._keys.pop((entry.record.function_name, entry.idempotency_key), None)

    def count_open(self, function_name: str) -> int:
        with self._lock:
            self.ping()
            ids = [one for ids in self._open.values() for one in ids]
            return sum(1 for one in ids if self._entries[one].record.function_name == function_name)

    # -- leases and facts

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        with self._lock:
            self.ping()
            held = self.lease(name, now)
            if held is not None and held.seconds_left > 0:
                if held.owner != owner:
                    return None
                token = held.token
            else:
                self._tokens += 1
                token = self._tokens
                self._drop_old_leases(now)
            lease = Lease(name, owner, token, seconds)
            self._leases[name] = lease, now + seconds
            return lease

    def _drop_old_leases(self, now: float) -> None:
        for name, (lease, expires) in list(self._leases.items()):
            if expires < now - LEASE_MEMORY and not self.executions_of(lease.owner):
                del self._leases[name]

    def lease(self, name: str, now: float) -> Lease | None:
        return next((lease for lease in self.leases(name, now) if lease.name == name), None)

    def leases(self, prefix: str, now: float) -> list[Lease]:
        with self._lock:
            self.ping()
            found = [self._leases[name] for name in sorted(self._leases) if name.startswith(prefix)]
            return [replace(lease, seconds_left=expires - now) for lease, expires in found]

    def release_lease(self, lease: Lease) -> None:
        with self._lock:
            self.ping()
            held, _ = self._leases.get(lease.name, (None, 0.0))
            if held is not None and held.token == lease.token:
                self._leases[lease.name] = held, 0.0

    # -- the store itself

    def ping(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")

    def persistence(self) -> tuple[str, ...]:
        return ("the store is in memory: everything is lost when Flux stops",)

    def close(self, timeout: float = 30.0) -> None:
        del timeout  # nothing is on its way
        self._closed = True

    def _check(self, lease: Lease | None) -> None:
        self.ping()
        if lease is not None:
            held, _ = self._leases.get(lease.name, (None, 0.0))
            if held is None or held.token != lease.token:
                raise LeaseLost(f"another process holds {lease.name} now")


def _at(entry: ExecutionEntry, attempt: int) -> bool:
    return attempt in (0, entry.record.attempt)


def _matches(entry: ExecutionEntry, where: ExecutionFilter) -> bool:
    record = entry.record
    return (
        (not where.function_name or record.function_name == where.function_name)
        and (where.status is None or record.status is where.status)
        and (not where.queued or (not record.status.ended and record.phase is Phase.QUEUED))
    )
