"""What the thread of everybody's output reads, and when it stops reading."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from fluxlib.agent.executor.reactor import OutputPipe, Reactor


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Not started: a test is its thread."""
    reactor = Reactor("test-reactor")
    yield reactor
    reactor.stop(1)


def test_whoever_was_handed_an_ended_programs_output_keeps_nobody_busy(reactor: Reactor) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    reads: list[int] = []

    def read(data: bytes) -> None:
        reads.append(len(data))
        if len(reads) < 100:
            os.write(writing, bytes(len(data)))

    pipe = OutputPipe(reading, read)
    reactor.add_pipe(pipe)
    os.write(writing, bytes(size))
    reactor.drain(pipe)
    os.close(writing)
    assert sum(reads) == size
    assert pipe.fd == -1


def test_packets_are_read_to_the_last(reactor: Reactor) -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK | os.O_DIRECT)
    output: list[bytes] = []
    pipe = OutputPipe(reading, output.append)
    reactor.add_pipe(pipe)
    for word in (b"one", b"two", b"three"):
        os.write(writing, word)
    os.close(writing)
    reactor.drain(pipe)
    assert output == [b"one", b"two", b"three"]
