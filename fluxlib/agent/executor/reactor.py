"""One thread that reads what every running program writes.

A program that writes many small pieces would cost a wake-up each. After a few
quick reads its pipe is enlarged and looked at every 20 ms instead: 200 000 lines
cost hundreds of reads. A program's end is told by the spawner, not by the pipe,
so a short program never waits for that; and most are so short that their pipe
is read once, at their end, and never watched.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import select
import termios
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

_READ_SIZE = 256 * 1024
_QUICK_READS = 8
_COALESCE = 0.02
# Between two reads of output that is past its cap and thrown away: what a flood costs the agent (seconds).
_DISCARD_EVERY = 0.04
# A new pipe is watched from then on: a program that fills it at once waits no longer than this (seconds).
_UNWATCHED = 0.01
_PIPE_SIZE = 1024 * 1024
# How long one waits that the kernel could not watch (seconds).
_AGAIN = 1.0
_READABLE = select.EPOLLIN


class OutputPipe:
    """The reading end of one program's output."""

    __slots__ = ("enlarged", "fd", "on_output", "reads", "resting", "taken", "wanted")

    def __init__(self, fd: int, on_output: Callable[[bytes], object]) -> None:
        self.fd = fd
        self.on_output = on_output  # answers False when nothing of what comes is kept any more
        self.wanted = True
        self.enlarged = False
        self.reads = 0
        self.resting = False
        self.taken = 0  # by the last read


class InputPipe:
    """The writing end of one program's standard input, and what is still to be written."""

    __slots__ = ("fd", "left")

    def __init__(self, fd: int, data: bytes) -> None:
        self.fd = fd
        self.left = memoryview(data)

    def write(self) -> None:
        """As much as fits now. A program that no longer reads gets no more."""
        os.set_blocking(self.fd, False)
        try:
            while self.left:
                self.left = self.left[os.write(self.fd, self.left) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.left = self.left[:0]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


class Reactor:
    """The epoll loop. ``watch`` and ``forget`` may be called from any thread, the callbacks run in its own."""

    def __init__(self, name: str) -> None:
        self._poller = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._pipes: dict[int, OutputPipe] = {}
        self._resting: deque[tuple[float, OutputPipe]] = deque()
        self._new: deque[tuple[float, OutputPipe]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poller.register(self._wake_read, select.EPOLLIN)
        # Kept: an allocation of this size is a mapping made, touched and unmapped, for each read. Not a bytearray,
        # whose zeros are written: of this only what has been read into is held.
        self._buffer = memoryview(mmap.mmap(-1, _READ_SIZE))
        self._null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def is_here(self) -> bool:
        """Whether the caller is the reactor's own thread."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the reactor's thread soon."""
        self._calls.append(function)
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        """Run ``function`` on the reactor's thread in ``seconds``; not at all when it stops before."""
        at = time.monotonic() + seconds
        self.call(lambda: self._later.append((at, function)))

    def watch(self, fd: int, handler: Callable[[], None], events: int = _READABLE) -> None:
        """Call ``handler`` whenever ``fd`` can be read, or has other ``events``."""
        self._handlers[fd] = handler
        self._poller.register(fd, events)

    def forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._poller.unregister(fd)

    def add_pipe(self, pipe: OutputPipe) -> None:
        """From any thread; reading it must not block. Something must wake the reactor soon, as the spawner's word of
        the start does.
        """
        fd = pipe.fd
        if fd < 0:
            return  # its spawner has died meanwhile, and it is drained
        self._pipes[fd] = pipe
        pipe.resting = True
        self._new.append((time.monotonic() + _UNWATCHED, pipe))

    def feed(self, pipe: InputPipe) -> None:
        """Write the rest as the program reads it. From any thread."""

        def go_on() -> None:
            pipe.write()
            if not pipe.left:
                self.drop(pipe)

        def watch() -> None:
            if pipe.fd < 0:
                return
            try:
                self.watch(pipe.fd, go_on, select.EPOLLOUT)
            except OSError as error:
                log.warning("a program's input cannot be watched now: %s; trying again", error)
                self._handlers.pop(pipe.fd, None)
                self.call_later(_AGAIN, watch)

        self.call(watch)

    def drop(self, pipe: InputPipe) -> None:
        """Close it, written to the end or not. On the reactor's thread."""
        if pipe.fd >= 0:
            self.forget(pipe.fd)
            pipe.close()

    def drain(self, pipe: OutputPipe) -> None:
        """Read what is left and close. On the reactor's thread, when nothing of the tree is alive any more."""
        # Counted first: the program may have handed its writing end to somebody who goes on for ever, and one that
        # made its writes packets (O_DIRECT) is read one of them at a time.
        left = _waiting(pipe.fd) if pipe.fd >= 0 else 0
        while left > 0 and self._read(pipe):
            left -= pipe.taken
        self._close(pipe)

    def stop(self, timeout: float) -> None:
        self._stopping = True
        self.call(lambda: None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if not self._thread.is_alive():
            for pipe in list(self._pipes.values()):
                self._close(pipe)
            for fd in (self._wake_read, self._wake_write, self._null):
                os.close(fd)
            self._poller.close()

    # -- the thread ----------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            for fd, _ in self._poller.poll(self._timeout()):
                try:
                    self._handle(fd)
                except Exception:
                    log.exception("handling what a program wrote failed")
            self._end_rests()
            if self._later:
                self._call_due()
            while self._calls:
                try:
                    self._calls.popleft()()
                except Exception:
                    log.exception("a call on the output thread failed")

    def _call_due(self) -> None:
        now = time.monotonic()
        self._calls.extend(function for at, function in self._later if at <= now)
        self._later = [one for one in self._later if one[0] > now]

    def _timeout(self) -> float:
        """Seconds until the next pipe is to be watched or call to be made, -1 = none."""
        ends = [at for at, _ in self._later]
        for waiting in (self._new, self._resting):
            while waiting and waiting[0][1].fd < 0:
                waiting.popleft()
            if waiting:
                ends.append(waiting[0][0])
        return max(0.0, min(ends) - time.monotonic()) if ends else -1.0

    def _handle(self, fd: int) -> None:
        if fd == self._wake_read:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 4096)
            return
        handler = self._handlers.get(fd)
        if handler is not None:
            handler()
            return
        pipe = self._pipes.get(fd)
        if pipe is None or pipe.resting:
            return
        if self._read(pipe) is False:
            # Every writer closed it although the program may go on: nothing more to see here.
            self._close(pipe)
            return
        pipe.reads += 1
        if not pipe.wanted or (pipe.reads >= _QUICK_READS and pipe.taken < _READ_SIZE):
            self._rest(pipe)

    def _rest(self, pipe: OutputPipe) -> None:
        if not pipe.enlarged:
            pipe.enlarged = True
            # Not at the start: most programs write little, and each enlarged pipe costs kernel memory.
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe.fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self._poller.unregister(pipe.fd)
        pipe.resting = True
        self._resting.append((time.monotonic() + (_COALESCE if pipe.wanted else _DISCARD_EVERY), pipe))

    def _end_rests(self) -> None:
        now = time.monotonic()
        for waiting in (self._new, self._resting):
            while waiting and waiting[0][0] <= now:
                pipe = waiting.popleft()[1]
                pipe.resting = False
                if pipe.fd >= 0:
                    self._watch_pipe(pipe)

    def _watch_pipe(self, pipe: OutputPipe) -> None:
        try:
            self._poller.register(pipe.fd, select.EPOLLIN)
        except OSError as error:
            # The user's watches are used up, or memory is: this program waits when its pipe is full, nobody else does.
            log.warning("a program's output cannot be watched now: %s; trying again", error)
            pipe.resting = True
            self.call_later(_AGAIN, lambda: self._resting.append((0.0, pipe)))

    def _read(self, pipe: OutputPipe) -> bool | None:
        """True after some data, False at the end, None when nothing is there now."""
        try:
            if not pipe.wanted:
                # Not even copied, and looked at every 20 ms: a program that floods costs the agent next to nothing.
                pipe.taken = os.splice(pipe.fd, self._null, _PIPE_SIZE)
                return pipe.taken > 0
            size = os.readv(pipe.fd, (self._buffer,))
        except BlockingIOError:
            return None
        except OSError as error:
            log.warning("reading a program's output failed: %s", error)
            return False
        pipe.taken = size
        if size:
            pipe.wanted = pipe.on_output(bytes(self._buffer[:size])) is not False
        return size > 0

    def _close(self, pipe: OutputPipe) -> None:
        if pipe.fd < 0:
            return
        if not pipe.resting:
            with contextlib.suppress(OSError):
                self._poller.unregister(pipe.fd)
        self._pipes.pop(pipe.fd, None)
        os.close(pipe.fd)
        pipe.fd = -1


def _waiting(fd: int) -> int:
    """Bytes that can be read now."""
    count = array("i", (0,))
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]
