"""The executor: its contract under profiles with and without cgroups, and trees that cannot be ended at once."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxlib.agent.executor import reactor, unix, users_walk_to_code
from fluxlib.agent.executor.base import Exit, Job, Limits
from fluxlib.agent.executor.cgroup import RunGroup
from fluxlib.agent.executor.reactor import OutputPipe, Reactor
from fluxlib.agent.executor.unix import UnixExecutor, UnixSandbox
from fluxlib.config.agent import read_agent
from fluxlib.errors import CannotStart
from tests.executor.conftest import need_own_root
from tests.support.programs import wait_until

SECONDS = 10
# Of this process alone: a range in which somebody's processes run is refused, and tests run beside each other.
UIDS = f"{1_900_000_600 + os.getpid() % 100_000 * 256}+256"


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[UnixExecutor]:
    """Without a spawner, whose controllers few machines lend to a test: this is what comes after it."""
    for module in (unix, reactor):
        monkeypatch.setattr(module, "_AGAIN", 0.01)
    executor = UnixExecutor.__new__(UnixExecutor)
    executor._lock = threading.Lock()
    executor._reactor = Reactor("test-reactor")
    executor._reactor.start()
    yield executor
    executor._reactor.stop(SECONDS)


class Tree:
    """A process in a cgroup of its own."""

    def __init__(self, cgroups: Path) -> None:
        path = cgroups / "tree"
        path.mkdir()
        self.group = RunGroup(str(path))
        self.process = subprocess.Popen(["sleep", "600"])
        (path / "cgroup.procs").write_text(str(self.process.pid))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.group.fd >= 0:
            assert self.group.wait_until_empty(SECONDS)
            self.group.remove()
            self.group.close()


@pytest.fixture
def tree(cgroups: Path) -> Iterator[Tree]:
    tree = Tree(cgroups)
    yield tree
    tree.close()


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_kill_without_a_descriptor_is_made_when_there_is_one(executor: UnixExecutor, tree: Tree) -> None:
    sandbox = UnixSandbox(executor, "e-1", -1, -1, keep=False)
    sandbox.group, sandbox.running, sandbox.pid = tree.group, True, tree.process.pid
    with no_descriptors():
        sandbox.kill()
        assert tree.process.poll() is None, "it has to fail for this to show anything"
    assert tree.process.wait(SECONDS) == -9


def test_what_a_program_left_is_ended_when_there_is_a_descriptor(executor: UnixExecutor, tree: Tree) -> None:
    over = threading.Event()
    with no_descriptors():
        executor._end_rest(tree.group, remove=True, then=over.set)
        assert not over.is_set()
    assert tree.process.wait(SECONDS) == -9
    assert over.wait(SECONDS)
    assert not os.path.exists(tree.group.path)
    wait_until(lambda: tree.group.fd < 0, "the executor to be done with it")


def test_a_tree_of_many_processes_is_told_to_stop_to_the_last(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    processes = RunGroup.processes

    def look(group: RunGroup) -> list[int]:
        found = processes(group)
        looks.append(len(found))
        return found

    monkeypatch.setattr(RunGroup, "processes", look)
    path = cgroups / "crowd"
    path.mkdir()
    group = RunGroup(str(path))
    crowd = f"echo $$ > {path}/cgroup.procs; for n in $(seq 700); do sleep 600 & done; echo up; wait"
    process = subprocess.Popen(["sh", "-c", crowd], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == b"up\n"
        group.signal(signal.SIGTERM)
        emptied = group.wait_until_empty(SECONDS)
    group.kill()
    assert process.wait(SECONDS) == -signal.SIGTERM
    assert group.wait_until_empty(SECONDS)
    group.remove()
    group.close()
    assert emptied
    assert looks[0] == 701
    assert len(looks) < 20


class Unwilling:
    """A poller whose user has no watches left at first."""

    def __init__(self, poller: select.epoll) -> None:
        self._poller = poller
        self.refused = 0

    def register(self, fd: int, events: int) -> None:
        if self.refused < 2:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._poller.register(fd, events)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)


@pytest.fixture
def unwilling(executor: UnixExecutor) -> Unwilling:
    executor._reactor._poller = poller = Unwilling(executor._reactor._poller)  # type: ignore[assignment]
    return poller


def test_what_a_program_left_is_ended_when_it_can_be_watched(
    executor: UnixExecutor, tree: Tree, unwilling: Unwilling
) -> None:
    over = threading.Event()
    before = len(os.listdir("/proc/self/fd"))
    executor._end_rest(tree.group, remove=True, then=over.set)
    assert over.wait(SECONDS)
    assert unwilling.refused == 2
    assert len(os.listdir("/proc/self/fd")) == before - 1, "its cgroup's"


def test_output_that_cannot_be_watched_yet_keeps_nobody_elses(executor: UnixExecutor, unwilling: Unwilling) -> None:
    came = [threading.Event() for _ in range(3)]
    pipes = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in came]
    for (reading, writing), event in zip(pipes, came, strict=True):
        os.write(writing, b"x")
        executor._reactor.add_pipe(OutputPipe(reading, lambda data, event=event: event.set()))  # type: ignore[misc]
    executor._reactor.call(lambda: None)
    assert [event.wait(SECONDS) for event in came] == [True] * 3
    assert unwilling.refused == 2
    for _, writing in pipes:
        os.close(writing)


def test_it_is_killed_although_its_end_cannot_be_watched_yet(
    executor: UnixExecutor, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def events(group: RunGroup) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(RunGroup, "events", events)
    executor._end_rest(tree.group, remove=True, then=lambda: None)
    assert tree.process.wait(SECONDS) == -9
    monkeypatch.undo()


# -- the contract, under off and under a profile with cgroups ------------------------------------------


class Groups:
    """Groups without controllers: limits are the lab machine's business (tests/vm)."""

    warnings: tuple[str, ...] = ()

    def __init__(self, place: Path) -> None:
        self.place = place

    def set_up(self, reserve: int) -> int:
        return 0

    def close_ports(self, *, listen: Collection[int], connect: Collection[int]) -> None:
        """Tried out in test_cgroup."""

    def make(self, name: str, limits: Limits) -> RunGroup:
        os.mkdir(self.place / name)
        return RunGroup(str(self.place / name))


@pytest.fixture(params=["off", "default"])
def whole(request: pytest.FixtureRequest, cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UnixExecutor]:
    profile = str(request.param)
    if profile != "off":
        need_own_root()
    state = Path(tempfile.mkdtemp(prefix="flux-unix-", dir="/var/lib"))
    state.chmod(0o755)
    monkeypatch.setattr(unix.Hierarchy, "find", classmethod(lambda cls, agent_id: Groups(cgroups)))
    monkeypatch.setattr(unix.probe, "require", lambda profile, host: None)
    config = read_agent(
        f"agent_id: a\ntls: {{enabled: false}}\ninsecure: true\nuid_range: {UIDS}\n"
        f"isolation: {profile}\nstate_dir: {state}\n",
        state / "a",
    )
    made = UnixExecutor(config, state, "for a test" if profile == "off" else "")
    yield made
    made.stop(time.monotonic() + SECONDS)
    shutil.rmtree(state)


class Invoked:
    """What one program told."""

    def __init__(self) -> None:
        self.output, self.errors = b"", b""
        self.ends: list[Exit] = []
        self.over = threading.Event()

    def wrote(self, data: bytes) -> bool:
        self.output += data
        return len(self.output) < 1 << 20

    def wrote_errors(self, data: bytes) -> None:
        self.errors += data

    def ended(self, ended: Exit) -> None:
        self.ends.append(ended)
        self.over.set()

    def end(self) -> Exit:
        assert self.over.wait(30)
        assert len(self.ends) == 1
        return self.ends[0]


def _job(executor: UnixExecutor, script: str, **changes: Any) -> Job:
    code = Path(executor._programs, "functions", "f")
    code.mkdir(parents=True, exist_ok=True)
    for directory in (code, code.parent):
        directory.chmod(0o755)
    program = code / f"p{len(list(code.iterdir()))}.sh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "FLUX_EXECUTION_ID": program.name}
    return Job(program.name, (str(program),), env, code, **changes)


def _run(executor: UnixExecutor, script: str, **changes: Any) -> Invoked:
    invoked = Invoked()
    executor.start(
        _job(executor, script, **changes), invoked.wrote, invoked.ended, lambda pid, ago: invoked.started.set()
    )
    return invoked


def test_code_may_lie_where_only_root_may_walk(
    cgroups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    need_own_root()
    state = tmp_path_factory.mktemp("closed")
    state.parent.chmod(0o700)
    config = read_agent(
        f"agent_id: a\ntls: {{enabled: false}}\ninsecure: true\nuid_range: {UIDS}\nstate_dir: {state}\n",
        state / "agent.yaml",
    )
    assert not users_walk_to_code(config)
    monkeypatch.setattr(unix.Hierarchy, "find", classmethod(lambda cls, agent_id: Groups(cgroups)))
    monkeypatch.setattr(unix.probe, "require", lambda profile, host: None)
    executor = UnixExecutor(config, state)
    try:
        invoked = _run(executor, "cat $0 | head -1")
        assert invoked.end().exit_code == 0
        assert invoked.output == b"#!/bin/sh\n"
    finally:
        executor.stop(time.monotonic() + SECONDS)


READ_BY_AN_EVENT_LOOP = """exec python3 - 3<&0 <<'EOF'
import asyncio, os
async def main():
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(3))
    print(len(await asyncio.wait_for(reader.read(), 20)))
asyncio.run(main())
EOF"""


@pytest.mark.parametrize("size", [0, 5, 65_536, 3_000_000])
def test_input_is_a_pipe_that_event_loops_can_read_to_its_end(whole: UnixExecutor, size: int) -> None:
    invoked = _run(whole, READ_BY_AN_EVENT_LOOP, stdin=b"x" * size)
    assert invoked.end().exit_code == 0
    assert invoked.output == b"%d\n" % size


def test_input_that_nobody_reads_holds_nobody_up(whole: UnixExecutor) -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert _run(whole, "exit 3", stdin=b"x" * 3_000_000).end().exit_code == 3
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, "its descriptors to be closed")
    invoked = _run(whole, "cat </dev/stdin", stdin=b"again")
    assert invoked.end().exit_code == 0
    assert invoked.output == b"again"


def test_what_one_does_to_its_input_no_other_finds(whole: UnixExecutor) -> None:
    """Also without input: one /dev/null for all would carry flags from a function to the next."""
    flags = "import fcntl; print(fcntl.fcntl(0, fcntl.F_GETFL)); fcntl.fcntl(0, fcntl.F_SETFL, 0o4000 | 0o2000)"
    outputs = []
    for _ in range(2):
        invoked = _run(whole, f"exec python3 -c '{flags}'")
        assert invoked.end().exit_code == 0
        outputs.append(invoked.output)
    assert outputs == [b"0\n", b"0\n"]


def test_both_outputs_apart_or_in_their_order(whole: UnixExecutor) -> None:
    script = "echo 1; echo 2 >&2; echo 3; echo 4 >/dev/stderr"
    together = _run(whole, script)
    together.end()
    assert together.output == b"1\n2\n3\n4\n"
    apart = Invoked()
    whole.start(_job(whole, script), apart.wrote, apart.ended, None, apart.wrote_errors)
    apart.end()
    assert (apart.output, apart.errors) == (b"1\n3\n", b"2\n4\n")


def test_a_sandbox_outlives_its_invocations(whole: UnixExecutor) -> None:
    job = _job(whole, "echo x >$HOME/file 2>/dev/null; id -u; exec sleep 0.1")
    sandbox = whole.create(job)
    users = set()
    for _ in range(2):
        invoked = Invoked()
        sandbox.invoke(job, invoked.wrote, invoked.ended)
        with pytest.raises(CannotStart, match="runs in this sandbox already"):
            sandbox.invoke(job, invoked.wrote, invoked.ended)
        assert invoked.end().exit_code == 0
        users.add(invoked.output)
    assert len(users) == 1
    if sandbox.group is not None:
        assert os.path.isdir(sandbox.group.path)
        assert sandbox.figures().out_of_memory is False
    sandbox.destroy()
    assert sandbox.group is None or not os.path.exists(sandbox.group.path)
    gone = f"{sandbox.directory}/file"
    wait_until(lambda: not sandbox.directory or not os.path.exists(gone), "its files to be removed")


def test_a_destroyed_sandbox_tells_the_end_of_what_ran(whole: UnixExecutor) -> None:
    job = _job(whole, "(setsid sleep 60 &); echo up; exec sleep 60")
    sandbox, invoked = whole.create(job), Invoked()
    sandbox.invoke(job, invoked.wrote, invoked.ended)
    wait_until(lambda: invoked.output, "it to be up")
    sandbox.destroy()
    assert invoked.end().signal == signal.SIGKILL
    wait_until(lambda: sandbox.group is None or not os.path.exists(sandbox.group.path), "its cgroup to go")


def test_a_spawner_that_hangs_is_replaced(whole: UnixExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "_PING_EVERY", 0.1)
    running = _run(whole, "echo up; exec sleep 60")
    wait_until(lambda: running.output, "it to be up")
    assert whole.problem == ""
    spawner = whole._link.pid
    os.kill(spawner, signal.SIGSTOP)
    assert running.end().lost
    assert whole._link.pid != spawner
    assert _run(whole, "exit 3").end().exit_code == 3


def test_an_idle_spawner_answers_and_stays(whole: UnixExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "_PING_EVERY", 0.01)
    spawner, pings = whole._link.pid, whole._pings
    wait_until(lambda: whole._pings > pings + 20, "pings")
    assert whole._link.pid == spawner


def test_without_a_spawner_it_says_so(whole: UnixExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "_FIRST_RETRY", 0.01)
    monkeypatch.setattr(unix, "_LAST_RETRY", 0.01)
    real = unix.SpawnerLink

    def refuse(*arguments: str) -> Any:
        raise CannotStart("no process can be made")

    monkeypatch.setattr(unix, "SpawnerLink", refuse)
    os.kill(whole._link.pid, signal.SIGKILL)
    wait_until(lambda: whole.problem == "no process can be made", "the problem")
    monkeypatch.setattr(unix, "SpawnerLink", real)
    wait_until(lambda: whole.problem == "", "it to heal")
    assert _run(whole, "true").end().exit_code == 0


def test_a_flood_that_nobody_keeps_costs_little(whole: UnixExecutor) -> None:
    job, invoked = _job(whole, "exec cat /dev/zero"), Invoked()
    sandbox = whole.start(job, invoked.wrote, invoked.ended)
    wait_until(lambda: len(invoked.output) >= 1 << 20, "all that is kept")
    spent, began = time.process_time(), time.monotonic()
    threading.Event().wait(2)
    spent, took = time.process_time() - spent, time.monotonic() - began
    kept = len(invoked.output)
    sandbox.kill()
    invoked.end()
    assert spent < 0.15 * took, f"{spent:.2f} s of a processor in {took:.1f} s"
    assert kept < 2 << 20


@pytest.mark.parametrize(
    ("step", "number", "host_at_fault"),
    [
        ("exec", errno.ENOENT, False),
        ("exec", errno.EIO, True),
        ("change directory", errno.ENOENT, False),
        ("limits", errno.EPERM, False),
        ("mounts", errno.ENOSPC, True),
        ("clone", errno.EAGAIN, True),
        ("system call filter", 524, True),
    ],
)
def test_a_machine_that_cannot_is_told_from_a_program_that_cannot(
    tmp_path: Path, step: str, number: int, host_at_fault: bool
) -> None:
    job = Job("e", (str(tmp_path / "main.sh"),), {}, tmp_path)
    assert unix._failed(job, step, number).host_at_fault is host_at_fault
