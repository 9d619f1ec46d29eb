"""Ports that functions may neither listen on nor connect to: the kernel asks a small BPF program of their cgroup.

A function that listened on Flux's port while Flux was stopped would be sent its callers' keys, and the agent's own port
takes orders. The program belongs to the cgroup and holds for everything below it, whatever becomes of the agent; the
next one replaces it. Landlock's rules for TCP would need Linux 6.7.
Numbers and structures: Linux's include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection

_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8
_CGROUP_SOCK_ADDR = 18
_BIND = (8, 9)  # IPv4, IPv6
_CONNECT = (10, 11)
_USER_PORT = 24  # in struct bpf_sock_addr, in network byte order
_LOAD_WORD, _JUMP_IF_EQUAL, _MOVE, _EXIT = 0x61, 0x15, 0xB7, 0x95
_LOAD_ATTRIBUTES = struct.Struct("=IIQQIIQII16sII")
_ATTACH_ATTRIBUTES = struct.Struct("=IIII")
_INSTRUCTION = struct.Struct("=BBhi")


def close_ports(group: int, *, listen: Collection[int], connect: Collection[int]) -> None:
    """Refuse them (EPERM) to all processes in the cgroup whose directory ``group`` is, and below. Raises OSError."""
    for kinds, ports in ((_BIND, listen), (_CONNECT, connect)):
        for kind in kinds:
            program = _load(_refusing(ports), kind)
            try:
                _bpf(_PROG_ATTACH, _ATTACH_ATTRIBUTES.pack(group, program, kind, 0))
            finally:
                os.close(program)


def _refusing(ports: Collection[int]) -> bytes:
    """1 (allowed) unless the port is one of these."""
    load = _instruction(_LOAD_WORD, registers=0x12, offset=_USER_PORT)  # register 2 = context's port
    end = _instruction(_EXIT)
    # Past the other comparisons, and past the two instructions that allow.
    compared = [
        _instruction(_JUMP_IF_EQUAL, registers=2, offset=left + 2, value=socket.htons(port))
        for left, port in zip(range(len(ports) - 1, -1, -1), ports, strict=True)
    ]
    return b"".join([load, *compared, _instruction(_MOVE, value=1), end, _instruction(_MOVE, value=0), end])


def _instruction(code: int, *, registers: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, registers, offset, value)


def _load(code: bytes, kind: int) -> int:
    instructions = ctypes.create_string_buffer(code, len(code))
    license_ = ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(instructions), ctypes.addressof(license_)
    count = len(code) // _INSTRUCTION.size
    attributes = _LOAD_ATTRIBUTES.pack(_CGROUP_SOCK_ADDR, count, *addresses, 0, 0, 0, 0, 0, b"flux_ports", 0, kind)
    return _bpf(_PROG_LOAD, attributes)


def _bpf(command: int, attributes: bytes) -> int:
    number = _BPF.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = int(libc.syscall(ctypes.c_long(number), ctypes.c_int(command), buffer, ctypes.c_uint(len(attributes))))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
