"""The executions of the control plane in Redis: found by key or by index, never by a search."""

from __future__ import annotations

from typing import Any

from fluxlib.errors import Conflict, LeaseLost, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus, Phase
from fluxlib.store import redis_scripts as scripts
from fluxlib.store import rows
from fluxlib.store.base import Commit, ExecutionEntry, ExecutionFilter, Lease, Page
from fluxlib.store.redis_link import RedisLink

_FIELDS = ("id", "seq", "function", "agent", "status", "phase", "async", "started", "owner", "key", "keep", "record")
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
            int(entry.request is not None),
            rows.request_to_bytes(entry.request) if entry.request is not None else b"",
            read=lambda answer: answer.decode(),
        )
        return (str(pending.value()) if entry.idempotency_key else record.execution_id), pending

    def assign_execution(self, execution_id: str, agent_id: str, owner: str) -> Commit:
        return self._move(execution_id, agent_id, Phase.STARTING, owner)

    def requeue_execution(self, execution_id: str, owner: str) -> Commit:
        return self._move(execution_id, "", Phase.QUEUED, owner)

    def _move(self, execution_id: str, agent_id: str, phase: Phase, owner: str) -> Commit:
        def read(answer: int) -> None:
            if not answer:
                raise Conflict(f"execution {execution_id} has ended, or was taken over")

        pending: Commit = self._link.write(scripts.MOVE, execution_id, agent_id, phase.value, owner, read=read)
        return pending

    def end_execution(self, record: ExecutionRecord, keep_until: float) -> Commit:
        pending: Commit = self._link.write(
            scripts.END,
            record.execution_id,
            record.status.value,
            record.agent_id,
            repr(keep_until),
            rows.record_to_text(record),
        )
        return pending

    def forget_execution(self, execution_id: str, owner: str) -> Commit:
        pending: Commit = self._link.write(scripts.FORGET, execution_id, owner)
        return pending

    def execution(self, execution_id: str) -> ExecutionEntry | None:
        fields = (*_FIELDS, "request")
        values = self._link.read(lambda client: client.hmget(self._key(f"execution:{execution_id}"), fields))
        return _entry(values)

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
        return self._open(f"open:agent:{agent_id}")

    def executions_of(self, owner: str) -> list[ExecutionEntry]:
        return self._open(f"open:owner:{owner}")

    def _open(self, index: str) -> list[ExecutionEntry]:
        ids = self._link.read(lambda client: client.zrange(self._key(index), 0, -1))
        entries: list[ExecutionEntry] = []
        for start in range(0, len(ids), _AT_ONCE):
            part = [f"execution:{execution_id.decode()}" for execution_id in ids[start : start + _AT_ONCE]]

            def fetch(client: Any, part: list[str] = part) -> list[Any]:
                pipeline = client.pipeline(transaction=False)
                for key in part:
                    pipeline.hmget(self._key(key), (*_FIELDS, "request"))
                return list(pipeline.execute())

            found = [_entry(values) for values in self._link.read(fetch)]
            # Some may have ended since the index was read.
            entries += [entry for entry in found if entry is not None and not entry.record.status.ended]
        return entries

    def adopt_executions(self, from_owner: str, to_owner: str, lease: Lease | None = None) -> int:
        return int(self._link.write(scripts.ADOPT, from_owner, to_owner, *fence(lease), read=in_time(lease)).value())

    def expire_executions(self, now: float, limit: int = 1000) -> int:
        count = 0
        while count < limit:
            part = min(_AT_ONCE, limit - count)
            gone = int(self._link.write(scripts.EXPIRE, repr(now), part).value())
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
    texts = [value.decode() if value is not None else "" for value in values[:11]]
    execution_id, sequence, function, agent, status, phase, asynchronous, started, owner, key, keep = texts
    record = values[11]
    request = values[12] if len(values) > 12 else None
    if status == ExecutionStatus.RUNNING.value:
        kept = rows.open_record(execution_id, function, agent, phase, asynchronous == "1", float(started))
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
    )
