"""The agent's end of one spawner process: starting it, talking to it, noticing its death."""

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxlib.agent.executor.launch import as_file
from fluxlib.agent.executor.spawner_protocol import MAX_MESSAGE
from fluxlib.errors import CannotStart, InvalidInput

log = logging.getLogger(__name__)

# A frozen program has no interpreter to hand a file to: it is started again with this argument.
SPAWNER_ARGUMENT = "--flux-spawner"
_READY_TIMEOUT = 20.0
# Spares most requests the question for the buffer's size, which no kernel lets be smaller.
_ALWAYS_FITS = 1024
_START = """
import sys
sys.path.insert(0, sys.argv[1].rsplit("/", 4)[0])
from fluxlib.agent.executor.spawner import main
main(int(sys.argv[2]), sys.argv[3:])
"""


class SetUpRefused(CannotStart):
    """This machine does not let the spawner set itself up; ``number`` is the errno of ``step``."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(f"the spawner did not come up: {step}")
        self.step = step
        self.number = number


class SpawnerLink:
    """One life of the spawner. Sending is safe from any thread; receiving is the reactor's."""

    def __init__(self, *arguments: str) -> None:
        try:
            # Kept: an allocation of this size is a mapping made, touched and unmapped, for each answer. Not a
            # bytearray, whose zeros are written: a megabyte, of which answers take a page.
            self._buffer = memoryview(mmap.mmap(-1, MAX_MESSAGE))
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise CannotStart(f"the spawner cannot be started: {error}") from error
        try:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
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
            first = self.receive()
        except TimeoutError as error:
            self._process.kill()
            raise CannotStart(f"the spawner did not come up within {_READY_TIMEOUT:g} s") from error
        if not first:
            raise CannotStart("the spawner did not come up: it ended at once")
        if first[0][0] != "ready":
            raise SetUpRefused(*first[0][1:3])
        self._socket.settimeout(None)
        return tuple(first[0][1])

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, request: tuple[Any, ...], fds: Sequence[int] = ()) -> None:
        """Raises InvalidInput for what is too large to send, OSError when the spawner is gone."""
        message = marshal.dumps(request)
        if len(message) > MAX_MESSAGE - 4096:
            raise InvalidInput("the arguments and the environment together are larger than 1 MiB")
        if len(message) > _ALWAYS_FITS and len(message) > self._largest_message():
            file = as_file(message)
            try:
                self._send(marshal.dumps(("large",)), [file, *fds])
            finally:
                os.close(file)
        else:
            self._send(message, fds)

    def _send(self, message: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with self._lock:
            self._socket.sendmsg([message], rights)

    def _largest_message(self) -> int:
        """A message has to fit into the buffer, of which net.core.wmem_max leaves 208 KiB on most machines.

        Linux tells twice of what it gives, and counts what it adds to a message.
        """
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2 - 1024

    def receive(self) -> list[tuple[Any, ...]]:
        """One batch of answers; empty when the spawner is gone."""
        try:
            size = self._socket.recv_into(self._buffer)
        except ConnectionError:
            return []
        return list(marshal.loads(self._buffer[:size])) if size else []

    def close(self, timeout: float = 2.0) -> None:
        """Closing our end tells it to kill what runs and go."""
        self._socket.close()
        try:
            self._process.wait(max(0.0, timeout))
        except subprocess.TimeoutExpired:
            log.warning("the spawner did not end in time: killing it")
            self._process.kill()
            self._process.wait()


def _command(fd: int) -> list[str]:
    if getattr(sys, "frozen", False):
        return [sys.executable, SPAWNER_ARGUMENT, str(fd)]
    # Isolated and without site: it starts in a third of the time and imports nothing from the working directory.
    # Imported rather than run as a script: what compiling it would leave behind, every clone would pay for.
    script = Path(__file__).with_name("spawner.py")
    return [sys.executable, "-I", "-S", "-c", _START, os.fspath(script), str(fd)]
