"""Zips from strangers: each is refused by name, nothing lands outside, nothing of a refused one stays usable."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fluxlib import archive as archives
from fluxlib.archive import Limits
from fluxlib.errors import InvalidInput
from fluxlib.model import Platform
from tests.support.programs import make_zip

SMALL = Limits(entries=20, total_bytes=1024 * 1024, ratio=50)


def entries(*infos: tuple[str, bytes, dict[str, int]]) -> bytes:
    """A zip written entry by entry, each with its own attributes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name, data, attributes in infos:
            info = zipfile.ZipInfo(name)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            made.writestr(info, data)
    return buffer.getvalue()


def named(name: str) -> bytes:
    return entries(("main.sh", b"#!/bin/sh\n", {}), (name, b"x", {}))


def patched(name: bytes, by: bytes) -> bytes:
    """A zip whose names were changed behind the library's back; same length."""
    assert len(name) == len(by)
    return named(name.decode()).replace(name, by)


def encrypted() -> bytes:
    data = bytearray(make_zip({"main.sh": "x"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(signature) + offset
        data[at] |= 1
    return bytes(data)


def other_method(number: int) -> bytes:
    data = bytearray(make_zip({"main.sh": "x"}))
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        struct.pack_into("<H", data, data.index(signature) + offset, number)
    return bytes(data)


def lying_about_its_size() -> bytes:
    data = bytearray(entries(("main.sh", b"#!" + b"x" * 100_000, {"compress_type": zipfile.ZIP_DEFLATED})))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + offset, 10)
    return bytes(data)


def wrong_checksum() -> bytes:
    data = bytearray(entries(("main.sh", b"#!/bin/sh\n" * 1000, {})))
    data[len("main.sh") + 30 + 5000] ^= 0xFF
    return bytes(data)


def far_off(other: str, name: str) -> bytes:
    extra = struct.pack("<HHQ", 1, 8, 1 << 63)  # ZIP64's place of an entry
    made = bytearray(entries((other, b"", {}), (name, b"", {"extra": extra})))
    struct.pack_into("<I", made, made.rindex(b"PK\x01\x02") + 42, 0xFFFF_FFFF)
    return bytes(made)


LINK = {"external_attr": 0o120777 << 16}
DEVICE = {"external_attr": 0o020666 << 16}
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "not a zip": (lambda: b"#!/bin/sh\necho no zip\n", "not a usable zip"),
    "empty": (lambda: b"", "not a usable zip"),
    "truncated": (lambda: make_zip({"main.sh": "x" * 5000})[:-30], "not a usable zip"),
    "beginning only": (lambda: entries(("main.sh", b"x" * 5000, {}))[:200], "not a usable zip"),
    "no entries": (lambda: make_zip({}), "it has no files"),
    "no handler": (lambda: make_zip({"other.sh": "x"}), "not in the zip; it has 'other.sh'"),
    "handler elsewhere": (lambda: make_zip({"src/main.sh": "x"}), "it has 'src/main.sh'"),
    "handler is a directory": (lambda: entries(("main.sh/", b"", {})), "not in the zip"),
    "parent": (lambda: named("../../outside.sh"), "leaves the directory"),
    "parent inside": (lambda: named("a/../../outside.sh"), "leaves the directory"),
    "absolute": (lambda: named("/etc/cron.d/x"), "leaves the directory"),
    "host": (lambda: named("//server/share/x"), "leaves the directory"),
    "parent behind a dot": (lambda: named("a/.//../../x"), "leaves the directory"),
    "drive": (lambda: named("C:/x"), "absolute"),
    "backslash": (lambda: patched(b"aXXbXXc", b"..\\..\\c"), "leaves the directory"),
    "absolute by backslash": (lambda: patched(b"XaXX", b"\\a\\b"), "absolute"),
    "drive and backslash": (lambda: patched(b"CXXab", b"C:\\ab"), "absolute"),
    "NUL in a name": (lambda: patched(b"aXXb", b"a\0Xb"), "a NUL"),
    "long name": (lambda: named("n" * 600), "longer than 512"),
    "long part of a name": (lambda: named("d/" + "é" * 128), "a part longer than 255 bytes"),
    "symbolic link": (lambda: entries(("main.sh", b"x", {}), ("link", b"/etc/passwd", LINK)), "leaves the zip"),
    "handler a link": (lambda: entries(("main.sh", b"/bin/sh", LINK)), "leaves the zip"),
    "under a link": (
        lambda: entries(("main.sh", b"x", {}), ("d", b".", LINK), ("d/x", b"x", {})),
        "lies inside a link",
    ),
    "device": (lambda: entries(("main.sh", b"x", {}), ("tty", b"", DEVICE)), "a device"),
    "twice": (lambda: entries(("main.sh", b"a", {}), ("main.sh", b"b", {})), "there twice"),
    "twice after a dot": (lambda: entries(("main.sh", b"a", {}), ("./main.sh", b"b", {})), "there twice"),
    "inside a file": (lambda: entries(("main.sh", b"a", {}), ("main.sh/x", b"b", {})), "lies inside a file"),
    "file and directory": (lambda: entries(("main.sh", b"", {}), ("a", b"", {}), ("a/", b"", {})), "there twice"),
    "too many entries": (lambda: make_zip({f"f{number}": "" for number in range(21)}), "more than 20 entries"),
    "too many directories": (
        lambda: make_zip({"main.sh": "", **{f"{number}/b/c/d/e/f": "" for number in range(5)}}),
        "more than 20 directories",
    ),
    "too much": (lambda: entries(("main.sh", bytes(1024 * 1024 + 1), {})), "unpacks to"),
    "encrypted": (encrypted, "encrypted"),
    "bzip2": (lambda: other_method(12), "neither stored nor deflated"),
    "unknown method": (lambda: other_method(99), "neither stored nor deflated"),
    "lying about its size": (lying_about_its_size, ""),
    "wrong checksum": (wrong_checksum, "cannot be unpacked"),
    "handler far off": (lambda: far_off("a", "main.sh"), "the handler 'main.sh' cannot be unpacked"),
    "far off": (lambda: far_off("main.sh", "a"), "'a' cannot be unpacked"),
}
TOLERATED_BY_INSPECT = {"lying about its size", "wrong checksum", "far off"}  # seen only while all of it is unpacked


def around(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", HOSTILE)
def test_each_is_refused_and_named(tmp_path: Path, what: str) -> None:
    make, words = HOSTILE[what]
    archive = make()
    target = tmp_path / "in" / "here"
    target.mkdir(parents=True)
    with pytest.raises(InvalidInput) as refused:
        archives.unpack(archive, "main.sh", target, SMALL)
    assert words in refused.value.message
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 2000
    # Whatever it did, it did inside.
    assert all(path == "in" or path.startswith("in/here") for path in around(tmp_path))
    if what not in TOLERATED_BY_INSPECT:
        assert around(target) == []
        with pytest.raises(InvalidInput):
            archives.inspect(archive, "main.sh", SMALL)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = make_zip({f"zeros-{number}": bytes(50 * 1024 * 1024) for number in range(4)} | {"main.sh": "x"})
    assert len(bomb) < 1024 * 1024
    with pytest.raises(InvalidInput, match="times its size, more than 200"):
        archives.unpack(bomb, "main.sh", tmp_path)
    assert around(tmp_path) == []


def test_a_quine_like_overlap_is_not_unpacked_beyond_its_word(tmp_path: Path) -> None:
    """Two entries that share one compressed stream: the sizes of the directory count, twice."""
    one = bytearray(make_zip({"main.sh": "#!" + "x" * 400_000, "b": ""}))
    first = one.index(b"PK\x01\x02")
    second = one.index(b"PK\x01\x02", first + 4)
    # The second entry points at the first one's data, and claims its sizes and checksum.
    one[second + 16 : second + 28] = one[first + 16 : first + 28]
    one[second + 42 : second + 46] = one[first + 42 : first + 46]
    with pytest.raises(InvalidInput):
        archives.unpack(bytes(one), "main.sh", tmp_path, Limits(total_bytes=1024 * 1024, ratio=10_000))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1024 * 1024


def test_ten_thousand_entries_are_taken_and_one_more_is_not(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"d{number % 100}/f{number}": "" for number in range(9_999)}
    archives.inspect(make_zip({"main.sh": "x", **files}), "main.sh")
    with pytest.raises(InvalidInput, match="more than 10000 entries"):
        archives.inspect(make_zip({"main.sh": "x", "more": "", **files}), "main.sh")


def test_a_directory_of_very_many_entries_is_not_read_to_its_end() -> None:
    one = make_zip({"a": ""})
    begin, end = one.index(b"PK\x01\x02"), one.index(b"PK\x05\x06")
    directory = one[begin:end] * 200_000
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), begin, 0)
    archive = one[:begin] + directory + tail
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match="more than 10000 entries"):
            archives.inspect(archive, "main.sh")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # ZipFile reads the directory as one piece, twice over.
    assert peak < 4 * len(archive)


def test_what_is_good_is_unpacked_as_it_is(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "main.sh": "#!/bin/sh\n",
        "deep/er/file": b"\x00\xff",
        "with space": "x",
        "\u00fcml\u00e4ut": "y",
        "empty/": "",
        "..data": "starts with dots",
    }
    archive = make_zip(files)
    info = archives.inspect(archive, "main.sh")
    assert info.entries == 6
    assert info.platforms == (Platform("unix"),)
    assert info.digest == archives.digest_of(archive)
    archives.unpack(archive, "main.sh", tmp_path)
    for name, content in files.items():
        if not name.endswith("/"):
            path = tmp_path / name
            assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
            assert path.stat().st_mode & 0o7777 == 0o555
    assert (tmp_path / "empty").is_dir()
    assert {path.stat().st_mode & 0o7777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o555}


def test_a_deep_and_wide_one_costs_what_it_has_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of 200 directories in each other, with a thousand files in the innermost."""
    path, files = "", {"main.sh": "#!/bin/sh\n"}
    for _ in range(200):
        path += "a/"
        files[path] = ""
    archive = make_zip(files | {f"{path}{number}": "" for number in range(1000)})
    looks: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda at: looks.append(at) or scandir(at))  # type: ignore[func-returns-value]
    archives.unpack(archive, "main.sh", tmp_path)
    assert len(looks) <= 201
    monkeypatch.undo()
    at, depth = tmp_path, 0
    while (at := at / "a").is_dir():
        depth += 1
        assert at.stat().st_mode & 0o7777 == 0o555
    assert depth == 200
    assert len(os.listdir(at.parent)) == 1000


def test_every_directory_can_be_walked_through_whatever_the_umask(tmp_path: Path) -> None:
    """Functions' users must get to their code, and an agent's umask is 077."""
    before = os.umask(0o077)
    try:
        archives.unpack(make_zip({"a/b/c/main.sh": "#!/bin/sh\n", "a/d": "x"}), "a/b/c/main.sh", tmp_path)
    finally:
        os.umask(before)
    for directory in (tmp_path, tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c"):
        assert directory.stat().st_mode & 0o777 == 0o555, directory


def test_set_user_bits_do_not_come_out(tmp_path: Path) -> None:
    archives.unpack(entries(("main.sh", b"x", {"external_attr": 0o106755 << 16})), "main.sh", tmp_path)
    assert (tmp_path / "main.sh").stat().st_mode & 0o7777 == 0o555


def elf(machine: int, big: bool = False) -> bytes:
    order = ">" if big else "<"
    return b"\x7fELF" + bytes([2, 2 if big else 1, 1]) + bytes(9) + struct.pack(f"{order}HH", 2, machine) + bytes(60)


def pe(machine: int) -> bytes:
    return b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine) + bytes(20)


@pytest.mark.parametrize(
    ("handler", "head", "platform"),
    [
        ("main", elf(62), Platform("linux", "amd64")),
        ("main", elf(183), Platform("linux", "arm64")),
        ("main", elf(22, big=True), Platform("linux", "s390x")),
        ("main", elf(9999), Platform("linux")),
        ("main", b"\x7fELF", None),
        ("main.exe", pe(0x8664), Platform("windows", "amd64")),
        ("main", pe(0xAA64), Platform("windows", "arm64")),
        ("main.exe", b"MZ", Platform("windows")),
        ("run.BAT", b"@echo off", Platform("windows")),
        ("run.ps1", b"", Platform("windows")),
        ("main", b"#!/bin/sh\n", Platform("unix")),
        ("main", b"\xcf\xfa\xed\xfe\x0c\0\0\x01", Platform("darwin", "arm64")),
        ("main", b"\xca\xfe\xba\xbe\0\0\0\2", Platform("darwin")),
        ("Main.class", b"\xca\xfe\xba\xbe\0\0\0\x3d", None),
        # Bytes first, the suffix last.
        ("tool.exe", elf(62), Platform("linux", "amd64")),
        ("run.cmd", b"#!/bin/sh\n", Platform("unix")),
        ("run.ps1", b"#!/usr/bin/env pwsh\n", Platform("unix")),
        ("run.sh", pe(0x8664), Platform("windows", "amd64")),
        ("main", b"", None),
        ("main", b"hello", None),
    ],
)
def test_where_a_handler_runs(handler: str, head: bytes, platform: Platform | None) -> None:
    info = archives.inspect(make_zip({handler: head}), handler)
    assert info.platforms == ((platform,) if platform else ())


NAMES = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(["..", ".", "", "a", "A", "main.sh", "con", "\0", "\\", "/"]), max_size=6).map("/".join),
)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=300, deadline=None)
@example(names=["0\\"], data=b"")
@given(names=st.lists(NAMES, min_size=1, max_size=6), data=st.binary(max_size=50))
def test_no_names_at_all_get_out(tmp_path_factory: pytest.TempPathFactory, names: list[str], data: bytes) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("main.sh", "#!/bin/sh\n")
        # ZipInfo ends a name at a NUL, as C would: what comes after never gets into the zip.
        names = [name.partition("\0")[0] for name in names]
        for name in names:
            try:
                made.writestr(zipfile.ZipInfo(name), data)
            except (ValueError, UnicodeError):
                continue
    parent = tmp_path_factory.mktemp("z", numbered=True)
    target = parent / "in"
    target.mkdir()
    try:
        archives.unpack(buffer.getvalue(), "main.sh", target, SMALL)
    except InvalidInput:
        pass
    else:
        # What was taken is all there, under its own name.
        unpacked = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
        assert "main.sh" in unpacked
        wanted = {"main.sh", *names}
        if not any("/" in name for name in wanted):
            wanted = {name.replace("\\", "/") for name in wanted}
        files = [name.split("/") for name in wanted if not name.endswith("/")]
        wanted = {"/".join(part for part in parts if part not in ("", ".")) for parts in files}
        assert unpacked == wanted - {""}
    assert os.listdir(parent) == ["in"]


@pytest.mark.parametrize(
    ("handler", "content", "words"),
    [
        ("main.py", "print('hi')\n", "#!/usr/bin/env"),
        ("run.sh", "#!/bin/sh\r\necho hi\r\n", "CR LF"),
        ("run.sh", "#!/bin/sh\necho hi\n", ""),
        ("run.bat", "echo hi\r\n", ""),
        ("run", b"\x7fELF" + bytes(60), ""),
    ],
)
def test_what_will_hardly_start_is_told(handler: str, content: str | bytes, words: str) -> None:
    """The first mistake of a first function: it is taken, and said."""
    warnings = archives.inspect(make_zip({handler: content}), handler).warnings
    assert words in " ".join(warnings)
    assert bool(warnings) == bool(words)
