"""Where configuration and state live, and reading a file with the reason when that fails."""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
from pathlib import Path
from typing import Any

from fluxlib.config.document import MAX_BYTES
from fluxlib.config.environment import config_path, is_named, program_data, state_directory
from fluxlib.errors import ConfigInvalid

AGENT_PORT = 50052
API_PORT = 7227
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def find_config(variable: str, name: str, package: str) -> Path:
    """The file that ``variable`` names, else ``name`` here, else the installed package's; it may not exist."""
    here = config_path(variable, name)
    # Not Path.exists, which raises where this user may not look: `sudo -u flux flux keys list` in root's directory.
    if is_named(variable) or os.path.exists(here):
        return here
    installed = system_directory(package) / name
    return installed if os.path.exists(installed) else here


# How to get a file that is missing.
_ADVICE = {
    "agent.yaml": "Make one with `flux enroll NAME` on the machine where Flux runs",
    "flux.yaml": "`flux serve` makes one on its first start",
}


def existing_config(variable: str, name: str, package: str) -> Path:
    """What `find_config` finds. Raises ConfigInvalid with the places it looked in when there is no file."""
    path = find_config(variable, name, package)
    try:
        os.stat(path)
    except FileNotFoundError as error:
        if is_named(variable):
            missing = f"there is no {path}, which {variable} names"
        else:
            missing = f"{name} was found neither in {Path.cwd()} nor in {system_directory(package)}"
        raise ConfigInvalid(f"{missing}. {_ADVICE[name]}, or set {variable} to its path") from error
    except OSError:
        pass  # reading it says why
    return path


def system_directory(package: str) -> Path:
    """Where the packages of Flux keep their configuration: ``package`` is flux or flux-agent."""
    return program_data() / package if sys.platform == "win32" else Path("/etc") / package


def read_file(path: Path) -> bytes:
    """A configuration file's bytes. Raises ConfigInvalid with the reason."""
    try:
        with path.open("rb") as file:
            # One byte more than is taken, so that the reader can say it is too large.
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigInvalid(f"there is no {path}") from error
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror or error}") from error


def absolute(path: Path, beside: Path) -> Path:
    """Relative paths count from the file that names them, not from where the program was started."""
    return path if path.is_absolute() else beside / path


def default_state_dir(package: str, beside: Path) -> Path:
    """systemd's choice, a system directory for root and installed packages, otherwise beside the configuration."""
    if sys.platform == "win32":
        return program_data() / package / "state"
    installed = os.geteuid() == 0 or beside == system_directory(package)
    return state_directory() or (Path("/var/lib") / package if installed else beside / f"{package}-state")


def default_certs_dir(beside: Path) -> Path:
    """The original's directory for root, beside the configuration otherwise."""
    if sys.platform == "win32":
        return program_data() / "flux" / "certs"
    return Path("/etc/flux/certs") if os.geteuid() == 0 else beside / "certs"


def open_to_all(path: Path) -> bool:
    """Whether every user of this machine may read the file. Windows' rights are not looked at."""
    return sys.platform != "win32" and bool(path.stat().st_mode & stat.S_IROTH)


def open_to_others(path: Path) -> bool:
    """Whether others may use a private key: every user, or the group of a file that is our own (ssh's rule)."""
    if sys.platform == "win32":
        return False
    found = path.stat()
    return bool(found.st_mode & (0o077 if found.st_uid == os.geteuid() else 0o007))


# ---- checks both files share ---------------------------------------------------


def address_problem(value: Any) -> str | None:
    """What is wrong with an address to listen on, or None."""
    if value == "localhost":
        return None
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return "must be an IP address of this machine (0.0.0.0 = all of them)"
    return None
