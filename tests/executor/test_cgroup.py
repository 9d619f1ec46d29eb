"""cgroup files on a directory that stands for the kernel's: what is written, what is read, what is refused."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.agent.executor.base import Limits
from fluxlib.agent.executor.cgroup import Hierarchy, Machine, RunGroup, is_empty, own_group
from fluxlib.errors import CannotStart, Unenforceable
from tests.support.need import lacking

MB = 1024**2
FILES = ("memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cpu.max", "cgroup.kill", "cgroup.procs")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[RunGroup]:
    for name in FILES:
        (tmp_path / name).write_text("")
    group = RunGroup(os.fspath(tmp_path))
    yield group
    group.close()


def _content(group: RunGroup) -> dict[str, str]:
    return {name: text for name in FILES if (text := Path(group.path, name).read_text())}


def test_limits_as_the_kernel_reads_them(group: RunGroup) -> None:
    group.limit(Limits(memory_bytes=128 * MB, cpu_millicores=250, processes=64, open_files=9, tmp_bytes=MB))
    assert _content(group) == {
        "memory.max": str(128 * MB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "64",
        "cpu.max": "25000 100000",
    }


def test_what_is_not_limited_is_not_written(group: RunGroup) -> None:
    group.limit(Limits())
    assert _content(group) == {"memory.oom.group": "1"}


def test_a_kernel_without_swap_needs_no_swap_limit(group: RunGroup) -> None:
    Path(group.path, "memory.swap.max").unlink()
    group.limit(Limits(memory_bytes=MB))
    assert Path(group.path, "memory.max").read_text() == str(MB)


def test_figures(group: RunGroup) -> None:
    Path(group.path, "memory.peak").write_text("5242880\n")
    Path(group.path, "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n")
    Path(group.path, "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 1\noom_kill 0\noom_group_kill 0\n")
    figures = group.figures()
    assert (figures.peak_memory_bytes, figures.cpu_seconds, figures.out_of_memory) == (5242880, 1.5, False)
    Path(group.path, "memory.events").write_text("max 12\noom 1\noom_kill 2\n")
    assert group.figures().out_of_memory is True


def test_an_older_kernel_has_no_peak(group: RunGroup) -> None:
    Path(group.path, "cpu.stat").write_text("usage_usec 10\n")
    assert group.figures().peak_memory_bytes is None


def test_killing_writes_one_file(group: RunGroup) -> None:
    group.kill()
    assert Path(group.path, "cgroup.kill").read_text() == "1"


def test_a_closed_group_is_left_alone(group: RunGroup) -> None:
    group.close()
    group.kill()
    group.signal(15)
    group.close()
    assert Path(group.path, "cgroup.kill").read_text() == ""


def test_emptiness(tmp_path: Path) -> None:
    events = tmp_path / "cgroup.events"
    for populated in (1, 0):
        events.write_text(f"populated {populated}\nfrozen 0\n")
        fd = os.open(events, os.O_RDONLY)
        assert is_empty(fd) is (populated == 0)
        os.close(fd)


# -- where functions run ---------------------------------------------------------------------


def _unified(root: Path, group: str = "system.slice/flux-agent.service") -> tuple[Path, Path]:
    """A made-up /sys/fs/cgroup and /proc/self/cgroup."""
    root.joinpath(group).mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory pids io\n")
    membership = root / "membership"
    membership.write_text(f"0::/{group}\n")
    return root / group, membership


def test_a_hybrid_or_old_hierarchy_is_no_place(tmp_path: Path) -> None:
    assert own_group(tmp_path) is None
    with pytest.raises(Unenforceable, match=r"no cgroup v2 at /sys/fs/cgroup: boot with systemd.unified"):
        Hierarchy.find("worker", tmp_path)


def test_ones_own_group(tmp_path: Path) -> None:
    group, membership = _unified(tmp_path)
    assert own_group(tmp_path, membership) == group


def test_a_unit_without_delegation_is_refused_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, _ = _unified(tmp_path)
    monkeypatch.setattr("fluxlib.agent.executor.cgroup.own_group", lambda root: group)
    with pytest.raises(Unenforceable, match="put `Delegate=cpu memory pids` into the agent's unit"):
        Hierarchy.find("worker", tmp_path, systemd=True)
    assert Hierarchy.find("worker", tmp_path, systemd=False).base == tmp_path / "flux" / "worker"


def test_a_delegated_unit_is_the_base_also_when_the_agent_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit, _ = _unified(tmp_path)
    try:
        os.setxattr(unit, "user.delegate", b"1")
    except OSError:
        lacking("needs a file system with user attributes")
    moved = unit / "agent"
    moved.mkdir()
    for group in (unit, moved):
        monkeypatch.setattr("fluxlib.agent.executor.cgroup.own_group", lambda root, group=group: group)
        assert Hierarchy.find("worker", tmp_path, systemd=True).base == unit


def test_a_missing_controller_is_named(tmp_path: Path) -> None:
    unit, _ = _unified(tmp_path)
    for path in (tmp_path / "cgroup.subtree_control", unit.parent / "cgroup.subtree_control"):
        path.write_text("")
    (unit / "cgroup.controllers").write_text("cpu pids\n")
    with pytest.raises(Unenforceable, match="lacks the controllers memory: put `Delegate=cpu memory pids`"):
        Hierarchy(unit).set_up()


def test_a_group_that_cannot_be_made_starts_nothing(tmp_path: Path) -> None:
    hierarchy = Hierarchy(tmp_path)
    with pytest.raises(CannotStart, match="No such file or directory"):
        hierarchy.make("e-1", Limits())
    hierarchy.functions.mkdir()
    (hierarchy.functions / "e-1").mkdir()
    with pytest.raises(CannotStart, match="File exists"):
        hierarchy.make("e-1", Limits())


def test_a_group_that_no_descriptor_is_left_for_is_not_left_behind(tmp_path: Path) -> None:
    hierarchy = Hierarchy(tmp_path)
    hierarchy.functions.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(CannotStart, match="Too many open files"):
            hierarchy.make("e-1", Limits())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not (hierarchy.functions / "e-1").exists()


def test_functions_get_a_port_neither_to_listen_on_nor_to_connect_to(cgroups: Path, tmp_path: Path) -> None:
    """Whatever the address and the way to connect; and the ports of an agent replace those of the one before it."""
    hierarchy = Hierarchy(tmp_path)
    hierarchy.functions = cgroups
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        agent, elsewhere = server.getsockname()[1], other.getsockname()[1]
        hierarchy.close_ports(listen={elsewhere}, connect={elsewhere})
        hierarchy.close_ports(listen={_FREE_PORT, agent}, connect={agent})
        run = cgroups / "run"
        run.mkdir()
        try:
            script = _JOIN_AND_TRY.format(group=run, api=_FREE_PORT, agent=agent, elsewhere=elsewhere)
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        finally:
            run.rmdir()
    assert not hierarchy.warnings
    assert json.loads(done.stdout) == {
        **dict.fromkeys(("listen", "listen on IPv6", "connect", "connect from IPv6", "fast open"), "EPERM"),
        "connect elsewhere": "works",
        "listen elsewhere": "works",
    }


def test_where_ports_cannot_be_closed_the_agent_says_so(tmp_path: Path) -> None:
    hierarchy = Hierarchy(tmp_path)
    hierarchy.close_ports(listen={7227, 50052}, connect={50052})
    (warning,) = hierarchy.warnings
    assert "functions can listen on ports 7227, 50052 of this machine while nobody else does" in warning


_FREE_PORT = 7227  # never bound here: listening on it is refused
_JOIN_AND_TRY = """
import errno, json, socket
with open("{group}/cgroup.procs", "w") as file:
    file.write("0")
FAST_OPEN = 0x20000000
def listen(address, family=socket.AF_INET):
    socket.socket(family).bind(address)
def connect(port):
    socket.create_connection(("127.0.0.1", port), 5).close()
def connect6():
    socket.socket(socket.AF_INET6).connect(("::ffff:127.0.0.1", {agent}))
tries = {{
    "listen": lambda: listen(("0.0.0.0", {api})),
    "listen on IPv6": lambda: listen(("::", {api}), socket.AF_INET6),
    "listen elsewhere": lambda: listen(("127.0.0.1", 0)),
    "connect": lambda: connect({agent}),
    "connect from IPv6": connect6,
    "fast open": lambda: socket.socket().sendto(b"x", FAST_OPEN, ("127.0.0.1", {agent})),
    "connect elsewhere": lambda: connect({elsewhere}),
}}
found = {{}}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = "works"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(json.dumps(found))
"""

_GB = 1024**3


@pytest.mark.parametrize(
    ("memory", "of_the_unit", "reserve", "functions", "agent"),
    [
        (16 * _GB, "max", 0, 16 * _GB - 16 * _GB // 10, 16 * _GB // 10),  # a tenth
        (3 * _GB, "max", 0, 3 * _GB - 512 * 1024**2, _GB),  # half a GB at least
        (3 * _GB, "max", 2**20, 3 * _GB - 2**20, _GB),  # as agent.yaml says
        (16 * _GB, str(2 * _GB), 0, 2 * _GB - 512 * 1024**2, _GB),  # the unit has less than the machine
        (600 * 1024**2, "max", 0, 300 * 1024**2, 300 * 1024**2),  # a small one: half each
    ],
)
def test_the_sum_of_all_executions_is_bounded(
    tmp_path: Path, memory: int, of_the_unit: str, reserve: int, functions: int, agent: int
) -> None:
    names = ("fn/memory.max", "fn/memory.swap.max", "fn/pids.max", "agent/memory.max", "agent/cpu.weight", "memory.max")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "memory.max").write_text(of_the_unit + "\n")
    Hierarchy(tmp_path).bound(Machine(memory, 32768), reserve)
    written = {name: (tmp_path / name).read_text() for name in names[:5]}
    assert written == dict(zip(names, (str(functions), "0", "16384", str(agent), "1000"), strict=False))


def test_this_machine_has_memory_and_threads() -> None:
    machine = Machine.here()
    assert machine.memory > 100 * 1024**2
    assert machine.threads > 1000
