"""What a program is started in. A profile is a list of steps, and a start goes through it.

Once: this process gives up what no program may have and makes the view of the file system that all get. Per run: a
child is born inside its cgroup and its namespaces, goes through the steps, and becomes the program. A step that fails
is reported by its name.

The view is an empty file system with an allow-list bound into it (``VIEW``), so nothing else exists there, whatever the
machine has or mounts later:

    /usr /bin /sbin /lib* /opt /etc /sys     the machine's, read-only; in /etc, accounts for the functions' users
    /var/lib/gems                            where there is one
    /proc                                    its own processes only
    /dev                                     a few devices, and per run its own terminals
    the resolver's files                     copies, where /etc/resolv.conf points to
    /run/flux/code                           per run: its code, read-only
    /run/flux/work, /tmp, /dev/shm           per run: its own, empty, in memory, limited in size

All of a run's mounts vanish with its last process: nothing has to be undone. Everything is imported before the first
child: where the modules lie does not exist in the view.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import stat
import time
from enum import IntEnum

from fluxlib.spawner import linux
from fluxlib.spawner.linux import MS_NODEV, MS_NOEXEC, MS_NOSUID
from fluxlib.spawner.seccomp import Filter, instructions

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is a tenth of this process
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, NoReturn

    from fluxlib.spawner.linux import Call

    # Makes (step, function, arguments) of what a child does for one request.
    Maker = Callable[[dict[str, Any], dict[str, int]], list[tuple[Any, ...]]]

OFF, MINIMAL, DEFAULT, STRICT = "off", "minimal", "default", "strict"


class Step(IntEnum):
    """What can go wrong with a start, by name. The numbers are only for the memory shared with children."""

    OUT_OF_MEMORY_SCORE = 0
    CLONE = 1
    STREAMS = 2
    SESSION = 3
    NETWORK = 4
    MOUNTS = 5
    CGROUP_VIEW = 6
    LIMITS = 7
    SYSTEM_CALL_FILTER = 8
    USER = 9
    PRIVILEGES = 10
    LANDLOCK = 11
    CHANGE_DIRECTORY = 12
    DESCRIPTORS = 13
    EXEC = 14

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")


# The order matters: each step needs what the later ones take away. The filter is installed before the capabilities go,
# because without them the kernel refuses it once the machine's memory for compiled filters is used up.
_BEGIN = (Step.STREAMS, Step.SESSION)
_CONFINE = (Step.LIMITS, Step.SYSTEM_CALL_FILTER, Step.USER, Step.PRIVILEGES)
_FINISH = (Step.CHANGE_DIRECTORY, Step.DESCRIPTORS, Step.EXEC)
PROFILES: dict[str, tuple[Step, ...]] = {
    OFF: (*_BEGIN, Step.LIMITS, Step.USER, Step.CHANGE_DIRECTORY, Step.EXEC),
    MINIMAL: (*_BEGIN, *_CONFINE, Step.LANDLOCK, *_FINISH),
    DEFAULT: (*_BEGIN, Step.NETWORK, Step.MOUNTS, *_CONFINE, *_FINISH),
    STRICT: (*_BEGIN, Step.NETWORK, Step.MOUNTS, Step.CGROUP_VIEW, *_CONFINE, Step.LANDLOCK, *_FINISH),
}

# Looking a member up costs more than a name, in pages that a clone copies too.
_STREAMS, _NETWORK, _MOUNTS, _LIMITS, _USER = Step.STREAMS, Step.NETWORK, Step.MOUNTS, Step.LIMITS, Step.USER
_LANDLOCK, _CHANGE_DIRECTORY, _DESCRIPTORS, _EXEC = (
    Step.LANDLOCK,
    Step.CHANGE_DIRECTORY,
    Step.DESCRIPTORS,
    Step.EXEC,
)

CODE = "/run/flux/code"
WORK = "/run/flux/work"
_CODE, _WORK = CODE.encode(), WORK.encode()
_CGROUPS = b"/sys/fs/cgroup"
# The allow-list. Landlock allows the same, but of /sys only what programs read about the machine's size.
_READABLE = (
    *(b"/usr", b"/bin", b"/sbin", b"/lib", b"/lib32", b"/lib64", b"/libx32", b"/opt", b"/etc"),
    b"/var/lib/gems",  # where Debian's Ruby keeps what `gem install` brings
    *(b"/sys/devices/system", _CGROUPS, b"/sys/kernel/mm/transparent_hugepage"),
)
VIEW = (*(path for path in _READABLE if not path.startswith(b"/sys/")), b"/sys", _CGROUPS)
_DEVICES = (b"null", b"zero", b"full", b"random", b"urandom", b"tty")
_DEVICE_LINKS = {
    b"fd": b"/proc/self/fd",
    b"stdin": b"/proc/self/fd/0",
    b"stdout": b"/proc/self/fd/1",
    b"stderr": b"/proc/self/fd/2",
    b"ptmx": b"pts/ptmx",
}
_COPIES = b"/run/flux/copies"
# Certificates and settings of Flux and its agent: root's by their modes, and nobody's business if those are wrong.
_COVERED = (b"/etc/flux", b"/etc/flux-agent")
_MAX_TERMINALS = 16
# Files also cost kernel memory by number.
_INODES = 65536
_TERMINALS = b"newinstance,ptmxmode=0666,max=%d" % _MAX_TERMINALS
_OWN_TERMINALS = (_MOUNTS, *linux.mount(b"devpts", b"/dev/pts", MS_NOSUID | MS_NOEXEC, _TERMINALS))
_CLOSE_FROM_3, _CLOSE_FROM_4 = linux.close_range_on_exec(3), linux.close_range_on_exec(4)

# By number, the same on both machines (asm-generic/resource.h).
_CORE, _MEMLOCK, _MSGQUEUE, _NICE, _RTPRIO = 4, 8, 12, 13, 14
# Core: 1 is the kernel's own sign for "do not start the handler"; with 0 a piped core_pattern still starts one, as root
# and outside every limit.
_LIMITS_OF_ALL = {_CORE: 1, _MEMLOCK: 64 * 1024, _MSGQUEUE: 819_200, _NICE: 0, _RTPRIO: 0}
# Functions go first when the machine itself has no memory left; an inherited -1000 would make their own OOM hang.
_OUT_OF_MEMORY_SCORE = b"500"


class SetUpFailed(Exception):
    """``step`` in words, and the errno of the call."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(step, number)
        self.step = step
        self.number = number


class Sandbox:
    """Starts programs under one profile. Owns this process: build it once, before anything is started.

    ``programs`` is the directory with all functions' code; ``hidden`` are directories that the view must not show, and
    ``users`` the numbers of the functions' users.
    """

    def __init__(self, profile: str, programs: bytes, hidden: Iterable[bytes], users: range) -> None:
        self.notes: list[str] = []
        self._steps = PROFILES[profile]
        self._mounts = Step.MOUNTS in self._steps
        self._programs = programs
        self._failures = _Failures()
        self._score = _RaisedScore() if Step.PRIVILEGES in self._steps else contextlib.nullcontext()
        self._view: View | None = None
        self._may_raise = linux.has_capability(linux.CAP_SYS_RESOURCE)
        with _step("lower the limits"):
            self._lower_own_limits()
        with _step("give up privileges"):
            linux.make(linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))
        # What each step does in the child: the same for all, ready to be gone through, or made for each request.
        self._same: dict[Step, list[Call]] = {
            Step.SESSION: [linux.new_session(), linux.unblock_signals()],
            Step.CGROUP_VIEW: _own_cgroup_view(),
            Step.PRIVILEGES: [
                linux.clear_capabilities(),
                # After the change of user, which clears it. A backup for when this process dies: it misses
                # grandchildren.
                linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL),
            ],
        }
        made: dict[Step, Maker] = {
            Step.STREAMS: _streams,
            Step.NETWORK: self._network,
            Step.MOUNTS: _mounts_of_run,
            Step.LIMITS: self._limits,
            Step.USER: _user,
            Step.LANDLOCK: self._confine,
            Step.CHANGE_DIRECTORY: _change_directory,
            Step.DESCRIPTORS: _descriptors,
            Step.EXEC: _execute,
        }
        self._prepare(users, hidden)
        self._parts: list[list[tuple[Any, ...]] | Maker] = []
        for step in self._steps:
            ready = [(step, *call) for call in self._same.get(step, ())]
            self._parts.append(ready or made[step])
        os.umask(0o077)

    def _prepare(self, users: range, hidden: Iterable[bytes]) -> None:
        """What the profile's steps need once."""
        loopback = linux.has_capability(linux.CAP_NET_ADMIN)
        self._loopback = [(_NETWORK, *linux.raise_loopback())] if loopback else []
        if Step.NETWORK in self._steps and not loopback:
            self.notes.append("CAP_NET_ADMIN is missing: under `network: none` functions have no loopback interface")
        if Step.PRIVILEGES in self._steps and not self._may_raise:
            self.notes.append(
                "CAP_SYS_RESOURCE is missing: functions can undo that they go first when the machine has no memory left"
            )
        if Step.PRIVILEGES in self._steps:
            with _step("start programs in their cgroups (clone3)"):
                if not linux.clone3_is_there():
                    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            with _step("give up privileges"):
                linux.drop_bounding_set()
                linux.make(linux.prctl(linux.PR_SET_DUMPABLE, 0))
            _set_login_user(users)
        if Step.SYSTEM_CALL_FILTER in self._steps:
            with _step("assemble the system call filter"):
                # Where there is no IPC namespace, System V objects would outlive their function.
                code = instructions(linux.MACHINE, deny_lasting_ipc=not self._mounts)
                self._filter = Filter(code)
                self._same[Step.SYSTEM_CALL_FILTER] = [linux.install_filter(self._filter.program)]
        if self._mounts:
            with _step("make a mount namespace"):
                self._view = View(self._programs, hidden, users)
        if Step.LANDLOCK in self._steps:
            with _step("prepare Landlock"):
                self._landlock = _Landlock(linux.landlock_version(), _DEVICES)

    def _lower_own_limits(self) -> None:
        limits = _LIMITS_OF_ALL if Step.PRIVILEGES in self._steps else {_CORE: _LIMITS_OF_ALL[_CORE]}
        for which, value in limits.items():
            hard = resource.getrlimit(which)[1]
            linux.make(linux.limit(which, value if hard == resource.RLIM_INFINITY else min(value, hard)))

    # -- one run -------------------------------------------------------------------------

    def start(self, request: dict[str, Any], fds: dict[str, int]) -> tuple[int, int]:
        """(process, slot): ask ``failure_of(slot)`` when it has ended. Raises SetUpFailed when there is none."""
        flags = linux.CLONE_NEWNS | linux.CLONE_NEWIPC if self._mounts else 0
        if request.get("no_network") and Step.NETWORK in self._steps:
            flags |= linux.CLONE_NEWNET
        slot, step = self._failures.take(), Step.MOUNTS
        try:
            if self._view is not None:
                self._view.refresh()
                fds["code"] = copy_of_code(request["code"])
            step = Step.EXEC
            calls: list[tuple[Any, ...]] = []
            for part in self._parts:
                calls += part if type(part) is list else part(request, fds)  # type: ignore[operator]
            step = Step.OUT_OF_MEMORY_SCORE
            with self._score:
                step = Step.CLONE
                pid = linux.clone(flags, fds.get("cgroup", -1))
                if pid == 0:
                    self._become(calls, slot)
        except (OSError, ValueError) as error:
            self._failures.give_back(slot)
            raise SetUpFailed(step.words, getattr(error, "errno", None) or errno.EINVAL) from error
        finally:
            if "code" in fds:
                os.close(fds.pop("code"))
        return pid, slot

    def failure_of(self, slot: int) -> tuple[str, int] | None:
        """(step, errno) when the child never became the program. Gives the slot back."""
        return self._failures.give_back(slot)

    def _become(self, calls: list[tuple[Any, ...]], slot: int) -> NoReturn:
        """All that the child does."""
        step = Step.STREAMS
        try:
            for step, function, arguments in calls:
                if function(*arguments) < 0:
                    self._failures.tell(slot, step, ctypes.get_errno())
                    os._exit(127)
            os._exit(0)  # a trial
        except OSError as error:
            self._failures.tell(slot, step, error.errno or errno.EIO)
        except BaseException:
            self._failures.tell(slot, step, errno.ENOTRECOVERABLE)
        os._exit(127)

    def _network(self, request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
        return self._loopback if request.get("no_network") else []

    def _limits(self, request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
        calls = []
        for which, value in request["rlimits"].items():
            if not self._may_raise:
                hard = resource.getrlimit(which)[1]
                value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            calls.append((_LIMITS, *linux.limit(which, value)))
        return calls

    def _confine(self, request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
        return [(_LANDLOCK, self._restrict, (request,))]

    def _restrict(self, request: dict[str, Any]) -> int:
        # Mounted anew in this child, so not the directories that were opened beforehand.
        code = _CODE if self._mounts else os.path.join(self._programs, request["code"])
        readable = [code, *([_CGROUPS] if Step.CGROUP_VIEW in self._steps else [])]
        work = request.get("work", b"")
        writable = [b"/tmp", b"/dev/shm", b"/dev/pts", _WORK] if self._mounts else [work] if work else []
        self._landlock.restrict(readable, writable)
        return 0


def _streams(request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = [
        (_STREAMS, *linux.duplicate(fds["stdin"], 0)),
        (_STREAMS, *linux.duplicate(fds["stdout"], 1)),
        (_STREAMS, *linux.duplicate(fds["stderr"] if "stderr" in fds else fds["stdout"], 2)),
    ]
    if "listen" in fds:
        calls.append((_STREAMS, *linux.duplicate(fds["listen"], 3)))
    return calls


def _user(request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
    if request["uid"] < 0:
        return []
    return [(_USER, *call) for call in linux.become_user(request["uid"], request["gid"])]


def _change_directory(request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
    return [(_CHANGE_DIRECTORY, *linux.change_directory(request["cwd"]))]


def _descriptors(request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
    return [(_DESCRIPTORS, *(_CLOSE_FROM_4 if "listen" in fds else _CLOSE_FROM_3))]


def _execute(request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
    return [] if request.get("trial") else [(_EXEC, *linux.execute(request["argv"], request["env"]))]


def _own_cgroup_view() -> list[Call]:
    """Its cgroup becomes the root of those it sees."""
    return [
        linux.unshare(linux.CLONE_NEWCGROUP),
        linux.unmount(_CGROUPS),
        linux.mount(b"cgroup2", _CGROUPS, MS_NOSUID | MS_NODEV | MS_NOEXEC),
        linux.set_attributes(_CGROUPS, linux.MOUNT_ATTR_RDONLY),
    ]


def _mounts_of_run(request: dict[str, Any], fds: dict[str, int]) -> list[tuple[Any, ...]]:
    options = b"size=%d,nr_inodes=%d,mode=" % (request["tmp_bytes"], _INODES)
    own, anybody = b"%s700,uid=%d,gid=%d" % (options, request["uid"], request["gid"]), options + b"1777"
    return [
        (_MOUNTS, *linux.attach(fds["code"], _CODE)),
        (_MOUNTS, *linux.mount(b"tmpfs", _WORK, MS_NOSUID | MS_NODEV, own)),
        (_MOUNTS, *linux.mount(b"tmpfs", b"/tmp", MS_NOSUID | MS_NODEV, anybody)),
        (_MOUNTS, *linux.mount(b"tmpfs", b"/dev/shm", MS_NOSUID | MS_NODEV, anybody)),
        _OWN_TERMINALS,
    ]


def copy_of_code(code: bytes) -> int:
    """A read-only mount of the directory ``code``, relative to the programs directory, not attached yet; a descriptor.

    Taken by the spawner, whose namespace it is, and attached by the child in its own.
    """
    tree = linux.open_tree(code)
    try:
        attributes = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
        linux.make(linux.set_attributes(tree, attributes))
    except OSError:
        os.close(tree)
        raise
    return tree


class View:
    """The file system as every child of this process finds it. Raises OSError with the call that failed."""

    def __init__(self, programs: bytes, hidden: Iterable[bytes], users: range) -> None:
        os.umask(0o022)  # of the directories made here, which every user walks through
        self._look_at = 0.0
        linux.make(linux.unshare(linux.CLONE_NEWNS))
        linux.make(linux.make_private())
        sources, links = self._collect()
        # With what is mounted below: the disk with the code may be.
        code = linux.open_tree(programs, recursive=True)
        self._copies = [
            _Copy(
                b"/etc/passwd", b"".join(b"%s:x:%d:%d::%s:/bin/sh\n" % (_name(uid), uid, uid, _WORK) for uid in users)
            ),
            _Copy(b"/etc/group", b"".join(b"%s:x:%d:\n" % (_name(uid), uid) for uid in users)),
        ]
        resolver = os.path.realpath(b"/etc/resolv.conf")
        if not resolver.startswith((b"/etc/", b"/usr/")) and os.path.isdir(b"/" + resolver.split(b"/")[1]):
            # Not its directory, where the resolver also has sockets.
            self._copies.append(_Copy(resolver))
        # Covered rather than any other directory: a fresh one is mounted there in any case.
        root = b"/proc"
        linux.make(linux.mount(b"tmpfs", root, MS_NOSUID | MS_NODEV, b"size=16m,nr_inodes=1024,mode=755"))
        os.chdir(root)
        for path, target in links.items():
            os.symlink(target, path[1:])
        for path, tree in sources.items():
            _attach(tree, path[1:])
        for directory in (_CODE, _WORK, b"/proc", b"/tmp", b"/dev/pts", b"/dev/shm"):
            os.makedirs(directory[1:], exist_ok=True)
        for name, link in _DEVICE_LINKS.items():
            os.symlink(link, b"dev/" + name)
        self._lay_copies()
        linux.make(linux.mount(b"proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, b"hidepid=invisible"))
        for directory in (*hidden, *_COVERED):
            inside = os.path.realpath(directory)[1:]
            if os.path.isdir(inside):
                linux.make(
                    linux.mount(b"tmpfs", inside, MS_NOSUID | MS_NODEV | MS_NOEXEC, b"size=4k,nr_inodes=2,mode=755")
                )
        # Where each run's code is attached over it. A copy of a mount can only be taken from one's own namespace, and
        # the way there is the working directory, which each clone translates into its own.
        _attach(code, _CODE[1:])
        linux.make(linux.set_attributes(b".", linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID, recursive=True))
        # Programs name their threads there; a function owns nothing else in it.
        linux.make(linux.set_attributes(b"proc", 0, clear=linux.MOUNT_ATTR_RDONLY))
        linux.make(linux.pivot_root())
        linux.make(linux.unmount(b"."))
        os.chdir(_CODE)

    @staticmethod
    def _collect() -> tuple[dict[bytes, int], dict[bytes, bytes]]:
        """Detached mounts of the allow-list, and the links in it (/bin is usr/bin on most systems)."""
        sources, links = {}, {}
        for path in VIEW:
            if os.path.islink(path) and _is_below(os.path.realpath(path), b"/usr"):
                links[path] = os.readlink(path)
            elif os.path.isdir(path) and (path != _CGROUPS or os.path.ismount(path)):
                # Not with what is mounted below /sys: it serves administrators.
                tree = linux.open_tree(path, recursive=not path.startswith(b"/sys"))
                linux.make(linux.set_attributes(tree, linux.MOUNT_ATTR_NODEV, recursive=True))
                sources[path] = tree
        for name in _DEVICES:
            if os.path.exists(b"/dev/" + name):
                sources[b"/dev/" + name] = linux.open_tree(b"/dev/" + name)
        return sources, links

    def _lay_copies(self) -> None:
        os.mkdir(_COPIES[1:], 0o755)
        # A mount of its own that stays writable: the one in the view becomes read-only.
        tree = linux.open_tree(_COPIES[1:])
        directory = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)
        os.close(tree)
        for number, copy in enumerate(self._copies):
            name = b"%d" % number
            copy.fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=directory)
            copy.kept = os.path.join(_COPIES, name)
            copy.refresh()
            _attach(linux.open_tree(copy.kept[1:]), copy.path[1:])
        os.close(directory)

    def refresh(self) -> None:
        """Take over what has changed: a new account, another name server. Looks once a second."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + 1.0
        for copy in self._copies:
            # Replaced on the machine, which takes the mount off the old file everywhere.
            if copy.refresh() and not copy.is_in_place():
                with contextlib.suppress(OSError):
                    tree = linux.open_tree(copy.kept)
                    linux.make(linux.set_attributes(tree, linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID))
                    _attach(tree, copy.path)


class _Copy:
    """A file of the machine's as functions see it: with lines added, and without its directory."""

    def __init__(self, path: bytes, more: bytes = b"") -> None:
        self.path = path
        self.kept = b""
        self.fd = -1
        self._more = more
        self._seen: tuple[int, int, int] | None = None
        # Kept: the path is not there in the view. From the top, because the file and its directory may come later.
        top, _, self._name = path[1:].partition(b"/")
        self._directory = os.open(b"/" + top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def is_in_place(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        return False

    def refresh(self) -> bool:
        """Whether it had changed; what cannot be read now stays as it was."""
        try:
            found = os.stat(self._name, dir_fd=self._directory)
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen:
                return False
            source = os.open(self._name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._directory)
            try:
                text = os.read(source, 8 << 20)
            finally:
                os.close(source)
            if self._more and text and not text.endswith(b"\n"):
                text += b"\n"
            text += self._more
            os.pwrite(self.fd, text, 0)
            os.ftruncate(self.fd, len(text))
            self._seen = seen
        except OSError:
            return False
        return True


def _is_below(path: bytes, directory: bytes) -> bool:
    return path.startswith(directory.rstrip(b"/") + b"/")


def _name(uid: int) -> bytes:
    return b"flux-%d" % uid


def _attach(tree: int, target: bytes) -> None:
    """At ``target`` relative to the working directory, which is made."""
    if not os.path.lexists(target):
        os.makedirs(os.path.dirname(target) or b".", exist_ok=True)
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            os.mkdir(target, 0o755)
        else:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
    linux.make(linux.attach(tree, target))
    os.close(tree)


def _set_login_user(users: range) -> None:
    """Audit records would name the user that a process says it is, as long as it has said nothing yet."""
    with contextlib.suppress(OSError), open("/proc/self/loginuid", "wb", buffering=0) as file:
        file.write(b"%d" % users.start)


class _Landlock:
    """An allow-list of directories, the view's own. Prepared once, applied in each child."""

    _EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
    _TRUNCATE = 1 << 14  # ABI 3
    _IOCTL_DEV = 1 << 15  # ABI 5
    # The rights each ABI knows, first to last: 13, refer, truncate, network, ioctl.
    _RIGHTS = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
    _SCOPES_SINCE = 6
    _ABSTRACT_SOCKETS_AND_SIGNALS = 3

    def __init__(self, version: int, devices: Iterable[bytes]) -> None:
        self._all = self._RIGHTS[min(version, len(self._RIGHTS) - 1)]
        self._read = self._EXECUTE | self._READ_FILE | self._READ_DIR
        self._scoped = self._ABSTRACT_SOCKETS_AND_SIGNALS if version >= self._SCOPES_SINCE else 0
        device = (self._READ_FILE | self._WRITE_FILE | self._TRUNCATE | self._IOCTL_DEV) & self._all
        resolver = os.path.realpath(b"/etc/resolv.conf")
        self._shared = [(fd, self._read) for fd in _open_those_there((*_READABLE, b"/proc"))]
        self._shared += [(fd, self._READ_FILE) for fd in _open_those_there((resolver,))]
        self._shared += [(fd, device) for fd in _open_those_there(b"/dev/" + name for name in devices)]

    def restrict(self, readable: Iterable[bytes], writable: Iterable[bytes]) -> None:
        """From here on this process and its children can open nothing else."""
        ruleset = linux.landlock_ruleset(self._all, self._scoped)
        for fd, access in self._shared:
            linux.landlock_allow(ruleset, fd, access)
        for paths, access in ((readable, self._read), (writable, self._all)):
            for path in paths:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                linux.landlock_allow(ruleset, fd, access)
                os.close(fd)
        linux.landlock_restrict_self(ruleset)


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


class _Failures:
    """Where children that never became a program leave the reason: memory shared with them, gone at exec.

    It costs a run nothing, where a pipe would cost it five system calls.
    """

    def __init__(self, slots: int = 16_384) -> None:
        self._memory = linux.shared_numbers(2 * slots)  # step + 1 and errno of each
        self._slots = slots
        self._used = 0
        # Grows with use: every page of this process is paid for by each clone.
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        if self._used == self._slots:
            raise OSError(errno.EAGAIN, "too many programs at a time")
        self._used += 1
        return self._used - 1

    def tell(self, slot: int, step: int, number: int) -> None:
        self._memory[2 * slot + 1] = number
        self._memory[2 * slot] = step + 1

    def give_back(self, slot: int) -> tuple[str, int] | None:
        step = self._memory[2 * slot]
        self._free.append(slot)
        if not step:
            return None
        self._memory[2 * slot] = 0
        return Step(step - 1).words, self._memory[2 * slot + 1]


class _RaisedScore:
    """While entered, what this process clones is among the first to go when the machine has no memory left.

    Inherited, because a child's own score has to be looked for in /proc, which costs as much as a mount.
    """

    def __init__(self) -> None:
        self._file = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        self._own = os.pread(self._file, 16, 0)

    def __enter__(self) -> None:
        os.pwrite(self._file, _OUT_OF_MEMORY_SCORE, 0)

    def __exit__(self, *_: object) -> None:
        os.pwrite(self._file, self._own, 0)


@contextlib.contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SetUpFailed(f"{name}: {error.strerror}", error.errno or 0) from error
