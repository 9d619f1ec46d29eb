"""The flux.yaml of a first start: a random key, the embedded store, everything beside the file."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from fluxlib.config.files import system_directory
from fluxlib.errors import ConfigInvalid

_BESIDE = "flux-data"


def random_key() -> str:
    """160 random bits that YAML, shells and HTTP headers all take as they are."""
    return f"flux_{secrets.token_hex(20)}"


def make_flux_yaml(path: Path, *, data: str | None = None, **settings: str | int | bool) -> bool:
    """Write ``path`` unless it exists; whether it did. Raises ConfigInvalid when it cannot be written.

    ``data`` is the directory of state and certificates, seen from the file; by default one beside it, and the
    platform's own directories where the packages of Flux keep their configuration.
    """
    if data is None:
        installed = path.absolute().parent == system_directory("flux")
        data = "" if installed else _BESIDE
    if data:
        settings |= {"state_dir": f"{data}/state", "certs_dir": f"{data}/certs"}
    lines = [
        "# Made by Flux on its first start. Every setting there is, with its default and reason:",
        "# `flux check-config --settings`. Anybody who has this key may do everything.",
        f"api_key: {random_key()}",
        *(f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()),
    ]
    return write_new(path, "\n".join(lines) + "\n")


def write_new(path: Path, text: str) -> bool:
    """A new private file (0600), all of it or nothing; False when there is one already, which stays as it is."""
    try:
        if path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            return _give_name(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be written: {error.strerror or error}") from error


def _give_name(temporary: str, path: Path) -> bool:
    """Never over a file that appeared meanwhile: of two first starts at once, one makes the key."""
    try:
        if os.name == "nt":
            os.rename(temporary, path)  # fails there when the name is taken
        else:
            os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # No hard links here (FAT, some network shares): the check before has to do.
        os.replace(temporary, path)
    return True
