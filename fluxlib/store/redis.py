"""The control plane's state in Redis, shared by several Flux processes."""

from __future__ import annotations

import secrets
from typing import Any, cast

from redis import Redis

from fluxlib.archive import digest_of
from fluxlib.errors import LeaseLost, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionRequest, ExecutionStatus, Phase
from fluxlib.store import redis_scripts as scripts
from fluxlib.store import rows
from fluxlib.store.base import (
    SMALL_REQUEST,
    Commit,
    ExecutionEntry,
    ExecutionFilter,
    Lease,
    Page,
    QueuedExecutions,
)
from fluxlib.store.kv import NO_BLOB, Blob, TypedTables, Value
from fluxlib.store.redis_import import import_original
from fluxlib.store.redis_link import RedisLink
from fluxlib.store.redis_migration import SCHEMA, bring_up_to_date

PREFIX = "fluxpy:"
# A value of Redis holds 512 MB at most, and a command that large would hold up everybody else's.
_PIECE = 8 * 1024 * 1024
_UPLOAD_LIFE = 3600  # seconds, of pieces whose function never came
_FIELDS = (
    *("id", "seq", "function", "agent", "status", "phase", "async", "started", "owner", "key", "keep"),
    *("rank", "size", "attempt", "record"),
)
# Entries fetched, or forgotten, in one step: others wait for Redis meanwhile.
_AT_ONCE = 200


class RedisKeyValues:
    """KeyValues: each table a hash, each blob a list of pieces."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    def get(self, table: str, key: str) -> Value | None:
        text, revision = self._link.run(scripts.VALUE, table, key)
        return Value(text.decode(), int(revision or 1)) if text is not None else None

    def all(self, table: str) -> dict[str, Value]:
        texts, revisions = map(_hash, self._link.run(scripts.HASHES, table, f"{table}:revisions"))
        return {key.decode(): Value(texts[key].decode(), int(revisions.get(key, 1))) for key in sorted(texts)}

    def put(self, table: str, key: str, text: str, blob: Blob = NO_BLOB, lease: Lease | None = None) -> None:
        self._put(table, key, text, "", blob, lease)

    def update(self, table: str, key: str, text: str, lease: Lease | None = None) -> bool:
        return self._put(table, key, text, "known", NO_BLOB, lease)

    def compare_and_set(
        self, table: str, key: str, text: str, revision: int, blob: Blob = NO_BLOB, lease: Lease | None = None
    ) -> bool:
        return self._put(table, key, text, str(revision), blob, lease)

    def _put(self, table: str, key: str, text: str, revision: str, blob: Blob, lease: Lease | None) -> bool:
        upload = self._upload(blob.data) if blob.data is not None else ""
        pending = self._link.write(
            scripts.PUT, table, key, text, revision, blob.digest, upload, *fence(lease), read=in_time(lease)
        )
        return bool(pending.value())

    def _upload(self, archive: bytes) -> str:
        key = self._key(f"upload:{secrets.token_hex(8)}")

        for number, start in enumerate(range(0, max(1, len(archive)), _PIECE)):
            piece = archive[start : start + _PIECE]
            count = self._link.run(scripts.UPLOAD, key, number, piece, _UPLOAD_LIFE)
            if count != number + 1:
                raise StoreUnavailable("Redis has lost a part of the code while it was being saved: try again")
        return key

    def delete(self, table: str, key: str, lease: Lease | None = None) -> bool:
        return bool(self._link.write(scripts.DELETE, table, key, *fence(lease), read=in_time(lease)).value())

    def revision(self, table: str) -> int:
        return int(self._link.read(lambda client: client.get(self._key(f"{table}:revision"))) or 0)

    def blob(self, digest: str) -> bytes | None:
        key = self._key(f"archive:{digest}")

        def pull(client: Redis) -> bytes | None:
            pieces: list[bytes] = []
            while True:
                found: Any = client.lrange(key, len(pieces), len(pieces))
                if not found:
                    return b"".join(pieces) if pieces else None
                pieces += found

        found: bytes | None = self._link.read(pull)
        if found is not None and digest_of(found) != digest:
            raise StoreUnavailable(f"the code {digest} in Redis is damaged: deploy it again")
        return found

    def _key(self, name: str) -> str:
        return self._link.prefix + name


class RedisControlStore(TypedTables):
    """ControlStore. ``address``: host:port, or a redis://, rediss:// or unix:// URL. Raises StoreUnavailable.

    Executions are found by key or by index, never by a search.
    """

    def __init__(self, address: str, *, prefix: str = PREFIX) -> None:
        self._link = RedisLink(address, prefix, scripts.ALL, "flux-store")
        super().__init__(RedisKeyValues(self._link))
        self._emptied: tuple[str, ...] = ()
        try:
            bring_up_to_date(self._link)
            import_original(self._link, self)
        except BaseException:
            self._link.close()
            raise

    # -- executions

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
        waiting, ready, size = map(_hash, self._link.run(scripts.HASHES, "queues", "queues:ready", "queues:bytes"))
        return {
            name.decode(): QueuedExecutions(int(count), int(ready.get(name, 0)), int(size.get(name, 0)))
            for name, count in sorted(waiting.items())
        }

    def adopt_session(self, dead_owner: str, owner: str, lease: Lease | None = None) -> int:
        pending = self._link.write(scripts.ADOPT, dead_owner, owner, *fence(lease), read=in_time(lease))
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

    # -- leases

    def acquire_lease(self, name: str, owner: str, seconds: float, now: float) -> Lease | None:
        del now  # Redis has a clock of its own
        token = self._link.write(scripts.ACQUIRE, name, owner, repr(seconds)).value()
        return Lease(name, owner, int(token), seconds) if token is not None else None

    def lease(self, name: str, now: float) -> Lease | None:
        del now
        return next(iter(self._leases([name])), None)

    def leases(self, prefix: str, now: float) -> list[Lease]:
        del now
        every: Any = self._link.read(lambda client: client.zrange(self._key("leases"), 0, -1))
        return self._leases(sorted(name for one in every if (name := one.decode()).startswith(prefix)))

    def _leases(self, names: list[str]) -> list[Lease]:
        found = zip(names, self._link.run(scripts.LEASES, *names), strict=True)
        return [Lease(name, of[0].decode(), int(of[1]), float(of[2])) for name, of in found if of is not None]

    def release_lease(self, lease: Lease) -> None:
        self._link.write(scripts.RELEASE, lease.name, str(lease.token)).wait()

    # -- the store itself

    def ping(self) -> None:
        self._link.write(scripts.PING).wait(5)

    def persistence(self) -> tuple[str, ...]:
        return (*self._lost(), *self._kept())

    def _lost(self) -> tuple[str, ...]:
        """Whether everything is gone since this process started: Redis was emptied, or came back without its data."""
        if self._link.read(lambda client: client.set(self._key("schema"), SCHEMA, nx=True)):
            self._emptied = (
                "Redis was emptied while Flux used it: its functions, agents and executions are not known any more",
            )
        return self._emptied

    def _kept(self) -> tuple[str, ...]:
        info = self._info()
        if info is None:
            return ("could not ask whether Redis keeps what it is given: it does not let Flux run INFO",)
        warnings = []
        if not info.get("aof_enabled"):
            warnings.append(
                "Redis keeps no append-only file: what was accepted since its last snapshot is lost when it crashes"
                " (appendonly yes)"
            )
        else:
            fsync = self._setting("appendfsync")
            if fsync is None:
                warnings.append(
                    "could not ask whether Redis keeps what it is given: it does not let Flux run CONFIG GET, which"
                    " tells when its append-only file is synced (appendfsync always)"
                )
            elif fsync != "always":
                lost = "the last second of" if fsync == "everysec" else "some of"
                warnings.append(
                    f"Redis syncs its append-only file late (appendfsync {fsync}): {lost} what was accepted is lost"
                    " when its machine crashes (appendfsync always)"
                )
            if info.get("aof_last_write_status", "ok") != "ok":
                warnings.append("Redis cannot write its append-only file: see its log")
        if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
            warnings.append(
                f"Redis may throw state away when its memory is full ({info.get('maxmemory_policy')}):"
                " set maxmemory-policy noeviction"
            )
        return tuple(warnings)

    def _info(self) -> dict[str, Any] | None:
        """What the server says of itself; None where asking is not allowed."""

        def ask(client: Redis) -> dict[str, Any]:
            sections: list[Any] = [client.info(section) for section in ("persistence", "memory")]
            return {name: value for section in sections for name, value in section.items()}

        return cast("dict[str, Any] | None", self._link.read_if_allowed(ask))

    def _setting(self, name: str) -> str | None:
        """A setting of the server's; None where asking is not allowed."""

        def ask(client: Redis) -> str:
            answer: Any = client.config_get(name)
            return str(answer.get(name, ""))

        return cast("str | None", self._link.read_if_allowed(ask))

    def close(self, timeout: float = 30.0) -> None:
        self._link.close(timeout)

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


def _hash(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


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
