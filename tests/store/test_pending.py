"""Writes on their way: who waits, who does not, and what a batch is."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from fluxlib.errors import StoreUnavailable
from fluxlib.store import pending as pending_module
from fluxlib.store.pending import Pending, WriteQueue
from fluxlib.store.sqlite_file import SqliteFile


@pytest.fixture
def queue() -> WriteQueue[str]:
    return WriteQueue(max_batch=10)


def works(batch: list[Pending[str]]) -> list[str]:
    return [pending.work for pending in batch]


def test_a_patient_write_goes_with_the_next(queue: WriteQueue[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending_module, "_COMPANY", 30.0)
    queue.put("end", patient=True)
    queue.put("create")
    assert works(queue.next_batch()[0]) == ["end", "create"]


def test_a_patient_write_alone_goes_soon(queue: WriteQueue[str]) -> None:
    began = monotonic()
    queue.put("end", patient=True)
    assert works(queue.next_batch()[0]) == ["end"]
    assert monotonic() - began < 10


def test_a_patient_write_wakes_a_writer_that_dozes(queue: WriteQueue[str]) -> None:
    taken: list[str] = []
    writer = threading.Thread(target=lambda: taken.extend(works(queue.next_batch()[0])), name="writer")
    writer.start()
    while not queue._dozing:
        threading.Event().wait(0.001)
    queue.put("end", patient=True)
    writer.join(10)
    assert taken == ["end"]


@pytest.mark.parametrize("how", ["wait", "catch up"])
def test_who_waits_for_a_patient_write_hurries_it(
    queue: WriteQueue[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(pending_module, "_COMPANY", 30.0)
    write = queue.put("end", patient=True)
    waiter = threading.Thread(target=write.wait if how == "wait" else lambda: queue.catch_up(20), name="waiter")
    waiter.start()
    for taken in queue.next_batch()[0]:
        taken.settle()
    waiter.join(10)
    assert not waiter.is_alive()


def test_the_end_of_the_queue_takes_what_is_left(queue: WriteQueue[str]) -> None:
    queue.put("end", patient=True)
    queue.close()
    assert queue.next_batch() == ([queue._last_patient], True)
    with pytest.raises(StoreUnavailable):
        queue.put("late")


@pytest.mark.parametrize("settled_first", [True, False])
@pytest.mark.parametrize("error", [None, StoreUnavailable("full")])
def test_what_follows_a_write_is_called_once(settled_first: bool, error: Exception | None) -> None:
    write: Pending[str] = Pending("create")
    write.error = error
    told: list[Exception | None] = []
    if settled_first:
        write.settle()
    write.then(told.append)
    if not settled_first:
        assert told == []
        write.settle()
    assert told == [error]


def test_what_follows_a_write_does_not_end_the_writer() -> None:
    write: Pending[str] = Pending("create")
    write.then(lambda error: 1 / 0)  # type: ignore[func-returns-value, arg-type, return-value]
    write.settle()
    assert write.settled


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SqliteFile]:
    file = SqliteFile(tmp_path / "a.db", [["CREATE TABLE t (n INTEGER)"]], "test")
    yield file
    file.close()


def test_readers_see_what_was_written_patiently(file: SqliteFile) -> None:
    for number in range(50):
        file.write(lambda db, n=number: db.execute("INSERT INTO t VALUES (?)", (n,)), patient=True)  # type: ignore[misc]
        assert file.read("SELECT count(*) FROM t") == [(number + 1,)]


def test_what_follows_a_write_may_read(file: SqliteFile) -> None:
    """On the writer's own thread, with a patient write behind it: it must not wait for itself."""
    seen: list[object] = []
    done = threading.Event()

    def follow(error: Exception | None) -> None:
        file.write(lambda db: db.execute("INSERT INTO t VALUES (2)"), patient=True)
        seen.append((error, file.read("SELECT n FROM t")))
        done.set()

    file.write(lambda db: db.execute("INSERT INTO t VALUES (1)")).then(follow)
    assert done.wait(4)
    assert seen == [(None, [(1,)])]


def test_a_refused_write_says_whether_nothing_was_written(file: SqliteFile) -> None:
    def faulty(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO t VALUES (1)")
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(StoreUnavailable, match="disk I/O error") as undone:
        file.write(faulty).wait()
    assert undone.value.nothing_written
    assert file.read("SELECT n FROM t") == []

    # Only the commit finds this one at fault, as it would a disk that cannot sync.
    deferred = "CREATE TABLE child (n INTEGER REFERENCES parent(n) DEFERRABLE INITIALLY DEFERRED)"
    file.write(lambda db: (db.execute("CREATE TABLE parent (n INTEGER PRIMARY KEY)"), db.execute(deferred))).wait()
    with pytest.raises(StoreUnavailable, match="FOREIGN KEY") as unknown:
        file.write(lambda db: db.execute("INSERT INTO child VALUES (1)")).wait()
    assert not unknown.value.nothing_written
    file.write(lambda db: db.execute("INSERT INTO t VALUES (2)")).wait()
    assert file.read("SELECT n FROM t") == [(2,)]
