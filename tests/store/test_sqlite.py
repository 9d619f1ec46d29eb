"""SQLite as a store: what survives a kill, what a power cut may take, and what every query costs."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fluxlib.errors import Conflict, StoreUnavailable
from fluxlib.model import ExecutionRecord, ExecutionStatus
from fluxlib.store.base import ExecutionFilter
from fluxlib.store.records_sqlite import SqliteRecordStore
from fluxlib.store.sqlite import SqliteControlStore
from fluxlib.store.sqlite_file import SqliteFile
from tests.support.entries import end, entry, function, keep

_VICTIM = """
import sys
from pathlib import Path
from fluxlib.store.sqlite import SqliteControlStore
from fluxlib.store.records_sqlite import SqliteRecordStore
from tests.support.entries import entry, function, keep
store = SqliteControlStore(Path(sys.argv[1]) / "flux.db")
records = SqliteRecordStore(Path(sys.argv[1]) / "agent.db")
store.save_function(function(code_digest="d"), b"zip")
number = 0
while True:
    keep(store, f"e-{number}", agent="w", owner="victim", idempotency_key=f"k-{number}")
    records.begin(entry(f"e-{number}").record)
    records.flush()
    print(number, flush=True)
    number += 1
"""


@pytest.fixture
def store(state_dir: Path) -> Iterator[SqliteControlStore]:
    store = SqliteControlStore(state_dir / "flux.db")
    yield store
    store.close()


def test_what_was_said_to_hold_survives_a_kill(state_dir: Path) -> None:
    command = [sys.executable, "-c", _VICTIM, str(state_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        said = [int(victim.stdout.readline()) for _ in range(20)]
        os.kill(victim.pid, signal.SIGKILL)
        said += [int(line) for line in victim.stdout if line.strip()]
    store, records = SqliteControlStore(state_dir / "flux.db"), SqliteRecordStore(state_dir / "agent.db")
    try:
        assert store.archive("d") == b"zip"
        found = {one.execution_id: one for one in store.executions_of("victim")}
        assert {f"e-{number}" for number in said} <= set(found)
        assert store.request("e-3") == entry("e-3").request
        assert {f"e-{number}" for number in said} <= {one.execution_id for one in records.unfinished()}
        assert store.create_execution(entry("new", idempotency_key="k-3"), durable=True)[0] == "e-3"
    finally:
        store.close()
        records.close()


def test_closing_commits_what_is_on_its_way(state_dir: Path) -> None:
    store = SqliteControlStore(state_dir / "flux.db")
    for number in range(500):
        store.create_execution(entry(f"e-{number}"), durable=False)
    store.close()
    again = SqliteControlStore(state_dir / "flux.db")
    assert again.count_open("f") == 500
    again.close()


def test_no_query_searches_the_executions(store: SqliteControlStore, state_dir: Path) -> None:
    """By the plans SQLite makes, for every statement the store sends: no scan of a table that grows."""
    statements: list[str] = []
    connect = store._file._connect

    def traced() -> sqlite3.Connection:
        connection = connect()
        connection.set_trace_callback(statements.append)
        return connection

    made = keep(store, "e-1", owner="o", idempotency_key="k")
    store.close()
    store = SqliteControlStore(state_dir / "flux.db")
    store._file._connect = traced  # type: ignore[method-assign]
    writer = store._file
    writer.write(lambda db: db.set_trace_callback(statements.append)).wait()
    try:
        keep(store, "e-2", agent="w", owner="o", idempotency_key="k2")
        store.assign_attempt("e-1", 1, "w", "o").wait()
        store.return_execution("e-1", 1, "o").wait()
        store.claim_executions("o", "f", 5)
        store.request("e-1")
        store.open_ids("o")
        store.queued()
        store.execution("e-1")
        store.open_executions("w")
        store.open_executions("")
        store.executions_of("o")
        store.count_open("f")
        for where in (
            ExecutionFilter(),
            ExecutionFilter("f"),
            ExecutionFilter(status=ExecutionStatus.RUNNING),
            ExecutionFilter("f", ExecutionStatus.SUCCESS),
            ExecutionFilter(queued=True),
            ExecutionFilter("f", queued=True),
        ):
            store.executions(where, "2", 10)
            store.executions(where, "", 10)
        end(store, made)
        store.adopt_session("o", "p")
        store.acquire_lease("flux/x", "x", 15, 100.0)
        store.expire_executions(max_records=100)
    finally:
        store.close()
    asked = [sql for sql in statements if "executions" in sql and "sqlite_" not in sql]
    assert len(asked) > 20
    with sqlite3.connect(state_dir / "flux.db") as database:
        for sql in asked:
            plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}")]
            bad = [step for step in plan if "executions" in step and step.startswith("SCAN")]
            assert not bad, (sql, plan)
            assert not any("TEMP B-TREE" in step for step in plan), (sql, plan)
    database.close()


def test_one_faulty_write_harms_no_other(store: SqliteControlStore) -> None:
    def broken(db: sqlite3.Connection) -> Any:
        db.execute("INSERT INTO entries VALUES ('notes', 'half', 'done', 1, '')")
        raise RuntimeError("a fault of ours")

    hold = store._file.write(lambda db: db.execute("SELECT 1"))
    before = store.create_execution(entry("before"), durable=True)[1]
    fault = store._file.write(broken)
    after = store.create_execution(entry("after"), durable=True)[1]
    hold.wait()
    before.wait()
    after.wait()
    with pytest.raises(StoreUnavailable, match="a fault of ours"):
        fault.wait()
    assert store.note("half") is None
    assert store.count_open("f") == 2


def test_a_disk_that_fails_is_a_store_that_is_away(store: SqliteControlStore) -> None:
    keep(store, "e-1")
    # What SQLite says of a full disk, brought about by a limit on the file's pages.
    store._file.write(lambda db: db.execute("PRAGMA max_page_count=1")).wait()
    with pytest.raises(StoreUnavailable, match="full"):
        store.save_function(function(code_digest="d"), bytes(1 << 20))
    assert store.function("f") is None
    assert store.execution("e-1") is not None
    store._file.write(lambda db: db.execute("PRAGMA max_page_count=1000000")).wait()
    store.save_function(function(code_digest="d"), bytes(1 << 20))


def test_a_disk_that_was_full_for_a_moment_loses_no_record(state_dir: Path) -> None:
    records = SqliteRecordStore(state_dir / "agent.db")
    try:
        records.begin(ExecutionRecord("before", "f"))
        records.flush(10)
        records._file.write(lambda db: db.execute("PRAGMA max_page_count=1")).wait()
        ended = ExecutionRecord("before", "f").ended(ExecutionStatus.SUCCESS, at=5.0)
        records.end(ended, bytes(200_000), 1e12)
        records.begin(ExecutionRecord("meanwhile", "f"))
        with contextlib.suppress(StoreUnavailable):
            records.flush(10)
        records._file.write(lambda db: db.execute("PRAGMA max_page_count=1000000")).wait()
        records.end(ExecutionRecord("meanwhile", "f").ended(ExecutionStatus.FAILED, at=6.0), b"", 1e12)
        records.expire(10.0)
        records.flush(10)
        assert [records.record(one).status for one in ("before", "meanwhile")] == ["success", "failed"]
        assert records.unfinished() == []
    finally:
        records.close()


def test_a_file_that_is_no_database(state_dir: Path) -> None:
    (state_dir / "flux.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        SqliteControlStore(state_dir / "flux.db")


def test_a_file_of_a_newer_flux_is_left_alone(state_dir: Path) -> None:
    path = state_dir / "flux.db"
    SqliteFile(path, [["CREATE TABLE a (b)"], ["CREATE TABLE c (d)"]], "newer").close()
    with pytest.raises(StoreUnavailable, match="newer Flux"):
        SqliteFile(path, [["CREATE TABLE a (b)"]], "older")


@pytest.mark.skipif(sys.platform == "win32", reason="modes are Unix's")
def test_nobody_else_can_read_it(store: SqliteControlStore, state_dir: Path) -> None:
    keep(store, "e-1")
    for path in state_dir.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_threads_that_come_and_go_leave_no_connections(store: SqliteControlStore) -> None:
    keep(store, "e-1")
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: store.execution("e-1"), range(20)))
    assert len(store._file._idle) <= 4


def test_a_burst_of_readers_leaves_a_few_connections(store: SqliteControlStore) -> None:
    file = store._file
    burst = [file._borrow() for _ in range(30)]
    for connection in burst:
        file._give_back(connection)
    assert len(file._idle) == 8
    for connection in set(burst) - set(file._idle):
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_one_process_alone_has_it_until_it_closes_or_dies(state_dir: Path) -> None:
    command = [sys.executable, "-c", _VICTIM, str(state_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(Conflict, match=rf"in use by process {other.pid}: .*`state_dir`.*`redis_addr`"):
            SqliteControlStore(state_dir / "flux.db")
        os.kill(other.pid, signal.SIGKILL)
    store = SqliteControlStore(state_dir / "flux.db")
    with pytest.raises(Conflict, match=rf"process {os.getpid()}:"):
        SqliteControlStore(state_dir / "flux.db")
    store.close()
    store.close()
    SqliteControlStore(state_dir / "flux.db").close()


def test_a_store_that_cannot_be_opened_is_let_go(state_dir: Path) -> None:
    (state_dir / "flux.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreUnavailable):
        SqliteControlStore(state_dir / "flux.db")
    (state_dir / "flux.db").unlink()
    SqliteControlStore(state_dir / "flux.db").close()
