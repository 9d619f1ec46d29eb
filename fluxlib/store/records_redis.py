"""An agent's own records in Redis, where several agents share one: each keeps to a prefix of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from redis import Redis

from fluxlib.errors import StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus
from fluxlib.store import rows
from fluxlib.store.redis_link import RedisLink, Script

# P, id, JSON
_BEGIN = Script.of(
    """
local P, id, record = unpack(ARGV)
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
_NOTHING = Script.of("return 1")
_AT_ONCE = 200


class RedisRecordStore:
    """RecordStore. ``address``: host:port, or a redis://, rediss:// or unix:// URL. Raises StoreUnavailable."""

    def __init__(self, address: str, agent_id: str) -> None:
        scripts = (_BEGIN, _END, _OVER, _FORGET, _NOTHING)
        self._link = RedisLink(address, f"fluxpy-agent:{agent_id}:", scripts, "record-store")

    def begin(self, record: ExecutionRecord) -> None:
        self._link.write(_BEGIN, record.execution_id, rows.record_to_text(record))

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        self._link.write(
            _END,
            record.execution_id,
            rows.record_to_text(record),
            repr(keep_until),
            int(output is not None),
            output or b"",
        )

    def flush(self, timeout: float | None = None) -> None:
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
        over = [execution_id.decode() for execution_id in self._link.run(_OVER, repr(now), limit)]
        for start in range(0, len(over), _AT_ONCE):
            self._link.write(_FORGET, *over[start : start + _AT_ONCE]).wait()
        return over

    def close(self) -> None:
        try:
            self.flush(10)
        except StoreUnavailable:
            return
        finally:
            self._link.close()

    def _key(self, name: str) -> str:
        return self._link.prefix + name
