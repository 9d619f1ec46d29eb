"""Why an address cannot be listened on, and what to do about it."""

from __future__ import annotations

import errno
import socket
import sys


def listen_problem(program: str, host: str, port: int, error: OSError, file: object) -> str:
    """In words, for the ``host`` and ``port`` of the configuration ``file``. ``error`` is what binding raised."""
    where = f"{program} cannot listen on {host}:{port}"
    if isinstance(error, socket.gaierror):
        return f"{where}: that name is not known here ({error.strerror}). Set `listen_host` in {file}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: another program does, perhaps this one started twice. Stop it, or set `port` in {file}"
    if error.errno == errno.EACCES and sys.platform == "win32":
        # Exclusive use of an address that is taken is "access denied" there, and so are reserved ranges.
        return f"{where}: another program does, or Windows keeps that port for itself. Set `port` in {file}"
    if error.errno == errno.EACCES:
        return f"{where}: ports below 1024 need root. Set `port` in {file}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where}: this machine does not have that address. Set `listen_host` in {file}"
    return f"{where}: {error.strerror or error}"


def try_to_listen(host: str, port: int) -> None:
    """Raises what binding there raises now: for libraries that say only that it failed."""
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":  # where it would share the port with whoever has it
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
