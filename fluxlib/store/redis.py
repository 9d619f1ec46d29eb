"""The control plane's state in Redis, shared by several Flux processes."""

from __future__ import annotations

import json
import logging
import secrets
from typing import Any, cast

from redis import Redis

from fluxlib.archive import digest_of
from fluxlib.errors import StoreUnavailable
from fluxlib.model import AgentRecord, Function
from fluxlib.store import redis_scripts as scripts
from fluxlib.store import rows
from fluxlib.store.base import Lease
from fluxlib.store.redis_executions import RedisExecutions, fence, in_time
from fluxlib.store.redis_import import import_original
from fluxlib.store.redis_link import RedisLink
from fluxlib.store.redis_migration import bring_up_to_date

log = logging.getLogger(__name__)

PREFIX = "fluxpy:"
# A value of Redis holds 512 MB at most, and a command that large would hold up everybody else's.
_PIECE = 8 * 1024 * 1024
_UPLOAD_LIFE = 3600  # seconds, of pieces whose function never came


class RedisControlStore(RedisExecutions):
    """ControlStore. ``address``: host:port, or a redis://, rediss:// or unix:// URL. Raises StoreUnavailable."""

    def __init__(self, address: str, *, prefix: str = PREFIX) -> None:
        link = RedisLink(address, prefix, scripts.ALL, "flux-store")
        super().__init__(link)
        try:
            bring_up_to_date(link)
            import_original(link, self)
        except BaseException:
            link.close()
            raise

    # -- functions and code

    def functions(self) -> list[Function]:
        found = self._link.read(lambda client: client.hgetall(self._key("functions")))
        return [_function(found[name]) for name in sorted(found)]

    def function(self, name: str) -> Function | None:
        found = self._link.read(lambda client: client.hget(self._key("functions"), name))
        return _function(found) if found is not None else None

    def functions_revision(self) -> int:
        return int(self._link.read(lambda client: client.get(self._key("functions:revision"))) or 0)

    def save_function(self, function: Function, archive: bytes | None = None) -> None:
        upload = self._upload(archive) if archive is not None else ""
        self._link.write(
            scripts.SAVE_FUNCTION,
            function.spec.name,
            rows.dump(function.to_fields()),
            function.code_digest,
            upload,
        ).wait()

    def _upload(self, archive: bytes) -> str:
        key = self._key(f"upload:{secrets.token_hex(8)}")

        for number, start in enumerate(range(0, max(1, len(archive)), _PIECE)):
            piece = archive[start : start + _PIECE]
            count = self._link.run(scripts.UPLOAD, key, number, piece, _UPLOAD_LIFE)
            if count != number + 1:
                raise StoreUnavailable("Redis has lost a part of the code while it was being saved: try again")
        return key

    def delete_function(self, name: str) -> bool:
        return bool(self._link.write(scripts.DELETE_FUNCTION, name).value())

    def archive(self, code_digest: str) -> bytes | None:
        key = self._key(f"archive:{code_digest}")

        def pull(client: Redis) -> bytes | None:
            pieces: list[bytes] = []
            while True:
                found: Any = client.lrange(key, len(pieces), len(pieces))
                if not found:
                    return b"".join(pieces) if pieces else None
                pieces += found

        found: bytes | None = self._link.read(pull)
        if found is not None and digest_of(found) != code_digest:
            raise StoreUnavailable(f"the code {code_digest} in Redis is damaged: deploy it again")
        return found

    # -- agents

    def agents(self) -> list[AgentRecord]:
        found = self._link.read(lambda client: client.hgetall(self._key("agents")))
        return [_agent(found[agent_id]) for agent_id in sorted(found)]

    def agent(self, agent_id: str) -> AgentRecord | None:
        found = self._link.read(lambda client: client.hget(self._key("agents"), agent_id))
        return _agent(found) if found is not None else None

    def save_agent(self, agent: AgentRecord, lease: Lease | None = None) -> None:
        self._set("agents", agent.agent_id, rows.dump(agent.to_fields()), lease)

    def update_agent(self, agent: AgentRecord, lease: Lease | None = None) -> bool:
        text = rows.dump(agent.to_fields())
        pending = self._link.write(
            scripts.UPDATE_FIELD, "agents", agent.agent_id, text, *fence(lease), read=in_time(lease)
        )
        return bool(pending.value())

    def delete_agent(self, agent_id: str, lease: Lease | None = None) -> bool:
        pending = self._link.write(scripts.DELETE_FIELD, "agents", agent_id, *fence(lease), read=in_time(lease))
        return bool(pending.value())

    # -- leases and facts

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

    def get_fact(self, key: str) -> str | None:
        found = self._link.read(lambda client: client.hget(self._key("facts"), key))
        return found.decode() if found is not None else None

    def set_fact(self, key: str, value: str, lease: Lease | None = None) -> None:
        self._set("facts", key, value, lease)

    def delete_fact(self, key: str, lease: Lease | None = None) -> None:
        self._link.write(scripts.DELETE_FIELD, "facts", key, *fence(lease), read=in_time(lease)).wait()

    def _set(self, table: str, field: str, value: str, lease: Lease | None) -> None:
        self._link.write(scripts.SET_FIELD, table, field, value, *fence(lease), read=in_time(lease)).wait()

    # -- the store itself

    def ping(self) -> None:
        self._link.write(scripts.PING).wait(5)

    def persistence(self) -> tuple[str, ...]:
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


def _function(text: str | bytes) -> Function:
    return Function.from_fields(json.loads(text))


def _agent(text: str | bytes) -> AgentRecord:
    return AgentRecord.from_fields(json.loads(text))
