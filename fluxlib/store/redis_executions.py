"""The executions of the control plane in Redis: found by key or by index, never by a search."""

from __future__ import annotations

import time
from typing import Any

from fluxlib.errors import LeaseLost, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.store import redis_scripts as scripts
from fluxlib.store import rows
from fluxlib.store.base import SMALL_REQUEST, Commit, ExecutionEntry, ExecutionFilter, Lease, Page, QueuedExecutions
from fluxlib.store.redis_link import RedisLink

_FIELDS = (
    *("id", "seq", "function", "agent", "status", "phase", "async", "started", "owner", "key", "keep"),
    *("rank", "size", "attempt", "record"),
)
# Entries fetched, or forgotten, in one step: others wait for Redis meanwhile.
_AT_ONCE = 200


class RedisExecutions:
    """The part of ControlStore that is about executions."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def create_execution(self, entry: ExecutionEntry, *, durable: bool) -> tuple[str, Commit]:
        record = entry.record
        pending = self._link.write(
            scripts.CREATE,
            record.execution_id,
            record.function_name,
            record.agent_id,
            record.phase.value,
            int(record.asynchronous),
            repr(record.started_at),
            entry.owner,
            entry.idempotency_key,
            record.attempt,
            repr(entry.rank) if entry.rank else "",
            int(entry.request is not None),
            rows.request_to_bytes(entry.request) if entry.request is not None else b"",
            read=lambda answer: answer.decode(),
        )
        return (str(pending.value()) if entry.idempotency_key else record.execution_id), pending

    def claim_executions(self, owner: str, function_name: str, limit: int) -> list[ExecutionEntry]:
        found = self._link.write(scripts.CLAIM, owner, function_name, limit, SMALL_REQUEST).value()
        return [entry for values in found if (entry := _entry(values)) is not None]

    def assign_attempt(self, execution_id: str, attempt: int, agent_id: str, owner: str) -> Commit:
        return self._move(execution_id, attempt, owner, agent_id, Phase.STARTING, owner)

    def return_execution(self, execution_id: str, attempt: int, owner: str, *, claimed: bool = False) -> Commit:
        return self._move(execution_id, attempt, owner, "", Phase.QUEUED, owner if claimed else "")

    def assign_execution(self, execution_id: str, agent_id: str, owner: str) -> Commit:
        return self.assign_attempt(execution_id, 0, agent_id, owner)

    def requeue_execution(self, execution_id: str, owner: str) -> Commit:
        return self.return_execution(execution_id, 0, owner, claimed=True)

    def _move(self, execution_id: str, attempt: int, owner: str, agent_id: str, phase: Phase, new_owner: str) -> Commit:
        def read(answer: int) -> None:
            if not answer:
                raise rows.not_current(execution_id)

        pending: Commit = self._link.write(
            scripts.MOVE, execution_id, attempt, owner, agent_id, phase.value, new_owner, read=read
        )
        return pending

    def end_attempt(
        self, record: ExecutionRecord, attempt: int, keep_for: float, *, keep_request: bool = False
    ) -> Commit:
        pending: Commit = self._link.write(
            scripts.END,
            record.execution_id,
            attempt,
            record.status.value,
            record.agent_id,
            repr(keep_for),
            rows.record_to_text(record),
            int(keep_request),
            read=bool,
        )
        return pending

    def end_execution(self, record: ExecutionRecord, keep_until: float) -> Commit:
        return self.end_attempt(record, 0, keep_until - time.time())

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        pending: Commit = self._link.write(scripts.FORGET, execution_id, owner)
        return pending

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        return _entry(self._link.read(lambda client: client.hmget(self._key(f"execution:{execution_id}"), _FIELDS)))

    def request(self, execution_id: str) -> ExecutionRequest | None:
        def ask(client: Any) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            pipeline.hmget(self._key(f"execution:{execution_id}"), ("function", "async"))
            pipeline.get(self._key(f"request:{execution_id}"))
            return list(pipeline.execute())

        (function, asynchronous), data = self._link.read(ask)
        if function is None or data is None:
            return None
        return rows.request_from_bytes(data, execution_id, function.decode(), asynchronous == b"1")

    def execution_by_key(self, function_name: str, idempotency_key: str) -> ExecutionEntry | None:
        key = self._key(f"idempotent:{function_name}:{idempotency_key}")
        known = self._link.read(lambda client: client.get(key))
        return self.execution(known.decode()) if known else None

    def executions(self, where: ExecutionFilter, cursor: str, limit: int) -> Page:
        index = _index(where)
        if index is None:
            return Page()
        highest = f"({int(cursor)}" if cursor else "+inf"
        found = [_entry(values) for values in self._link.run(scripts.PAGE, index, highest, limit + 1)]
        entries = [entry for entry in found[:limit] if entry is not None]
        return Page(tuple(entries), str(entries[-1].sequence) if len(found) > limit else "")

    def open_executions(self, agent_id: str) -> list[ExecutionEntry]:
        return self._open(f"open:agent:{agent_id}", 0, 0)

    def executions_of(self, owner: str, after: int = 0, limit: int = 0) -> list[ExecutionEntry]:
        return self._open(f"open:owner:{owner}", after, limit)

    def _open(self, index: str, after: int, limit: int) -> list[ExecutionEntry]:
        entries: list[ExecutionEntry] = []
        while True:
            part = min(_AT_ONCE, limit - len(entries)) if limit else _AT_ONCE
            found = [_entry(values) for values in self._link.run(scripts.OPEN, index, after, part)]
            entries += [entry for entry in found if entry is not None]
            if len(found) < part or len(entries) == limit:
                return entries
            after = entries[-1].sequence

    def open_ids(self, owner: str) -> set[str]:
        ids = self._link.read(lambda client: client.zrange(self._key(f"open:owner:{owner}"), 0, -1))
        return {execution_id.decode() for execution_id in ids}

    def queued(self) -> dict[str, QueuedExecutions]:
        def ask(client: Any) -> list[Any]:
            # In one transaction: the three belong together.
            pipeline = client.pipeline()
            for name in ("queues", "queues:ready", "queues:bytes"):
                pipeline.hgetall(self._key(name))
            return list(pipeline.execute())

        waiting, ready, size = self._link.read(ask)
        return {
            name.decode(): QueuedExecutions(int(count), int(ready.get(name, 0)), int(size.get(name, 0)))
            for name, count in sorted(waiting.items())
        }

    def adopt_session(self, dead_owner: str, owner: str, lease: Lease | None = None) -> int:
        return self._adopt(dead_owner, owner, lease, everything=False)

    def adopt_executions(self, from_owner: str, to_owner: str, lease: Lease | None = None) -> int:
        return self._adopt(from_owner, to_owner, lease, everything=True)

    def _adopt(self, dead_owner: str, owner: str, lease: Lease | None, *, everything: bool) -> int:
        pending = self._link.write(
            scripts.ADOPT, dead_owner, owner, int(everything), *fence(lease), read=in_time(lease)
        )
        return int(pending.value())

    def expire_executions(self, max_records: int = 0, limit: int = 1000) -> int:
        count = 0
        while count < limit:
            part = min(_AT_ONCE, limit - count)
            gone = int(self._link.write(scripts.EXPIRE, max_records, part).value())
            count += gone
            if gone < part:
                break
        return count

    def count_open(self, function_name: str) -> int:
        key = self._key(f"executions:fs:{function_name}:running")
        return int(self._link.read(lambda client: client.zcard(key)))

    def _key(self, name: str) -> str:
        return self._link.prefix + name


def fence(lease: Lease | None) -> tuple[str, str]:
    """What a script is told of the lease a write is made under."""
    return (lease.name, str(lease.token)) if lease is not None else ("", "")


def in_time(lease: Lease | None) -> Any:
    """Reads the answer of a fenced script: LeaseLost when it came too late."""

    def read(answer: Any) -> Any:
        if answer == b"late":
            raise LeaseLost(f"another process holds {lease.name if lease is not None else 'the lease'} now")
        return answer

    return read


def _index(where: ExecutionFilter) -> str | None:
    """The set that holds exactly what fits; None when nothing can."""
    if where.queued:
        if where.status not in (None, ExecutionStatus.RUNNING):
            return None
        return f"queued:f:{where.function_name}" if where.function_name else "queued"
    if where.function_name and where.status is not None:
        return f"executions:fs:{where.function_name}:{where.status.value}"
    if where.function_name:
        return f"executions:f:{where.function_name}"
    return f"executions:s:{where.status.value}" if where.status is not None else "executions"


def _entry(values: list[bytes | None]) -> ExecutionEntry | None:
    if values[0] is None:
        return None
    texts = [value.decode() if value is not None else "" for value in values[:14]]
    execution_id, sequence, function, agent, status, phase, asynchronous, started, owner, key, keep = texts[:11]
    rank, size, attempt = texts[11:]
    record = values[14]
    request = values[15] if len(values) > 15 else None
    if status == ExecutionStatus.RUNNING.value:
        kept = rows.open_record(
            execution_id, function, agent, phase, asynchronous == "1", float(started), int(attempt or 1)
        )
    elif record is None:
        raise StoreUnavailable(f"the store's record of {execution_id} is damaged")
    else:
        kept = rows.record_from_text(record)
    return ExecutionEntry(
        record=kept,
        request=(
            rows.request_from_bytes(request, execution_id, function, asynchronous == "1")
            if request is not None
            else None
        ),
        owner=owner,
        sequence=int(sequence),
        idempotency_key=key,
        keep_until=float(keep) if keep else 0.0,
        rank=float(rank or sequence),
        request_bytes=int(size or 0),
    )
