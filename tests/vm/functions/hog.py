#!/usr/bin/python3 -I
"""One bad neighbour, named by its first argument."""

import os
import signal
import socket
import sys
import time


def fork_bomb():
    started = refused = 0
    while refused < 3:
        try:
            if os.fork() == 0:
                time.sleep(600)
                os._exit(0)
            started += 1
        except OSError:
            refused += 1
    print("started", started, flush=True)


def memory():
    kept = []
    while True:
        kept.append(bytearray(b"x" * (1 << 20)))


def child_memory():
    """A child is killed for it; the leader ends well."""
    if os.fork() == 0:
        memory()
    os.wait()


def daemon():
    """Double fork, own session, output closed: no process group reaches it."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.closerange(0, 3)
        os.environ.clear()
        time.sleep(600)
    else:
        os.wait()
        print("left", flush=True)


def chatty_daemon():
    """Its grandchild writes for ever into the output that the agent reads."""
    if os.fork() == 0:
        os.setsid()
        while True:
            os.write(1, b"x" * 65536)
    time.sleep(0.3)


def deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("deaf", flush=True)
    while True:
        time.sleep(600)


def polite():
    def stop(*_):
        print("stopping", flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    print("ready", flush=True)
    time.sleep(600)


def fill(directory):
    """Files until it is refused; how many MiB that were and why it ended."""
    written = number = 0
    block = b"x" * (1 << 20)
    try:
        while written < 4096:
            with open(os.path.join(directory, f"fill-{number}"), "wb", buffering=0) as file:
                number += 1
                for _ in range(16):
                    if file.write(block) != len(block):
                        raise OSError(28, "short write")
                    written += 1
    except OSError as error:
        print(written, error.errno, flush=True)


def big_file():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with open(os.path.join(os.environ["HOME"], "big"), "wb", buffering=0) as file:
            for _ in range(64):
                if file.write(b"x" * (1 << 20)) != 1 << 20:
                    raise OSError(27, "short write")
        print("written", flush=True)
    except OSError as error:
        print(error.errno, flush=True)


def files():
    kept = []
    try:
        while True:
            kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        print(len(kept), error.errno, flush=True)


def spin(seconds):
    """How much work gets done in ``seconds`` of the clock."""
    print("spinning", flush=True)
    began, deadline = time.process_time(), time.monotonic() + float(seconds)
    count = 0
    while time.monotonic() < deadline:
        for _ in range(2000):
            count += 1
    print(count, time.process_time() - began, flush=True)


def network():
    try:
        socket.create_connection(("127.0.0.1", 22), 5).close()
        print("works")
    except OSError as error:
        print(error.errno)


def loopback():
    """A server and a client of one function."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5) as client:
        server.accept()[0].sendall(b"works")
        print(client.recv(16).decode())


def flood():
    block = b"x" * (1 << 20)
    print("flooding", flush=True)
    while True:
        os.write(1, block)


def sleep(seconds="600"):
    with open(os.path.join(os.environ["HOME"], "secret"), "w") as file:
        file.write("secret")
    print(os.getpid(), os.environ["HOME"], os.environ["TMPDIR"], os.getcwd(), os.getuid(), flush=True)
    time.sleep(float(seconds))


globals()[sys.argv[1]](*sys.argv[2:])
