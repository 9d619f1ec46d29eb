"""The spawner under each profile with real namespaces and cgroups, asked as the agent asks it.

Needs root and a kernel with cgroup v2, also one that is mounted without controllers: limits are the
lab machine's business (tests/vm).
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxlib.agent.executor import link
from fluxlib.agent.executor.cgroup import RunGroup
from fluxlib.agent.executor.link import SpawnerLink
from fluxlib.spawner import sandbox
from fluxlib.spawner.sandbox import DEFAULT, MINIMAL, OFF, STRICT
from tests.executor.conftest import need_own_root
from tests.support.need import need_root
from tests.support.programs import wait_until

UID = 1_950_000_000 + os.getpid()  # of this process alone: tests run beside each other, and some count its processes
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """A programs directory with one function, where every user can walk to."""
    need_root()
    place = Path(tempfile.mkdtemp(prefix="flux-programs-", dir="/var/lib"))
    code = place / "functions" / "mine"
    (place / "functions" / "other").mkdir(parents=True)
    (place / "functions" / "other" / "secret").write_text("secret")
    code.mkdir()
    work = place / "work"
    work.mkdir()
    os.chown(work, UID, UID)
    for path in (place, place / "functions", code, place / "functions" / "other"):
        path.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def shared(programs: Path) -> Iterator[Path]:
    """A mount whose changes go to the namespaces copied from this one, where every profile may read."""
    place = Path(tempfile.mkdtemp(prefix="flux-shared-", dir="/opt"))
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    subprocess.run(["mount", "--make-shared", place], check=True)
    (place / "later").mkdir()
    yield place
    subprocess.run(["umount", "-R", place], check=True)
    place.rmdir()


class Launched:
    """A spawner under one profile, asked one thing at a time."""

    def __init__(self, profile: str, programs: Path, cgroups: Path) -> None:
        if profile != MINIMAL:
            need_own_root()
        self.profile = profile
        self._programs = programs
        self._cgroups = cgroups
        self.link = SpawnerLink(profile, str(programs), str(UID), "8", str(programs))

    def run(self, script: str, **changes: Any) -> tuple[str, list[dict[str, Any]]]:
        """(output, answers) of a shell script that is the function's program."""
        program = self._programs / "functions/mine/main.sh"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        code, cwd, work = sandbox.CODE, sandbox.WORK, ""
        if self.profile == MINIMAL:
            code, cwd = str(self._programs / "functions/mine"), str(self._programs / "work")
            work = cwd
        path = self._cgroups / f"run-{next(_numbers)}"
        path.mkdir()
        group = RunGroup(str(path))
        output, written = os.pipe()
        os.fchown(written, UID, UID)
        null = os.open(os.devnull, os.O_RDONLY)
        request = {"do": "run", "id": 1, "argv": [os.fsencode(f"{code}/main.sh")], "cwd": cwd, "uid": UID, "gid": UID}
        request |= {"env": {b"PATH": b"/usr/bin:/bin", b"HOME": os.fsencode(cwd)}, "rlimits": {}, "execution": b"e"}
        request |= {"code": b"functions/mine", "work": work.encode(), "tmp_bytes": 1 << 20, "no_network": False}
        fds = {"stdin": null, "stdout": written, "cgroup": group.fd, **changes.pop("fds", {})}
        self.link.send({**request, **changes}, fds)
        os.close(written)
        os.close(null)
        answers: list[dict[str, Any]] = []
        while not answers or answers[-1]["event"] == "started":
            answers += self.link.receive()
        group.kill()
        assert group.wait_until_empty(5)
        assert group.remove()
        group.close()
        with os.fdopen(output) as file:
            return file.read(), answers


@pytest.fixture(scope="module", params=[DEFAULT, STRICT, MINIMAL])
def launched(request: pytest.FixtureRequest, programs: Path, cgroups: Path, shared: Path) -> Iterator[Launched]:
    launched = Launched(request.param, programs, cgroups)
    yield launched
    launched.link.close()


def test_it_becomes_the_program_and_its_end_is_told(launched: Launched) -> None:
    output, answers = launched.run("echo hello; exit 7")
    assert output == "hello\n"
    assert [answer["event"] for answer in answers] == ["started", "exit"]
    assert os.WEXITSTATUS(answers[1]["status"]) == 7
    _, answers = launched.run("kill -9 $$")
    assert os.WTERMSIG(answers[-1]["status"]) == signal.SIGKILL


def test_a_request_larger_than_the_socket_takes(launched: Launched) -> None:
    """net.core.wmem_max limits its buffer, whatever is asked for."""
    option = (socket.SOL_SOCKET, socket.SO_SNDBUF)
    usual = launched.link._socket.getsockopt(*option) // 2
    launched.link._socket.setsockopt(*option, 8192)
    try:
        words = [b"x" * 100_000] * 9
        code = str(launched._programs / "functions/mine") if launched.profile == MINIMAL else sandbox.CODE
        argv = [f"{code}/main.sh".encode(), *words]
        assert launched.run("echo $#; cat", argv=argv)[0] == "9\n"
        reading, writing = os.pipe()
        os.write(writing, b"along")
        os.close(writing)
        assert launched.run("echo $#; cat", argv=argv, fds={"stdin": reading})[0] == "9\nalong"
        os.close(reading)
    finally:
        launched.link._socket.setsockopt(*option, usual)


def test_it_is_nobody_with_nothing(launched: Launched) -> None:
    output, _ = launched.run("grep -E '^(Uid|Gid|Groups|Cap|NoNew|Seccomp:|SigIgn|SigBlk)' /proc/self/status; umask")
    *lines, umask = output.splitlines()
    status = {name: value.split() for name, value in (line.split(":", 1) for line in lines)}
    assert status["Uid"] == status["Gid"] == [str(UID)] * 4
    assert status["Groups"] == []
    assert {int(status[name][0], 16) for name in status if name.startswith("Cap")} == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    # 32 and 33 are the C library's own: nobody can set them through it, and some starters leave them ignored.
    of_libc = 0b11 << 31
    assert (int(status["SigIgn"][0], 16) & ~of_libc, int(status["SigBlk"][0], 16)) == (0, 0)
    assert umask == "0077"


def test_it_inherits_no_descriptor(launched: Launched) -> None:
    assert launched.run("ls /proc/self/fd")[0].split() == ["0", "1", "2", "3"], "3 is ls's own"


def test_its_limits_and_score(launched: Launched) -> None:
    limits = {resource.RLIMIT_NOFILE: 77, resource.RLIMIT_FSIZE: 1 << 20}
    output, _ = launched.run("ulimit -n; ulimit -c; cat /proc/self/oom_score_adj", rlimits=limits)
    assert output.split() == ["77", "0", "500"]
    score = Path("oom_score_adj")
    assert (f"/proc/{launched.link.pid}" / score).read_text() == ("/proc/self" / score).read_text(), (
        "only while it clones"
    )


def test_another_functions_code_is_out_of_reach(launched: Launched, programs: Path) -> None:
    output, _ = launched.run(f"cat {programs}/functions/other/secret 2>&1")
    reason = "Permission denied" if launched.profile == MINIMAL else "No such file or directory"
    assert output.strip().endswith(reason)


def test_it_writes_to_its_own_and_nowhere_else(launched: Launched) -> None:
    script = 'for d in "$HOME" /tmp /dev/shm /var/tmp /usr/local "${0%/*}"; do (: >$d/f) 2>/dev/null && echo $d; done'
    output, _ = launched.run(script)
    minimal = launched.profile == MINIMAL
    assert output.split() == [*output.split()[:1], *([] if minimal else ["/tmp", "/dev/shm"])]
    assert output.split()[0] == (str(launched._programs / "work") if minimal else sandbox.WORK)
    if not minimal:
        # Of the first nothing is there for the second.
        assert launched.run("ls -A /tmp /dev/shm $HOME")[0].split() == ["/dev/shm:", "/run/flux/work:", "/tmp:"]


def test_what_the_machine_mounts_later_is_not_there(launched: Launched, shared: Path) -> None:
    later = shared / "later"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", later], check=True)
    try:
        output, _ = launched.run(
            f"grep -c ' {later} ' /proc/self/mountinfo; echo x >/proc/self/comm && echo named; echo x >{later}/f"
        )
    finally:
        # Not kept in use by the spawner.
        subprocess.run(["umount", later], check=True)
    if launched.profile == MINIMAL:
        return  # the machine's own view, where Landlock refuses it
    lines = output.splitlines()
    assert lines[0] == "0"
    assert launched.profile == STRICT or lines[1] == "named", "Landlock has no file in /proc to write to"


def test_memory_file_systems_have_their_size(launched: Launched) -> None:
    if launched.profile == MINIMAL:
        return  # it has none
    output, _ = launched.run("head -c 2000000 /dev/zero >/tmp/full; stat -c %s /tmp/full", tmp_bytes=1 << 20)
    assert output.split()[-1] == str(1 << 20)


def test_what_serves_administrators_is_not_mounted(launched: Launched) -> None:
    if launched.profile == MINIMAL:
        return  # the machine's own view
    table = [line.split() for line in launched.run("cat /proc/self/mountinfo")[0].splitlines()]
    kinds = {fields[fields.index("-") + 1] for fields in table}
    assert not kinds & {"mqueue", "debugfs", "tracefs", "securityfs", "configfs", "bpf", "pstore"}, kinds
    targets = [fields[4] for fields in table]
    assert targets.count("/proc") == 1
    beside = {
        "/",
        "/proc",
        "/sys",
        "/sys/fs/cgroup",
        "/tmp",
        "/dev/shm",
        "/dev/pts",
        "/run/flux/code",
        "/run/flux/work",
    }
    listed = re.compile(r"/(usr|bin|sbin|lib\w*|opt|etc|var/lib/gems|dev/\w+)(/|$)")
    others = [target for target in targets if target not in beside and not listed.match(target)]
    assert others in ([], [os.path.realpath("/etc/resolv.conf")]), "only what the list names"


def test_processes_of_others_are_not_there(launched: Launched) -> None:
    if launched.profile == MINIMAL:
        return  # the agent's unit hides them there
    # What a test before it has left ends in a moment; where process 1 reaps nobody, it stays as a zombie.
    seen = "for process in /proc/[0-9]*; do grep -qs '^State:.*zombie' $process/status || echo; done | wc -l"
    wait_until(lambda: int(launched.run(seen)[0]) <= 4, "nobody but two shells and wc to be seen")


def test_without_a_network_nothing_can_be_reached(launched: Launched) -> None:
    if launched.profile == MINIMAL:
        return  # refused before it comes here
    here = launched.run("ls /proc/self/net/tcp && readlink /proc/self/ns/net")[0]
    alone = launched.run("readlink /proc/self/ns/net; cat /proc/self/net/route", no_network=True)[0]
    assert here.splitlines()[-1] not in alone
    assert len(alone.splitlines()) == 2, "no route, only the heading"


@pytest.mark.parametrize(
    ("changes", "step", "number"),
    [
        ({"argv": [b"/run/flux/code/missing"]}, "exec", 2),
        ({"cwd": "/nowhere"}, "change directory", 2),
        ({"code": b"functions/missing"}, "mounts", 2),
    ],
)
def test_a_step_that_fails_is_told_by_name(launched: Launched, changes: dict[str, Any], step: str, number: int) -> None:
    if launched.profile != DEFAULT:
        return  # the same code
    _, answers = launched.run("true", **changes)
    assert answers[-1] == {"event": "failed", "id": 1, "step": step, "errno": number}
    assert launched.run("echo still here")[0] == "still here\n"


def test_the_steps_can_be_tried_without_a_program(launched: Launched) -> None:
    output, answers = launched.run("echo never", trial=True)
    assert (output, answers[-1]["status"]) == ("", 0)


def test_code_may_lie_behind_a_link_on_a_disk_in_a_hidden_directory(cgroups: Path, tmp_path: Path) -> None:
    disk = Path(tempfile.mkdtemp(prefix="flux-disk-", dir="/mnt"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", disk], check=True)
    try:
        (disk / "functions" / "mine").mkdir(parents=True)
        (tmp_path / "link").symlink_to(disk)
        launched = Launched(DEFAULT, tmp_path / "link", cgroups)
        try:
            output, answers = launched.run(f"ls {disk.parent} 2>/dev/null; echo hello")
        finally:
            launched.link.close()
    finally:
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()
    assert (output, answers[-1]["event"]) == ("hello\n", "exit")


def test_what_runs_dies_with_the_agents_end_of_the_socket(programs: Path, cgroups: Path) -> None:
    launched = Launched(DEFAULT, programs, cgroups)
    outputs: list[str] = []
    thread = threading.Thread(target=lambda: outputs.append(_until_gone(launched)))
    thread.start()
    path = cgroups / f"run-{next(_numbers)}"
    path.mkdir()
    group = RunGroup(str(path))
    null = os.open(os.devnull, os.O_RDWR)
    request = {"do": "run", "id": 1, "argv": [b"/bin/sh", b"-c", b"setsid sleep 60 & sleep 60"], "cwd": "/tmp"}
    request |= {"uid": UID, "gid": UID, "env": {b"PATH": b"/bin"}, "rlimits": {}, "execution": b"e"}
    request |= {"code": b"functions/mine", "tmp_bytes": 1 << 20}
    launched.link.send(request, {"stdin": null, "stdout": null, "cgroup": group.fd})
    os.close(null)
    events = group.events()
    while b"populated 1" not in os.pread(events, 100, 0):
        threading.Event().wait(0.01)
    os.close(events)
    launched.link._socket.shutdown(2)
    assert group.wait_until_empty(5)
    thread.join(5)
    launched.link.close()
    assert group.remove()
    group.close()


def _until_gone(launched: Launched) -> str:
    while launched.link.receive():
        pass
    return "gone"


# -- the holes that were closed, and what honest programs need ----------------------------------------


def python(launched: Launched, script: str, **changes: Any) -> str:
    """The output of a Python program, or the last line of its traceback."""
    output, _ = launched.run(f"exec python3 - 2>&1 <<'EOF'\n{script}\nEOF", **changes)
    return output.strip()


def test_output_can_be_written_by_name(launched: Launched) -> None:
    script = "echo one >/dev/stderr; echo two | tee /dev/stderr >/dev/null; echo three >/proc/self/fd/1"
    assert launched.run(script)[0].split() == ["one", "two", "three"]


def test_standard_error_can_be_a_pipe_of_its_own(launched: Launched) -> None:
    reading, writing = os.pipe()
    os.fchown(writing, UID, UID)
    output, _ = launched.run("echo out; echo err >&2; echo more >/dev/stderr", fds={"stderr": writing})
    os.close(writing)
    with os.fdopen(reading) as file:
        assert (output, file.read()) == ("out\n", "err\nmore\n")


def test_a_listening_socket_is_handed_on_as_descriptor_3(launched: Launched) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    script = "import socket; s = socket.socket(fileno=3); print(s.getsockname()[1], s.getsockopt(1, 30))"
    assert python(launched, script, fds={"listen": listening.fileno()}) == f"{port} 1"
    assert launched.run("ls /proc/self/fd", fds={"listen": listening.fileno()})[0].split() == ["0", "1", "2", "3", "4"]
    listening.close()


def test_its_user_has_an_account_a_home_and_a_shell(launched: Launched) -> None:
    if launched.profile == MINIMAL:
        return  # the machine's own view
    script = "import pwd, grp, os; print(*pwd.getpwuid(os.getuid())[:7]); print(grp.getgrgid(os.getgid()).gr_name)"
    entry, group = python(launched, script).splitlines()
    assert entry.split() == [f"flux-{UID}", "x", str(UID), str(UID), sandbox.WORK, "/bin/sh"]
    assert group == f"flux-{UID}"
    assert launched.run("whoami; echo ~")[0].split() == [f"flux-{UID}", sandbox.WORK]
    assert "root:x:0:0" in launched.run("cat /etc/passwd")[0], "the machine's accounts are there too"


@pytest.fixture
def etc(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the next spawner takes for /etc: a copy, because the machine's own is everybody's."""
    place = Path(tempfile.mkdtemp(prefix="flux-etc-", dir="/var/lib"))
    subprocess.run(["cp", "-a", "/etc", place], check=True)
    command = link._command
    within = ["unshare", "--mount", "sh", "-c", f'mount --bind {place}/etc /etc && exec "$@"', "sh"]
    monkeypatch.setattr(link, "_command", lambda fd: [*within, *command(fd)])
    yield place / "etc"
    shutil.rmtree(place)


def test_accounts_follow_the_machines(programs: Path, cgroups: Path, etc: Path) -> None:
    """A new account replaces /etc/passwd, which takes what is mounted over it away everywhere."""
    launched = Launched(DEFAULT, programs, cgroups)
    try:
        assert launched.run("whoami")[0] == f"flux-{UID}\n"
        new = etc / "passwd.new"
        new.write_text((etc / "passwd").read_text() + "flux-test-account:x:54321:54321::/:/bin/sh\n")
        new.chmod(0o644)
        new.rename(etc / "passwd")

        def followed() -> bool:
            output = launched.run("cat /etc/passwd; whoami")[0]
            return "flux-test-account" in output and output.endswith(f"\nflux-{UID}\n")

        wait_until(followed, "both accounts", 10)
    finally:
        launched.link.close()


def test_nothing_is_there_that_is_not_on_the_list(launched: Launched) -> None:
    if launched.profile != DEFAULT:
        return  # in strict / cannot be listed, in minimal it is the machine's own
    listed = launched.run("ls -A / /run /run/flux /dev")[0].split("\n\n")
    root, run, flux, dev = (set(part.split("\n", 1)[1].split()) for part in (listed[0], *listed[2:], listed[1]))
    assert root <= {
        "bin",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "libx32",
        "opt",
        "proc",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
        "var",
    }
    assert run <= {"flux", "systemd", "resolvconf", "NetworkManager"}
    assert flux == {"code", "copies", "work"}
    devices = {"null", "zero", "full", "random", "urandom", "tty"}
    assert dev == {*devices, "fd", "stdin", "stdout", "stderr", "ptmx", "pts", "shm"}


def test_sockets_and_fifos_of_the_machine_are_out_of_reach(launched: Launched) -> None:
    place = Path(tempfile.mkdtemp(prefix="flux-sockets-", dir="/var/lib"))
    place.chmod(0o755)
    os.mkfifo(place / "fifo", 0o666)
    os.chmod(place / "fifo", 0o666)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place / "socket"))
    listening.listen()
    os.chmod(place / "socket", 0o777)
    script = f"""
import os, socket
for reach in (lambda: socket.socket(socket.AF_UNIX).connect("{place}/socket"), lambda: os.open("{place}/fifo", 2)):
    try:
        reach(); print("reached")
    except OSError as error:
        print(error.errno)
"""
    try:
        found = python(launched, script).split()
    finally:
        listening.close()
        shutil.rmtree(place)
    # Landlock knows files, not sockets: there a socket's own mode decides.
    assert found == (["reached", "13"] if launched.profile == MINIMAL else ["2", "2"])


def test_terminals_are_its_own_and_few(launched: Launched) -> None:
    if launched.profile == MINIMAL:
        return  # the machine's own view
    before = Path("/proc/sys/kernel/pty/nr").read_text()
    script = """
import os
opened = 0
try:
    while opened < 100:
        os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY); opened += 1
except OSError as error:
    print(opened, error.errno)
"""
    assert python(launched, script).split() == ["16", "28"]
    assert Path("/proc/sys/kernel/pty/nr").read_text() == before
    assert "/dev/pts/0" in python(launched, "import os, pty; a, b = pty.openpty(); print(os.ttyname(b))")


def test_a_loopback_interface_of_its_own_without_a_network(launched: Launched) -> None:
    from fluxlib.spawner import linux

    if launched.profile == MINIMAL:
        return  # refused before it comes here
    if not linux.has_capability(linux.CAP_NET_ADMIN):
        pytest.skip("needs CAP_NET_ADMIN")
    script = """
import socket
server = socket.create_server(("127.0.0.1", 0)); client = socket.create_connection(server.getsockname())
server6 = socket.create_server(("::1", 0), family=socket.AF_INET6); socket.create_connection(server6.getsockname()[:2])
server.accept()[0].send(b"hello"); print(client.recv(9))
"""
    assert python(launched, script, no_network=True) == "b'hello'"
    listening = socket.create_server(("127.0.0.1", 0))
    script = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {listening.getsockname()[1]})))"
    assert python(launched, script, no_network=True) == "111", "the machine's is another one"
    listening.close()


def test_no_crash_starts_a_handler_and_the_limit_cannot_be_changed(launched: Launched) -> None:
    script = """
import resource
print(resource.getrlimit(resource.RLIMIT_CORE))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print(resource.getrlimit(resource.RLIMIT_CORE), resource.prlimit(0, resource.RLIMIT_CORE))
try:
    resource.prlimit(0, resource.RLIMIT_CORE, (0, 0))
except PermissionError:
    print("refused")
resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    assert python(launched, script).splitlines() == ["(1, 1)", "(1, 1) (1, 1)", "refused", "(99, 99)"]


def test_its_login_user_is_set_and_stays(launched: Launched) -> None:
    if not Path("/proc/self/loginuid").exists():
        pytest.skip("this kernel keeps no login users")
    ours = Path("/proc/self/loginuid").read_text()
    expected = str(UID) if ours == str(2**32 - 1) else ours
    assert launched.run("cat /proc/self/loginuid; echo; (echo 0 >/proc/self/loginuid) 2>/dev/null || echo refused")[
        0
    ].split() == [
        expected,
        "refused",
    ]


def test_it_is_reported_which_version_speaks(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxlib import spawner
    from fluxlib.errors import CannotStart

    monkeypatch.setattr(spawner, "VERSION", 99)
    with pytest.raises(CannotStart, match=r"version 1 of its protocol and this agent 99: .* restart the agent"):
        SpawnerLink(OFF, str(programs), "0", "0")


def test_the_resolvers_file_is_followed_and_its_sockets_are_not_there(programs: Path, cgroups: Path, etc: Path) -> None:
    """Also when it comes after the agent, and its directory with it."""
    place = Path("/run/flux-test-resolver")
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").symlink_to(place / "stub.conf")
    launched = Launched(DEFAULT, programs, cgroups)
    try:
        assert launched.run("cat /etc/resolv.conf")[0] == ""
        place.mkdir()
        (place / "stub.conf").write_text("nameserver 127.0.0.53\n")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(place / "socket"))
        wait_until(lambda: launched.run("cat /etc/resolv.conf")[0] == "nameserver 127.0.0.53\n", "its content", 10)
        assert launched.run(f"ls {place}")[0] == "stub.conf\n"
        listening.close()
    finally:
        launched.link.close()
        shutil.rmtree(place, ignore_errors=True)
