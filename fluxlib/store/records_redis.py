"""An agent's own records in Redis, where several agents share one: each keeps to a prefix of its own."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import Any

from redis import Redis

from fluxlib.errors import StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus
from fluxlib.store import rows
from fluxlib.store.base import COMMIT_TIMEOUT
from fluxlib.store.pending import Pending
from fluxlib.store.redis_link import Argument, Call, RedisLink, Script

# P, id, JSON. One that comes late, after a repeated end, must not open the record again.
_BEGIN = Script.of(
    """
local P, id, record = unpack(ARGV)
if redis.call('EXISTS', P..'record:'..id) == 1 then return end
redis.call('HSET', P..'record:'..id, 'record', record)
redis.call('SADD', P..'running', id)
"""
)
# P, id, JSON, keep until, has output, output
_END = Script.of(
    """
local P, id, record, keep, has_output, output = unpack(ARGV)
redis.call('HSET', P..'record:'..id, 'record', record)
if has_output == '1' then redis.call('HSET', P..'record:'..id, 'output', output) end
redis.call('SREM', P..'running', id)
redis.call('ZADD', P..'expiring', keep, id)
"""
)
# P, now, how many at most → their IDs. Forgotten only by _FORGET, so that a run repeated loses none.
_OVER = Script.of("return redis.call('ZRANGEBYSCORE', ARGV[1]..'expiring', '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])")
# P, ids…
_FORGET = Script.of(
    """
local P = ARGV[1]
for i = 2, #ARGV do
  redis.call('DEL', P..'record:'..ARGV[i])
  redis.call('ZREM', P..'expiring', ARGV[i])
end
"""
)
_SCHEMA = 2
_NOTHING = Script.of("return 1")
_AT_ONCE = 200
# Writes remembered while Redis is away, to be made when it is back. Beyond that the oldest are lost.
_REMEMBERED = 20_000


class RedisRecordStore:
    """RecordStore. ``address``: host:port, or a redis://, rediss:// or unix:// URL. Raises StoreUnavailable.

    What cannot be written because Redis is away is written later, by ``expire`` (which is called every now and then).
    """

    def __init__(self, address: str, agent_id: str) -> None:
        scripts = (_BEGIN, _END, _OVER, _FORGET, _NOTHING)
        self._link = RedisLink(address, f"fluxpy-agent:{agent_id}:", scripts, "record-store")
        self._lock = threading.Lock()
        self._written: deque[Pending[Call]] = deque(maxlen=_REMEMBERED)
        try:
            self._name_fields()
        except BaseException:
            self._link.close()
            raise

    def _name_fields(self) -> None:
        """Once: records of the first version, which were lists, by name."""
        marker = self._key("schema")
        if self._link.read(lambda client: client.exists(marker)):
            return

        def convert(client: Redis) -> None:
            ids: Any = client.zrange(self._key("expiring"), 0, -1)
            running: Any = client.smembers(self._key("running"))
            for execution_id in (*ids, *running):
                key = self._key(f"record:{execution_id.decode()}")
                text: Any = client.hget(key, "record")
                if text is not None:
                    client.hset(key, "record", rows.named_record(text))
            client.set(marker, _SCHEMA)

        self._link.read(convert)

    def begin(self, record: ExecutionRecord) -> None:
        self._write(_BEGIN, record.execution_id, rows.record_to_text(record))

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        self._write(
            _END,
            record.execution_id,
            rows.record_to_text(record),
            repr(keep_until),
            int(output is not None),
            output or b"",
        )

    def check(self, timeout: float) -> None:
        self.flush(timeout)

    def flush(self, timeout: float = COMMIT_TIMEOUT) -> None:
        self._link.write(_NOTHING).wait(timeout)

    def record(self, execution_id: str) -> ExecutionRecord | None:
        key = self._key(f"record:{execution_id}")
        values: Any = self._link.read(lambda client: client.hmget(key, ("record", "output")))
        text, output = values
        return replace(rows.record_from_text(text), output=output) if text is not None else None

    def unfinished(self) -> list[ExecutionRecord]:
        def ask(client: Redis) -> list[Any]:
            ids: Any = client.smembers(self._key("running"))
            pipeline = client.pipeline(transaction=False)
            for execution_id in sorted(ids):
                pipeline.hget(self._key(f"record:{execution_id.decode()}"), "record")
            return list(pipeline.execute())

        found = [rows.record_from_text(text) for text in self._link.read(ask) if text is not None]
        return [record for record in found if record.status is ExecutionStatus.RUNNING]

    def expire(self, now: float, limit: int = 1000) -> list[str]:
        self._write_again()
        over = [execution_id.decode() for execution_id in self._link.run(_OVER, repr(now), limit)]
        for start in range(0, len(over), _AT_ONCE):
            self._link.write(_FORGET, *over[start : start + _AT_ONCE]).wait()
        return over

    def close(self, timeout: float = 30.0) -> None:
        try:
            self.flush(min(10.0, timeout))
        except StoreUnavailable:
            return
        finally:
            self._link.close(timeout)

    def _write(self, script: Script, *arguments: Argument) -> None:
        with self._lock:
            self._written.append(self._link.write(script, *arguments))
            while self._written and self._written[0].settled and self._written[0].error is None:
                self._written.popleft()

    def _write_again(self) -> None:
        """In their order: an end rests on its begin."""
        with self._lock:
            failed = [one for one in self._written if one.settled and one.error is not None]
            under_way = [one for one in self._written if not one.settled]
            again = [self._link.write(one.work.script, *one.work.arguments[1:]) for one in failed]
            self._written = deque([*under_way, *again], maxlen=_REMEMBERED)

    def _key(self, name: str) -> str:
        return self._link.prefix + name
