"""Records: running, just ended, long ended, of a former life; never nowhere in between."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fluxlib.agent import records as module
from fluxlib.agent.records import IN_MEMORY, Records, new_record
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import RecordStore
from fluxlib.store.records_sqlite import SqliteRecordStore
from tests.support.memory_records import MemoryRecordStore

Open = Callable[[], Records]


@pytest.fixture(params=["memory", "sqlite"])
def open_records(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Each call is a new life of the agent on the same store."""
    opened: list[Records] = []
    memory = MemoryRecordStore()

    def make() -> Records:
        store: RecordStore = memory if request.param == "memory" else SqliteRecordStore(tmp_path / "agent.db")
        opened.append(Records(store, tmp_path / "outputs", 60, 1 << 20))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def run(records: Records, execution_id: str, data: bytes, at: float = 1000.0) -> ExecutionRecord:
    output = records.begin(new_record(execution_id, "hello", "worker-1", True, ()))
    output.append(data)
    record = new_record(execution_id, "hello", "worker-1", True, ())
    return records.end(record.ended(ExecutionStatus.SUCCESS, at=at))


@pytest.mark.parametrize("size", [0, 5, IN_MEMORY, IN_MEMORY + 1, 300_000])
def test_output_survives_a_restart(open_records: Open, size: int) -> None:
    first = open_records()
    data = bytes(range(256)) * (size // 256 + 1)
    ended = run(first, "one", data[:size])
    assert ended.output_bytes == size
    first.flush()
    second = open_records()
    found = second.get("one")
    assert found is not None
    assert found.output == data[:size]
    reader = second.reader("one")
    assert reader is not None
    pieces = list(reader.pieces(3, 0, follow=True))
    assert b"".join(piece for _, piece, _ in pieces) == data[3:size]
    assert pieces[-1][2] is True


def test_a_large_output_is_not_carried_about(open_records: Open) -> None:
    records = open_records()
    assert run(records, "small", b"x").output == b"x"
    large = run(records, "large", b"x" * 100_000)
    assert large.output is None
    assert records.with_output(large).output == b"x" * 100_000


def test_an_unknown_one_is_none(open_records: Open) -> None:
    records = open_records()
    assert records.get("nobody") is None
    assert records.known("nobody") is None
    assert records.reader("nobody") is None


def test_truncation_is_in_the_record(open_records: Open) -> None:
    records = open_records()
    ended = run(records, "one", b"x" * ((1 << 20) + 1))
    assert (ended.truncated, ended.output_bytes) == (True, 1 << 20)


def test_expiry_takes_the_output_file_too(open_records: Open, tmp_path: Path) -> None:
    records = open_records()
    run(records, "old", b"x" * 100_000, at=1000)
    run(records, "new", b"y" * 100_000, at=1030)
    records.flush()
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"old", "new"}
    records.tick(1061)
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"new"}
    assert records.get("old") is None
    assert records.get("new") is not None


def test_a_former_life_fails_with_the_reason(open_records: Open, tmp_path: Path) -> None:
    first = open_records()
    first.begin(new_record("quiet", "hello", "worker-1", True, ())).append(b"lost with its memory")
    loud = first.begin(new_record("loud", "hello", "worker-1", True, ()))
    loud.append(b"x" * 100_000)
    run(first, "ended", b"")
    first.flush()
    loud.end()
    (tmp_path / "outputs" / "of-nobody").write_bytes(b"left by a store that was thrown away")
    second = open_records()
    assert sorted(second.unfinished()) == ["loud", "quiet"]
    assert second.end_previous_run(2000, "the agent restarted") == 2
    assert second.unfinished() == []
    for name, size in (("quiet", 0), ("loud", 100_000)):
        record = second.get(name)
        assert record is not None
        assert (record.status, record.error) == (ExecutionStatus.FAILED, "the agent restarted")
        assert record.error_kind is ErrorKind.AGENT_STOPPED
        assert record.output == b"x" * size
    ended = second.get("ended")
    assert ended is not None
    assert ended.status is ExecutionStatus.SUCCESS
    assert not (tmp_path / "outputs" / "of-nobody").exists()


def test_what_was_refused_never_was(open_records: Open) -> None:
    records = open_records()
    record = new_record("one", "hello", "worker-1", True, ())
    records.begin(record)
    refused = replace(record, status=ExecutionStatus.FAILED, error_kind=ErrorKind.STOPPING, status_at=5.0)
    records.refuse(refused)
    assert records.get("one") is None
    assert records.known("one") is None
    assert records.unfinished() == []
    records.tick(5)
    assert records._store.record("one") is None


def test_whoever_follows_what_is_refused_is_told_its_end(open_records: Open) -> None:
    records = open_records()
    record = new_record("one", "hello", "worker-1", True, ())
    records.begin(record)
    reader = records.reader("one")
    assert reader is not None
    pieces: list[tuple[int, bytes, bool]] = []
    follower = threading.Thread(target=lambda: pieces.extend(reader.pieces(0, 0, follow=True)))
    follower.start()
    records.refuse(replace(record, status=ExecutionStatus.FAILED, error_kind=ErrorKind.STOPPING, status_at=5.0))
    follower.join(5)
    reader.abandon()
    follower.join()
    assert pieces == [(0, b"", True)]


def test_memory_of_what_just_ended_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RECENT", 10)
    monkeypatch.setattr(module, "_RECENT_BYTES", 1000)
    records = Records(MemoryRecordStore(), tmp_path, 60, 1 << 20)
    for number in range(50):
        run(records, f"small-{number}", b"x")
    assert len(records._recent) == 10
    for number in range(50):
        run(records, f"large-{number}", b"x" * 300)
    assert len(records._recent) == 3
    assert records._recent_bytes == 900
    records.flush()
    records.tick(10_000)
    assert (len(records._recent), records._recent_bytes) == (0, 0)
    records.close()


def test_whoever_asks_at_any_moment_finds_it(tmp_path: Path) -> None:
    records = Records(SqliteRecordStore(tmp_path / "agent.db"), tmp_path / "outputs", 60, 1 << 20)
    missing: list[str] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            for execution_id in list(begun):
                if records.known(execution_id) is None:
                    missing.append(execution_id)

    begun: list[str] = []
    asking = threading.Thread(target=ask)
    asking.start()
    for number in range(300):
        records.begin(new_record(str(number), "hello", "worker-1", True, ()))
        begun.append(str(number))
        records.end(new_record(str(number), "hello", "worker-1", True, ()).ended(ExecutionStatus.SUCCESS, at=1.0))
        if len(begun) > 20:
            del begun[0]
    done.set()
    asking.join(10)
    records.close()
    assert missing == []


def test_all_outputs_together_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    def opened() -> Records:
        store = SqliteRecordStore(tmp_path / "agent.db")
        return Records(store, tmp_path / "outputs", 60, 1 << 20, total=700_000)

    calls: list[str] = []
    records = opened()
    records.over = lambda: calls.append("over")
    for name in ("one", "two"):
        run(records, name, b"x" * 300_000)
    records.tick(1000)
    assert (calls, records.warnings) == ([], ())
    run(records, "three", b"x" * 300_000)
    assert calls == ["over"]
    records.tick(1000)
    oldest = records.get("one")
    assert oldest is not None
    assert (oldest.status, oldest.output, oldest.truncated) == (ExecutionStatus.SUCCESS, b"", True)
    assert "max_output_store_mb" in oldest.warnings[-1]
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["three", "two"]
    assert "outputs of 1 executions were removed early" in records.warnings[0]
    records.close()
    os.utime(tmp_path / "outputs" / "two", (1000, 1000))  # the file system's clock is too coarse for this test
    # What lies there already counts after a restart, and small outputs, which have no file, count too.
    records = opened()
    for number in range(3):
        run(records, f"small-{number}", b"x" * IN_MEMORY)
    records.tick(1000)
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["three"]
    kept = records.get("one")
    assert kept is not None
    assert "max_output_store_mb" in kept.warnings[-1]
    records.close()


def test_asking_for_what_never_was_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteRecordStore(tmp_path / "agent.db")
    records = Records(store, tmp_path / "outputs", 60, 1 << 20)
    run(records, "one", b"x")
    records.flush()
    flushes: list[float] = []
    flush = store.flush
    monkeypatch.setattr(store, "flush", lambda timeout=10.0: (flushes.append(timeout), flush(timeout)))
    for number in range(20):
        assert records.get(f"nobody-{number}") is None
    assert len(flushes) <= 1
    monkeypatch.undo()
    records.close()
