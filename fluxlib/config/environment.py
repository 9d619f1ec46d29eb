"""The few environment variables Flux reads, and the one it sets. Nowhere else is the environment touched."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

# Where systemd hears of this process after its start; programs that it starts do not see it.
_told_later: dict[str, str] = {}


def config_path(variable: str, default: str) -> Path:
    """``FLUX_CONFIG`` or ``AGENT_CONFIG``, else ``default`` in the working directory."""
    return Path(os.environ.get(variable) or default)


def is_named(variable: str) -> bool:
    """Whether somebody named the file, so that a missing one is a mistake."""
    return bool(os.environ.get(variable))


def prepare_grpc() -> None:
    """Must run before grpc is imported: its fork handlers crash children of a threaded process."""
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def under_journald() -> bool:
    """systemd sets this when standard error goes to the journal, which stamps lines itself."""
    return "JOURNAL_STREAM" in os.environ


def report_ready() -> None:
    """Tell systemd, when it started this process (Type=notify), that it now serves."""
    _notify("READY=1")
    _told_later["socket"] = os.environ.pop("NOTIFY_SOCKET", "")


def report_alive(status: str) -> None:
    """Tell systemd that this process does not hang (WatchdogSec=), and what ``systemctl status`` is to show."""
    _notify(f"WATCHDOG=1\nSTATUS={status}", to=_told_later.get("socket", ""))


def inherited_sockets() -> dict[str, socket.socket]:
    """The sockets that systemd handed on to this process (LISTEN_FDS), by name; the caller's to close.

    They are those ``keep_sockets`` gave it in the process before this one, or those of a .socket unit.
    """
    count, process = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if sys.platform == "win32" or process != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, socket.socket] = {}
    for number in range(3, 3 + int(count)):  # sd_listen_fds(3): SD_LISTEN_FDS_START
        os.set_inheritable(number, False)
        name = names[number - 3] if number - 3 < len(names) else ""
        try:
            found[name or f"unnamed-{number}"] = socket.socket(fileno=number)
        except OSError:
            os.close(number)  # not a socket
    return found


def keep_sockets(sockets: Mapping[str, socket.socket], unused: Iterable[str]) -> None:
    """Have systemd hold these listening sockets over a restart, so that nobody else gets their port meanwhile.

    ``unused`` names those it is to close. Does nothing without systemd, or where the unit has no
    FileDescriptorStoreMax=.
    """
    for name in unused:
        _notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
    for name, one in sockets.items():
        _notify(f"FDSTORE=1\nFDNAME={name}", one.fileno())


def _notify(state: str, *descriptors: int, to: str = "") -> None:
    path = to or os.environ.get("NOTIFY_SOCKET", "")
    if sys.platform == "win32" or not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        socket.send_fds(notify, [state.encode()], descriptors)


def for_child(**changes: str) -> dict[str, str]:
    """This process's environment with changes, for a program of ours started beside it."""
    return {**os.environ, **changes}


def state_directory() -> Path | None:
    """Where systemd's ``StateDirectory=`` says that state belongs; None outside such a unit."""
    first = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(first) if first else None


def program_data() -> Path:
    """Where Windows keeps what all users share."""
    return Path(os.environ.get("PROGRAMDATA") or r"C:\ProgramData")


def program_files() -> Path:
    """Where Windows keeps programs only administrators may change."""
    return Path(os.environ.get("PROGRAMFILES") or r"C:\Program Files")


def windows_basics() -> dict[str, str]:
    """What Windows programs cannot start without, from this machine; of PATH only the system's own part."""
    names = (
        *("SystemRoot", "SystemDrive", "windir", "ComSpec", "PATHEXT", "NUMBER_OF_PROCESSORS"),
        *("PROCESSOR_ARCHITECTURE", "ProgramData", "ProgramFiles", "ProgramFiles(x86)", "ProgramW6432"),
    )
    basics = {name: os.environ[name] for name in names if name in os.environ}
    # What programs ask for the user, the machine and the common directory; a service may have none of them.
    basics["USERNAME"] = os.environ.get("USERNAME") or "flux"
    basics["COMPUTERNAME"] = os.environ.get("COMPUTERNAME") or socket.gethostname().partition(".")[0].upper()
    basics["PUBLIC"] = os.environ.get("PUBLIC") or basics.get("SystemDrive", "C:") + r"\Users\Public"
    root = basics.setdefault("SystemRoot", r"C:\Windows")
    path = (r"\system32", "", r"\System32\Wbem", r"\System32\WindowsPowerShell\v1.0")
    return basics | {"PATH": ";".join(root + part for part in path)}


def function_basics() -> dict[str, str]:
    """What every function's environment begins with."""
    # Unbuffered: what Python prints is there in order, at once, and not lost when the program is stopped.
    unbuffered = {"PYTHONUNBUFFERED": "1"}
    if sys.platform == "win32":
        # What comes in is UTF-8 and what goes out is read as UTF-8, whatever the machine's code page.
        return windows_basics() | unbuffered | {"PYTHONIOENCODING": "utf-8"}
    path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    return path | {"LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"} | unbuffered
