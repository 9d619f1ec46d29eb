"""The agent's end of one spawner process: starting it, talking to it, noticing that it has died or hangs."""

from __future__ import annotations

import logging
import marshal
import mmap
import os
import socket
import subprocess
import sys
import threading
from array import array
from pathlib import Path
from typing import Any

from fluxlib import spawner
from fluxlib.errors import CannotStart, InvalidInput

log = logging.getLogger(__name__)

# A frozen program has no interpreter to hand a file to: it is started again with this argument.
SPAWNER_ARGUMENT = "--flux-spawner"
_READY_TIMEOUT = 20.0
# Spares most requests the question for the buffer's size, which no kernel lets be smaller.
_ALWAYS_FITS = 1024
_START = """
import sys
sys.path.insert(0, sys.argv[1].rsplit("/", 3)[0])
from fluxlib.spawner.main import main
main(int(sys.argv[2]), sys.argv[3:])
"""


class SetUpRefused(CannotStart):
    """This machine does not let the spawner set itself up; ``number`` is the errno of ``step``."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(f"the spawner failed to start: {step}")
        self.step = step
        self.number = number


class SpawnerLink:
    """One spawner process. Sending is safe from any thread; receiving is the reactor's."""

    def __init__(self, *arguments: str) -> None:
        try:
            # Kept: an allocation of this size is a mapping made, touched and unmapped, for each message. Not a
            # bytearray, whose zeros are written: a megabyte, of which messages take a page.
            self._buffer = memoryview(mmap.mmap(-1, spawner.MAX_MESSAGE))
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise CannotStart(f"the spawner cannot be started: {error}") from error
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, spawner.MAX_MESSAGE)
            self._process = subprocess.Popen(
                [*_command(theirs.fileno()), *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal must reach the agent alone.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise CannotStart(f"the spawner cannot be started: {error}") from error
        finally:
            theirs.close()
        self._socket = ours
        self._lock = threading.Lock()
        try:
            self.notes = self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> tuple[str, ...]:
        """What it has to say of this machine."""
        self._socket.settimeout(_READY_TIMEOUT)
        try:
            greeting = self._receive()
        except TimeoutError as error:
            self._process.kill()
            raise CannotStart(f"the spawner did not start within {_READY_TIMEOUT:g} s") from error
        if not isinstance(greeting, dict):
            raise CannotStart("the spawner failed to start: it ended at once")
        version = greeting.get("ready", greeting.get("version"))
        if version != spawner.VERSION:
            raise CannotStart(
                f"the spawner on disk speaks version {version} of its protocol and this agent {spawner.VERSION}:"
                " Flux was upgraded while the agent ran, restart the agent"
            )
        if "refused" in greeting:
            raise SetUpRefused(greeting["refused"], greeting["errno"])
        self._socket.settimeout(None)
        return tuple(greeting.get("notes", ()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, request: dict[str, Any], fds: dict[str, int] | None = None) -> None:
        """Raises InvalidInput for what is too large to send, OSError when the spawner is gone."""
        fds = fds or {}
        message = marshal.dumps({**request, "fds": tuple(fds)})
        if len(message) > spawner.MAX_MESSAGE - 4096:
            raise InvalidInput("the arguments and the environment together are larger than 1 MiB")
        if len(message) > _ALWAYS_FITS and len(message) > self._largest_message():
            file = _as_file(message)
            try:
                self._send(marshal.dumps({"do": "large"}), [file, *fds.values()])
            finally:
                os.close(file)
        else:
            self._send(message, list(fds.values()))

    def _send(self, message: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with self._lock:
            self._socket.sendmsg([message], rights)

    def ping(self, number: int) -> None:
        """Never waits: a spawner that takes no messages is found out by the answer that does not come."""
        if self._lock.acquire(blocking=False):
            try:
                self._socket.send(marshal.dumps({"do": "ping", "id": number}), socket.MSG_DONTWAIT)
            except OSError:
                log.debug("the spawner cannot be pinged")
            finally:
                self._lock.release()

    def _largest_message(self) -> int:
        """A message has to fit into the buffer, of which net.core.wmem_max leaves 208 KiB on most machines.

        Linux reports twice what it gives, and counts what it adds to a message.
        """
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2 - 1024

    def receive(self) -> list[dict[str, Any]]:
        """One batch of events; empty when the spawner is gone."""
        events = self._receive()
        return events if isinstance(events, list) else []

    def _receive(self) -> object:
        try:
            size = self._socket.recv_into(self._buffer)
        except ConnectionError:
            return None
        return marshal.loads(self._buffer[:size]) if size else None

    def kill(self) -> None:
        self._process.kill()

    def close(self, timeout: float = 2.0) -> None:
        """Closing our end tells it to kill what runs and go."""
        self._socket.close()
        for last in (False, True):
            try:
                self._process.wait(max(0.0, timeout))
                return
            except subprocess.TimeoutExpired:
                log.warning("the spawner did not end in time: %s", "giving up on it" if last else "killing it")
                self._process.kill()


def _command(fd: int) -> list[str]:
    if getattr(sys, "frozen", False):
        return [sys.executable, SPAWNER_ARGUMENT, str(fd)]
    # Isolated and without site: it starts in a third of the time and imports nothing from the working directory.
    # Imported rather than run as a script: what compiling it would leave behind, every clone would pay for.
    script = Path(spawner.__file__).with_name("main.py")
    return [sys.executable, "-I", "-S", "-c", _START, os.fspath(script), str(fd)]


def _as_file(data: bytes) -> int:
    fd = os.memfd_create("request", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd
