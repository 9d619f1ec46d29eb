"""The system call filter: what a function has no honest use for is refused.

A deny list, because functions are any program in any language: everything that
administers the machine, looks into other processes, opens a namespace or offers
the kernel more surface than programs need. Refused is EPERM, as without the
privilege; ENOSYS where programs know how to go on without the call.

Instructions: Linux's include/uapi/linux/bpf_common.h and linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from fluxlib.spawner.linux import FilterProgram

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    # The instructions that one number comes to.
    Outcome = tuple[bytes, ...]

_X86 = "x86_64"
_ARM = "aarch64"
AUDIT_ARCHITECTURES = {_X86: 0xC000_003E, _ARM: 0xC000_00B7}

# Calls added since 2019: one number everywhere.
_NEW = {
    **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429},
    **{"fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "clone3": 435, "pidfd_getfd": 438},
    **{"process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "process_mrelease": 448},
    **{"set_mempolicy_home_node": 450, "statmount": 457, "listmount": 458, "open_tree_attr": 467},
}
SYSCALLS = {
    _X86: {
        **_NEW,
        **{"socket": 41, "setsockopt": 54, "clone": 56, "setrlimit": 160, "prlimit64": 302, "io_setup": 206},
        **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240},
        **{"ptrace": 101, "syslog": 103, "personality": 135, "ustat": 136, "uselib": 134, "pivot_root": 155},
        **{"_sysctl": 156, "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165},
        **{"umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171},
        **{"iopl": 172, "ioperm": 173, "create_module": 174, "init_module": 175, "delete_module": 176},
        **{"get_kernel_syms": 177, "query_module": 178, "quotactl": 179, "nfsservctl": 180, "vhangup": 153},
        **{"modify_ldt": 154, "lookup_dcookie": 212, "clock_settime": 227, "kexec_load": 246, "add_key": 248},
        **{"request_key": 249, "keyctl": 250, "migrate_pages": 256, "unshare": 272, "move_pages": 279},
        **{"perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304},
        **{"clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312},
        **{"finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323},
    },
    _ARM: {
        **_NEW,
        **{"socket": 198, "setsockopt": 208, "clone": 220, "setrlimit": 164, "prlimit64": 261, "io_setup": 0},
        **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180},
        **{"lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "nfsservctl": 42, "chroot": 51},
        **{"vhangup": 58, "quotactl": 60, "acct": 89, "personality": 92, "unshare": 97, "kexec_load": 104},
        **{"init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116, "ptrace": 117},
        **{"reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "adjtimex": 171},
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "swapon": 224, "swapoff": 225, "migrate_pages": 238},
        **{"move_pages": 239, "perf_event_open": 241, "fanotify_init": 262, "name_to_handle_at": 264},
        **{"open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270},
        **{"process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "bpf": 280, "userfaultfd": 282},
        "kexec_file_load": 294,
    },
}
# Programs fall back when these are not there: libc to clone, event loops to epoll, databases to their own threads
# (io_setup takes its share of fs.aio-max-nr, which is one number for the machine).
_ABSENT = frozenset({"clone3", "io_uring_setup", "io_uring_enter", "io_uring_register", "io_setup"})
# Where there is no IPC namespace, such objects would outlive their function and be its successor's.
_LASTING = frozenset({"shmget", "semget", "msgget", "mq_open"})

_NAMESPACES = 0x7E02_0000  # every CLONE_NEW* that clone can be given
_NETLINK = 16
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_SOL_SOCKET = 1
# SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF: socket filters use up the memory
# that the machine has for compiled ones, and then nobody without CAP_BPF can install a system call filter any more.
_FILTERS_OF_SOCKETS = (26, 50, 51, 52)
_RLIMIT_CORE = 4
_LINUX_AND_QUERY = (0, 0xFFFF_FFFF)

_LOAD, _EQUALS, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_X32 = 0x4000_0000
_INSTRUCTION = struct.Struct("HBBI")


def instructions(machine: str, *, deny_lasting_ipc: bool) -> bytes:
    """The filter for a machine ("x86_64", "aarch64"). Raises KeyError for another one."""
    numbers = SYSCALLS[machine]
    outcomes: dict[int, Outcome] = {
        number: (_refuse(errno.ENOSYS if name in _ABSENT else errno.EPERM),)
        for name, number in numbers.items()
        if deny_lasting_ipc or name not in _LASTING
    }
    # Conditions by argument. Each list returns in the end; _if_equal jumps over what follows when it does not hold.
    outcomes[numbers["clone"]] = (
        *(_argument(0), _op(_ANY_BIT, _NAMESPACES, 0, 1)),
        *(_refuse(errno.EPERM), _op(_RETURN, _ALLOW)),
    )
    outcomes[numbers["socket"]] = (
        _argument(0),
        *(op for family in _FAMILIES for op in _if_equal(family, _op(_RETURN, _ALLOW))),
        *(_op(_EQUALS, _NETLINK, 1, 0), _refuse(errno.EAFNOSUPPORT)),
        # NETLINK_ROUTE alone: it answers at once, while others let messages pile up in memory that nobody is charged
        # for.
        *(_argument(2), *_if_equal(0, _op(_RETURN, _ALLOW)), _refuse(errno.EPROTONOSUPPORT)),
    )
    outcomes[numbers["setsockopt"]] = (
        *(_argument(1), _op(_EQUALS, _SOL_SOCKET, 1, 0), _op(_RETURN, _ALLOW), _argument(2)),
        *(op for option in _FILTERS_OF_SOCKETS for op in _if_equal(option, _refuse(errno.EPERM))),
        _op(_RETURN, _ALLOW),
    )
    outcomes[numbers["personality"]] = (
        _argument(0),
        *(op for persona in _LINUX_AND_QUERY for op in _if_equal(persona, _op(_RETURN, _ALLOW))),
        _refuse(errno.EPERM),
    )
    # The limit of core dumps stays 1, with which no handler is started. Changes succeed without effect, because
    # programs with secrets (ssh-agent, gpg) set it to 0 and end when they cannot.
    outcomes[numbers["setrlimit"]] = (*(_argument(0), *_if_equal(_RLIMIT_CORE, _refuse(0)), _op(_RETURN, _ALLOW)),)
    outcomes[numbers["prlimit64"]] = (
        *(_argument(1), _op(_EQUALS, _RLIMIT_CORE, 1, 0), _op(_RETURN, _ALLOW)),
        # A query has no new limit. One that also asks for the old limit would get nothing written there: an error.
        *(_argument(2), _op(_EQUALS, 0, 0, 2), _argument(2, high=True), _op(_EQUALS, 0, 5, 0)),
        *(_argument(3), _op(_EQUALS, 0, 0, 2), _argument(3, high=True), _op(_EQUALS, 0, 2, 0)),
        *(_refuse(errno.EPERM), _op(_RETURN, _ALLOW), _refuse(0)),
    )
    start = [
        _op(_LOAD, _ARCHITECTURE),
        # 32-bit calls have other numbers: the whole interface is closed.
        *(_op(_EQUALS, AUDIT_ARCHITECTURES[machine], 1, 0), _refuse(errno.ENOSYS)),
        _op(_LOAD, _NUMBER),
    ]
    ranges = _ranges(outcomes)
    places, end = {}, len(start) + len(ranges) - 1
    for outcome in dict.fromkeys(outcome for _, outcome in ranges):
        places[outcome] = end
        end += len(outcome)
    return b"".join([*start, *_search(ranges, len(start), places), *(op for outcome in places for op in outcome)])


def _ranges(outcomes: dict[int, Outcome]) -> list[tuple[int, Outcome]]:
    """Where along the numbers the outcome changes, and to what; from 0 on, x32's numbers absent."""
    allowed = (_op(_RETURN, _ALLOW),)
    ranges = [(0, outcomes.get(0, allowed))]
    for number in range(1, max(outcomes) + 2):
        then = outcomes.get(number, allowed)
        if then != ranges[-1][1]:
            ranges.append((number, then))
    return [*ranges, (_X32, (_refuse(errno.ENOSYS),))]


def _search(ranges: list[tuple[int, Outcome]], at: int, places: dict[Outcome, int]) -> list[bytes]:
    """A binary search for the range of the loaded number, from instruction ``at`` on, to its outcome's place.

    Each program that is started installs the filter anew: the kernel compiles it, and runs it once for every
    call there is to learn which it always allows. So it is short: one comparison per range, and every outcome
    once. The whole is shorter than the longest jump (255).
    """
    if len(ranges) == 1:
        return []
    middle = len(ranges) // 2
    below = _search(ranges[:middle], at + 1, places)
    above = _search(ranges[middle:], at + 1 + len(below), places)
    to_above = len(below) if above else places[ranges[middle][1]] - at - 1
    to_below = 0 if below else places[ranges[0][1]] - at - 1
    return [_op(_AT_LEAST, ranges[middle][0], to_above, to_below), *below, *above]


class Filter:
    """The filter in memory, ready for ``install_filter``."""

    def __init__(self, code: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(code, len(code))
        length = len(code) // _INSTRUCTION.size
        self.program = FilterProgram(length, ctypes.cast(self._buffer, ctypes.c_void_p))


def run(code: bytes, architecture: int, number: int, arguments: Iterable[int] = ()) -> int:
    """What the filter answers, by interpreting it: for those who want to see it decide."""
    data = struct.pack("IIQ6Q", number, architecture, 0, *[*arguments, *[0] * 6][:6])
    program = list(_INSTRUCTION.iter_unpack(code))
    at, value = 0, 0
    while True:
        operation, if_true, if_false, operand = program[at]
        at += 1
        if operation == _RETURN:
            return int(operand)
        if operation == _LOAD:
            value = struct.unpack_from("I", data, operand)[0]
            continue
        holds = {_EQUALS: value == operand, _AT_LEAST: value >= operand, _ANY_BIT: bool(value & operand)}[operation]
        at += if_true if holds else if_false


def _op(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(operation, if_true, if_false, operand)


def _argument(which: int, *, high: bool = False) -> bytes:
    """Load half of a 64-bit argument; the kernel takes only the low one of an int."""
    return _op(_LOAD, 16 + 8 * which + 4 * high)


def _if_equal(value: int, then: bytes) -> tuple[bytes, bytes]:
    return _op(_EQUALS, value, 0, 1), then


def _refuse(number: int) -> bytes:
    return _op(_RETURN, _ERRNO | number)
