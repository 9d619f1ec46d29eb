"""State on disk or in Redis. ``base`` says what is promised; these two open what is configured."""

from __future__ import annotations

from pathlib import Path

from fluxlib.store.base import ControlStore, RecordStore


def open_control_store(redis_addr: str, state_dir: Path) -> ControlStore:
    """Redis when ``redis_addr`` is set, else SQLite in ``state_dir``, for this process alone.

    Raises StoreUnavailable, Conflict when another process has that directory.
    """
    if redis_addr:
        from fluxlib.store.redis import RedisControlStore

        return RedisControlStore(redis_addr)
    from fluxlib.store.sqlite import SqliteControlStore

    return SqliteControlStore(state_dir / "flux.db")


def open_record_store(kind: str, redis_addr: str, state_dir: Path, agent_id: str) -> RecordStore:
    """The agent's records: ``kind`` is ``sqlite`` or ``redis``. Raises StoreUnavailable."""
    if kind == "redis":
        from fluxlib.store.records_redis import RedisRecordStore

        return RedisRecordStore(redis_addr, agent_id)
    from fluxlib.store.records_sqlite import SqliteRecordStore

    return SqliteRecordStore(state_dir / "agent.db")
