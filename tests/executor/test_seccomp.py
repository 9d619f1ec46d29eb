"""The system call filter: its numbers against the kernel's headers, its decisions, and a real process under it."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from pathlib import Path

import pytest

from fluxlib.spawner import linux, seccomp
from tests.support.need import lacking

MACHINES = ("x86_64", "aarch64")
# Where Debian's linux-libc-dev puts the numbers; arm64 uses the generic table.
HEADERS = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
ALLOW = 0x7FFF_0000
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_VSOCK = 1, 2, 10, 16, 17, 40
CLONE_THREAD_LIKE = 0x003D_0F00


def refused(number: int) -> int:
    return 0x0005_0000 | number


def decide(machine: str, name: str, *arguments: int, lasting: bool = False) -> int:
    code = seccomp.instructions(machine, deny_lasting_ipc=lasting)
    architecture = seccomp.AUDIT_ARCHITECTURES[machine]
    return seccomp.run(code, architecture, seccomp.SYSCALLS[machine][name], arguments)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_is_the_kernels(machine: str) -> None:
    header = Path("/usr/include", HEADERS[machine])
    if not header.exists():
        lacking(f"needs {header} (linux-libc-dev)")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {name: int(number) for name, number in found}
    # Newer calls than these headers may know.
    ours = {name: number for name, number in seccomp.SYSCALLS[machine].items() if number <= max(numbers.values())}
    aliases = {"umount2": "umount2", "_sysctl": "_sysctl"}
    assert {name: numbers.get(aliases.get(name, name)) for name in ours} == ours


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_denied_and_how(machine: str) -> None:
    for name in ("mount", "ptrace", "unshare", "setns", "bpf", "keyctl", "kexec_load", "open_tree", "process_vm_readv"):
        assert decide(machine, name) == refused(errno.EPERM), name
    for name in ("clone3", "io_uring_setup"):
        assert decide(machine, name) == refused(errno.ENOSYS), name


@pytest.mark.parametrize("machine", MACHINES)
def test_namespaces_cannot_be_had_by_clone(machine: str) -> None:
    assert decide(machine, "clone", CLONE_THREAD_LIKE) == ALLOW
    for flag in (0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000):
        assert decide(machine, "clone", CLONE_THREAD_LIKE | flag) == refused(errno.EPERM)


@pytest.mark.parametrize("machine", MACHINES)
def test_only_usual_socket_families(machine: str) -> None:
    for family in (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK):
        assert decide(machine, "socket", family) == ALLOW
    for family in (0, AF_PACKET, AF_VSOCK):
        assert decide(machine, "socket", family) == refused(errno.EAFNOSUPPORT)


@pytest.mark.parametrize("machine", MACHINES)
def test_lasting_ipc_only_where_it_has_a_namespace(machine: str) -> None:
    for name in ("shmget", "msgget", "semget", "mq_open"):
        assert decide(machine, name, lasting=False) == ALLOW
        assert decide(machine, name, lasting=True) == refused(errno.EPERM)


@pytest.mark.parametrize("machine", MACHINES)
def test_other_interfaces_are_closed_and_the_rest_is_open(machine: str) -> None:
    code = seccomp.instructions(machine, deny_lasting_ipc=False)
    ours = seccomp.AUDIT_ARCHITECTURES[machine]
    assert seccomp.run(code, 0x4000_0003, 1) == refused(errno.ENOSYS)  # i386
    assert seccomp.run(code, ours, 0x4000_0000 | 1) == refused(errno.ENOSYS)  # x32
    denied = set(seccomp.SYSCALLS[machine].values())
    for number in set(range(470)) - denied:
        assert seccomp.run(code, ours, number) == ALLOW, number


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_the_kernel_takes_it_and_holds_to_it() -> None:
    if linux.MACHINE not in MACHINES:
        lacking(f"needs one of {MACHINES}")
    filtered = seccomp.Filter(seccomp.instructions(linux.MACHINE, deny_lasting_ipc=True))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        report = []
        try:
            linux.make(linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1))
            linux.make(linux.install_filter(filtered.program))
            libc = ctypes.CDLL(None, use_errno=True)
            numbers = seccomp.SYSCALLS[linux.MACHINE]
            for name, argument in (("mount", 0), ("io_uring_setup", 0), ("socket", AF_PACKET), ("socket", AF_UNIX)):
                ctypes.set_errno(0)
                libc.syscall(ctypes.c_long(numbers[name]), ctypes.c_long(argument), ctypes.c_long(1), ctypes.c_long(0))
                report.append(ctypes.get_errno())
            os.write(write_end, repr(report).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        seen = file.read()
    os.waitpid(pid, 0)
    assert seen == repr([errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT, 0])
