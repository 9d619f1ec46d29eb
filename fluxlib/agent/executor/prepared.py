"""System calls that the spawner makes ready and its child only makes.

A child shares every page with the spawner until it writes to it, and a page that it reads code from or
counts a reference in costs it a fault: what it does in Python costs ten times what it costs the spawner.
So the arguments are converted beforehand, and the child goes through a list (``launcher``). C library
functions where it has them, because their numbers differ between machines.
"""

from __future__ import annotations

import ctypes
import os
import signal
from ctypes import byref, c_char_p, c_int, c_long, c_uint, c_uint64, c_ulong, c_void_p

from fluxlib.agent.executor import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    # The function, which returns less than 0 and sets errno when it fails, and its arguments.
    Call = tuple[Callable[..., int], tuple[Any, ...]]

_libc = ctypes.PyDLL(None, use_errno=True)
# Found here, not in every child anew.
_syscall, _dup2, _setsid, _chdir, _execve = _libc.syscall, _libc.dup2, _libc.setsid, _libc.chdir, _libc.execve
_prctl, _unshare, _mount, _umount = _libc.prctl, _libc.unshare, _libc.mount, _libc.umount2
_setresuid, _setresgid, _capset = _libc.setresuid, _libc.setresgid, _libc.capset
_prlimit = getattr(_libc, "prlimit64", None) or _libc.prlimit
_sigprocmask = _libc.sigprocmask
_syscall.restype = c_long

_HERE = c_int.from_param(syscalls.AT_FDCWD)
_FLUX = c_char_p.from_param(b"flux")
_ATTACH = c_long.from_param(syscalls.MOVE_MOUNT)
_ATTACHED = c_uint.from_param(syscalls.MOVE_MOUNT_F_EMPTY_PATH)
_NONE = c_ulong.from_param(0)
_EMPTY = c_char_p.from_param(b"")
_NO_SIGNALS = (c_uint64 * 16)()  # a sigset_t


def make(call: Call) -> None:
    """In this process. Raises OSError."""
    function, arguments = call
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def duplicate(fd: int, target: int) -> Call:
    return _dup2, (fd, target)


def new_session() -> Call:
    return _setsid, ()


def unblock_signals() -> Call:
    """An empty mask: what the spawner blocks for itself its child inherits."""
    return _sigprocmask, (signal.SIG_SETMASK, byref(_NO_SIGNALS), None)


def limit(which: int, value: int) -> Call:
    """Both limits of the resource ``which``."""
    both = (c_uint64 * 2)(value, value)
    return _prlimit, (0, which, byref(both), None)


def become_user(uid: int) -> tuple[Call, Call]:
    """The group of the same number first, while that may be done."""
    number = c_uint.from_param(uid)
    return (_setresgid, (number, number, number)), (_setresuid, (number, number, number))


def clear_capabilities() -> Call:
    return _capset, tuple(c_void_p.from_param(address) for address in syscalls.NO_CAPABILITIES)


def prctl(option: int, first: int, second: int = 0) -> Call:
    return _prctl, (option, c_ulong.from_param(first), c_ulong.from_param(second), _NONE, _NONE)


def install_filter(program: syscalls.FilterProgram) -> Call:
    """By prctl: seccomp(2) is outside what systemd's @system-service allows."""
    return _prctl, (syscalls.PR_SET_SECCOMP, c_ulong.from_param(syscalls.SECCOMP_MODE_FILTER), byref(program))


def change_directory(path: str) -> Call:
    return _chdir, (os.fsencode(path),)


def close_range_on_exec(first: int) -> Call:
    """Every descriptor from ``first`` on is closed by exec."""
    every = c_uint.from_param(0xFFFF_FFFF)
    arguments = (c_uint.from_param(first), every, c_uint.from_param(syscalls.CLOSE_RANGE_CLOEXEC))
    return _syscall, (c_long.from_param(syscalls.CLOSE_RANGE), *arguments)


def execute(argv: list[bytes], env: dict[bytes, bytes]) -> Call:
    """Raises ValueError for what C cannot be handed: a NUL anywhere, a variable's name that is empty or has a =."""
    variables = [b"%s=%s" % item for item in env.items()]
    if any(b"\0" in word for word in (*argv, *variables)) or not all(name and b"=" not in name for name in env):
        raise ValueError("a program's arguments or environment")
    return _execve, (argv[0], _strings(argv), _strings(variables))


def _strings(words: list[bytes]) -> Any:
    return byref((c_char_p * (len(words) + 1))(*words))


# -- mounts --------------------------------------------------------------------------------


def unshare(flags: int) -> Call:
    return _unshare, (flags,)


def mount(kind: bytes, target: bytes, flags: int, options: bytes | None = None) -> Call:
    """A new file system of ``kind`` at ``target``."""
    return _mount, (_FLUX, target, kind, c_ulong.from_param(flags), options)


def unmount(target: bytes) -> Call:
    return _umount, (target, syscalls.MNT_DETACH)


def attach(tree: int, target: bytes) -> Call:
    """Attach what ``syscalls.open_tree`` gave."""
    return _syscall, (_ATTACH, tree, _EMPTY, _HERE, target, _ATTACHED)


def set_attributes(target: bytes, attributes: int, *, clear: int = 0, recursive: bool = False) -> Call:
    """Set and clear MOUNT_ATTR_* of the mount at ``target``, and of all below it."""
    wanted = syscalls.MountAttributes(attr_set=attributes, attr_clr=clear)
    flags = c_uint.from_param(syscalls.AT_RECURSIVE if recursive else 0)
    size = c_ulong.from_param(ctypes.sizeof(wanted))
    return _syscall, (c_long.from_param(syscalls.MOUNT_SETATTR), _HERE, target, flags, byref(wanted), size)
