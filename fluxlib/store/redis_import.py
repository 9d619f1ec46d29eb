"""What an original Flux left in the same Redis, taken over once; its keys are never written.

The original keeps ``function:NAME`` (JSON), ``code:NAME`` (the zip) and
``flux:agents:ID`` (JSON). Its field names are Go's: what is missing or cannot
be read is left at its default, what makes no function or agent is skipped with a word in the log.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from redis import Redis

from fluxlib import archive as archives
from fluxlib.errors import FluxError
from fluxlib.model import AGENT_ID, FUNCTION_NAME, AgentRecord, Behavior, Function, FunctionSpec, epoch, handler_path
from fluxlib.store.redis_link import RedisLink

log = logging.getLogger(__name__)


class Target(Protocol):
    """What is imported into."""

    def function(self, name: str) -> Function | None: ...

    def save_function(self, function: Function, archive: bytes | None = None) -> None: ...

    def agents(self) -> list[AgentRecord]: ...

    def save_agent(self, agent: AgentRecord) -> None: ...


def import_original(link: RedisLink, target: Target) -> None:
    """Take over what is there, unless that was done before. Raises StoreUnavailable."""
    marker = link.prefix + "imported"
    if link.read(lambda client: client.exists(marker)):
        return
    functions, agents = _import_functions(link, target), _import_agents(link, target)
    if functions or agents:
        log.warning(
            "took over %d functions and %d agents of an original Flux from this Redis; its keys stay as they are",
            functions,
            agents,
        )
    # Last: one that is interrupted is done again. Two at once do the same twice.
    link.read(lambda client: client.set(marker, int(time.time())))


def _import_functions(link: RedisLink, target: Target) -> int:
    count = 0
    for name, data in _found(link, "function:"):
        try:
            spec = _spec(name, data)
            if target.function(spec.name) is None:
                code = link.read(partial(_bytes, key=f"code:{name}"))
                target.save_function(_function(spec, code), code)
                count += 1
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("function:%s of the original's cannot be taken over: %s", name, error)
    return count


def _import_agents(link: RedisLink, target: Target) -> int:
    known = {agent.agent_id for agent in target.agents()}
    count = 0
    for agent_id, data in _found(link, "flux:agents:"):
        try:
            agent = _agent(agent_id, data)
            if agent.agent_id not in known:
                target.save_agent(agent)
                count += 1
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("flux:agents:%s of the original's cannot be taken over: %s", agent_id, error)
    return count


def _found(link: RedisLink, start: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, fields) of every key that begins so. A search, but made only once for a store."""
    keys: list[bytes] = link.read(lambda client: list(client.scan_iter(match=start + "*", count=500)))
    for key in sorted(keys):
        name = key.decode("utf-8", "replace").removeprefix(start)
        data = link.read(partial(_fields, key=key))
        if data is not None:
            yield name, data


def _fields(client: Redis, key: bytes) -> Mapping[str, Any] | None:
    """JSON or a hash, with names in lower case and without underscores, as Go may have written them either way."""
    kind: Any = client.type(key)
    if kind == b"hash":
        fields: Any = client.hgetall(key)
        data: Any = {field.decode(): value.decode("utf-8", "replace") for field, value in fields.items()}
    elif kind == b"string":
        try:
            data = json.loads(client.get(key) or b"null")
        except ValueError:
            data = None
    else:
        data = None
    if not isinstance(data, dict):
        log.warning("%s holds nothing that can be taken over", key.decode("utf-8", "replace"))
        return None
    return {str(field).lower().replace("_", ""): value for field, value in data.items()}


def _bytes(client: Redis, key: str) -> bytes | None:
    kind: Any = client.type(key)
    found: Any = client.get(key) if kind == b"string" else None
    return bytes(found) if found is not None else None


def _spec(name: str, data: Mapping[str, Any]) -> FunctionSpec:
    resources = _lowered(data.get("resources"))
    name = str(data.get("name") or name)
    handler = handler_path(str(data.get("handler") or ""))
    if not FUNCTION_NAME.fullmatch(name) or not handler:
        raise ValueError("it has no usable name or handler")
    return FunctionSpec(
        name=name,
        handler=handler,
        cpu_millicores=_amount(_first(resources, data, "cpu", "cpumillicores")),
        memory_mb=_amount(_first(resources, data, "memory", "memorymb")),
        timeout_seconds=_amount(_first(data, data, "timeout", "timeoutseconds", "timeoutsec")),
        max_concurrency=_amount(data.get("maxconcurrency")) or 5,
        max_concurrency_behavior=_behavior(data.get("maxconcurrencybehavior")),
        resource_pressure_behavior=_behavior(data.get("resourcepressurebehavior")),
        env={str(key): str(value) for key, value in (data.get("env") or {}).items()},
    )


def _function(spec: FunctionSpec, code: bytes | None) -> Function:
    function = Function(spec, spec.digest(), updated_at=time.time())
    if not code:
        return function
    try:
        platforms = archives.inspect(code, spec.handler).platforms
    except FluxError as error:
        # It ran there, so it is kept; the agents say what they think of it.
        log.warning("the code of %s is odd: %s", spec.name, error.message)
        platforms = ()
    return Function(
        spec,
        spec.digest(),
        archives.digest_of(code),
        len(code),
        platforms,
        time.time(),
    )


def _agent(agent_id: str, data: Mapping[str, Any]) -> AgentRecord:
    agent_id = str(data.get("id") or data.get("agentid") or agent_id)
    address = str(data.get("address") or "")
    if not AGENT_ID.fullmatch(agent_id) or ":" not in address:
        raise ValueError("it has no usable ID or address")
    return AgentRecord(
        agent_id,
        address,
        registered_at=_time(data.get("registeredat")) or time.time(),
        last_heartbeat=_time(data.get("lastheartbeat")),
        provider=str(data.get("provider") or ""),
        provider_id=str(data.get("providerid") or data.get("instanceid") or ""),
        instance_type=str(data.get("instancetype") or ""),
        max_tasks=_amount(data.get("maxconcurrent") or data.get("maxtasks")),
        # The original's certificates carry no IDs; one that shows an ID is held to it from then on.
        legacy_certificate=True,
    )


def _first(nested: Mapping[str, Any], flat: Mapping[str, Any], *names: str) -> Any:
    return next((source[name] for source in (nested, flat) for name in names if source.get(name) is not None), 0)


def _lowered(value: Any) -> Mapping[str, Any]:
    fields = value if isinstance(value, dict) else {}
    return {str(field).lower().replace("_", ""): one for field, one in fields.items()}


def _amount(value: Any) -> int:
    """The leading number of ``500``, ``"500m"``, ``"128Mi"`` or ``"30s"``."""
    match = re.match(r"\s*(\d+)", str(value or 0))
    return int(match.group(1)) if match else 0


def _behavior(value: Any) -> Behavior:
    return Behavior.WAIT if str(value).lower() == "wait" else Behavior.EXIT


def _time(value: Any) -> float:
    if isinstance(value, int | float):
        return float(value)
    try:
        return epoch(str(value or ""))
    except ValueError:
        return 0.0
