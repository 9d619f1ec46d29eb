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
    # On Windows exclusive use of an address that is taken is "access denied", and so are reserved ranges.
    if error.errno == errno.EADDRINUSE or (error.errno == errno.EACCES and sys.platform == "win32"):
        advice = f"Stop that program, or set another `port` in {file}"
        holder = _holder(host, port)
        if holder:
            return f"{where}: the port is in use by {holder}. {advice}"
        if error.errno == errno.EACCES:
            look = "`netsh interface ipv4 show excludedportrange tcp` lists those"
            return f"{where}: the port is in use by another program, or Windows reserves it ({look}). {advice}"
        look = f"; `sudo ss -ltnp sport = :{port}` shows which" if sys.platform == "linux" else ""
        return f"{where}: the port is in use by another program{look}. {advice}"
    if error.errno == errno.EACCES:
        return f"{where}: ports below 1024 need root. Set `port` in {file}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where}: this machine does not have that address. Set `listen_host` in {file}"
    return f"{where}: {error.strerror or error}"


def _holder(host: str, port: int) -> str:
    """The program that listens there and its process, or nothing when this user may not see it."""
    import psutil

    anywhere = ("0.0.0.0", "::")
    try:
        # An unprivileged user sees the sockets of others, but not whose they are.
        for one in psutil.net_connections("tcp"):
            if one.status != psutil.CONN_LISTEN or one.pid is None or not one.laddr or one.laddr.port != port:
                continue
            # gRPC's sockets are IPv6, also for an IPv4 address.
            if host in anywhere or one.laddr.ip.removeprefix("::ffff:") in (host, *anywhere):
                return f"{psutil.Process(one.pid).name()} (process {one.pid})"
    except (psutil.Error, OSError):
        pass
    return ""


def try_to_listen(host: str, port: int) -> None:
    """Raises what binding there raises now: for libraries that say only that it failed."""
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            if sys.platform != "win32":  # where it would share the port with its owner
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
