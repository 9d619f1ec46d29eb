"""Output: kept once, read by many, bounded in memory, harmless when the disk is full."""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from fluxlib.agent.records import IN_MEMORY, Output, Reader

LINE = b"x" * 499 + b"\n"


def test_small_output_makes_no_file(tmp_path: Path) -> None:
    output = Output(tmp_path / "one", 1 << 20)
    output.append(b"hello ")
    output.append(b"world")
    assert output.read(6, 100) == b"world"
    output.end()
    assert output.read(0, 100) == b"hello world"
    assert not output.in_file
    assert list(tmp_path.iterdir()) == []


def test_large_output_lives_in_a_private_file(tmp_path: Path) -> None:
    output = Output(tmp_path / "one", 1 << 30)
    for _ in range(1000):
        output.append(LINE)
    assert output.in_file
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    assert output.read(499 * 500, 501) == LINE + b"x"
    output.end()
    assert output.read(0, 1 << 20) == LINE * 1000
    assert output.read(500 * 1000, 10) == b""


@pytest.mark.parametrize("cap", [10, IN_MEMORY, IN_MEMORY + 1, 200_000])
def test_beyond_the_cap_the_rest_is_dropped(tmp_path: Path, cap: int) -> None:
    output = Output(tmp_path / "one", cap)
    for _ in range(1000):
        output.append(LINE)
    assert (output.size, output.truncated, output.dropped) == (cap, True, 500_000 - cap)
    assert output.read(0, 1 << 20) == (LINE * 1000)[:cap]


def test_a_hundred_megabytes_in_short_lines_cost_little_time_and_no_memory(tmp_path: Path) -> None:
    output = Output(tmp_path / "one", 10 * 1024 * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(200_000):
        output.append(LINE)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert output.size == 10 * 1024 * 1024
    assert output.dropped == 200_000 * 500 - output.size
    # 200 000 appends, each of them a write at worst: well under 10 us apiece, on a slow machine too.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert len(output._memory) == 0
    assert after.ru_maxrss - before.ru_maxrss < 8 * 1024


def test_followers_get_every_byte_once(tmp_path: Path) -> None:
    output = Output(tmp_path / "one", 1 << 30)
    got: list[bytes] = [b""] * 3
    offsets = [0, 100, 70_000]

    def follow(number: int) -> None:
        for offset, data, _ in Reader(output).pieces(offsets[number], 0, follow=True):
            assert offset == offsets[number] + len(got[number])
            got[number] += data

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in range(400):
        output.append(b"%d" % (number % 10) * 1000)
    output.end()
    for thread in threads:
        thread.join(10)
    whole = b"".join(b"%d" % (number % 10) * 1000 for number in range(400))
    assert got == [whole[offset:] for offset in offsets]


def test_an_abandoned_follower_returns_at_once(tmp_path: Path) -> None:
    output = Output(tmp_path / "one", 100)
    reader = Reader(output)
    thread = threading.Thread(target=lambda: list(reader.pieces(0, 0, follow=True)))
    thread.start()
    began = time.monotonic()
    reader.abandon()
    thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - began < 1


def test_pieces_end_where_asked(tmp_path: Path) -> None:
    output = Output(tmp_path / "one", 1 << 30)
    output.append(b"0123456789")
    now = list(Reader(output).pieces(2, 4, follow=False))
    assert now == [(2, b"2345", False)]
    assert b"".join(data for _, data, _ in Reader(output).pieces(0, 0, follow=False)) == b"0123456789"
    output.end()
    for follow in (True, False):
        assert list(Reader(output).pieces(0, 0, follow=follow)) == [(0, b"0123456789", True)]
        assert list(Reader(output).pieces(10, 0, follow=follow)) == [(10, b"", True)]
        assert list(Reader(output).pieces(99, 0, follow=follow)) == [(99, b"", True)]


@pytest.mark.parametrize(("follow", "running"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("left", [0, 100_000, None])
def test_pieces_end_where_the_file_does(tmp_path: Path, left: int | None, follow: bool, running: bool) -> None:
    path = tmp_path / "one"
    output = Output(path, 1 << 30)
    for _ in range(400):
        output.append(LINE)
    if not running:
        output.end()
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left)
    pieces = list(itertools.islice(Reader(output).pieces(0, 0, follow=follow), 10))
    assert sum(len(data) for _, data, _ in pieces) == (left or 0)
    assert [ended for _, _, ended in pieces] == [False] * (len(pieces) - 1) + [True]
    output.end()


def test_a_full_disk_drops_output_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "one", 1 << 30)
    output.append(b"a" * IN_MEMORY)
    real = os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    output.append(b"b")
    monkeypatch.setattr(os, "write", real)
    output.append(b"c")
    assert (output.size, output.dropped, output.truncated) == (IN_MEMORY, 2, True)
    assert "No space left" in output.problem
    output.end()
    assert output.read(0, 1 << 20) == b"a" * IN_MEMORY
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_later_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(tmp_path / "one", 1 << 30)
    output.append(b"a" * 100_000)

    def half(fd: int, data: memoryview) -> int:
        if len(data) > 1:
            return real(fd, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    real = os.write
    monkeypatch.setattr(os, "write", half)
    output.append(b"b" * 1000)
    monkeypatch.setattr(os, "write", real)
    output.end()
    assert output.size == 100_000
    assert output.read(0, 1 << 20) == b"a" * 100_000
