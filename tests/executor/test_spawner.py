"""The spawner as a process: what it is asked, what it answers, and what becomes of its runs when it dies."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import ANY

import psutil
import pytest

from fluxlib.agent.executor import link as spawner_link
from fluxlib.agent.executor import unix
from fluxlib.agent.executor.base import Exit, Job
from fluxlib.agent.executor.link import SpawnerLink
from fluxlib.agent.executor.reactor import OutputPipe
from fluxlib.agent.executor.unix import UnixExecutor
from fluxlib.config.agent import read_agent
from fluxlib.errors import CannotStart, Stopping
from fluxlib.spawner.sandbox import Step, _Failures
from tests.support.programs import is_alive, wait_until


class Run:
    """One job of an executor and everything it told."""

    def __init__(self, executor: UnixExecutor, directory: Path, script: str, name: str = "e-1", **changes: Any) -> None:
        program = directory / f"{name}.sh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        self.output = b""
        self.ends: list[Exit] = []
        self.pid, self.started_at, self.ended_at = 0, 0.0, 0.0
        self._changed = threading.Condition()
        env = {"PATH": "/usr/bin:/bin", "FLUX_EXECUTION_ID": name}
        job = Job(name, (str(program), *changes.pop("args", ())), env, directory, **changes)
        self.job = executor.start(job, self._wrote, self._ended, self._started)

    def _wrote(self, data: bytes) -> None:
        with self._changed:
            self.output += data
            self._changed.notify_all()

    def _started(self, pid: int, ago: float) -> None:
        self.pid, self.started_at = pid, time.monotonic() - ago

    def _ended(self, ended: Exit) -> None:
        self.ended_at = time.monotonic()
        with self._changed:
            self.ends.append(ended)
            self._changed.notify_all()

    def wait_for(self, words: bytes) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: words in self.output, 10)

    def end(self) -> Exit:
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends, 10)
        return self.ends[0]


@pytest.fixture
def directory() -> Iterator[Path]:
    import shutil
    import tempfile

    # Functions run as somebody else, who may not enter pytest's own directories.
    path = Path(tempfile.mkdtemp(prefix="flux-spawner-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def off_executor(directory: Path) -> UnixExecutor:
    config = read_agent(b"agent_id: worker\ntls: {enabled: false}\ninsecure: true\n", directory / "agent.yaml")
    return UnixExecutor(config, directory / "state", "a test")


@pytest.fixture
def executor(directory: Path) -> Iterator[UnixExecutor]:
    executor = off_executor(directory)
    yield executor
    executor.stop(time.monotonic() + 5)


def test_its_runs_are_lost_and_ended_when_it_dies_and_it_is_replaced(executor: UnixExecutor, directory: Path) -> None:
    run = Run(executor, directory, "(setsid sleep 60 &) ; echo up; sleep 60")
    run.wait_for(b"up")
    os.kill(executor._link.pid, signal.SIGKILL)
    assert run.end() == Exit(lost=True)
    assert run.output == b"up\n"
    assert len(run.ends) == 1
    wait_until(lambda: not is_alive(run.pid), "its program to have died of the signal")
    assert Run(executor, directory, "echo again", "e-2").end().exit_code == 0


def test_a_start_that_is_overtaken_by_its_spawners_death_holds_nobody_up(
    executor: UnixExecutor, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_pipe, told = executor._reactor.add_pipe, []

    def add_late(pipe: OutputPipe) -> None:
        os.kill(executor._link.pid, signal.SIGKILL)
        with executor._idle:
            told.append(executor._idle.wait_for(lambda: not executor._running, 10))
        add_pipe(pipe)

    monkeypatch.setattr(executor._reactor, "add_pipe", add_late)
    lost = Run(executor, directory, "true", "e-lost")
    monkeypatch.undo()
    assert told == [True]
    assert lost.end() == Exit(lost=True)
    assert Run(executor, directory, "echo hello", "e-next").end() == Exit(exit_code=0, cpu_seconds=ANY)
    assert lost.ends == [Exit(lost=True)]
    assert not executor._reactor._pipes


@pytest.mark.parametrize("unread", [True, *[False] * 5])
def test_nothing_outlives_an_agent_that_is_gone(unread: bool) -> None:
    """Not what left the process group of a program that still runs, nor when the agent died with answers unread."""
    link = SpawnerLink("off", "/", "0", "0")
    output, written = os.pipe()
    for execution in (b"e-1", b"e-2"):
        env = {b"PATH": b"/usr/bin:/bin", b"FLUX_EXECUTION_ID": execution}
        program = [b"/bin/sh", b"-c", b"setsid sleep 30 & setsid sleep 30 & echo up; sleep 30"]
        request = {
            "do": "run",
            "id": int(execution[-1:]),
            "argv": program,
            "env": env,
            "cwd": "/",
            "uid": -1,
            "gid": -1,
        }
        null = os.open(os.devnull, os.O_RDONLY)
        link.send({**request, "rlimits": {}, "execution": execution}, {"stdin": null, "stdout": written})
        os.close(null)
    os.close(written)
    with os.fdopen(output, "rb", buffering=0) as file:
        heard = b""
        while heard != b"up\n" * 2:
            heard += file.read(8)
        started = 0
        while not unread and started < 2:
            started += len(link.receive())
        assert not unread or select.select([link], [], [], 10)[0]
        link.close(10)
        # The end of the file comes when none of them is left that could write.
        assert select.select([file], [], [], 10)[0], "some of them live"
        assert file.read() == b""


def test_starts_while_it_dies_end_exactly_once(executor: UnixExecutor, directory: Path) -> None:
    """Every start either raises and tells nothing, or is told one end."""
    runs: list[Run] = []
    raised = 0
    for round_ in range(3):
        with contextlib.suppress(ProcessLookupError):  # the last one's successor is not there yet
            os.kill(executor._link.pid, signal.SIGKILL)
        for number in range(20):
            try:
                runs.append(Run(executor, directory, "exit 3", f"e-{round_}-{number}"))
            except Exception:
                raised += 1
    for run in runs:
        ended = run.end()
        assert ended.lost or ended.exit_code == 3
    assert len(runs) + raised == 60
    assert all(len(run.ends) == 1 for run in runs)


@pytest.mark.parametrize("stdin", [b"", b"along\n"])
def test_a_request_larger_than_the_socket_takes(executor: UnixExecutor, directory: Path, stdin: bytes) -> None:
    """net.core.wmem_max limits its buffer, whatever is asked for."""
    executor._link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    words = ("x" * 100_000,) * 9
    run = Run(executor, directory, "echo $#; cat; ls /proc/self/fd", args=words, stdin=stdin)
    assert run.end().exit_code == 0
    assert run.output.split() == [b"9", *stdin.split(), b"0", b"1", b"2", b"3"]
    assert Run(executor, directory, "echo small", "e-2").end().exit_code == 0


def test_a_start_told_with_its_end_was_before_it(executor: UnixExecutor, directory: Path) -> None:
    """The spawner keeps the news of a start for company; how long a program ran must not suffer by it."""
    before = time.monotonic()
    for number in range(10):
        run = Run(executor, directory, "exec sleep 0.001", f"e-{number}")
        run.end()
        assert before <= run.started_at <= run.ended_at - 0.001


def test_programs_get_signals_as_they_should_be(executor: UnixExecutor, directory: Path) -> None:
    run = Run(executor, directory, "grep -E 'Sig(Ign|Blk)' /proc/self/status")
    run.end()
    masks = {line.split()[0]: int(line.split()[1], 16) for line in run.output.decode().splitlines()}
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD, signal.SIGTERM):
        assert not masks["SigIgn:"] >> (number - 1) & 1, number
    assert masks["SigBlk:"] == 0


def test_what_the_agents_starter_ignored_is_no_programs_affair(directory: Path) -> None:
    """nohup ignores SIGHUP, a script's & SIGQUIT, and exec keeps that."""
    ours = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGQUIT)}
    try:
        executor = off_executor(directory)
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    try:
        run = Run(executor, directory, "grep SigIgn /proc/self/status")
        run.end()
        ignored = int(run.output.split()[1], 16)
        assert not [number for number in signal.valid_signals() if ignored >> (number - 1) & 1]
    finally:
        executor.stop(time.monotonic() + 10)


def test_no_descriptor_of_ours_is_inherited(executor: UnixExecutor, directory: Path) -> None:
    run = Run(executor, directory, "ls /proc/self/fd")
    run.end()
    assert run.output.split() == [b"0", b"1", b"2", b"3"], "3 is ls's own"


def test_no_descriptor_left_for_a_new_spawner_and_then_again(
    executor: UnixExecutor, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the dead one had is ended before there is another, and there is another in the end."""
    monkeypatch.setattr(unix, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(unix, "_LAST_RETRY", 0.01)
    run = Run(executor, directory, "echo there; exec sleep 60")
    run.wait_for(b"there")
    ended = threading.Event()
    asked: list[int] = []
    real = socket.socketpair

    def none_left(*args: Any) -> Any:
        asked.append(0)
        if len(asked) < 3 or not ended.is_set():
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*args)

    monkeypatch.setattr(socket, "socketpair", none_left)
    os.kill(executor._link.pid, signal.SIGKILL)
    assert run.end().lost
    ended.set()
    assert Run(executor, directory, "exit 3", "e-2").end().exit_code == 3
    assert len(asked) >= 3


def test_whatever_fails_with_a_new_spawner_it_is_tried_again(
    executor: UnixExecutor, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix, "_FIRST_RETRY", 0.01)
    runs = [Run(executor, directory, "echo there; exec sleep 60", f"e-{number}") for number in range(2)]
    for run in runs:
        run.wait_for(b"there")
    greeted: list[SpawnerLink] = []

    def greet(link: SpawnerLink) -> None:
        greeted.append(link)
        if len(greeted) == 1:
            raise RuntimeError("not this one")

    def end_trees(lost: list[unix.UnixSandbox]) -> None:
        raise RuntimeError("not these")

    monkeypatch.setattr(executor, "greet", greet)
    monkeypatch.setattr(executor, "end_trees", end_trees)
    os.kill(executor._link.pid, signal.SIGKILL)
    assert [run.end() for run in runs] == [Exit(lost=True)] * 2
    assert Run(executor, directory, "exit 3", "e-3").end().exit_code == 3
    assert len(greeted) == 2
    assert not psutil.pid_exists(greeted[0].pid)
    for run in runs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def test_a_stop_ends_the_tries_for_a_new_spawner(
    executor: UnixExecutor, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    tried = threading.Event()

    def greet(link: SpawnerLink) -> None:
        tried.set()
        raise RuntimeError("none")

    monkeypatch.setattr(unix, "_FIRST_RETRY", 300)
    monkeypatch.setattr(executor, "greet", greet)
    os.kill(executor._link.pid, signal.SIGKILL)
    assert tried.wait(10)
    began = time.monotonic()
    executor.stop(began + 30)
    assert time.monotonic() - began < 20


def test_the_machine_is_searched_once_for_what_a_dead_spawner_left(
    executor: UnixExecutor, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A session of its own: neither its group nor its number is known.
    script = "setsid sh -c 'echo $$; exec sleep 60' & wait"
    runs = [Run(executor, directory, script, f"e-{number}") for number in range(3)]
    for run in runs:
        run.wait_for(b"\n")
    searches: list[set[str]] = []
    kill = unix.kill_executions
    monkeypatch.setattr(unix, "kill_executions", lambda ids: searches.append(set(ids)) or kill(ids))  # type: ignore[func-returns-value]
    os.kill(executor._link.pid, signal.SIGKILL)
    for run in runs:
        assert run.end().lost
        pid = int(run.output)
        wait_until(lambda pid=pid: not is_alive(pid), "it to have died of the signal")
    assert searches == [{"e-0", "e-1", "e-2"}]


def test_in_cgroups_each_tree_is_ended_by_its_own_and_none_for_another() -> None:
    killed: list[str] = []

    class Group:
        def __init__(self, path: str) -> None:
            self.path = path

        def kill(self) -> None:
            killed.append(self.path)
            if self.path == "first":
                raise OSError(errno.EMFILE, "Too many open files")

    lost = [SimpleNamespace(group=Group(path)) for path in ("first", "second")]
    UnixExecutor.end_trees(cast(Any, SimpleNamespace(_hierarchy=object())), cast(Any, lost))
    assert killed == ["first", "second"]


@pytest.mark.parametrize("failing", ["pipe2", "write"])
def test_a_start_that_fails_leaves_no_descriptor(
    executor: UnixExecutor, directory: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_args: object) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        with pytest.raises(OSError, match="allocate"):
            executor.start(Job("e-1", ("/bin/true",), {}, directory, stdin=b"x"), print, print)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_slow_spawner_is_not_told_as_a_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(script: str) -> None:
        monkeypatch.setattr(spawner_link, "_command", lambda fd: [sys.executable, "-c", script])

    command("import time; time.sleep(60)")
    monkeypatch.setattr(spawner_link, "_READY_TIMEOUT", 0.01)
    with pytest.raises(CannotStart, match=r"did not start within 0\.01 s"):
        SpawnerLink()
    monkeypatch.setattr(spawner_link, "_READY_TIMEOUT", 20.0)
    command("raise SystemExit(1)")
    with pytest.raises(CannotStart, match="it ended at once"):
        SpawnerLink()


def test_after_stop_nothing_is_started(executor: UnixExecutor, directory: Path) -> None:
    executor.stop(time.monotonic() + 5)
    with pytest.raises(Stopping):
        Run(executor, directory, "true")


def test_what_it_cannot_do_it_says_when_it_starts(directory: Path) -> None:
    """An unknown directory to serve from: refused by the step, not by a process that is just gone."""
    from fluxlib.agent.executor.link import SetUpRefused

    if os.geteuid() != 0:
        pytest.skip("as root a namespace is made first")
    with pytest.raises(SetUpRefused) as refused:
        SpawnerLink("default", str(directory / "missing"), "1900000000", "4")
    assert "make a mount namespace" in refused.value.message


def test_a_childs_failure_is_kept_until_it_is_asked_for() -> None:
    failures = _Failures(slots=2)
    first, second = failures.take(), failures.take()
    with pytest.raises(OSError, match="too many programs"):
        failures.take()
    pid = os.fork()
    if pid == 0:
        failures.tell(second, Step.OUT_OF_MEMORY_SCORE, 30)
        os._exit(0)
    os.waitpid(pid, 0)
    assert failures.give_back(first) is None
    assert failures.give_back(second) == ("out of memory score", 30)
    again: list[Any] = [failures.give_back(failures.take()) for _ in range(3)]
    assert again == [None, None, None]
