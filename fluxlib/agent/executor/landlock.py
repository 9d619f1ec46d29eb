"""Landlock: an allow-list of directories, for profiles strict and minimal.

Without it a function reads what every user may read. The shared directories are
opened once; per run only the function's own are added.
"""

from __future__ import annotations

import os

from fluxlib.agent.executor import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE = 1 << 14  # ABI 3
_IOCTL_DEV = 1 << 15  # ABI 5
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# The rights each ABI knows, first to last: 13, refer, truncate, network, ioctl.
_RIGHTS = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
_SCOPES_SINCE = 6
_ABSTRACT_SOCKETS_AND_SIGNALS = 3

READABLE = (
    *(b"/usr", b"/lib", b"/lib32", b"/lib64", b"/bin", b"/sbin", b"/opt", b"/etc", b"/proc"),
    *(b"/sys/devices/system", b"/sys/fs/cgroup", b"/sys/kernel/mm/transparent_hugepage"),
    *(b"/run/systemd/resolve", b"/run/resolvconf", b"/run/NetworkManager"),
)
_DEVICES = (b"/dev/null", b"/dev/zero", b"/dev/full", b"/dev/random", b"/dev/urandom")


class Landlock:
    """Prepared once, applied in each child. ``version`` is the kernel's ABI, at least 1."""

    def __init__(self, version: int) -> None:
        self._all = _RIGHTS[min(version, len(_RIGHTS) - 1)]
        self._scoped = _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPES_SINCE else 0
        device = (_READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & self._all
        self._shared = [(fd, _READ) for fd in _open_those_there(READABLE)]
        self._shared += [(fd, device) for fd in _open_those_there(_DEVICES)]

    def restrict(self, readable: Iterable[bytes], writable: Iterable[bytes]) -> None:
        """From here on this process and its children can open nothing else."""
        ruleset = syscalls.landlock_ruleset(self._all, self._scoped)
        for fd, access in self._shared:
            syscalls.landlock_allow(ruleset, fd, access)
        for paths, access in ((readable, _READ), (writable, self._all)):
            for path in paths:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                syscalls.landlock_allow(ruleset, fd, access)
                os.close(fd)
        syscalls.landlock_restrict_self(ruleset)


def _open_those_there(paths: Iterable[bytes]) -> list[int]:
    found: dict[tuple[int, int], int] = {}
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        status = os.fstat(fd)
        # /lib is a link to /usr/lib on most systems, which /usr covers; equal ones need one rule.
        if found.setdefault((status.st_dev, status.st_ino), fd) != fd:
            os.close(fd)
    return list(found.values())
