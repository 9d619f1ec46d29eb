"""Why this machine cannot start a handler: looked for when it is deployed, and again when it did not start."""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fluxlib import handlers
from fluxlib.config.environment import function_basics
from fluxlib.handlers import Head
from fluxlib.model import FunctionSpec, Platform

_ARCHITECTURES = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "aarch64": "arm64",
    "arm64": "arm64",
    "i686": "386",
    "x86": "386",
}
# Where the profiles with a mount namespace show a function its code.
_SHOWN_CODE = "/run/flux/code/"


def this_platform() -> Platform:
    """This machine in Go's words, as a legacy Flux and its users spell them."""
    systems = {"win32": "windows", "darwin": "darwin", "linux": "linux"}
    machine = platform.machine().lower()
    return Platform(systems.get(sys.platform, sys.platform), _ARCHITECTURES.get(machine, machine))


def head_of(path: str | Path, name: str = "") -> Head:
    """The beginning of a file. Raises OSError."""
    with open(path, "rb") as file:
        return Head(name or os.path.basename(path), file.read(handlers.HEAD))


def start_problem(spec: FunctionSpec, code_dir: Path, shows: Sequence[str] = ()) -> str:
    """Why the handler will not start on this machine, as far as can be told beforehand; empty when it should.

    ``shows`` are the directories that functions see of the machine; none = all of them.
    """
    handler = spec.handler
    if sys.platform == "win32":
        return ""
    path = code_dir.joinpath(*handler.split("/"))
    try:
        head = head_of(path, handler)
    except OSError as error:
        return f"{handler} cannot be read: {error.strerror}"
    files = _Files(code_dir, spec.env.get("PATH") or function_basics()["PATH"], shows)
    return _problem(path, head, files) or (handlers.unix_hint(head) if sys.platform == "linux" else "")


def exec_problem(program: str, number: int, code_dir: Path) -> str:
    """Why execve of ``program`` failed with errno ``number``, in words."""
    name = os.path.basename(program)
    if number == errno.E2BIG:
        return "its arguments and environment are too large"
    if number == errno.ETXTBSY:
        return f"{name} is still being written"
    try:
        head = head_of(program)
    except FileNotFoundError:
        return f"{name} is not there"
    except OSError:
        return f"{name} may not be executed" if number == errno.EACCES else os.strerror(number)
    here = this_platform()
    foreign = number == errno.ENOEXEC and bool(head.platform.os) and not here.matches(head.platform)
    problem = "" if foreign else _problem(Path(program), head, _Files(code_dir))
    if problem:
        return problem
    needs = handlers.interpreter_of(head) or handlers.loader_of(head, _loader(program, head))
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and needs:
        return f"{name} asks for {needs}, {handlers.NOT_SHOWN}"
    if number == errno.EACCES:
        also = f", or {needs} may not," if needs else ""
        return f"{name} may not be executed{also} by the function's user"
    if number == errno.ENOEXEC and head.is_script:
        return f"{name} asks for {needs}, which this machine ({here}) cannot run"
    if number == errno.ENOEXEC:
        return f"{name} is {head.what}, which this machine ({here}) cannot run"
    return f"{name}: {os.strerror(number)}"


def _problem(path: Path, head: Head, files: handlers.Files) -> str:
    return handlers.unix_problem(head) or handlers.machine_problem(head, files, _loader(path, head))


class _Files:
    """handlers.Files of this machine. ``search`` is the function's PATH; empty where it does not matter."""

    def __init__(self, code_dir: Path, search: str = "", shows: Sequence[str] = ()) -> None:
        self._code_dir = code_dir
        self._search = search
        self._shows = shows

    def exists(self, path: str) -> bool:
        return os.path.exists(self._here(path))

    def is_shown(self, path: str) -> bool:
        if not self._shows or path.startswith(_SHOWN_CODE) or not os.path.isabs(path):
            return True
        # Where a link lies and where it leads: either may be a home directory.
        lies, leads = os.path.normpath(path), os.path.realpath(path)
        real = [os.path.realpath(directory) for directory in self._shows]
        return _is_below(lies, [*self._shows, *real]) and _is_below(leads, real)

    def read(self, path: str) -> bytes:
        try:
            return head_of(self._here(path)).data
        except OSError:
            return b""

    def is_on_path(self, program: str) -> bool:
        if "/" in program:
            return self.exists(program)
        if not self._search:
            return True
        found = [os.path.join(directory or ".", program) for directory in self._search.split(os.pathsep)]
        return any(self.exists(path) and self.is_shown(path) for path in found)

    def _here(self, path: str) -> str:
        if path.startswith(_SHOWN_CODE):
            return os.path.join(self._code_dir, path.removeprefix(_SHOWN_CODE))
        # Relative to the working directory, which is the code's unless the function says otherwise.
        return os.path.join(self._code_dir, path)


def _is_below(path: str, directories: Iterable[str]) -> bool:
    return any(Path(path).is_relative_to(directory) for directory in directories)


def _loader(path: str | Path, head: Head) -> bytes:
    """The path of an ELF file's loader where it lies beyond its head (patchelf moves it there)."""
    position = handlers.loader_position(head)
    if position is None or position[0] + position[1] <= len(head.data):
        return b""
    try:
        with open(path, "rb") as file:
            file.seek(position[0])
            return file.read(position[1])
    except OSError:
        return b""
