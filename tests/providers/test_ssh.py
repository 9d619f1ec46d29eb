"""The connection to a node, against a real sshd: pinned, quoted, private, and honest about what failed."""

from __future__ import annotations

import os
import shlex
import socket
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxlib.errors import ProviderError
from fluxlib.pki import Authority
from fluxlib.pki.ssh import SshKey
from fluxlib.providers import ssh as module
from fluxlib.providers.ssh import HostKeyChanged, RemoteFailed, Shell
from tests.support.programs import free_port, wait_until
from tests.support.sshd import Sshd

# What a node's own sudo does, and that it was asked.
SUDO = """#!/bin/sh
printf '%s\\n' "$*" >>"{log}"
[ "$1" = -n ] && [ "$2" = -- ] || exit 97
shift 2
exec "$@"
"""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SshKey:
    return Authority.open(tmp_path_factory.mktemp("certs")).ssh_key(for_ec2=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, key: SshKey) -> Iterator[Sshd]:
    directory = tmp_path_factory.mktemp("sshd")
    with Sshd(directory, key.public, {"sudo": SUDO.format(log=directory / "sudo.log")}) as running:
        yield running


@pytest.fixture(scope="module")
def shared(server: Sshd, key: SshKey) -> Iterator[Shell]:
    with connect(server, key) as shell:
        # sshd forks the session's own process after the login was answered; no test is to be blamed for it.
        shell.run(["true"], 20)
        yield shell


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.05)


def connect(server: Sshd, key: SshKey, seconds: float = 20, **options: object) -> Shell:
    deadline = time.monotonic() + seconds
    return Shell.connect("127.0.0.1", server.user, key.private, deadline, port=server.port, **options)  # type: ignore[arg-type]


# -- getting in --------------------------------------------------------------------------


def test_a_machine_that_still_boots_is_waited_for(tmp_path: Path, key: SshKey) -> None:
    server = Sshd(tmp_path, key.public)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, server, key)
        with pytest.raises(TimeoutError):
            connecting.result(0.3)
        with server, connecting.result(20) as shell:
            assert shell.run(["echo", "in"], 20) == "in\n"


@pytest.mark.parametrize(("answers", "expected"), [(True, [0.1, 0.2, 0.4, 0.4]), (False, [0.1, 0.1, 0.1, 0.1])])
def test_an_sshd_that_refuses_is_asked_less_and_less_often(
    key: SshKey, monkeypatch: pytest.MonkeyPatch, answers: bool, expected: list[float]
) -> None:
    """OpenSSH 9.8 and later drop the connections of an address whose refused logins come too fast."""
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.1)
    monkeypatch.setattr(module, "_LONGEST_PAUSE", 0.4)
    pauses: list[float] = []

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            pauses.append(timeout)
            return len(pauses) == len(expected)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        if answers:
            pool.submit(_refuse, listener, len(expected))
        else:
            listener.close()
        with pytest.raises(ProviderError, match="given up while waiting for SSH"):
            Shell.connect("127.0.0.1", "admin", key.private, time.monotonic() + 60, port=port, stopped=Stopped())
    assert pauses == expected


def _refuse(listener: socket.socket, times: int) -> None:
    """As sshd refuses an address that it penalizes."""
    for _ in range(times):
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"Not allowed at this time\r\n")


def test_one_that_never_answers_is_named_with_the_reason(key: SshKey) -> None:
    port = free_port()
    with pytest.raises(ProviderError, match=rf"admin@127\.0\.0\.1:{port} could not be reached over SSH: .*"):
        Shell.connect("127.0.0.1", "admin", key.private, time.monotonic() + 0.3, port=port)


def test_waiting_ends_when_it_is_told_to(key: SshKey) -> None:
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(ProviderError, match="given up while waiting for SSH"):
        Shell.connect("127.0.0.1", "admin", key.private, time.monotonic() + 60, port=free_port(), stopped=stopped)


def test_a_key_that_is_not_taken_is_a_reason_of_its_own(server: Sshd, tmp_path: Path) -> None:
    stranger = Authority.open(tmp_path / "other").ssh_key(for_ec2=True)
    with pytest.raises(ProviderError, match="Authentication failed"):
        connect(server, stranger, 1)


def test_an_originals_ecdsa_key_still_opens_the_door(tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    texts = [
        private.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
        for form in (serialization.PrivateFormat.OpenSSH, serialization.PrivateFormat.TraditionalOpenSSL)
    ]
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with Sshd(tmp_path, public.decode()) as server:
        for text in texts:
            with connect(server, SshKey(text, public.decode())) as shell:
                assert shell.run(["echo", "in"], 20) == "in\n"


def test_text_that_is_no_key_is_refused() -> None:
    with pytest.raises(ProviderError, match="neither ED25519 nor ECDSA"):
        Shell.connect("127.0.0.1", "admin", "no key at all", time.monotonic() + 5, port=free_port())


# -- the host key ------------------------------------------------------------------------


def test_the_host_key_is_pinned_and_a_changed_one_refused_at_once(tmp_path: Path, key: SshKey) -> None:
    server = Sshd(tmp_path, key.public)
    with server, connect(server, key) as shell:
        seen = shell.host_key
    shown = (server.home / "host_key.pub").read_text().split()[:2]
    assert seen.split() == shown
    with server, connect(server, key, expected_host_key=seen) as shell:
        assert shell.host_key == seen
    server.new_host_key()
    mark = tmp_path / "mark"
    with server:
        began = time.monotonic()
        with pytest.raises(HostKeyChanged, match="another SSH host key"):
            connect(server, key, 60, expected_host_key=seen).run(["touch", str(mark)], 20)
        assert time.monotonic() - began < 30
    assert not mark.exists()


# -- words stay words --------------------------------------------------------------------

HOSTILE = [
    "; touch {mark}",
    "$(touch {mark})",
    "`touch {mark}`",
    "' ; touch {mark} ; '",
    '" ; touch {mark} ; "',
    "a\ntouch {mark}\n",
    "&& touch {mark}",
    "| touch {mark}",
    "> {mark}",
    "\\'; touch {mark}",
    "$HOME ${{IFS}} *",
    "--help",
    "",
]


@pytest.mark.parametrize("sudo", [False, True])
def test_no_value_reaches_a_shell(shared: Shell, tmp_path: Path, sudo: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_sudo", sudo)
    mark = tmp_path / "mark"
    values = [value.format(mark=mark) for value in HOSTILE]
    assert shared.run(["printf", "%s\\0", *values], 20) == "".join(f"{value}\0" for value in values)
    with pytest.raises(RemoteFailed, match=r"exit status 12[67]"):
        shared.run([values[0]], 20)
    assert not mark.exists()


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), min_size=10, max_size=60))
def test_any_text_arrives_as_it_was(shared: Shell, values: list[str]) -> None:
    assert shared.run(["printf", "%s\\0", *values], 20) == "".join(f"{value}\0" for value in values)


def test_commands_are_root_s_by_sudo_that_asks_nothing(
    shared: Shell, server: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_sudo", True)
    shared.run(["echo", "as root"], 20)
    shared.run(["echo", "as myself"], 20, root=False)
    asked = (server.home.parent / "sudo.log").read_text().splitlines()
    assert "-n -- echo as root" in asked
    assert not any("as myself" in line for line in asked)


# -- what fails is told ------------------------------------------------------------------


def test_the_output_of_a_failing_command_is_in_the_error(shared: Shell) -> None:
    with pytest.raises(RemoteFailed, match="exit status 3: first\nsecond") as caught:
        shared.run(["sh", "-c", "echo first; echo second >&2; exit 3"], 20)
    assert caught.value.status == 3


def test_of_much_output_the_end_is_told(shared: Shell) -> None:
    with pytest.raises(RemoteFailed) as caught:
        shared.run(["sh", "-c", "seq 1 200000; echo the end; exit 1"], 30)
    assert str(caught.value).endswith("the end")
    assert len(str(caught.value)) < 3000


def test_what_takes_too_long_is_given_up_with_what_it_said(shared: Shell) -> None:
    with pytest.raises(ProviderError, match=r"no end within 2 s; its output so far: waiting"):
        shared.run(["sh", "-c", "echo waiting; exec sleep 5"], 2)
    # Its output is at its end, and it is not.
    with pytest.raises(ProviderError, match="no end within 1 s"):
        shared.run(["sh", "-c", "exec >/dev/null 2>&1 </dev/null; exec sleep 4"], 1)
    assert shared.run(["echo", "still in"], 20) == "still in\n"


def test_a_connection_that_breaks_is_an_error(tmp_path: Path, key: SshKey) -> None:
    with Sshd(tmp_path, key.public) as server, connect(server, key) as shell, ThreadPoolExecutor(1) as pool:
        started = tmp_path / "started"
        running = pool.submit(shell.run, ["sh", "-c", f"touch {shlex.quote(str(started))}; exec sleep 60"], 60)
        wait_until(started.exists, "the command to run")
        server.cut()
        with pytest.raises(ProviderError):
            running.result(20)
        with pytest.raises(ProviderError, match="connection"):
            shell.run(["true"], 20)


def test_a_server_that_hangs_holds_up_neither_a_file_nor_a_command(tmp_path: Path, key: SshKey) -> None:
    with Sshd(tmp_path, key.public) as server:
        for act in (lambda shell: shell._send(b"x", "/tmp/x", 0.3), lambda shell: shell.run(["true"], 0.3)):
            with connect(server, key) as shell, ThreadPoolExecutor(1) as pool, server.hung():
                asked = pool.submit(act, shell)
                try:
                    with pytest.raises(ProviderError):
                        asked.result(10)
                finally:
                    shell.close()


def test_closing_from_outside_ends_what_is_under_way(tmp_path: Path, key: SshKey, server: Sshd) -> None:
    with connect(server, key) as shell, ThreadPoolExecutor(1) as pool:
        started = tmp_path / "started"
        running = pool.submit(shell.run, ["sh", "-c", f"touch {shlex.quote(str(started))}; exec sleep 4"], 60)
        wait_until(started.exists, "the command to run")
        shell.close()
        with pytest.raises(ProviderError):
            running.result(3)


# -- the operator's own lines ------------------------------------------------------------


def test_a_script_is_a_shells_and_stops_at_its_first_failure(shared: Shell, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    assert shared.run_script("for n in 1 2; do echo $n; done", 20) == "1\n2\n"
    with pytest.raises(RemoteFailed, match="exit status 1: before"):
        shared.run_script(f"echo before\nfalse\ntouch {mark}", 20)
    assert not mark.exists()
    assert list(Path("/run").glob("flux-setup-*")) == []


def test_secrets_are_in_no_process_list(shared: Shell, tmp_path: Path) -> None:
    # What runs the script, and what runs that.
    listing = shared.run_script("TOKEN=hunter2\ncat /proc/$$/cmdline /proc/$PPID/cmdline", 30)
    assert "flux-setup-" in listing
    assert "hunter2" not in listing
    target = tmp_path / "key.pem"
    seen: list[str] = []
    run = shared.run

    def watched(words, timeout, **options):  # type: ignore[no-untyped-def]
        seen.extend(words)
        return run(words, timeout, **options)

    shared.run = watched  # type: ignore[method-assign]
    try:
        shared.upload(b"-----BEGIN PRIVATE KEY----- hunter2", str(target), 0o600)
    finally:
        shared.run = run  # type: ignore[method-assign]
    assert seen
    assert not any("hunter2" in word for word in seen)


# -- files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["it's; $(touch mark) `x`", "-new\nline"])
def test_a_file_arrives_whole_with_its_mode(shared: Shell, tmp_path: Path, name: str) -> None:
    target = tmp_path / "deep" / "er" / name
    content = os.urandom(300_000)
    shared.upload(content, str(target), 0o640)
    assert target.read_bytes() == content
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    shared.upload(b"other", str(target), 0o600)
    assert target.read_bytes() == b"other"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [path.name for path in target.parent.iterdir()] == [name]
    # Tests beside this one have some of their own, for a moment.
    wait_until(lambda: not list(Path("/tmp").glob(".flux-*")), "no temporary file to be left")


def test_an_upload_that_fails_leaves_nothing_behind(shared: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RemoteFailed):
        shared.upload(b"secret", str(tmp_path / "file" / "key.pem"), 0o600)
    # Tests beside this one have some of their own, for a moment.
    wait_until(lambda: not list(Path("/tmp").glob(".flux-*")), "no temporary file to be left")
