"""What the agent holds: each function's spec and the versions of its code.

    functions/<name>/spec.json          what was registered, and which version is current
    functions/<name>/<code digest>/     one unpacked version
    functions/<name>/.new-… and .old-…  being unpacked and being removed; gone after the next start

A version is unpacked beside the old one and becomes current by the atomic
replacement of spec.json. An old one is removed when nothing runs from it. What
a power cut left incomplete counts as not deployed: Flux sends it again.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from fluxlib import archive as archives
from fluxlib.agent.diagnosis import head_of, this_platform
from fluxlib.agent.removal import discard
from fluxlib.config.function import env_problem, handler_problem, is_device, name_problem
from fluxlib.errors import InvalidInput, NotFound
from fluxlib.handlers import check_runs_on
from fluxlib.lifecycle import Deadline
from fluxlib.model import FunctionSpec, FunctionState

log = logging.getLogger(__name__)

_SPEC = "spec.json"
_FRESH, _DOOMED = ".new-", ".old-"


@dataclass(frozen=True, slots=True)
class Installed:
    """A function as it stands. ``code_dir`` is None until code was deployed."""

    spec: FunctionSpec
    spec_digest: str
    code_digest: str = ""
    code_dir: Path | None = None
    files: int = 0
    bytes: int = 0


class Packages:
    """The functions of this agent. Safe from any thread; reading takes no lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # never held while a disk is waited for: every start takes it
        self._changing = threading.Lock()  # one change at a time; taken before the other
        self._installed: dict[str, Installed] = {}
        self._in_use: Counter[Path] = Counter()
        self._obsolete: set[Path] = set()
        self._to_delete: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self.revision = 0
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        # The functions' users must be able to walk to their code, and not to list the others'.
        os.chmod(directory, 0o711)
        self._load()
        # Large versions take seconds to remove; runs end and start meanwhile.
        self._remover = threading.Thread(target=self._delete_obsolete, name="old-versions", daemon=True)
        self._remover.start()

    def stop(self, deadline: Deadline) -> None:
        self._to_delete.put(None)
        self._remover.join(deadline.remaining())

    def spool(self) -> BinaryIO:
        """A file for an archive on its way here, gone when it is closed. On this disk: /tmp may be memory."""
        directory = None if sys.platform == "win32" else self._directory
        return cast(BinaryIO, tempfile.TemporaryFile(dir=directory))

    def get(self, name: str) -> Installed | None:
        return self._installed.get(name)

    def states(self) -> tuple[FunctionState, ...]:
        return tuple(
            FunctionState(name, installed.spec_digest, installed.code_digest)
            for name, installed in sorted(self._installed.items())
        )

    def register(self, spec: FunctionSpec, spec_digest: str) -> Installed:
        """A new or changed spec. Raises InvalidInput when the code that is here lacks its handler, or has one that
        is for another system.
        """
        check_names(spec)
        with self._changing:
            known = self._installed.get(spec.name)
            code_dir = known.code_dir if known else None
            if code_dir is not None and not _is_file(code_dir, spec.handler):
                raise InvalidInput(f"the deployed code of {spec.name} has no {spec.handler}: deploy a zip that has it")
            if code_dir is not None:
                _check_handler(spec, code_dir)
            installed = replace(known, spec=spec, spec_digest=spec_digest) if known else Installed(spec, spec_digest)
            self._save(installed)
            return installed

    def deploy(self, spec: FunctionSpec, spec_digest: str, code_digest: str, archive: archives.Archive) -> Installed:
        """New code with its spec. Raises InvalidInput, OSError; then nothing has changed."""
        check_names(spec)
        actual = archives.digest_of(archive)
        if code_digest and code_digest != actual:
            raise InvalidInput(f"checksum mismatch for the code of {spec.name}: it arrived damaged")
        home = self._directory / spec.name
        target = home / actual
        with self._lock:
            self._make_home(home)
            # Unpacking and starting count as uses, so that neither it nor its home is removed.
            self._in_use[target] += 1
        try:
            if not target.is_dir():
                self._unpack(spec, archive, target)
            elif not _is_file(target, spec.handler):
                raise InvalidInput(f"the handler {spec.handler} is not in the zip")
            else:
                _check_handler(spec, target)
            files, size = _measure(target)
            with self._changing:
                before = self._installed.get(spec.name)
                installed = Installed(spec, spec_digest, actual, target, files, size)
                self._save(installed)
                with self._lock:
                    self._obsolete.discard(target)
                    if before is not None and before.code_dir is not None and before.code_dir != target:
                        self._obsolete.add(before.code_dir)
                        self._remove_if_unused(before.code_dir)
            return installed
        except BaseException:
            with self._lock:
                current = self._installed.get(spec.name)
                if current is None or current.code_dir != target:
                    self._obsolete.add(target)
            raise
        finally:
            self._let_go(target)

    def remove(self, name: str) -> None:
        """Raises NotFound. What runs from it goes on to its end."""
        with self._changing, self._lock:
            known = self._installed.pop(name, None)
            if known is None:
                raise NotFound(f"function {name} is not here")
            home = self._directory / name
            (home / _SPEC).unlink(missing_ok=True)
            self.revision += 1
            if known.code_dir is not None:
                self._obsolete.add(known.code_dir)
                self._remove_if_unused(known.code_dir)
            self._remove_home(home)

    def acquire(self, name: str) -> Installed | None:
        """The function with its version held: it is not removed before ``release``."""
        with self._lock:
            installed = self._installed.get(name)
            if installed is not None and installed.code_dir is not None:
                self._in_use[installed.code_dir] += 1
            return installed

    def release(self, installed: Installed) -> None:
        if installed.code_dir is not None:
            self._let_go(installed.code_dir)

    # -- on disk -------------------------------------------------------------------

    def _let_go(self, code_dir: Path) -> None:
        with self._lock:
            self._in_use[code_dir] -= 1
            if not self._in_use[code_dir]:
                del self._in_use[code_dir]
                self._remove_if_unused(code_dir)

    def _remove_if_unused(self, code_dir: Path) -> None:
        if code_dir not in self._obsolete or self._in_use.get(code_dir):
            return
        self._obsolete.discard(code_dir)
        # Out of the way first: the same code may come again while this one is being removed.
        doomed = code_dir.with_name(f"{_DOOMED}{code_dir.name}-{time.monotonic_ns():x}")
        try:
            os.rename(code_dir, doomed)
        except FileNotFoundError:
            self._remove_home(code_dir.parent)
        except OSError as error:
            log.warning("the old version %s cannot be removed before the next start: %s", code_dir, error)
        else:
            self._to_delete.put(doomed)

    def _remove_home(self, home: Path) -> None:
        """When it is empty and nobody is about to put something there."""
        if not any(path.parent == home for path in self._in_use):
            with contextlib.suppress(OSError):
                home.rmdir()

    def _delete_obsolete(self) -> None:
        while (doomed := self._to_delete.get()) is not None:
            discard(doomed)
            with self._lock:
                self._remove_home(doomed.parent)

    def _unpack(self, spec: FunctionSpec, archive: archives.Archive, target: Path) -> None:
        fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=_FRESH))
        try:
            archives.unpack(archive, spec.handler, fresh)
            _check_handler(spec, fresh)
            # A power cut must not leave files of the right names and sizes that are full of zeros.
            sync_file_system(fresh)
            with self._lock:
                if not target.is_dir():  # else the same code came twice at once
                    os.rename(fresh, target)
                    return
        except BaseException:
            discard(fresh)
            raise
        discard(fresh)

    def _make_home(self, home: Path) -> None:
        if sys.platform == "win32" and is_device(home.name):
            raise InvalidInput(f"{home.name} is the name of a device on Windows: rename the function")
        if _folds_case():
            # Not by asking for the directory: there it is the other one's.
            here = [other for other in os.listdir(self._directory) if other.casefold() == home.name.casefold()]
            if here and home.name not in here:
                raise InvalidInput(f"{home.name} and {here[0]} are one directory on this agent's system: rename one")
        home.mkdir(mode=0o711, exist_ok=True)
        os.chmod(home, 0o711)

    def _save(self, installed: Installed) -> None:
        home = self._directory / installed.spec.name
        data = {
            "spec": installed.spec.to_json(),
            "spec_digest": installed.spec_digest,
            "code_digest": installed.code_digest,
            "files": installed.files,
            "bytes": installed.bytes,
        }
        with self._lock:
            self._make_home(home)
            # Nobody removes a home that has something in it.
            descriptor, temporary = tempfile.mkstemp(dir=home, prefix=".spec-")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(data, file)
                file.flush()
                os.fsync(file.fileno())
            with self._lock:
                os.replace(temporary, home / _SPEC)
                self._installed[installed.spec.name] = installed
                self.revision += 1
        except BaseException:
            os.unlink(temporary)
            raise

    def _load(self) -> None:
        for home in sorted(self._directory.iterdir()):
            installed = _read(home)
            if installed is None:
                log.warning("%s holds no readable function: removed", home)
                discard(home)
                continue
            self._installed[home.name] = installed
            for entry in list(home.iterdir()):
                # What an interrupted deploy or removal left.
                if entry.name not in (_SPEC, installed.code_digest):
                    discard(entry) if entry.is_dir() else entry.unlink()


def check_names(spec: FunctionSpec) -> None:
    """Raises InvalidInput for what cannot be a path or a variable: a legacy Flux checks nothing."""
    problems = {
        "name": name_problem(spec.name),
        "handler": handler_problem(spec.handler),
        "env": env_problem(spec.env),
    }
    for what, problem in problems.items():
        if problem is not None:
            raise InvalidInput(f"the function's {what} {problem}")


def _read(home: Path) -> Installed | None:
    try:
        data = json.loads((home / "spec.json").read_text())
        spec = FunctionSpec.from_json(data["spec"])
        check_names(spec)
        if spec.name != home.name:
            return None
        code_dir = home / data["code_digest"]
        found = _measure(code_dir) if data["code_digest"] and code_dir.is_dir() else (0, 0)
        if not data["code_digest"] or found != (data["files"], data["bytes"]) or not _is_file(code_dir, spec.handler):
            if data["code_digest"]:
                log.warning("the code in %s is incomplete: it has to be deployed again", home)
            return Installed(spec, data["spec_digest"])
        return Installed(spec, data["spec_digest"], data["code_digest"], code_dir, *found)
    except (OSError, ValueError, KeyError, TypeError, InvalidInput):
        return None


def _check_handler(spec: FunctionSpec, code_dir: Path) -> None:
    """Raises InvalidInput, OSError."""
    check_runs_on(spec, head_of(code_dir.joinpath(*spec.handler.split("/")), spec.handler), this_platform())


def _is_file(directory: Path, handler: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(directory.joinpath(*handler.split("/"))).st_mode)
    except OSError:
        return False


def _measure(directory: Path) -> tuple[int, int]:
    """(files, their bytes together): what an incomplete copy does not have."""
    sizes = [os.lstat(os.path.join(top, name)).st_size for top, _, names in os.walk(directory) for name in names]
    return len(sizes), sum(sizes)


def sync_file_system(directory: Path) -> None:
    """Until what was written below ``directory`` is on the disk: one call, whatever the number of files."""
    if not sys.platform.startswith("linux"):
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), os.fspath(directory))
    finally:
        os.close(fd)


def _folds_case() -> bool:
    return sys.platform in ("win32", "darwin")
