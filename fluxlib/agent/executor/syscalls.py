"""System calls that Python has no function for, by ctypes: x86-64 and arm64 Linux.

Every function returns what the call returns and raises OSError with its errno and
the call's name. They are made through PyDLL, which keeps the interpreter's lock:
the spawner is single-threaded, and its child between clone and exec must not wait
for a lock that no thread is left to give back.

Numbers and structures: Linux's include/uapi (linux/sched.h, linux/mount.h,
linux/landlock.h, linux/prctl.h, linux/capability.h, asm/unistd.h). Calls added
since 2019 have one number on every architecture.
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import byref, c_char_p, c_int, c_long, c_uint, c_uint32, c_uint64, c_ulong, c_void_p

MACHINE = os.uname().machine

CLONE3 = 435
CLOSE_RANGE = 436
OPEN_TREE = 428
MOVE_MOUNT = 429
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWNET = 0x4000_0000
CLONE_INTO_CGROUP = 0x2_0000_0000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 16384
MS_SLAVE = 1 << 19
MNT_DETACH = 2

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
CLOSE_RANGE_CLOEXEC = 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1

_CAPABILITY_VERSION_3 = 0x2008_0522

_libc = ctypes.PyDLL(None, use_errno=True)
# Naming a function here also finds it here, not in every child anew.
_libc.syscall.restype = c_long
_libc.umount2.argtypes = [c_char_p, c_int]
_libc.mount.argtypes = [c_char_p, c_char_p, c_char_p, c_ulong, c_char_p]
_libc.prctl.argtypes = [c_int, c_ulong, c_ulong, c_ulong, c_ulong]
_libc.unshare.argtypes = [c_int]
_libc.mmap.restype = c_void_p
_libc.mmap.argtypes = [c_void_p, c_ulong, c_int, c_int, c_int, c_long]


class _CloneArgs(ctypes.Structure):
    """struct clone_args, as of Linux 5.7."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    ]


class MountAttributes(ctypes.Structure):
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


# Made once: a child that makes a type pays for every page it touches doing so.
_OWN_CAPABILITIES = _CapHeader(_CAPABILITY_VERSION_3, 0)
_NO_CAPABILITIES = (_CapData * 2)()
# Where capset(2) finds them.
NO_CAPABILITIES = (ctypes.addressof(_OWN_CAPABILITIES), ctypes.addressof(_NO_CAPABILITIES))


class FilterProgram(ctypes.Structure):
    """struct sock_fprog; keep the buffer alive as long as this."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", c_void_p)]


def _checked(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _call(name: str, number: int, *arguments: object) -> int:
    return _checked(_libc.syscall(c_long(number), *arguments), name)


# -- processes -----------------------------------------------------------------------------


def clone3_is_there() -> bool:
    """False where a filter or an old kernel hides it; asks with an argument too short to start anything."""
    try:
        _call("clone3", CLONE3, None, c_ulong(0))
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


_clone_args = _CloneArgs()
_CLONE3 = (c_long.from_param(CLONE3), byref(_clone_args), c_ulong.from_param(ctypes.sizeof(_clone_args)))


def clone3(flags: int, exit_signal: int, cgroup: int) -> int:
    """Fork into the cgroup whose directory ``cgroup`` is; 0 in the child, its process ID in the parent.

    The child is born there: at no time does it run outside its limits.

    Only for a process with one thread, whose child becomes another program soon. Then no lock of the
    interpreter's can be held by somebody else, and what os.fork does about them (PyOS_BeforeFork,
    PyOS_AfterFork_Child) is left out: it would double the price, mostly in pages copied for it.
    """
    _clone_args.flags, _clone_args.exit_signal, _clone_args.cgroup = flags | CLONE_INTO_CGROUP, exit_signal, cgroup
    # Nothing is made for the call: the child would pay for the pages it touches to free it.
    pid = _libc.syscall(*_CLONE3)
    return _checked(pid, "clone3") if pid < 0 else int(pid)


def shared_numbers(count: int) -> ctypes.Array[ctypes.c_uint16]:
    """``count`` numbers of 16 bits, 0 at first, in memory that children share until they become programs."""
    kind = ctypes.c_uint16 * count
    read_write, anonymous_shared = 3, 0x21
    address = _libc.mmap(None, ctypes.sizeof(kind), read_write, anonymous_shared, -1, 0)
    if address in (None, c_void_p(-1).value):
        _checked(-1, "mmap")
    return kind.from_address(address)


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def prctl(option: int, first: int = 0, second: int = 0) -> int:
    return _checked(_libc.prctl(option, first, second, 0, 0), "prctl")


# -- capabilities --------------------------------------------------------------------------


def drop_bounding_set() -> None:
    """No program started from here on can gain any capability, whatever its file says."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        prctl(PR_CAPBSET_DROP, capability)


# -- mounts --------------------------------------------------------------------------------


def mount(kind: bytes, target: bytes, flags: int, options: bytes | None = None) -> None:
    """A new file system of ``kind`` at ``target``."""
    _checked(_libc.mount(b"flux", target, kind, flags, options), f"mount {os.fsdecode(target)}")


def set_propagation(target: bytes, flags: int) -> None:
    _checked(_libc.mount(None, target, None, flags, None), f"mount {os.fsdecode(target)}")


def unmount(target: bytes) -> None:
    _checked(_libc.umount2(target, MNT_DETACH), f"umount {os.fsdecode(target)}")


def open_tree(path: bytes) -> int:
    """A detached copy of the mount at ``path``, without what is mounted below it; a descriptor."""
    return _call("open_tree", OPEN_TREE, c_int(AT_FDCWD), c_char_p(path), c_uint(OPEN_TREE_CLONE | os.O_CLOEXEC))


def move_mount(tree: int, target: bytes) -> None:
    """Attach what ``open_tree`` gave."""
    empty = c_uint(MOVE_MOUNT_F_EMPTY_PATH)
    _call("move_mount", MOVE_MOUNT, c_int(tree), c_char_p(b""), c_int(AT_FDCWD), c_char_p(target), empty)


def mount_setattr(tree: int, attributes: int) -> None:
    """Set MOUNT_ATTR_* of a detached mount that ``open_tree`` gave."""
    attr = MountAttributes(attr_set=attributes)
    size = c_ulong(ctypes.sizeof(attr))
    _call("mount_setattr", MOUNT_SETATTR, c_int(tree), c_char_p(b""), c_uint(AT_EMPTY_PATH), byref(attr), size)


# -- confinement ---------------------------------------------------------------------------


def landlock_version() -> int:
    """The ABI of this kernel's Landlock, 0 when it is not there or switched off."""
    flags = c_uint(LANDLOCK_CREATE_RULESET_VERSION)
    return max(0, int(_libc.syscall(c_long(LANDLOCK_CREATE_RULESET), None, c_ulong(0), flags)))


def landlock_ruleset(handled_files: int, scoped: int) -> int:
    """A new ruleset's descriptor. ``scoped`` needs ABI 6."""
    attr = _RulesetAttr(handled_access_fs=handled_files, scoped=scoped)
    size = c_ulong(ctypes.sizeof(attr) if scoped else 8)
    return _call("landlock_create_ruleset", LANDLOCK_CREATE_RULESET, ctypes.byref(attr), size, c_uint(0))


def landlock_allow(ruleset: int, beneath: int, access: int) -> None:
    """Allow ``access`` to the file, or everything below the directory, that ``beneath`` is open on."""
    rule = _PathBeneath(access, beneath)
    kind = c_int(LANDLOCK_RULE_PATH_BENEATH)
    _call("landlock_add_rule", LANDLOCK_ADD_RULE, c_int(ruleset), kind, ctypes.byref(rule), c_uint(0))


def landlock_restrict_self(ruleset: int) -> None:
    _call("landlock_restrict_self", LANDLOCK_RESTRICT_SELF, c_int(ruleset), c_uint(0))
