"""What a profile says of the start of one job, and its standard input."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

# Who a function without an account is to the programs that ask by USER and LOGNAME.
_NO_ACCOUNT = "function"


@functools.lru_cache(1024)
def user_name(uid: int) -> str:
    """The account's name of a numeric user, -1 for the agent's own."""
    import pwd

    try:
        return pwd.getpwuid(uid if uid >= 0 else os.geteuid()).pw_name
    except KeyError:
        return _NO_ACCOUNT


@dataclass
class Launch:
    """One job as the spawner is asked for it. ``plan`` is the profile's own."""

    uid: int = -1
    gid: int = -1
    cwd: str = "/"
    program: str = ""  # argv[0] as the program sees it; empty = as the job says
    home: str = ""
    tmp: str = "/tmp"
    rlimits: dict[int, int] = field(default_factory=dict)
    directory: str = ""  # the private work directory on disk, empty when it has none there
    plan: Any = None  # for the spawner's launcher
    fds: tuple[int, ...] = ()  # what goes with the plan; stays the profile's
    own: Any = None  # what the profile needs again at the end


def as_file(data: bytes) -> int:
    """Standard input as a file of its own: nothing has to be fed, so nothing can block."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
