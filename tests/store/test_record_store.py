"""What an agent's store of its own records promises, kept by every backend."""

from __future__ import annotations

import pytest

from fluxlib.errors import StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.store.base import RecordStore


def begun(execution_id: str) -> ExecutionRecord:
    return ExecutionRecord(execution_id, "f", "worker-1", asynchronous=True, started_at=1000.125)


def ended(execution_id: str) -> ExecutionRecord:
    record = begun(execution_id)
    return record.ended(ExecutionStatus.FAILED, at=1003.5, error="exit code 3", kind=ErrorKind.EXIT_CODE)


def test_a_record_from_its_begin_to_its_end(records: RecordStore) -> None:
    records.begin(begun("r-1"))
    records.flush()
    assert records.record("r-1") == begun("r-1")
    records.end(ended("r-1"), b"\xff\x00out", 2000.0)
    records.flush()
    found = records.record("r-1")
    assert found is not None
    assert (found.status, found.output, found.error_kind) == (
        ExecutionStatus.FAILED,
        b"\xff\x00out",
        ErrorKind.EXIT_CODE,
    )
    assert (found.started_at, found.status_at) == (1000.125, 1003.5)
    assert records.record("nobody") is None


def test_output_elsewhere_is_not_empty_output(records: RecordStore) -> None:
    records.end(ended("file"), None, 2000.0)
    records.end(ended("empty"), b"", 2000.0)
    records.flush()
    in_file, empty = records.record("file"), records.record("empty")
    assert in_file is not None
    assert empty is not None
    assert in_file.output is None
    assert empty.output == b""


def test_what_a_former_life_was_running(records: RecordStore) -> None:
    for name in ("a", "b", "c"):
        records.begin(begun(name))
    records.end(ended("b"), b"", 2000.0)
    records.flush()
    assert sorted(record.execution_id for record in records.unfinished()) == ["a", "c"]


def test_only_what_is_over_is_forgotten(records: RecordStore) -> None:
    for number in range(5):
        records.begin(begun(f"r-{number}"))
        records.end(ended(f"r-{number}"), b"x", 2000.0 + number)
    records.begin(begun("open"))
    records.flush()
    assert records.expire(1999.0) == []
    first = records.expire(2010.0, limit=2)
    rest = records.expire(2010.0)
    assert sorted(first + rest) == [f"r-{number}" for number in range(5)]
    assert len(first) == 2
    assert records.record("r-0") is None
    assert records.record("open") is not None
    assert records.expire(9e9) == []


def test_a_closed_store_is_away(records: RecordStore) -> None:
    records.begin(begun("r-1"))
    records.close()
    with pytest.raises(StoreUnavailable):
        records.record("r-1")
    with pytest.raises(StoreUnavailable):
        records.begin(begun("r-2"))
