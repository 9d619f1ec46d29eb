"""The first schema of the Redis store brought to the second, once.

The first kept records and requests by position, the request among the fields of its execution, and no index of what
is ready to be claimed. A Flux of the first schema that still runs would go on writing so: it has to stop first.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Deadline, pause
from fluxlib.store import redis_scripts as scripts
from fluxlib.store import rows
from fluxlib.store.redis_link import RedisLink

log = logging.getLogger(__name__)

SCHEMA = 2
_SESSIONS = "flux/"
# Seconds. A Flux that was killed holds its lease for up to 15.
_LEASES_END, _OTHERS_MIGRATE, _LOOK = 17.0, 600.0, 0.5
_LOCK_SECONDS = 60
_PAGE = 200


def bring_up_to_date(link: RedisLink, *, patience: float = _LEASES_END) -> None:
    """Raises StoreUnavailable for a newer schema, and when a Flux of an older one runs for longer than ``patience``."""
    key = link.prefix + "schema"
    lock, mine = link.prefix + "migrating", secrets.token_hex(8)
    if link.read(lambda client: client.set(key, SCHEMA, nx=True)):
        log.warning("Redis holds no state of Flux yet: a new, empty store was made in it")
    deadline = Deadline(_OTHERS_MIGRATE)
    while (found := int(link.read(lambda client: client.get(key)) or SCHEMA)) < SCHEMA:
        _wait_for_older_ones(link, Deadline(patience))
        if link.read(lambda client: client.set(lock, mine, nx=True, ex=_LOCK_SECONDS)):
            _migrate(link, lock)
            link.read(lambda client: client.set(key, SCHEMA))
            link.read(lambda client: client.delete(lock))
        elif deadline.remaining() <= 0:
            raise StoreUnavailable("another Flux has been upgrading what Redis holds for ten minutes: see its log")
        else:
            pause(_LOOK)
    if found > SCHEMA:
        raise StoreUnavailable(f"Redis holds the state of a newer Flux (schema {found}, this one knows {SCHEMA})")


def _wait_for_older_ones(link: RedisLink, deadline: Deadline) -> None:
    while living := _living(link):
        if deadline.remaining() <= 0:
            raise StoreUnavailable(
                f"{len(living)} Flux of an older version still use this Redis ({', '.join(living)}): stop them all,"
                " then start this one"
            )
        pause(_LOOK)


def _living(link: RedisLink) -> list[str]:
    names: Any = link.read(lambda client: client.zrange(link.prefix + "leases", 0, -1))
    sessions = [name for one in names if (name := one.decode()).startswith(_SESSIONS)]
    found = zip(sessions, link.run(scripts.LEASES, *sessions), strict=True) if sessions else ()
    return [name.removeprefix(_SESSIONS) for name, of in found if of is not None and float(of[2]) > 0]


def _migrate(link: RedisLink, lock: str) -> None:
    """Each step may be made again: one that is interrupted begins anew."""
    count = 0
    ids: list[Any] = link.read(lambda client: client.zrange(link.prefix + "executions", 0, -1))
    for start in range(0, len(ids), _PAGE):
        part = [execution_id.decode() for execution_id in ids[start : start + _PAGE]]
        link.read(lambda client: client.expire(lock, _LOCK_SECONDS))
        count += _name_fields(link, part)
    queued = [execution_id.decode() for execution_id in link.read(lambda c: c.zrange(link.prefix + "queued", 0, -1))]
    link.run(scripts.COUNT_QUEUED)
    for start in range(0, len(queued), _PAGE):
        link.run(scripts.COUNT_QUEUED, *queued[start : start + _PAGE])
    if link.read(lambda client: client.exists(link.prefix + "facts")):
        link.read(lambda client: client.rename(link.prefix + "facts", link.prefix + "notes"))
    if count:
        log.info("brought %d executions in Redis to schema %d", count, SCHEMA)


def _name_fields(link: RedisLink, ids: list[str]) -> int:
    def ask(client: Any) -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for execution_id in ids:
            pipeline.hmget(f"{link.prefix}execution:{execution_id}", ("seq", "record", "request"))
        return list(pipeline.execute())

    found = link.read(ask)

    def write(client: Any) -> None:
        pipeline = client.pipeline(transaction=True)
        for execution_id, (sequence, record, request) in zip(ids, found, strict=True):
            key = f"{link.prefix}execution:{execution_id}"
            if sequence is None:
                continue
            pipeline.hsetnx(key, "attempt", 1)
            pipeline.hsetnx(key, "rank", sequence)
            if record is not None:
                pipeline.hset(key, "record", rows.named_record(record))
            if request is not None:
                named = rows.named_request(request)
                pipeline.set(f"{link.prefix}request:{execution_id}", named)
                pipeline.hset(key, "size", len(named))
                pipeline.hdel(key, "request")
        pipeline.execute()

    link.read(write)
    return len(ids)
