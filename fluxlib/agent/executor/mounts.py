"""What a function sees of the file system, for the profiles with a mount namespace.

Once per spawner: everything read-only and without set-user-ID, the machine's
private directories and every state directory hidden, processes of others
invisible. Once per run: what the machine has mounted since then read-only too,
and the run's code, its work directory and its own /tmp:

    /run/flux/code     its code, read-only
    /run/flux/work     its work directory: memory, as large as /tmp may be
    /tmp, /dev/shm     its own, empty, limited in size

All of a run's mounts vanish with its last process: nothing has to be undone.
"""

from __future__ import annotations

import os

from fluxlib.agent.executor import prepared, syscalls
from fluxlib.agent.executor.syscalls import MS_NODEV, MS_NOEXEC, MS_NOSUID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluxlib.agent.executor.prepared import Call

CODE = "/run/flux/code"
WORK = "/run/flux/work"
_CODE, _WORK = CODE.encode(), WORK.encode()
CGROUPS = b"/sys/fs/cgroup"
WRITABLE = (_WORK, b"/tmp", b"/dev/shm")
_HIDDEN = (b"/root", b"/home", b"/srv", b"/var/tmp", b"/mnt", b"/media", b"/boot")
_UNMOUNTED = (*_HIDDEN, b"/run", b"/proc")
_FOR_ADMINISTRATORS = frozenset(
    b"bpf binfmt_misc configfs debugfs efivarfs fusectl hugetlbfs mqueue pstore securityfs tracefs".split()
)
_FEW_FILES = b"size=64k,nr_inodes=64,mode=755"
_READ_ONLY_CODE = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
# Files also cost kernel memory by number.
_INODES = 65536


def prepare_namespace(programs: bytes, hidden: Iterable[bytes]) -> None:
    """This process's own view, which every child starts from. Raises OSError with the call that failed.

    ``programs`` becomes the working directory before it is hidden: a copy of a mount
    can only be taken from one's own namespace, and the way there is the working
    directory, which each clone translates into its own.
    """
    os.umask(0o022)  # of the directories made here, which every user walks through
    syscalls.unshare(syscalls.CLONE_NEWNS)
    # Slave: what the machine unmounts goes here too; nothing from here reaches the machine.
    syscalls.set_propagation(b"/", syscalls.MS_REC | syscalls.MS_SLAVE)
    os.chdir(programs)
    resolver = os.path.dirname(os.path.realpath(b"/etc/resolv.conf"))
    kept = syscalls.open_tree(resolver) if resolver.startswith(b"/run/") and os.path.isdir(resolver) else -1
    # Where it really is: on the way there may be a link to another disk, which lies in a directory that is hidden.
    _thin_out(os.getcwdb())
    for directory in _HIDDEN:
        if os.path.isdir(directory):
            _cover(directory)
    _cover(b"/run")
    for directory in (_CODE, _WORK, b"/run/lock"):
        os.makedirs(directory, 0o755)
    if kept >= 0:
        os.makedirs(resolver, 0o755)
        syscalls.move_mount(kept, resolver)
        os.close(kept)
    for directory in hidden:
        # Below a directory that is hidden already it is gone.
        if os.path.isdir(directory):
            _cover(directory)
    syscalls.mount(b"proc", b"/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, b"hidepid=invisible")
    for call in everything_read_only():
        prepared.make(call)


def _thin_out(programs: bytes) -> None:
    """Unmount here what is covered next, and what only serves those who look after the machine.

    Every child gets a copy of each mount. What cannot be unmounted is covered all the same.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        mounted = [line.split() for line in file]
    for fields in reversed(mounted):  # what is mounted on another comes after it
        target, kind = fields[4], fields[fields.index(b"-") + 1]
        covered = any(_is_below(target, directory) for directory in _UNMOUNTED)
        if (covered or kind in _FOR_ADMINISTRATORS) and not _is_below(programs, target):
            try:
                syscalls.unmount(target)
            except OSError:
                continue


def _is_below(path: bytes, directory: bytes) -> bool:
    return (path + b"/").startswith(directory.rstrip(b"/") + b"/")


def copy_of_code(code: bytes) -> int:
    """A read-only mount of the directory ``code``, relative to ``programs``, not attached yet; a descriptor.

    Taken by the spawner, whose namespace it is, and attached by the child in its own.
    """
    tree = syscalls.open_tree(code)
    try:
        syscalls.mount_setattr(tree, _READ_ONLY_CODE)
    except OSError:
        os.close(tree)
        raise
    return tree


def everything_read_only() -> list[Call]:
    """For the spawner, and again for each child in a namespace of its own, before it mounts anything there.

    What the machine mounts while the agent runs goes here too, as writable as it is there. Not kept out by private
    mounts: what the machine unmounts would then stay in use here.
    """
    return [
        # Not nodev: it would switch /dev off.
        prepared.set_attributes(b"/", syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID, recursive=True),
        # Programs name their threads there; a function owns nothing else in it.
        prepared.set_attributes(b"/proc", 0, clear=syscalls.MOUNT_ATTR_RDONLY),
    ]


def mounts_of_run(code: int, uid: int, size: int) -> list[Call]:
    """For the child, in a mount namespace of its own: ``code`` from ``copy_of_code``, ``size`` in bytes."""
    options = b"size=%d,nr_inodes=%d,mode=" % (size, _INODES)
    anybody = options + b"1777"
    return [
        prepared.attach(code, _CODE),
        prepared.mount(b"tmpfs", _WORK, MS_NOSUID | MS_NODEV, b"%s700,uid=%d,gid=%d" % (options, uid, uid)),
        prepared.mount(b"tmpfs", b"/tmp", MS_NOSUID | MS_NODEV, anybody),
        prepared.mount(b"tmpfs", b"/dev/shm", MS_NOSUID | MS_NODEV, anybody),
    ]


def hide_other_cgroups() -> list[Call]:
    """For the child: its cgroup becomes the root of those it sees."""
    return [
        prepared.unshare(syscalls.CLONE_NEWCGROUP),
        prepared.unmount(CGROUPS),
        prepared.mount(b"cgroup2", CGROUPS, MS_NOSUID | MS_NODEV | MS_NOEXEC),
        prepared.set_attributes(CGROUPS, syscalls.MOUNT_ATTR_RDONLY),
    ]


def _cover(directory: bytes) -> None:
    syscalls.mount(b"tmpfs", directory, MS_NOSUID | MS_NODEV | MS_NOEXEC, _FEW_FILES)
