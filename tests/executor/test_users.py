"""The users of running slots: one run each, and nobody else's number."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from fluxlib.agent.executor.users import Users, check_range
from fluxlib.errors import AtCapacity, Unenforceable
from tests.support.need import need_root
from tests.support.programs import wait_until

FAR = 1_900_000_000


def test_each_is_given_once_until_it_comes_back() -> None:
    users = Users(FAR, 3)
    taken = {users.take() for _ in range(3)}
    assert taken == {FAR, FAR + 1, FAR + 2}
    with pytest.raises(AtCapacity, match="all 3 users"):
        users.take()
    users.give_back(FAR + 1)
    assert users.take() == FAR + 1


def test_the_one_that_rested_longest_comes_first() -> None:
    users = Users(FAR, 3)
    first = users.take()
    users.give_back(first)
    assert [users.take() for _ in range(3)] == [FAR + 1, FAR + 2, first]


def test_never_two_at_a_time_however_many_ask() -> None:
    users = Users(FAR, 4)
    held: set[int] = set()
    lock = threading.Lock()
    problems: list[int] = []

    def work() -> None:
        for _ in range(500):
            try:
                uid = users.take()
            except AtCapacity:
                continue
            with lock:
                if uid in held:
                    problems.append(uid)
                held.add(uid)
            with lock:
                held.discard(uid)
            users.give_back(uid)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_an_unused_range_is_taken(tmp_path: Path) -> None:
    check_range(FAR, 256, (tmp_path / "missing",))


def test_an_account_stands_against_it() -> None:
    with pytest.raises(Unenforceable, match=r"overlaps the user root \(0\): choose another `uid_range`"):
        check_range(0, 1, ())


@pytest.mark.parametrize(
    ("line", "overlaps"),
    [
        (f"joe:{FAR - 100}:101", True),
        (f"joe:{FAR + 9}:65536", True),
        (f"joe:{FAR - 100}:100", False),
        (f"joe:{FAR + 10}:5", False),
        ("# nonsense", False),
    ],
)
def test_a_containers_range_stands_against_it(tmp_path: Path, line: str, overlaps: bool) -> None:
    file = tmp_path / "subuid"
    file.write_text(line + "\n")
    if overlaps:
        with pytest.raises(Unenforceable, match=f"of joe in {file}"):
            check_range(FAR, 10, (file,))
    else:
        check_range(FAR, 10, (file,))


def test_a_running_process_stands_against_it() -> None:
    need_root()
    number = FAR + 1077  # not in a range that a test beside this one takes
    program = f"import os, sys; os.setresuid({number}, {number}, {number}); print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        with pytest.raises(Unenforceable, match=f"processes that run as user {number}"):
            check_range(number - 1, 3, ())
        process.communicate()
    check_range(number - 1, 3, ())
    assert os.getuid() == 0


@pytest.mark.parametrize("threads", [0, 1])
def test_a_process_that_only_waits_to_be_reaped_is_nobody(threads: int) -> None:
    """What a former life left where the first process reaps nothing must not keep this one from starting."""
    need_root()
    number = FAR + 1079
    program = f"""
import ctypes, os, sys, threading
os.setresuid({number}, {number}, {number})
for _ in range({threads}):
    threading.Thread(target=sys.stdin.read).start()
print("up", flush=True)
ctypes.CDLL(None).pthread_exit(None) if {threads} else os._exit(0)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "it to end")
        if threads:
            with pytest.raises(Unenforceable, match=f"processes that run as user {number}"):
                check_range(number, 1, ())
        else:
            check_range(number, 1, ())
        process.kill()
