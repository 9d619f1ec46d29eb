"""Every backend under one suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.store.base import ControlStore, RecordStore
from fluxlib.store.records_redis import RedisRecordStore
from fluxlib.store.records_sqlite import SqliteRecordStore
from fluxlib.store.redis import RedisControlStore
from fluxlib.store.sqlite import SqliteControlStore
from tests.support.memory_records import MemoryRecordStore
from tests.support.memory_store import MemoryControlStore
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


# Wider than a test, so that the server it may need is there before the test's own fixtures.
@pytest.fixture(scope="session", params=["memory", "sqlite", "redis"])
def backend(request: pytest.FixtureRequest) -> str | RedisServer:
    server: RedisServer = request.getfixturevalue("redis_server") if request.param == "redis" else None
    return server or request.param


@pytest.fixture
def store(backend: str | RedisServer, state_dir: Path) -> Iterator[ControlStore]:
    store: ControlStore
    if isinstance(backend, RedisServer):
        backend.empty()
        store = RedisControlStore(backend.address)
    else:
        store = MemoryControlStore() if backend == "memory" else SqliteControlStore(state_dir / "flux.db")
    yield store
    store.close()


@pytest.fixture
def records(backend: str | RedisServer, state_dir: Path) -> Iterator[RecordStore]:
    store: RecordStore
    if isinstance(backend, RedisServer):
        backend.empty()
        store = RedisRecordStore(backend.address, "worker-1")
    else:
        store = MemoryRecordStore() if backend == "memory" else SqliteRecordStore(state_dir / "agent.db")
    yield store
    store.close()
