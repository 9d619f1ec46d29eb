"""How the spawner hears that a program has ended, and what it does about the signals it was started with.

Part of the spawner: standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal

# Python ignores the first two, and exec would keep that; a handler it resets. Ctrl-C in a terminal goes
# to the whole foreground group, and stopping is the agent's to say.
_HANDLED = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD]
_SIGSET_BYTES = 128


def ends_of_children() -> int:
    """A descriptor that can be read after a child has ended. Takes this process's signals over. Raises OSError.

    By signalfd: a handler of Python's interrupts poll, writes to a pipe and is called later, at a twentieth of what
    starting a program costs. SIGCHLD is blocked from then on, also in a child until it sets its own mask.
    """
    for number in _handled():
        signal.signal(number, lambda *_: None)
    wanted = (ctypes.c_uint64 * (_SIGSET_BYTES // 8))(1 << (signal.SIGCHLD - 1))
    # The flags are those of open on every Linux.
    fd = int(ctypes.CDLL(None, use_errno=True).signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    return fd


def _handled() -> set[int]:
    """Also what whoever started the agent made it ignore: nohup, or a script that ends a line with &."""
    others = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    return {*_HANDLED, *(number for number in others if signal.getsignal(number) is signal.SIG_IGN)}
