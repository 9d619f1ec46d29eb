"""What a handler is, read from its first bytes, and why a machine cannot start it.

Magic bytes decide first, then ``#!``, then the suffix of the name. Facts: e_machine
of ELF (gABI, "ELF Header"), Machine of PE (Microsoft's PE format), execve(2).
"""

from __future__ import annotations

import codecs
import posixpath
import struct
from dataclasses import dataclass
from typing import Protocol

from fluxlib.errors import InvalidInput
from fluxlib.model import FunctionSpec, Platform

HEAD = 4096  # bytes that are enough to tell what it is
_WINDOWS_SCRIPTS = (".bat", ".cmd", ".ps1")
_WINDOWS_PROGRAMS = (".exe", ".com")
# In Go's words.
_ELF_MACHINES = {3: "386", 40: "arm", 62: "amd64", 183: "arm64", 243: "riscv64", 22: "s390x", 21: "ppc64le"}
_PE_MACHINES = {0x14C: "386", 0x8664: "amd64", 0xAA64: "arm64"}
_MACH_O_CPUS = {0x01000007: "amd64", 0x0100000C: "arm64", 7: "386"}
_ELF, _PE, _ZIP, _WASM = b"\x7fELF", b"MZ", b"PK\x03\x04", b"\0asm"
_MACH_O = (b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe")
_FAT_MACH_O = b"\xca\xfe\xba\xbe"  # also of Java classes, whose fifth to eighth bytes are a version from 45 on
_ET_REL, _PT_INTERP = 1, 3
# Linux reads 256 bytes of a script (BINPRM_BUF_SIZE), and at most so many interpreters in a row.
_FIRST_LINE = 255
NOT_SHOWN = (
    "which functions on this machine cannot see: isolation shows them only /usr, /bin, /lib, /opt and /etc of it"
)
_NESTED = 4


@dataclass(frozen=True, slots=True)
class Head:
    """The first bytes of a handler. ``name`` is its path inside the zip."""

    name: str
    data: bytes

    @property
    def is_script(self) -> bool:
        return self.data[:2] == b"#!"

    @property
    def first_line(self) -> bytes:
        return self.data.partition(b"\n")[0]

    @property
    def platform(self) -> Platform:
        """Where it runs; an empty Platform when nothing says so."""
        data, name = self.data, self.name.lower()
        if data[:4] == _ELF and len(data) >= 20:
            return Platform("linux", _ELF_MACHINES.get(_elf_half(data, 18), ""))
        if data[:2] == _PE and len(data) >= 64:
            (offset,) = struct.unpack_from("<I", data, 60)
            if data[offset : offset + 4] == b"PE\0\0" and offset + 6 <= len(data):
                (machine,) = struct.unpack_from("<H", data, offset + 4)
                return Platform("windows", _PE_MACHINES.get(machine, ""))
            return Platform("windows")
        if data[:4] in _MACH_O and len(data) >= 8:
            return Platform("darwin", _MACH_O_CPUS.get(struct.unpack_from("<I", data, 4)[0], ""))
        if data[:4] == _FAT_MACH_O and not self._is_java_class:
            return Platform("darwin")
        if self.is_script:
            return Platform("unix")
        if name.endswith((*_WINDOWS_SCRIPTS, ".exe")):
            return Platform("windows")
        return Platform()

    @property
    def _is_java_class(self) -> bool:
        return self.data[:4] == _FAT_MACH_O and len(self.data) >= 8 and self.data[6:8] >= b"\0\x2d"

    @property
    def what(self) -> str:
        """What it is, in words that end a sentence."""
        platform = self.platform
        on = f" for {platform.architecture}" if platform.architecture else ""
        if self.data[:4] == _ELF:
            return f"a Linux program{on}"
        if self.data[:2] == _PE:
            return f"a Windows program{on}"
        if platform.os == "darwin":
            return f"a macOS program{on}"
        if self.is_script:
            return "a script with a #! line"
        if self._is_java_class:
            return "a Java class"
        if self.data[:4] == _ZIP:
            return "a zip or jar file"
        if self.data[:4] == _WASM:
            return "a WebAssembly module"
        if not self.data:
            return "an empty file"
        if platform.os == "windows":
            return "a script for Windows" if self.name.lower().endswith(_WINDOWS_SCRIPTS) else "no Windows program"
        return "neither a program nor a script with a #! line"


def check_runs_on(spec: FunctionSpec, head: Head, here: Platform) -> None:
    """Raises InvalidInput for a handler that is for another system than this machine's.

    What the function's ``platforms`` say outweighs what the handler looks like.
    """
    name = _shown(spec.handler)
    if spec.platforms:
        if not any(here.matches(wanted) for wanted in spec.platforms):
            wanted = ", ".join(str(platform) for platform in spec.platforms)
            raise InvalidInput(f"{spec.name} is for {wanted}, and this agent runs on {here}")
    elif not here.matches(Platform(head.platform.os)):  # another processor's may run all the same, emulated
        raise InvalidInput(f"the handler {name} is {head.what}, and this agent runs on {here}")
    suffixes = (*_WINDOWS_PROGRAMS, *_WINDOWS_SCRIPTS)
    if here.os == "windows" and head.data[:2] != _PE and not spec.handler.lower().endswith(suffixes):
        raise InvalidInput(
            f"Windows cannot run the handler {name}, which is {head.what}: there it has to be a Windows program,"
            f" or a file that ends in {', '.join(suffixes)}"
        )


def unix_problem(head: Head) -> str:
    """Why no Unix machine can start it, whatever is installed there; empty when nothing is wrong with it."""
    data, name = head.data, _shown(head.name)
    if not data:
        return f"{name} is an empty file"
    if head.is_script:
        return _first_line_problem(head)
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return f"{name} is UTF-16 text, as PowerShell's > writes it: save it as UTF-8 without a byte order mark"
    if data[:3] == codecs.BOM_UTF8:
        return (
            f"{name} begins with a UTF-8 byte order mark, so that its #! line is not the first thing in it:"
            " save it as UTF-8 without BOM"
        )
    if data.lstrip()[:2] == b"#!":
        return f"{name} has an empty line or spaces before its #! line: #! must be its first two bytes"
    if data[:4] == _ELF and len(data) >= 20 and _elf_half(data, 16) == _ET_REL:
        return f"{name} is an object file and no program: it has to be linked"
    if data[:4] == _ELF and len(data) >= 64:
        return ""
    if data[:4] == _ZIP or head.what == "a Java class":
        return f"{name} is {head.what}: make the handler a script that starts Java with it, and zip both"
    if data[:4] == _WASM:
        return f"{name} is {head.what}: make the handler a script that starts its runtime with it, and zip both"
    if data[:4] == _ELF:
        return f"{name} is the beginning of a Linux program: the file is cut off or damaged"
    if head.platform.os:
        return ""  # of another system; that is told by who knows this one
    return (
        f"{name} is neither a program nor a script with a #! line: let it begin with a line such as"
        " #!/usr/bin/env python3 or #!/bin/sh"
    )


def _first_line_problem(head: Head) -> str:
    line, name = head.first_line, _shown(head.name)
    if b"\r" in line:
        ends = "CR LF, as Windows editors write them" if b"\n" in head.data else "CR, as Macs wrote them once"
        return f"{name} has line ends of {ends}: Unix takes the CR for a part of its #! line; save it with LF alone"
    words = line[2:].split(None, 1)
    if not words:
        return f"{name} names no interpreter after #!"
    if len(line) > _FIRST_LINE:
        return f"{name} has a #! line of more than {_FIRST_LINE} bytes, which Linux cuts off"
    return ""


def unix_hint(head: Head) -> str:
    """What will most likely not work on Linux though the program is started; empty when nothing is known."""
    words = head.first_line[2:].split() if head.is_script else []
    options = words[1:2] and words[1].startswith(b"-")
    if len(words) > 2 and posixpath.basename(words[0]) == b"env" and not options and b"=" not in words[1]:
        return (
            f"{_shown(head.name)}: Linux hands everything after {_text(words[0])} over as one word, which is then"
            f" looked for as a program: write #!{_text(words[0])} -S {_text(b' '.join(words[1:]))}"
        )
    return ""


class Files(Protocol):
    """A machine's files, as a function sees them."""

    def exists(self, path: str) -> bool: ...

    def is_shown(self, path: str) -> bool:
        """Whether isolation shows functions a path that exists."""

    def read(self, path: str) -> bytes:
        """The first HEAD bytes; none when it cannot be read."""

    def is_on_path(self, program: str) -> bool:
        """Whether the function's PATH leads to it."""


def machine_problem(head: Head, files: Files, rest: bytes = b"") -> str:
    """Why this Unix machine cannot start it, empty when nothing is known: a missing interpreter or loader, say.

    ``rest`` is what the ELF file names as its loader when that lies beyond the head (see loader_position).
    """
    name = _shown(head.name)
    for _ in range(_NESTED):
        if not head.is_script:
            break
        problem = _first_line_problem(head)
        interpreter = interpreter_of(head)
        if problem or not interpreter:
            return problem
        if not files.exists(interpreter):
            where = "" if "/" in interpreter else f": write its whole path, such as #!/usr/bin/env {interpreter}"
            return f"{_shown(head.name)} asks for {_shown(interpreter)}, which is not on this machine{where}"
        if not files.is_shown(interpreter):
            return f"{_shown(head.name)} asks for {_shown(interpreter)}, {NOT_SHOWN}"
        by_env = program_of_env(head)
        if by_env and not files.is_on_path(by_env):
            return (
                f"{_shown(head.name)} asks for {_shown(by_env)}, which is not on the PATH of functions on this machine"
            )
        head = Head(interpreter, files.read(interpreter))
        rest = b""
        if not head.data:
            return ""
    else:
        return f"{name} is a script whose interpreter is a script, and so on more than {_NESTED} times"
    if head.data[:4] == _ELF:
        loader = loader_of(head, rest)
        if loader and not files.exists(loader):
            if "musl" in loader:
                why = (
                    "it was built for musl (Alpine Linux), and this machine has glibc: link it statically, or for glibc"
                )
            elif "ld-linux" in loader:
                why = "it was built for glibc or another processor: link it statically, or install that C library"
            else:
                why = "link it statically, or build it for this system"
            return f"{_shown(head.name)} needs the loader {_shown(loader)}, which is not on this machine: {why}"
    return ""


def interpreter_of(head: Head) -> str:
    """What the #! line names; empty when there is none."""
    words = head.first_line[2:].split(None, 1) if head.is_script else []
    return _text(words[0]) if words else ""


def program_of_env(head: Head) -> str:
    """What `#!/usr/bin/env NAME` looks for on the PATH; empty for every other line, and for options not known here."""
    if posixpath.basename(interpreter_of(head)) != "env" or unix_hint(head):
        return ""
    words = iter(head.first_line[2:].split()[1:])
    for word in words:
        if word in (b"-S", b"-i", b"-") or (b"=" in word and not word.startswith(b"-")):
            continue
        if word == b"-u":
            next(words, None)
            continue
        word = word.removeprefix(b"-S")
        return "" if word.startswith(b"-") or b"=" in word else _text(word)
    return ""


def loader_position(head: Head) -> tuple[int, int] | None:
    """(offset, length) of the loader's path in an ELF file; None for a static one and for everything else."""
    data = head.data
    if data[:4] != _ELF or len(data) < 64:
        return None
    wide = data[4] == 2
    order = "<" if data[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", data, 32 if wide else 28)
    size, count = struct.unpack_from(f"{order}HH", data, 54 if wide else 42)
    for number in range(min(count, 256)):
        at = table + number * size
        if at + (56 if wide else 32) > len(data):
            return None
        (kind,) = struct.unpack_from(f"{order}I", data, at)
        if kind == _PT_INTERP:
            if wide:
                (offset,), (length,) = (struct.unpack_from(f"{order}Q", data, at + skip) for skip in (8, 32))
            else:
                (offset,), (length,) = (struct.unpack_from(f"{order}I", data, at + skip) for skip in (4, 16))
            return int(offset), min(int(length), HEAD)
    return None


def loader_of(head: Head, rest: bytes = b"") -> str:
    position = loader_position(head)
    if position is None:
        return ""
    path = rest or head.data[position[0] : position[0] + position[1]]
    return _text(path.rstrip(b"\0")) if b"\0" not in path.rstrip(b"\0") else ""


def _elf_half(data: bytes, offset: int) -> int:
    return int(struct.unpack_from("<H" if data[5] == 1 else ">H", data, offset)[0])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    """A name in a message: as it is where it is harmless, else escaped."""
    name = name if len(name) <= 200 else name[:200] + "…"
    return name if name.isprintable() and name == name.strip() else ascii(name)
