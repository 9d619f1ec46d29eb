"""Untrusted zips: listing one, and unpacking it so that nothing lands outside the directory.

One place (``_names``) turns what a tool wrote into paths, the checks come after it
and see paths only. The whole directory of the zip is checked before a byte is
unpacked; sizes are counted again while unpacking, because a zip's own sizes are
untrusted too.
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
from calendar import timegm
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fluxlib.errors import InvalidInput
from fluxlib.handlers import HEAD, Head, unix_hint, unix_problem
from fluxlib.model import Platform

# What unpacked files get as the time of their last change: the first one a zip can hold, in UTC.
FIXED_TIME = 315_532_800
_COPY = 256 * 1024
_ENCRYPTED, _UTF8 = 0x1, 0x800
_PART_BYTES = 255
# On Windows a directory's mode only keeps it from being removed.
_DIRECTORY = 0o755 if sys.platform == "win32" else 0o555
_CODE_PAGE = "cp437"  # what APPNOTE.TXT (4.4.4, bit 11) says of names that are not UTF-8
# Who wrote an entry ("version made by"): FAT, NTFS (10 in APPNOTE.TXT, 11 with Info-ZIP) and VFAT.
_MADE_BY_WINDOWS = (0, 10, 11, 14)
_DOS_DIRECTORY = 0x10
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
_UNICODE_PATH, _UNIX_TIME, _OLD_UNIX_TIME, _NTFS_TIME = 0x7075, 0x5455, 0x5855, 0x000A
_NTFS_EPOCH = 11_644_473_600  # seconds from 1601 to 1970
_LINK_HOPS = 40  # as many as Linux follows
_LINK_STEPS = 1_000_000  # of all links together: short ones can lead a long way round
# What reading a broken entry raises; OverflowError when it is said to lie further off than a position can be.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError)
_DRIVE = re.compile(r"[A-Za-z]:(?:/|$)")
# What Windows alone refuses. CONIN$ and CONOUT$ are devices only by the whole name.
_NOT_ON_WINDOWS = re.compile(r'[\x00-\x1f\\<>:"|?*]|(?:^|/)(?i:conin\$|conout\$)(?:/|$)|[. ](?:/|$)')
_WINDOWS_DEVICE = re.compile(r"(?:^|/)(?i:con|prn|aux|nul|(?:com|lpt)[1-9\u00b9\u00b2\u00b3]) *(?:\.[^/]*)?(?:/|$)")


Archive = bytes | BinaryIO
"""A zip in memory, or a file that can be read and sought: one of two gigabytes need not be in memory."""
# What tells a zip from what people send in its place.
_BEGINNING = 1024
_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may unfold to. ``ratio`` counts only above ``small_bytes``: what is repetitive packs well."""

    entries: int = 10_000
    total_bytes: int = 1024 * 1024 * 1024
    ratio: int = 200
    small_bytes: int = 100 * 1024 * 1024
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


@dataclass(slots=True)
class _Contents:
    """What a checked zip unpacks to: paths without ``.``, ``..`` or empty parts, links resolved to what they show."""

    files: dict[str, zipfile.ZipInfo] = field(default_factory=dict)
    directories: set[str] = field(default_factory=set)  # every one, also those no entry names
    total_bytes: int = 0
    old_names: list[str] = field(default_factory=list)  # read in the code page


def digest_of(archive: Archive) -> str:
    if isinstance(archive, bytes):
        return hashlib.sha256(archive).hexdigest()
    archive.seek(0)
    digest = hashlib.sha256()
    while piece := archive.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def inspect(archive: bytes, handler: str, limits: Limits = DEFAULT_LIMITS) -> ArchiveInfo:
    """Check a zip without unpacking it. Raises InvalidInput naming what is wrong."""
    with _open(archive, limits.entries) as opened:
        contents = _check(opened, len(archive), limits)
        head = _head(opened, contents, handler)
        entries = len(opened.infolist())
    platform = head.platform
    warnings = [] if platform.os == "windows" else [text for text in (unix_problem(head), unix_hint(head)) if text]
    if contents.old_names:
        warnings.append(
            f"the zip's names are not UTF-8, so that they were read in code page 437: {_some(contents.old_names)};"
            " where letters are wrong, make the zip with UTF-8 names"
        )
    platforms = (platform,) if platform.os else ()
    return ArchiveInfo(entries, contents.total_bytes, digest_of(archive), platforms, tuple(warnings))


def unpack(
    archive: Archive,
    handler: str,
    directory: Path,
    limits: Limits = DEFAULT_LIMITS,
    *,
    system: str = sys.platform,
) -> None:
    """Everything into ``directory``, which must be empty and ours alone; files executable, nothing writable.

    Every file gets the same time, so that two agents' copies are alike; Python's sources the one that their byte
    code asks for. Raises InvalidInput; the caller removes the directory then.
    """
    with _open(archive, limits.entries) as opened:
        contents = _check(opened, _size_of(archive), limits)
        _head(opened, contents, handler)
        _check_for_system(contents, system)
        made = [directory]
        # Parents first.
        for path in sorted(contents.directories):
            made.append(directory.joinpath(*path.split("/")))
            made[-1].mkdir()
        left = limits.total_bytes
        for path, info in contents.files.items():
            left = _write(opened, info, path, directory, left)
        for source, time in _times_in_byte_code(contents.files, directory).items():
            os.utime(directory.joinpath(*source.split("/")), (time, time))
        for place in made:
            # Also without root, where functions run as the agent's own user: a file that one of them leaves beside
            # its code would make the version look damaged at the agent's next start.
            os.chmod(place, _DIRECTORY)
            os.utime(place, (FIXED_TIME, FIXED_TIME))


class _Zip(zipfile.ZipFile):
    """A zip whose entries are counted as they are read: each takes ten times the memory of its place in the zip."""

    def __init__(self, archive: Archive, most: int) -> None:
        self._entries = _Entries(most)
        super().__init__(io.BytesIO(archive) if isinstance(archive, bytes) else archive)

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


def _size_of(archive: Archive) -> int:
    return len(archive) if isinstance(archive, bytes) else archive.seek(0, os.SEEK_END)


def _beginning(archive: Archive) -> bytes:
    if isinstance(archive, bytes):
        return archive
    archive.seek(0)
    return archive.read(_BEGINNING)


def _open(archive: Archive, most: int) -> zipfile.ZipFile:
    try:
        return _Zip(archive, most)
    except UnicodeDecodeError as error:
        raise InvalidInput("the body is not a usable zip: it says that its names are UTF-8, and one is not") from error
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, struct.error, NotImplementedError) as error:
        raise InvalidInput(f"the body is not a usable zip: {_what_instead(_beginning(archive)) or error}") from error


def _what_instead(data: bytes) -> str:
    """What people send in place of a zip; empty when it is none of these."""
    for magic, what in (
        (b"\x1f\x8b", "a .tar.gz or .gz file"),
        (b"BZh", "a bzip2 file"),
        (b"\xfd7zXZ\0", "an .xz file"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
        (b"\x7fELF", "the program itself"),
        (b"MZ", "the program itself"),
        (b"#!", "the script itself"),
    ):
        if data.startswith(magic):
            return f"it is {what}: put the files in a zip (zip code.zip FILES) and send that"
    if data[257:262] == b"ustar":
        return "it is a tar archive: put the files in a zip (zip code.zip FILES) and send that"
    if data.startswith(b"PK\x03\x04"):
        return (
            "it begins as a zip and is damaged or cut off: curl sends it unchanged with --data-binary @code.zip"
            " (-d removes line ends)"
        )
    if len(data) < 1000 and data.strip().lower().endswith(b".zip") and b"\n" not in data.strip():
        return "it is the name of a file: put an @ before it, as in curl --data-binary @code.zip"
    return ""


# -- from what tools wrote to paths ------------------------------------------------------------


def _names(infos: list[zipfile.ZipInfo]) -> tuple[list[str], list[str]]:
    """Each entry's name with ``/`` between its parts, and those among them that only the code page could read.

    A name that is not marked as UTF-8 is UTF-8 all the same when every such name can be: one tool wrote them all.
    Backslashes separate where Windows or DOS wrote the entry, and in a zip without any slash.
    """
    # orig_filename: ZipInfo cuts filename at a NUL, turns backslashes on Windows, and in newer Pythons reads 0x7075.
    raw = [info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else _CODE_PAGE) for info in infos]
    given = [
        name.decode() if info.flag_bits & _UTF8 else _unicode_path(info.extra, name)
        for info, name in zip(infos, raw, strict=True)
    ]
    encoding = _CODE_PAGE
    try:
        for name, known in zip(raw, given, strict=True):
            if known is None:
                name.decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        pass
    names = [known if known is not None else name.decode(encoding) for name, known in zip(raw, given, strict=True)]
    old = [name for name, known in zip(names, given, strict=True) if known is None and not name.isascii()]
    no_slash = not any("/" in name for name in names)
    turned = [
        name.replace("\\", "/") if no_slash or info.create_system in _MADE_BY_WINDOWS else name
        for name, info in zip(names, infos, strict=True)
    ]
    return turned, old if encoding == _CODE_PAGE else []


def _path(name: str) -> str:
    """A name without ``.`` and empty parts; what leads out of the directory is left for the checks."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _unicode_path(extra: bytes, raw: bytes) -> str | None:
    """The UTF-8 name that Info-ZIP puts beside another, when it belongs to that one."""
    data = _extra_field(extra, _UNICODE_PATH)
    if len(data) < 6 or data[0] != 1 or struct.unpack_from("<L", data, 1)[0] != zlib.crc32(raw):
        return None
    try:
        return data[5:].decode()
    except UnicodeDecodeError:
        return None


def _extra_field(extra: bytes, wanted: int) -> bytes:
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == wanted:
            return extra[at + 4 : at + 4 + size]
        at += 4 + size
    return b""


def _kind(info: zipfile.ZipInfo, name: str) -> int:
    """S_IFDIR, S_IFLNK, S_IFREG, or what else the entry says it is."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    directory = info.create_system in _MADE_BY_WINDOWS and info.external_attr & _DOS_DIRECTORY and not info.file_size
    if name.endswith("/") or (directory and not kind):
        return stat.S_IFDIR
    return kind or stat.S_IFREG


# -- the checks --------------------------------------------------------------------------------


def _check(opened: zipfile.ZipFile, size: int, limits: Limits) -> _Contents:
    """Every entry's name, kind and size. Raises InvalidInput."""
    infos = opened.infolist()
    names, old_names = _names(infos)
    faults: list[str] = []
    contents = _Contents(old_names=old_names)
    links: dict[str, zipfile.ZipInfo] = {}
    named: set[str] = set()
    for info, name in zip(infos, names, strict=True):
        problem = _entry_problem(info, name, limits)
        if problem is not None:
            faults.append(f"{_shown(name)}: {problem}")
            continue
        path, kind = _path(name), _kind(info, name)
        if not path:
            continue  # the directory itself
        if kind == stat.S_IFDIR:
            if path in contents.files or path in links:
                faults.append(f"{_shown(path)}: there twice, as a file and as a directory")
            named.add(path)
            continue
        if path in contents.files or path in links or path in named:
            faults.append(f"{_shown(path)}: there twice")
        if kind == stat.S_IFLNK:
            links[path] = info
        else:
            contents.files[path] = info
            contents.total_bytes += info.file_size
    for path in (*contents.files, *links, *named):
        for parent in _parents(path):
            if parent in contents.directories:
                break
            if parent in contents.files or parent in links:
                faults.append(f"{_shown(path)}: lies inside a {'file' if parent in contents.files else 'link'}")
                break
            contents.directories.add(parent)
        if len(contents.directories) > limits.entries:
            break
    contents.directories |= named
    if not faults and links:
        faults = _Links(opened, contents, links, limits).replace()
    faults += _size_faults(contents, size, limits)
    if faults:
        shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise InvalidInput("the zip cannot be unpacked", shown)
    return contents


def _size_faults(contents: _Contents, size: int, limits: Limits) -> list[str]:
    faults, total = [], contents.total_bytes
    if len(contents.directories) > limits.entries:
        # Each takes a block and an inode wherever it is unpacked; a name of 512 bytes can stand for 256 of them.
        faults.append(f"its entries lie in more than {limits.entries} directories")
    if len(contents.files) > limits.entries:
        faults.append(f"with its links followed it has more than {limits.entries} files")
    if total > limits.total_bytes:
        faults.append(f"unpacks to {total // 1024**2} MB, more than {limits.total_bytes // 1024**2}")
    elif total > limits.small_bytes and total > size * limits.ratio:
        faults.append(f"unpacks to {total // max(1, size)} times its size, more than {limits.ratio}")
    return faults


def _entry_problem(info: zipfile.ZipInfo, name: str, limits: Limits) -> str | None:
    if not name or len(name.encode("utf-8", "surrogatepass")) > limits.name_bytes:
        return f"its name is empty or longer than {limits.name_bytes} bytes"
    if any(char == "\0" or 0xD800 <= ord(char) < 0xE000 for char in name):
        return "its name has a NUL or half a surrogate pair, which no file system holds"
    if name.startswith("/") or _DRIVE.match(name):
        return "its path is absolute and leaves the directory"
    parts = name.split("/")
    if ".." in parts:
        return "its path leaves the directory (it has a '..' part)"
    if any(len(part.encode("utf-8")) > _PART_BYTES for part in parts):
        return f"its name has a part longer than {_PART_BYTES} bytes, which no file system holds"
    if info.flag_bits & _ENCRYPTED:
        return "it is encrypted: make the zip without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = _METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"its compression ({method}) is neither stored nor deflated"
    if _kind(info, name) not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
        return "it is a device, a pipe or a socket, not a file"
    return None


def _check_for_system(contents: _Contents, system: str) -> None:
    """What this agent's file system cannot hold, though others can. Raises InvalidInput."""
    paths = sorted({*contents.files, *contents.directories})
    if system == "win32":
        bad = [path for path in paths if _NOT_ON_WINDOWS.search(path) or _WINDOWS_DEVICE.search(path)]
        bad = [path for path in bad if path in contents.files] or bad  # not the directories of a file as well
        if bad:
            raise InvalidInput(f"no file on Windows can have the name of {_some(bad)}: rename it in the zip")
    if system in ("win32", "darwin"):
        # macOS takes composed and decomposed letters for the same; a file system there may tell case apart, few do.
        seen: dict[str, str] = {}
        for path in paths:
            other = seen.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
            if other != path:
                raise InvalidInput(
                    f"{_shown(other)} and {_shown(path)} are one file on this agent's system: rename one in the zip"
                )


class _Links:
    """Puts in the place of each link a copy of what it shows, which must be in the zip.

    Resolved as Linux does, without a file system: what an unpacked link could be replaced by never exists.
    """

    def __init__(
        self, opened: zipfile.ZipFile, contents: _Contents, links: Mapping[str, zipfile.ZipInfo], limits: Limits
    ) -> None:
        self._opened, self._contents, self._links, self._limits = opened, contents, links, limits
        self._targets: dict[str, str] = {}
        self._resolved: dict[str, str] = {}
        self._steps = 0
        self._inside: dict[str, list[str]] = {}  # what lies in each directory
        for path in (*contents.files, *contents.directories, *links):
            self._inside.setdefault(path.rpartition("/")[0], []).append(path)

    def replace(self) -> list[str]:
        """What is wrong; the contents hold the copies when nothing is."""
        faults = []
        for path, info in self._links.items():
            try:
                self._targets[path] = self._read(info)
            except InvalidInput as error:
                faults.append(f"{_shown(path)}: {error.message}")
        if faults:
            return faults
        files, directories = dict(self._contents.files), set(self._contents.directories)
        for link in self._links:
            try:
                self._copy(self._resolve(link), link, files, directories, ())
            except InvalidInput as error:
                faults.append(f"{_shown(link)}: {error.message}")
                if len(files) > self._limits.entries or len(directories) > self._limits.entries:
                    break
        self._contents.files, self._contents.directories = files, directories
        self._contents.total_bytes = sum(info.file_size for info in files.values())
        return faults

    def _read(self, info: zipfile.ZipInfo) -> str:
        most = self._limits.name_bytes
        if info.file_size > most:
            raise InvalidInput(f"it is a link to a path longer than {most} bytes")
        try:
            with self._opened.open(info) as file:
                target = file.read(most + 1).decode()
        except (*_UNREADABLE, OSError) as error:
            raise InvalidInput(f"it is a link that cannot be read: {error}") from error
        if not target or "\0" in target or len(target) > most:
            raise InvalidInput("it is a link to nothing")
        return target

    def _resolve(self, link: str) -> str:
        """The path of what a link shows. Raises InvalidInput when it leads out, in a circle, or to nothing."""
        if link in self._resolved:
            return self._resolved[link]
        done: list[str] = []
        ahead = link.split("/")[::-1]
        hops = 0
        while ahead:
            part = ahead.pop()
            self._steps += 1
            if self._steps > _LINK_STEPS:
                raise InvalidInput("it is one of too many links, which lead too long a way round")
            if part in ("", "."):
                continue
            if part == "..":
                if not done:
                    raise InvalidInput(
                        f"it is a link that leaves the zip, to {_shown(self._targets[link])}: {_INSTEAD}"
                    )
                done.pop()
                continue
            path = "/".join((*done, part))
            target = self._targets.get(path)
            if target is None:
                done.append(part)
                continue
            hops += 1
            if hops > _LINK_HOPS:
                raise InvalidInput("it is a link in a circle of links")
            if target.startswith("/") or _DRIVE.match(target):
                raise InvalidInput(f"it is a link that leaves the zip, to {_shown(target)}: {_INSTEAD}")
            ahead += target.split("/")[::-1]
        found = "/".join(done)
        if found and found not in self._contents.files and found not in self._contents.directories:
            raise InvalidInput(f"it is a link to {_shown(self._targets[link])}, which is not in the zip: {_INSTEAD}")
        self._resolved[link] = found
        return found

    def _copy(
        self,
        source: str,
        target: str,
        files: dict[str, zipfile.ZipInfo],
        directories: set[str],
        within: tuple[str, ...],
    ) -> None:
        if len(target.encode()) > self._limits.name_bytes:
            raise InvalidInput("with its links followed it holds paths that are too long")
        if source in self._contents.files:
            files[target] = self._contents.files[source]
        else:
            if source in within or not source or target.startswith(f"{source}/"):
                raise InvalidInput("it is a link to a directory that it lies in, which has no end")
            directories.add(target)
            for path in self._inside.get(source, ()):
                name = path.rpartition("/")[2]
                inner = self._resolve(path) if path in self._links else path
                self._copy(inner, f"{target}/{name}", files, directories, (*within, source))
        if len(files) > self._limits.entries or len(directories) > self._limits.entries:
            raise InvalidInput(f"with its links followed the zip has more than {self._limits.entries} files")


_INSTEAD = "put the file itself in the zip (zip without -y does)"


def _head(opened: zipfile.ZipFile, contents: _Contents, handler: str) -> Head:
    """The handler's first bytes. Raises InvalidInput when it is not there or cannot be unpacked."""
    info = contents.files.get(handler)
    if info is None:
        raise InvalidInput(f"the handler {_shown(handler)} is not in the zip{_close_to(handler, list(contents.files))}")
    try:
        with opened.open(info) as file:
            return Head(handler, file.read(HEAD))
    except (*_UNREADABLE, OSError) as error:
        raise InvalidInput(
            f"the handler {_shown(handler)} cannot be unpacked: {error}. The zip is damaged: curl sends it unchanged"
            " with --data-binary @code.zip (-d removes line ends)"
        ) from error


def _close_to(handler: str, paths: list[str]) -> str:
    """What the zip has that could be meant."""

    def folded(path: str) -> str:
        return unicodedata.normalize("NFC", path).casefold()

    for path in paths:
        if unicodedata.normalize("NFC", path) == unicodedata.normalize("NFC", handler):
            return f"; it has {_shown(path)}, the same in decomposed letters, as macOS writes them: copy the name"
        if folded(path) == folded(handler):
            return f"; it has {_shown(path)}: upper and lower case differ"
    last = handler.rpartition("/")[2]
    close = [path for path in paths if path.rpartition("/")[2] == last]
    return f"; it has {_shown(close[0]) if close else ', '.join(map(_shown, paths[:5])) or 'no files'}"


# -- writing -----------------------------------------------------------------------------------


def _write(opened: zipfile.ZipFile, info: zipfile.ZipInfo, path: str, directory: Path, left: int) -> int:
    """One file; how many bytes may still follow. Raises InvalidInput."""
    target = directory.joinpath(*path.split("/"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    written = 0
    try:
        with opened.open(info) as source, os.fdopen(os.open(target, flags, 0o755), "wb") as file:
            while chunk := source.read(_COPY):
                written += len(chunk)
                if written > info.file_size or written > left:
                    raise InvalidInput(f"{_shown(path)} is larger than the zip says")
                file.write(chunk)
    except _UNREADABLE as error:
        raise InvalidInput(f"{_shown(path)} cannot be unpacked: {error}") from error
    os.utime(target, (FIXED_TIME, FIXED_TIME))
    os.chmod(target, 0o555)
    return left - written


def _times_in_byte_code(files: Mapping[str, zipfile.ZipInfo], directory: Path) -> dict[str, int]:
    """Python's sources whose byte code came along, with the time and size that it was compiled for.

    Python takes byte code only when it names the exact time of its source (PEP 3147, PEP 552). The zip must bear
    out that it belongs to this source: byte code older than an edit would run in place of what was edited.
    """
    times: dict[str, int] = {}
    for path, info in files.items():
        home, _, name = path.rpartition("/")
        module = name.partition(".")[0]
        if not name.endswith(".pyc") or home.rpartition("/")[2] != "__pycache__":
            continue
        source = f"{home.removesuffix('__pycache__')}{module}.py"
        if source not in files or source in times:
            continue
        with open(directory.joinpath(*path.split("/")), "rb") as file:
            header = file.read(16)
        if len(header) < 16 or header[2:8] != b"\r\n\0\0\0\0":
            continue  # no byte code, or such that goes by the source's hash
        time, size = struct.unpack_from("<II", header, 8)
        if size == files[source].file_size & 0xFFFF_FFFF and _was_changed_at(files[source], time, info):
            times[source] = time
    return times


def _was_changed_at(source: zipfile.ZipInfo, time: int, byte_code: zipfile.ZipInfo) -> bool:
    """Whether the zip says that a source was last changed at ``time`` (Unix), before its byte code was written."""
    exact = _exact_time(source.extra)
    if exact is not None:
        return exact == time
    # Local time in steps of two seconds, cut or rounded up: all zones differ by quarters of an hour.
    try:
        off = timegm((*source.date_time, 0, 0, 0)) - time
    except ValueError:
        return False  # zeros, where a tool wrote no time
    quarters = round(off / 900)
    return -2 <= off - quarters * 900 <= 2 and abs(quarters) <= 4 * 14 and source.date_time <= byte_code.date_time


def _exact_time(extra: bytes) -> int | None:
    """The last change in Unix time, from what most tools put beside the local one."""
    unix = _extra_field(extra, _UNIX_TIME)
    if len(unix) >= 5 and unix[0] & 1:
        return int(struct.unpack_from("<I", unix, 1)[0])
    ntfs = _extra_field(extra, _NTFS_TIME)
    if len(ntfs) >= 16 and struct.unpack_from("<HH", ntfs, 4) == (1, 24):
        return int(struct.unpack_from("<Q", ntfs, 8)[0]) // 10**7 - _NTFS_EPOCH
    old = _extra_field(extra, _OLD_UNIX_TIME)
    if len(old) >= 8:
        return int(struct.unpack_from("<I", old, 4)[0])
    return None


def _parents(path: str) -> Iterator[str]:
    """The directories on the way, the innermost first."""
    while parent := path.rpartition("/")[0]:
        yield parent
        path = parent


def _some(names: list[str]) -> str:
    return ", ".join(map(_shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 80 else name[:80] + "…")
