"""What the agent holds: each function's spec and the versions of its code.

    functions/<name>/spec.json          what was registered, and which version is current
    functions/<name>/<code digest>/     one unpacked version
    functions/<name>/.new-…             a version being unpacked; removed at the next start

A version is unpacked beside the old one and becomes current by the atomic
replacement of spec.json. An old one is removed when nothing runs from it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fluxlib import archive as archives
from fluxlib.config.function import handler_problem, name_problem
from fluxlib.errors import InvalidInput, NotFound
from fluxlib.model import FunctionSpec, FunctionState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Installed:
    """A function as it stands. ``code_dir`` is None until code was deployed."""

    spec: FunctionSpec
    spec_digest: str
    code_digest: str = ""
    code_dir: Path | None = None


class Packages:
    """The functions of this agent. Safe from any thread; reading takes no lock."""

    def __init__(self, directory: Path, owner: tuple[int, int] = (-1, -1)) -> None:
        self._directory = directory
        self._owner = owner
        self._lock = threading.Lock()
        self._installed: dict[str, Installed] = {}
        self._in_use: Counter[Path] = Counter()
        self._obsolete: set[Path] = set()
        self.revision = 0
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        # The functions' users must be able to walk to their code, and not to list the others'.
        os.chmod(directory, 0o711)
        self._load()

    def get(self, name: str) -> Installed | None:
        return self._installed.get(name)

    def states(self) -> tuple[FunctionState, ...]:
        return tuple(
            FunctionState(name, installed.spec_digest, installed.code_digest)
            for name, installed in sorted(self._installed.items())
        )

    def register(self, spec: FunctionSpec, spec_digest: str) -> Installed:
        """A new or changed spec. Raises InvalidInput when the code that is here lacks its handler."""
        check_names(spec)
        with self._lock:
            known = self._installed.get(spec.name)
            code_dir = known.code_dir if known else None
            if code_dir is not None and not _is_file(code_dir, spec.handler):
                raise InvalidInput(f"the deployed code of {spec.name} has no {spec.handler}: deploy a zip that has it")
            installed = Installed(spec, spec_digest, known.code_digest if known else "", code_dir)
            self._save(installed)
            return installed

    def deploy(self, spec: FunctionSpec, spec_digest: str, code_digest: str, archive: bytes) -> Installed:
        """New code with its spec. Raises InvalidInput; then nothing has changed."""
        check_names(spec)
        actual = archives.digest_of(archive)
        if code_digest and code_digest != actual:
            raise InvalidInput(f"the code of {spec.name} arrived damaged: its SHA-256 is not what Flux said")
        home = self._directory / spec.name
        target = home / actual
        if not target.is_dir():
            home.mkdir(mode=0o755, exist_ok=True)
            os.chmod(home, 0o755)
            fresh = Path(tempfile.mkdtemp(dir=home, prefix=".new-"))
            try:
                archives.unpack(archive, spec.handler, fresh)
                self._give_away(fresh)
                with self._lock:
                    self._obsolete.discard(target)
                    if target.is_dir():
                        shutil.rmtree(fresh)  # the same code came twice at once
                    else:
                        os.replace(fresh, target)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
        elif not _is_file(target, spec.handler):
            raise InvalidInput(f"the handler {spec.handler} is not in the zip")
        with self._lock:
            before = self._installed.get(spec.name)
            installed = Installed(spec, spec_digest, actual, target)
            self._save(installed)
            if before is not None and before.code_dir is not None and before.code_dir != target:
                self._retire(before.code_dir)
        return installed

    def remove(self, name: str) -> None:
        """Raises NotFound. What runs from it goes on to its end."""
        with self._lock:
            known = self._installed.pop(name, None)
            if known is None:
                raise NotFound(f"function {name} is not here")
            (self._directory / name / "spec.json").unlink(missing_ok=True)
            self.revision += 1
            if known.code_dir is not None:
                self._retire(known.code_dir)

    def acquire(self, name: str) -> Installed | None:
        """The function with its version held: it is not removed before ``release``."""
        with self._lock:
            installed = self._installed.get(name)
            if installed is not None and installed.code_dir is not None:
                self._in_use[installed.code_dir] += 1
            return installed

    def release(self, code_dir: Path) -> None:
        with self._lock:
            self._in_use[code_dir] -= 1
            if self._in_use[code_dir] <= 0:
                del self._in_use[code_dir]
                if code_dir in self._obsolete:
                    self._delete(code_dir)

    # -- on disk -------------------------------------------------------------------

    def _retire(self, code_dir: Path) -> None:
        self._obsolete.add(code_dir)
        if not self._in_use[code_dir]:
            self._delete(code_dir)

    def _delete(self, code_dir: Path) -> None:
        self._obsolete.discard(code_dir)
        shutil.rmtree(code_dir, ignore_errors=True)
        home = code_dir.parent
        if not any(home.iterdir()):
            home.rmdir()

    def _save(self, installed: Installed) -> None:
        home = self._directory / installed.spec.name
        home.mkdir(mode=0o755, exist_ok=True)
        os.chmod(home, 0o755)
        data = {
            "spec": installed.spec.to_json(),
            "spec_digest": installed.spec_digest,
            "code_digest": installed.code_digest,
        }
        descriptor, temporary = tempfile.mkstemp(dir=home, prefix=".spec-")
        with os.fdopen(descriptor, "w") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, home / "spec.json")
        self._installed[installed.spec.name] = installed
        self.revision += 1

    def _load(self) -> None:
        for home in sorted(self._directory.iterdir()):
            installed = _read(home)
            for entry in home.iterdir():
                current = installed is not None and entry.name == installed.code_digest
                if entry.is_dir() and not current:
                    shutil.rmtree(entry, ignore_errors=True)
            if installed is not None:
                self._installed[home.name] = installed
            else:
                log.warning("%s holds no readable function: removed", home)
                shutil.rmtree(home, ignore_errors=True)

    def _give_away(self, directory: Path) -> None:
        """Code belongs to a user no function runs as, so that none can give itself write access."""
        if self._owner[0] < 0:
            return
        for path in [directory, *directory.rglob("*")]:
            os.chown(path, *self._owner, follow_symlinks=False)


def check_names(spec: FunctionSpec) -> None:
    """Raises InvalidInput for names that cannot be paths: an original Flux checks nothing."""
    for what, problem in (("name", name_problem(spec.name)), ("handler", handler_problem(spec.handler))):
        if problem is not None:
            raise InvalidInput(f"the function's {what} {problem}")


def _read(home: Path) -> Installed | None:
    try:
        data = json.loads((home / "spec.json").read_text())
        spec = FunctionSpec.from_json(data["spec"])
        check_names(spec)
        code_dir = home / data["code_digest"] if data["code_digest"] else None
        if spec.name != home.name:
            return None
        if code_dir is not None and not code_dir.is_dir():
            return Installed(spec, data["spec_digest"])
        return Installed(spec, data["spec_digest"], data["code_digest"], code_dir)
    except (OSError, ValueError, KeyError, TypeError, InvalidInput):
        return None


def _is_file(directory: Path, handler: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(directory.joinpath(*handler.split("/"))).st_mode)
    except OSError:
        return False
