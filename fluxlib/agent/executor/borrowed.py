"""Starting a program as another user and under limits of its own, without a fork: profile ``off``.

posix_spawn has attributes for neither, so the spawner takes both on for the
moment of the call. No code of ours runs between fork and exec. Standard library
only: it is part of the spawner.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal

_CAP_SYS_RESOURCE = 24
# Enough for the spawner itself: with fewer it could not even be handed the next program's pipe.
_OWN_FILES = 256
# That moment is long when the machine is busy. 0 lets others run.
_PAUSES_MS = (0,) * 20 + (1,) * 200
# Named, so that glibc sets each without asking for it first: 60 system calls of the child less.
_ALL_SIGNALS = tuple(signal.valid_signals())


class Borrowed:
    """The spawner's own identity and limits, lent to each program. Build it once."""

    def __init__(self) -> None:
        self._root = os.geteuid() == 0
        self._may_raise = self._root and _has_capability(_CAP_SYS_RESOURCE)
        self._limits: dict[int, tuple[int, int]] = {}
        self._group = 0

    def spawn(
        self,
        argv: list[bytes],
        env: dict[bytes, bytes],
        cwd: str,
        uid: int,
        gid: int,
        rlimits: dict[int, int],
        stdin: int,
        output: int,
    ) -> int:
        """The program's process; ``stdin`` -1 leaves it this process's own, which is /dev/null.

        Raises OSError, ValueError for words that no program can be given.
        """
        # Each time: a directory of the same name may be another one by now.
        os.chdir(cwd)
        # Each action costs glibc two questions for the limit of open files, and the child a call.
        actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
        if stdin >= 0:
            actions.append((os.POSIX_SPAWN_DUP2, stdin, 0))
        borrowed = self._root and uid > 0
        try:
            for which, value in rlimits.items():
                self._limit(which, value)
            if borrowed:
                # The saved IDs stay 0, so that they can be taken back; exec overwrites the child's.
                if gid != self._group:
                    # Kept: root is root in any group.
                    os.setresgid(gid, gid, 0)
                    self._group = gid
                os.setresuid(uid, uid, 0)
            pid = os.posix_spawn(
                argv[0], argv, env, file_actions=actions, setsid=True, setsigmask=(), setsigdef=_ALL_SIGNALS
            )
            if not self._may_raise:
                self._lower_hard_limits(pid, rlimits)
            return pid
        finally:
            if borrowed:
                os.setresuid(0, 0, 0)
            if rlimits.get(resource.RLIMIT_NOFILE, _OWN_FILES) < _OWN_FILES:
                self._limit(resource.RLIMIT_NOFILE, _OWN_FILES)

    def _limit(self, which: int, value: int) -> None:
        """For what is started next; soft and hard where this process can take that back afterwards."""
        soft, hard = self._limits.get(which) or resource.getrlimit(which)
        if self._may_raise:
            wanted = (value, value)
        else:
            wanted = (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
        if wanted != (soft, hard):
            resource.setrlimit(which, wanted)
            self._limits[which] = wanted

    @staticmethod
    def _lower_hard_limits(pid: int, rlimits: dict[int, int]) -> None:
        """From outside, as the same user: soft ones alone the program could raise again. Linux only."""
        if not hasattr(resource, "prlimit"):
            return
        for which, value in rlimits.items():
            for pause_ms in _PAUSES_MS:
                try:
                    resource.prlimit(pid, which, (value, value))
                    break
                except PermissionError:
                    # The kernel lets the parent of a vfork go on a moment before exec gives the child its identity.
                    select.poll().poll(pause_ms)
                except OSError:
                    break  # it has ended


def _has_capability(number: int) -> bool:
    """Root in a container often lacks some. False where there is no /proc to ask."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False
