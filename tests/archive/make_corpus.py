"""Makes the zips of ``corpus/``: `python -m tests.archive.make_corpus DIRECTORY`, with the tools that its README names.

They are checked in, so that the tests need none of the tools and see the same bytes everywhere. All of them hold one
tree, and so must unpack to the same; the last ones are written here byte by byte, as programs do that are not on Linux.
"""

from __future__ import annotations

import os
import py_compile
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from calendar import timegm
from dataclasses import dataclass
from pathlib import Path

# An odd second: zips alone keep even ones.
CHANGED = timegm((2026, 1, 2, 3, 4, 5))
FILES = {
    "run.sh": "#!/bin/sh\ncat lib/data grüße.txt\n",
    "lib/data": "data\n",
    "lib/module.py": "X = 'a module'\n",
    "grüße.txt": "hello\n",
}
BYTE_CODE = "lib/__pycache__/module.cpython-311.pyc"
LINKS = {"latest": "lib/data", "library": "lib"}

GO = """
package main

import ("archive/zip"; "io"; "io/fs"; "os"; "path/filepath")

func main() {
	out, _ := os.Create(os.Args[1])
	w := zip.NewWriter(out)
	filepath.Walk(".", func(path string, info fs.FileInfo, err error) error {
		if path == "." { return nil }
		real, _ := os.Stat(path)
		if real.IsDir() && info.Mode()&fs.ModeSymlink == 0 {
			w.Create(path + "/")
			return nil
		}
		if real.IsDir() { return nil }
		var entry io.Writer
		if os.Args[2] == "plain" { entry, _ = w.Create(path) } else {
			header, _ := zip.FileInfoHeader(real)
			header.Name, header.Method = path, zip.Deflate
			entry, _ = w.CreateHeader(header)
		}
		data, _ := os.ReadFile(path)
		entry.Write(data)
		return nil
	})
	w.Close()
}
"""

# Each is run by sh in the tree; $OUT is the zip to make.
COMMANDS = {
    "infozip": "zip -q -r $OUT .",
    "infozip-links": "zip -q -y -r $OUT .",
    "infozip-c-locale": "LC_ALL=C zip -q -r $OUT .",
    "infozip-streamed": "zip -q -r - . | cat >$OUT",
    "infozip-plain": "zip -q -X -D -r $OUT . && zip -q $OUT empty/",
    "bsdtar": "bsdtar -a -cf $OUT .",
    "bsdtar-streamed": "bsdtar --format zip -cf - run.sh lib grüße.txt empty latest library | cat >$OUT",
    "7zip": "7z a -bd -bso0 $OUT . && 7z d -bd -bso0 $OUT library latest && 7z a -bd -bso0 -snl $OUT library latest",
    "7zip-oem": "7z a -bd -bso0 -mcl=on $OUT . ",
    "jar": "jar --create --file $OUT --no-manifest -C . .",
    "python": "python3 -m zipfile -c $OUT *",
    "python-prefixed": "python3 -m zipfile -c $OUT.0 * && { echo '#!/usr/bin/env python3'; cat $OUT.0; } >$OUT;"
    " rm $OUT.0",
    "go": "go run $GO $OUT header",
    "go-plain": "go run $GO $OUT plain",
    "git": "git init -q . && touch empty/.keep && git add . && git -c user.name=x -c user.email=x@x commit -q -m x"
    " && git archive --format zip -o $OUT HEAD; rm -rf .git",
}


def make_tree(directory: Path) -> None:
    for name, text in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
        os.utime(directory / name, (CHANGED + 0.5, CHANGED + 0.5))
    (directory / "run.sh").chmod(0o755)
    (directory / "empty").mkdir()
    py_compile.compile(str(directory / "lib/module.py"), cfile=str(directory / BYTE_CODE))
    for name, target in LINKS.items():
        (directory / name).symlink_to(target)


@dataclass
class Entry:
    """One entry as it is written, the name in bytes."""

    name: bytes
    data: bytes
    made_by: int = 0
    flags: int = 0
    attributes: int = 0x20
    extra: bytes = b""


def write_zip(path: Path, entries: list[Entry]) -> None:
    """With data descriptors where flag 3 says so."""
    out, directory = bytearray(), bytearray()
    day, time = (2026 - 1980) << 9 | 1 << 5 | 2, 3 << 11 | 4 << 5 | 5 // 2
    for entry in entries:
        at, crc, size = len(out), zlib.crc32(entry.data), len(entry.data)
        known = (0, 0, 0) if entry.flags & 8 else (crc, size, size)
        length = len(entry.name)
        out += struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, entry.flags, 0, time, day, *known, length, 0) + entry.name
        out += entry.data
        if entry.flags & 8:
            out += struct.pack("<IIII", 0x08074B50, crc, size, size)
        about = (20, entry.made_by, 20, entry.flags, 0, time, day, crc, size, size, length, len(entry.extra))
        directory += struct.pack("<IBBHHHHHIIIHHHHHII", 0x02014B50, *about, 0, 0, 0, entry.attributes, at)
        directory += entry.name + entry.extra
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(entries), len(entries), len(directory), len(out), 0)
    path.write_bytes(out + directory + end)


def by_hand(tree: Path, into: Path) -> None:
    """As the Finder, Windows' Explorer and PowerShell 5.1 write them."""
    links = {name: (tree / target).read_bytes() for name, target in LINKS.items() if (tree / target).is_file()}
    files = {**{name: (tree / name).read_bytes() for name in (*FILES, BYTE_CODE)}, **links}
    files |= {
        f"library/{Path(name).relative_to('lib')}": data for name, data in files.items() if name.startswith("lib/")
    }
    # The Finder: macOS (19 would be Darwin; it writes Unix), decomposed names without flag 11, AppleDouble beside.
    finder = []
    for name, data in files.items():
        decomposed = unicodedata.normalize("NFD", name).encode()
        times = struct.pack("<HHII", 0x5855, 8, CHANGED, CHANGED)
        finder.append(Entry(decomposed, data, 3, 8, 0o100755 << 16, times))
    finder.append(Entry(b"empty/", b"", 3, 0, 0o040755 << 16))
    finder.append(Entry(b"__MACOSX/._run.sh", b"\0\5\x16\7", 3, 8, 0o100644 << 16))
    write_zip(into / "finder.zip", finder)
    # The Explorer: NTFS as Info-ZIP numbers it, names in the code page, slashes.
    write_zip(into / "explorer.zip", [*(Entry(name.encode("cp437"), data, 11) for name, data in files.items()),
                                      Entry(b"empty/", b"", 11, 0, 0x10)])  # fmt: skip
    # Info-ZIP for Windows: what the code page lacks is a "?", and the whole name stands beside it in UTF-8.
    beside = []
    for name, data in files.items():
        raw, whole = name.encode("ascii", "replace"), name.encode()
        extra = struct.pack("<HHBL", 0x7075, 5 + len(whole), 1, zlib.crc32(raw)) + whole
        beside.append(Entry(raw, data, 11, extra=b"" if name.isascii() else extra))
    write_zip(into / "unicode-path.zip", [*beside, Entry(b"empty/", b"", 11, 0, 0x10)])
    # Compress-Archive of PowerShell 5.1 (.NET Framework): FAT, backslashes, UTF-8 with its flag where it is needed.
    windows = [
        Entry(name.replace("/", "\\").encode(), data, 0, 0 if name.isascii() else 0x800) for name, data in files.items()
    ]
    write_zip(into / "powershell.zip", [*windows, Entry(b"empty\\", b"", 0)])
    # A library that takes Windows' paths as they are and says it were Unix; no slash anywhere.
    unix = [Entry(one.name, one.data, 3, one.flags, 0o100644 << 16) for one in windows]
    write_zip(into / "backslashes-unix.zip", [*unix, Entry(b"empty\\", b"", 3, 0, 0o040755 << 16)])
    # NTFS as APPNOTE numbers it, "./" before every name and doubled slashes.
    dotted = [Entry(f".//{name.replace('/', '//')}".encode(), data, 10) for name, data in files.items()]
    write_zip(into / "dots.zip", [*dotted, Entry(b"./", b"", 10, 0, 0x10), Entry(b"./empty//", b"", 10, 0, 0x10)])


def main(into: Path) -> None:
    into = into.resolve()
    for name, command in COMMANDS.items():
        with tempfile.TemporaryDirectory() as directory:
            tree = Path(directory, "tree")
            tree.mkdir()
            make_tree(tree)
            program = Path(directory, "main.go")
            program.write_text(GO)
            (into / f"{name}.zip").unlink(missing_ok=True)
            environment = {**os.environ, "OUT": str(into / f"{name}.zip"), "GO": str(program), "GO111MODULE": "off"}
            # Neither whole hours nor to the east.
            environment |= {"LC_ALL": "C.UTF-8", "TZ": "America/St_Johns"}
            subprocess.run(["sh", "-c", command], cwd=tree, env=environment, check=True)
    with tempfile.TemporaryDirectory() as directory:
        make_tree(Path(directory))
        by_hand(Path(directory), into)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
