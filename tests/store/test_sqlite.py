"""SQLite as a store: what survives a kill, what a power cut may take, and what every query costs."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fluxlib.errors import Conflict, StoreUnavailable
from fluxlib.model import AgentRecord, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import ExecutionFilter
from fluxlib.store.pending import Pending
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


def names_of(path: Path) -> list[Path]:
    return [path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")]


def test_a_file_that_is_removed_while_it_is_used_takes_nothing_more(store: SqliteControlStore, state_dir: Path) -> None:
    """What was answered would be gone after the next start."""
    keep(store, "e-1")
    store.ping()
    for path in names_of(state_dir / "flux.db"):
        path.unlink(missing_ok=True)
    for write in (store.ping, lambda: keep(store, "e-2"), lambda: store.save_function(function())):
        with pytest.raises(StoreUnavailable, match="was removed or replaced while Flux uses it"):
            write()
    with ThreadPoolExecutor(12) as pool:
        # More readers than there are connections: the others would make a file of their own.
        for answer in [pool.submit(store.execution, "e-1") for _ in range(48)]:
            with contextlib.suppress(StoreUnavailable):
                assert answer.result(10) is not None
    assert not (state_dir / "flux.db").exists()


def test_a_store_that_was_made_anew_says_so(state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = SqliteControlStore(state_dir / "flux.db")
    assert first.persistence() == ()
    first.close()
    again = SqliteControlStore(state_dir / "flux.db")
    assert again.persistence() == ()
    again.close()
    for damage in (Path.unlink, lambda path: path.write_bytes(b"")):
        for path in names_of(state_dir / "flux.db")[1:]:
            path.unlink(missing_ok=True)
        damage(state_dir / "flux.db")
        caplog.clear()
        anew = SqliteControlStore(state_dir / "flux.db")
        (warning,) = anew.persistence()
        anew.close()
        assert "was missing or empty and was made anew" in warning
        assert warning in caplog.text


def test_a_wal_that_was_removed_after_a_crash_is_said_to_be_missing(
    state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file without it holds an older state, and SQLite opens it without a word."""
    crash = (
        "import os, sys; from pathlib import Path; from fluxlib.store.sqlite import SqliteControlStore;"
        " from tests.support.entries import function;"
        " SqliteControlStore(Path(sys.argv[1])).save_function(function()); os._exit(0)"
    )
    path = state_dir / "flux.db"
    subprocess.run([sys.executable, "-c", crash, str(path)], check=True, timeout=30)
    whole = SqliteControlStore(path)
    assert whole.persistence() == ()
    assert whole.function("f") is not None
    whole.close()
    subprocess.run([sys.executable, "-c", crash, str(path)], check=True, timeout=30)
    path.with_name("flux.db-wal").unlink()
    older = SqliteControlStore(path)
    (warning,) = older.persistence()
    older.close()
    assert "flux.db-wal was removed" in warning
    assert warning in caplog.text
    again = SqliteControlStore(path)
    assert again.persistence() == ()
    again.close()


def damage_index(path: Path, name: str) -> None:
    with sqlite3.connect(path) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    database.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)


def test_a_damaged_file_is_ill_and_proves_nothing_missing(state_dir: Path) -> None:
    store = SqliteControlStore(state_dir / "flux.db")
    keep(store, "e-1")
    store.close()
    damage_index(state_dir / "flux.db", "sqlite_autoindex_executions_1")
    store = SqliteControlStore(state_dir / "flux.db")
    try:
        store.ping()
        with pytest.raises(StoreUnavailable, match="malformed: bring it back from a backup, or move it away"):
            store.execution("e-1")
        with pytest.raises(StoreUnavailable, match="is damaged"):
            store.ping()
        with pytest.raises(StoreUnavailable, match="cannot be relied on"):
            store.function("nobody")
    finally:
        store.close()


def test_a_damaged_record_is_a_store_that_is_away(state_dir: Path) -> None:
    store = SqliteControlStore(state_dir / "flux.db")
    try:
        end(store, keep(store, "e-1"))
        store._file.write(lambda db: db.execute("UPDATE executions SET record = substr(record, 9)")).wait()
        with pytest.raises(StoreUnavailable, match="damaged"):
            store.execution("e-1")
    finally:
        store.close()


@pytest.mark.parametrize("how", ["overwritten", "flipped"])
def test_a_damaged_agent_db_is_moved_aside_and_the_agent_starts(
    state_dir: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = state_dir / "agent.db"
    records = SqliteRecordStore(path)
    records.begin(entry("e-1").record)
    records.close()
    if how == "overwritten":
        path.write_bytes(bytes(reversed(range(256))) * 64)
    else:
        damage_index(path, "sqlite_autoindex_records_1")
    damaged = path.read_bytes()
    records = SqliteRecordStore(path)
    try:
        assert records.unfinished() == []
        records.begin(entry("e-2").record)
        records.flush()
    finally:
        records.close()
    assert (state_dir / "agent.db.damaged").read_bytes() == damaged
    assert "is damaged" in caplog.text
    assert "was moved to" in caplog.text
    again = SqliteRecordStore(path)
    assert [record.execution_id for record in again.unfinished()] == ["e-2"]
    again.close()


def test_a_damaged_flux_db_says_in_a_sentence_what_to_do(state_dir: Path) -> None:
    state_dir.mkdir(exist_ok=True)
    (state_dir / "flux.db").write_bytes(bytes(reversed(range(256))) * 64)
    with pytest.raises(StoreUnavailable, match="bring it back from a backup, or move it away to begin with an empty"):
        SqliteControlStore(state_dir / "flux.db")


def test_a_read_behind_a_write_that_does_not_come_through_is_refused(
    store: SqliteControlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not answered with what was before that write."""
    made = keep(store, "e-1")
    gate, busy = threading.Event(), threading.Event()

    def hold(db: sqlite3.Connection) -> None:
        busy.set()
        gate.wait(30)

    monkeypatch.setattr("fluxlib.store.sqlite_file._BUSY_TIMEOUT", 0.2)
    held = store._file.write(hold)
    try:
        assert busy.wait(10)
        store.end_attempt(made.record.ended(ExecutionStatus.SUCCESS, at=1.0), 1, 1000.0)
        with pytest.raises(StoreUnavailable, match="an earlier write was not committed within"):
            store.execution("e-1")
    finally:
        gate.set()
    held.wait()
    found = store.execution("e-1")
    assert found is not None
    assert found.record.status is ExecutionStatus.SUCCESS


def test_every_wait_for_a_write_has_a_deadline(store: SqliteControlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, busy = threading.Event(), threading.Event()

    def hold(db: sqlite3.Connection) -> None:
        busy.set()
        gate.wait(30)

    for method in (Pending.wait, Pending.value):
        monkeypatch.setattr(method, "__defaults__", (0.2,))
    monkeypatch.setattr("fluxlib.store.sqlite.COMMIT_TIMEOUT", 0.2)
    keep_waiting = store._file.write(hold)
    try:
        assert busy.wait(10)
        for write in (
            lambda: store.save_function(function()),
            lambda: store.save_agent(AgentRecord("w", "h:1")),
            lambda: store.set_note("a", "b"),
            lambda: store.acquire_lease("leader", "a", 15, 1.0),
            lambda: store.claim_executions("a", "f", 1),
            lambda: store.adopt_session("a", "b"),
            lambda: store.create_execution(entry("e-1", idempotency_key="k"), durable=True),
            store.expire_executions,
        ):
            with pytest.raises(StoreUnavailable, match="did not commit the write within"):
                write()
    finally:
        gate.set()
    keep_waiting.wait(10)
