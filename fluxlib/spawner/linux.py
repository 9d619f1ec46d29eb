"""Linux system calls that Python has no function for, by ctypes, for x86-64 and arm64.

Two kinds. Some are made at once and raise OSError. The others return a ``Call``: the function with its arguments
already converted, which ``make`` makes here and a child makes from a list. A child shares every page with the spawner
until it writes to it, and a page that it reads code from or counts a reference in costs it a fault: what it does in
Python costs ten times what it costs the spawner.

All go through PyDLL, which keeps the interpreter's lock: the spawner has one thread, and its child between clone and
exec must not wait for a lock that no thread is left to give back. C library functions are used where there are some,
because call numbers differ between machines. Numbers and structures: Linux's include/uapi (linux/sched.h,
linux/mount.h, linux/landlock.h, linux/prctl.h, linux/capability.h, asm/unistd.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from ctypes import byref, c_char_p, c_int, c_long, c_uint, c_uint16, c_uint32, c_uint64, c_ulong, c_void_p

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is a tenth of this process
    from collections.abc import Callable
    from typing import Any

    # The function, which returns less than 0 and sets errno when it fails, and its arguments.
    Call = tuple[Callable[..., int], tuple[Any, ...]]

MACHINE = os.uname().machine

# The same on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _CLONE3, _CLOSE_RANGE, _MOUNT_SETATTR = 428, 429, 435, 436, 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_PIVOT_ROOT, _CLONE = {"x86_64": (155, 56), "aarch64": (41, 220)}.get(MACHINE, (-1, -1))

CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWNET = 0x4000_0000
_CLONE_INTO_CGROUP = 0x2_0000_0000
# The parent waits until the child has become another program or ended. Until then each page that it writes to has to be
# copied, because the child shares it: going on meanwhile costs more than the wait.
_CLONE_VFORK = 0x4000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4
MOUNT_ATTR_NOEXEC = 8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_CLOSE_RANGE_CLOEXEC = 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SECCOMP_MODE_FILTER = 2

_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

_CAPABILITY_VERSION_3 = 0x2008_0522
CAP_SYS_RESOURCE = 24
CAP_NET_ADMIN = 12

_SIOCSIFFLAGS = 0x8914
_IFF_UP_AND_RUNNING = 0x41
_AF_INET, _SOCK_DGRAM = 2, 2

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = [c_void_p, c_ulong, c_int, c_int, c_int, c_long]
# Found here, not in every child anew.
_syscall, _dup2, _setsid, _chdir, _execve = _libc.syscall, _libc.dup2, _libc.setsid, _libc.chdir, _libc.execve
_prctl, _unshare, _mount, _umount, _fork = _libc.prctl, _libc.unshare, _libc.mount, _libc.umount2, _libc.fork
_setresuid, _setresgid, _capset = _libc.setresuid, _libc.setresgid, _libc.capset
_sigprocmask, _socket, _ioctl = _libc.sigprocmask, _libc.socket, _libc.ioctl
_prlimit = getattr(_libc, "prlimit64", None) or _libc.prlimit
_syscall.restype = c_long

_HERE = c_int.from_param(_AT_FDCWD)
_FLUX = c_char_p.from_param(b"flux")
_EMPTY = c_char_p.from_param(b"")
_NONE = c_ulong.from_param(0)
_NO_SIGNALS = (c_uint64 * 16)()  # a sigset_t


class _CloneArgs(ctypes.Structure):
    """struct clone_args, as of Linux 5.7."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    ]


class _MountAttributes(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = [(name, c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = [("allowed_access", c_uint64), ("parent_fd", ctypes.c_int32)]


class _RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr, as of ABI 6."""

    _fields_ = [("handled_access_fs", c_uint64), ("handled_access_net", c_uint64), ("scoped", c_uint64)]


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", c_uint32), ("pid", c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [("effective", c_uint32), ("permitted", c_uint32), ("inheritable", c_uint32)]


class _InterfaceRequest(ctypes.Structure):
    """struct ifreq with flags."""

    _fields_ = [("name", ctypes.c_char * 16), ("flags", ctypes.c_short), ("rest", ctypes.c_char * 22)]


class FilterProgram(ctypes.Structure):
    """struct sock_fprog; keep the buffer alive as long as this."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", c_void_p)]


# Made once: a child that makes a type pays for every page it touches doing so.
_OWN_CAPABILITIES = _CapHeader(_CAPABILITY_VERSION_3, 0)
_NO_CAPABILITIES = (_CapData * 2)()
_LOOPBACK_UP = _InterfaceRequest(b"lo", _IFF_UP_AND_RUNNING)
_clone_args = _CloneArgs()
_FORK_CALL = (
    c_long.from_param(_CLONE),
    c_ulong.from_param(_CLONE_VFORK | signal.SIGCHLD),
    *[c_ulong.from_param(0)] * 4,
)
_CLONE3_CALL = (c_long.from_param(_CLONE3), byref(_clone_args), c_ulong.from_param(ctypes.sizeof(_clone_args)))


def make(call: Call) -> int:
    """In this process. Raises OSError."""
    function, arguments = call
    return _checked(function(*arguments), "")


def _checked(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}" if name else os.strerror(number))
    return int(result)


def _call(name: str, number: int, *arguments: object) -> int:
    return _checked(_syscall(c_long(number), *arguments), name)


# -- processes -----------------------------------------------------------------------------


def clone3_is_there() -> bool:
    """False where a filter hides it; asks with an argument too short to start anything."""
    try:
        _call("clone3", _CLONE3, None, c_ulong(0))
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def clone(flags: int, cgroup: int) -> int:
    """Fork into namespaces and the cgroup whose directory ``cgroup`` is; 0 in the child, its process ID in the parent.

    The child is born in its cgroup: at no time does it run outside its limits. -1 for none is a plain fork.

    Only for a process with one thread, whose child becomes another program soon. Then no lock of the interpreter's can
    be held by another thread, and what os.fork does about them (PyOS_BeforeFork, PyOS_AfterFork_Child) is left out: it
    would double the price, mostly in pages copied for it.
    """
    # Nothing is made for the calls: the child would pay for the pages it touches to free it.
    if cgroup < 0:
        pid = _syscall(*_FORK_CALL) if _CLONE >= 0 else _fork()
        return _checked(pid, "fork") if pid < 0 else int(pid)
    _clone_args.flags = flags | _CLONE_INTO_CGROUP | _CLONE_VFORK
    _clone_args.exit_signal, _clone_args.cgroup = signal.SIGCHLD, cgroup
    pid = _syscall(*_CLONE3_CALL)
    return _checked(pid, "clone3") if pid < 0 else int(pid)


def shared_numbers(count: int) -> ctypes.Array[ctypes.c_uint16]:
    """``count`` numbers of 16 bits, 0 at first, in memory that children share until they become programs."""
    kind = c_uint16 * count
    read_write, anonymous_shared = 3, 0x21
    address = _libc.mmap(None, ctypes.sizeof(kind), read_write, anonymous_shared, -1, 0)
    if address in (None, c_void_p(-1).value):
        _checked(-1, "mmap")
    return kind.from_address(address)


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


def change_directory(path: str) -> Call:
    return _chdir, (os.fsencode(path),)


def close_range_on_exec(first: int) -> Call:
    """Every descriptor from ``first`` on is closed by exec."""
    every = c_uint.from_param(0xFFFF_FFFF)
    arguments = (c_uint.from_param(first), every, c_uint.from_param(_CLOSE_RANGE_CLOEXEC))
    return _syscall, (c_long.from_param(_CLOSE_RANGE), *arguments)


def execute(argv: list[bytes], env: dict[bytes, bytes]) -> Call:
    """Raises ValueError for what C cannot be handed: a NUL anywhere, a variable's name that is empty or has a =."""
    variables = [b"%s=%s" % item for item in env.items()]
    if any(b"\0" in word for word in (*argv, *variables)) or not all(name and b"=" not in name for name in env):
        raise ValueError("a program's arguments or environment")
    return _execve, (argv[0], _strings(argv), _strings(variables))


def _strings(words: list[bytes]) -> Any:
    return byref((c_char_p * (len(words) + 1))(*words))


# -- privileges ----------------------------------------------------------------------------


def has_capability(number: int) -> bool:
    """Whether it is in effect here; False where there is no /proc to ask."""
    try:
        with open("/proc/self/status", "rb") as file:
            for line in file:
                if line.startswith(b"CapEff:"):
                    return bool(int(line.split()[1], 16) >> number & 1)
    except OSError:
        pass
    return False


def drop_bounding_set() -> None:
    """No program started from here on can gain any capability, whatever its file says."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        make(prctl(_PR_CAPBSET_DROP, capability))
    make(prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL))


def become_user(uid: int, gid: int) -> tuple[Call, Call]:
    """The group first, while that may be done."""
    user, group = c_uint.from_param(uid), c_uint.from_param(gid)
    return (_setresgid, (group, group, group)), (_setresuid, (user, user, user))


def clear_capabilities() -> Call:
    addresses = (ctypes.addressof(_OWN_CAPABILITIES), ctypes.addressof(_NO_CAPABILITIES))
    return _capset, tuple(c_void_p.from_param(address) for address in addresses)


def prctl(option: int, first: int, second: int = 0) -> Call:
    return _prctl, (option, c_ulong.from_param(first), c_ulong.from_param(second), _NONE, _NONE)


def install_filter(program: FilterProgram) -> Call:
    """By prctl: seccomp(2) is outside what systemd's @system-service allows."""
    return _prctl, (_PR_SET_SECCOMP, c_ulong.from_param(_SECCOMP_MODE_FILTER), byref(program))


# -- namespaces and mounts -----------------------------------------------------------------


def unshare(flags: int) -> Call:
    return _unshare, (flags,)


def raise_loopback() -> Call:
    """Switch the namespace's own loopback interface on, which also gives it 127.0.0.1 and ::1."""
    return _raise_loopback, ()


def _raise_loopback() -> int:
    fd = _socket(_AF_INET, _SOCK_DGRAM | os.O_CLOEXEC, 0)
    return int(fd if fd < 0 else _ioctl(fd, c_ulong(_SIOCSIFFLAGS), byref(_LOOPBACK_UP)))


def mount(kind: bytes, target: bytes, flags: int, options: bytes | None = None) -> Call:
    """A new file system of ``kind`` at ``target``."""
    return _mount, (_FLUX, target, kind, c_ulong.from_param(flags), options)


def unmount(target: bytes) -> Call:
    return _umount, (target, _MNT_DETACH)


def make_private() -> Call:
    """Nothing mounted or unmounted elsewhere comes into this namespace any more, and nothing goes out."""
    return _mount, (None, b"/", None, c_ulong.from_param(_MS_REC | _MS_PRIVATE), None)


def pivot_root() -> Call:
    """The working directory becomes the root; what was the root lies on top of it until it is unmounted."""
    return _syscall, (c_long.from_param(_PIVOT_ROOT), c_char_p.from_param(b"."), c_char_p.from_param(b"."))


def open_tree(path: bytes, *, recursive: bool = False) -> int:
    """A detached copy of the mount at ``path``; a descriptor. Raises OSError."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _call("open_tree", _OPEN_TREE, c_int(_AT_FDCWD), c_char_p(path), c_uint(flags))


def attach(tree: int, target: bytes) -> Call:
    """Attach what ``open_tree`` gave."""
    how = c_uint.from_param(_MOVE_MOUNT_F_EMPTY_PATH)
    return _syscall, (c_long.from_param(_MOVE_MOUNT), tree, _EMPTY, _HERE, target, how)


def set_attributes(where: bytes | int, attributes: int, *, clear: int = 0, recursive: bool = False) -> Call:
    """Set and clear MOUNT_ATTR_* of the mount at a path or that ``open_tree`` gave, and of all below it."""
    wanted = _MountAttributes(attr_set=attributes, attr_clr=clear)
    flags = c_uint.from_param((_AT_RECURSIVE if recursive else 0) | (_AT_EMPTY_PATH if isinstance(where, int) else 0))
    place = (where, _EMPTY) if isinstance(where, int) else (_HERE, where)
    size = c_ulong.from_param(ctypes.sizeof(wanted))
    return _syscall, (c_long.from_param(_MOUNT_SETATTR), *place, flags, byref(wanted), size)


# -- Landlock ------------------------------------------------------------------------------


def landlock_version() -> int:
    """The ABI of this kernel's Landlock, 0 when it is not there or switched off."""
    flags = c_uint(_LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, int(_syscall(c_long(_LANDLOCK_CREATE_RULESET), None, c_ulong(0), flags)))


def landlock_ruleset(handled_files: int, scoped: int) -> int:
    """A new ruleset's descriptor. ``scoped`` needs ABI 6."""
    attr = _RulesetAttr(handled_access_fs=handled_files, scoped=scoped)
    size = c_ulong(ctypes.sizeof(attr) if scoped else 8)
    return _call("landlock_create_ruleset", _LANDLOCK_CREATE_RULESET, byref(attr), size, c_uint(0))


def landlock_allow(ruleset: int, beneath: int, access: int) -> None:
    """Allow ``access`` to the file, or everything below the directory, that ``beneath`` is open on."""
    rule = _PathBeneath(access, beneath)
    kind = c_int(_LANDLOCK_RULE_PATH_BENEATH)
    _call("landlock_add_rule", _LANDLOCK_ADD_RULE, c_int(ruleset), kind, byref(rule), c_uint(0))


def landlock_restrict_self(ruleset: int) -> None:
    _call("landlock_restrict_self", _LANDLOCK_RESTRICT_SELF, c_int(ruleset), c_uint(0))
