"""Zips from strangers: what is in one, and unpacking it so that nothing lands outside.

The whole directory of the zip is checked before a byte is unpacked; sizes are
counted again while unpacking, because a zip's own figures are the stranger's too.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import sys
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from fluxlib.errors import InvalidInput
from fluxlib.model import Platform

_COPY = 256 * 1024
_ENCRYPTED = 0x1
_PART_BYTES = 255
# On Windows a directory's mode only keeps it from being removed.
_DIRECTORY = 0o755 if sys.platform == "win32" else 0o555
# What reading a broken entry raises; OverflowError when it is said to lie further off than a position can be.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError)
# e_machine of ELF (gABI, "ELF Header") and Machine of PE (Microsoft's PE format), in Go's words.
_ELF_MACHINES = {3: "386", 40: "arm", 62: "amd64", 183: "arm64", 243: "riscv64", 22: "s390x", 21: "ppc64le"}
_PE_MACHINES = {0x14C: "386", 0x8664: "amd64", 0xAA64: "arm64"}
# Fine elsewhere, so that only Windows refuses it. CONIN$ and CONOUT$ are devices only by the whole name.
_NOT_ON_WINDOWS = re.compile(r'[<>"|?*]|(?:^|/)(?i:conin\$|conout\$)(?:/|$)')
_WINDOWS_NAMES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may unfold to. ``ratio`` counts only above a megabyte, where it matters."""

    entries: int = 10_000
    total_bytes: int = 1024 * 1024 * 1024
    ratio: int = 200
    name_bytes: int = 512


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class ArchiveInfo:
    """A checked archive. ``digest`` is the SHA-256 (hex) of the zip itself."""

    entries: int
    total_bytes: int
    digest: str
    platforms: tuple[Platform, ...]  # read from the handler; empty = anything
    warnings: tuple[str, ...] = ()  # why the handler will hardly start, for people


def digest_of(archive: bytes) -> str:
    return hashlib.sha256(archive).hexdigest()


def inspect(archive: bytes, handler: str, limits: Limits = DEFAULT_LIMITS) -> ArchiveInfo:
    """Check a zip without unpacking it. Raises InvalidInput naming what is wrong."""
    with _open(archive, limits.entries) as opened:
        total = _check(opened, len(archive), limits)
        head = _head(opened, handler)
    platforms = (_platform(handler, head),)
    return ArchiveInfo(
        len(opened.infolist()),
        total,
        digest_of(archive),
        platforms if platforms[0].os else (),
        _first_line_problems(handler, head),
    )


def unpack(archive: bytes, handler: str, directory: Path, limits: Limits = DEFAULT_LIMITS) -> None:
    """Everything into ``directory``, which must be empty and ours alone; files executable, nothing writable.

    Raises InvalidInput; the caller removes the directory then.
    """
    with _open(archive, limits.entries) as opened:
        _check(opened, len(archive), limits)
        _head(opened, handler)
        if sys.platform == "win32":
            _check_for_windows(opened)
        left = limits.total_bytes
        directories = {directory}
        for info in opened.infolist():
            target = directory.joinpath(*_parts(info.filename))
            within = target if info.is_dir() else target.parent
            if within not in directories:
                within.mkdir(parents=True, exist_ok=True)
                # Looking for them afterwards, below each, would take the square of a deep zip's entries.
                while within not in directories:
                    directories.add(within)
                    within = within.parent
            if not info.is_dir():
                left = _write(opened, info, target, left)
        for made in directories:
            # Also without root, where functions run as the agent's own user: a file that one of them leaves beside
            # its code would make the version look damaged at the agent's next start.
            os.chmod(made, _DIRECTORY)


class _Zip(zipfile.ZipFile):
    """A zip whose entries are counted as they are read: each takes ten times the memory of its place in the zip."""

    def __init__(self, archive: bytes, most: int) -> None:
        self._entries = _Entries(most)
        super().__init__(io.BytesIO(archive))

    @property
    def filelist(self) -> list[zipfile.ZipInfo]:
        return self._entries

    @filelist.setter
    def filelist(self, entries: list[zipfile.ZipInfo]) -> None:
        """ZipFile begins with an empty one."""


class _Entries(list[zipfile.ZipInfo]):
    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def append(self, entry: zipfile.ZipInfo) -> None:
        if len(self) == self._most:
            raise InvalidInput(f"the zip has more than {self._most} entries")
        super().append(entry)


def _open(archive: bytes, most: int) -> zipfile.ZipFile:
    try:
        return _Zip(archive, most)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, struct.error, NotImplementedError) as error:
        raise InvalidInput(f"the body is not a usable zip: {error}") from error


def _check(opened: zipfile.ZipFile, size: int, limits: Limits) -> int:
    """Every entry's name, kind and size; the unpacked total. Raises InvalidInput."""
    infos = opened.infolist()
    faults: list[str] = []
    seen: dict[str, str] = {}
    files: set[str] = set()
    total = 0
    for info in infos:
        problem = _entry_problem(info, limits)
        if problem is not None:
            faults.append(f"{_shown(info.filename)}: {problem}")
            continue
        total += info.file_size
        # As Windows and macOS see it: names that differ in case or composition only are one file there.
        folded = unicodedata.normalize("NFC", "/".join(_parts(info.filename))).casefold()
        if folded in seen and not (info.is_dir() and seen[folded].endswith("/")):
            faults.append(f"{_shown(info.filename)}: there twice")
        seen[folded] = info.filename
        if not info.is_dir():
            files.add(folded)
    sound: set[str] = set()  # directories no part of whose path is a file
    for folded, name in seen.items():
        passed = []
        parent = folded.rpartition("/")[0]
        while parent and parent not in sound and parent not in files:
            passed.append(parent)
            parent = parent.rpartition("/")[0]
        if parent in files:
            faults.append(f"{_shown(name)}: lies inside a file")
        else:
            sound.update(passed)
        if len(sound) > limits.entries:
            # Each takes a block and an inode wherever it is unpacked; a name of 512 bytes can stand for 256 of them.
            faults.append(f"its entries lie in more than {limits.entries} directories")
            break
    if total > limits.total_bytes:
        faults.append(f"unpacks to {total // 1024**2} MB, more than {limits.total_bytes // 1024**2}")
    elif total > 1024 * 1024 and total > size * limits.ratio:
        faults.append(f"unpacks to {total // max(1, size)} times its size, more than {limits.ratio}")
    if faults:
        shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise InvalidInput("the zip cannot be taken", shown)
    return total


def _check_for_windows(opened: zipfile.ZipFile) -> None:
    names = [_shown(name) for name in opened.namelist() if _NOT_ON_WINDOWS.search(name)]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InvalidInput(
            f"no file on Windows can have the name of {', '.join(names[:3])}{more}: rename it in the zip"
        )


def _entry_problem(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    name = info.orig_filename  # ZipInfo cuts filename at a NUL and turns backslashes on Windows
    if not name or len(name.encode("utf-8", "surrogatepass")) > limits.name_bytes:
        return f"its name is empty or longer than {limits.name_bytes} bytes"
    if any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in name):
        return "its name has control characters"
    if "\\" in name or ":" in name:
        return "its name has a backslash or a colon"
    parts = name.removesuffix("/").split("/")
    if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        return "its path leaves the directory (absolute, or with empty, '.' or '..' parts)"
    if any(len(part.encode("utf-8")) > _PART_BYTES for part in parts):
        return f"its name has a part longer than {_PART_BYTES} bytes, which no file system holds"
    if any(part.split(".")[0].rstrip(" ").lower() in _WINDOWS_NAMES or part.endswith((".", " ")) for part in parts):
        return "its name is one Windows cannot hold"
    if info.flag_bits & _ENCRYPTED:
        return "it is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "its compression is neither stored nor deflated"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "it is a link or a device, not a file"
    return None


def _head(opened: zipfile.ZipFile, handler: str) -> bytes:
    """The handler's first bytes. Raises InvalidInput when it is not there or cannot be unpacked."""
    found = [info for info in opened.infolist() if info.filename == handler and not info.is_dir()]
    if not found:
        names = [info.filename for info in opened.infolist() if not info.is_dir()]
        close = [name for name in names if name.rsplit("/", 1)[-1] == handler.rsplit("/", 1)[-1]]
        hint = (
            f"; it has {_shown(close[0])}" if close else f"; it has {', '.join(map(_shown, names[:5])) or 'no files'}"
        )
        raise InvalidInput(f"the handler {_shown(handler)} is not in the zip{hint}")
    try:
        with opened.open(found[0]) as file:
            return file.read(4096)
    except (*_UNREADABLE, OSError) as error:
        raise InvalidInput(f"the handler {_shown(handler)} cannot be unpacked: {error}") from error


def _write(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, left: int) -> int:
    """One file; how many bytes may still follow. Raises InvalidInput."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    written = 0
    try:
        with opened.open(info) as source, os.fdopen(os.open(target, flags, 0o755), "wb") as file:
            while chunk := source.read(_COPY):
                written += len(chunk)
                if written > info.file_size or written > left:
                    raise InvalidInput(f"{_shown(info.filename)} is larger than the zip says")
                file.write(chunk)
    except _UNREADABLE as error:
        raise InvalidInput(f"{_shown(info.filename)} cannot be unpacked: {error}") from error
    os.chmod(target, 0o555)
    return left - written


def _platform(handler: str, head: bytes) -> Platform:
    """Where the handler runs, from its first bytes and its name; an empty one when that says nothing."""
    lower = handler.lower()
    if head[:4] == b"\x7fELF" and len(head) >= 20:
        order = "<" if head[5] == 1 else ">"
        (machine,) = struct.unpack_from(f"{order}H", head, 18)
        return Platform("linux", _ELF_MACHINES.get(machine, ""))
    if head[:2] == b"MZ" and len(head) >= 64:
        (offset,) = struct.unpack_from("<I", head, 60)
        if offset + 6 <= len(head) and head[offset : offset + 4] == b"PE\0\0":
            (machine,) = struct.unpack_from("<H", head, offset + 4)
            return Platform("windows", _PE_MACHINES.get(machine, ""))
        return Platform("windows")
    if lower.endswith((".bat", ".cmd", ".ps1", ".exe")):
        return Platform("windows")
    if head[:2] == b"#!":
        return Platform("unix")
    if head[:4] in (b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe"):
        return Platform("darwin")
    return Platform()


def _first_line_problems(handler: str, head: bytes) -> tuple[str, ...]:
    """What keeps most first functions from starting."""
    if head[:2] == b"#!":
        if head.split(b"\n", 1)[0].endswith(b"\r"):
            return (
                f"{_shown(handler)}: its first line ends in CR LF, which Unix takes for part of the program's name",
            )
        return ()
    if _platform(handler, head).os:
        return ()
    return (
        f"{_shown(handler)} is neither a program that Flux knows nor a script with a first line such as"
        " `#!/usr/bin/env python3`: agents on Unix will hardly be able to start it",
    )


def _parts(name: str) -> list[str]:
    return name.removesuffix("/").split("/")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:80] + "…")
