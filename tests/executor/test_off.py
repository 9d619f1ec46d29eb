"""Which user profile off runs functions as, and that they stay it."""

from __future__ import annotations

import marshal
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxlib.agent.executor.unix import UnixExecutor
from fluxlib.config.agent import read_agent
from tests.support.need import need

# A spawner of a user that is not root, and that may not be able to read this clone: it has read all it needs before.
_SPAWNER_OF_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from fluxlib.spawner import main as spawner
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
spawner.main(int(sys.argv[2]), ["off", "/", "0", "0"])
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give functions another user")


@pytest.mark.parametrize(("user", "told"), [("no-such-user", True), ("root", True), ("nobody", False), ("", False)])
def test_a_user_that_cannot_be_had_is_told(tmp_path: Path, user: str, told: bool) -> None:
    setting = f"runner_user: {user}\n" if user else ""
    config = read_agent(f"agent_id: w\nisolation: off\ntls: {{enabled: false}}\n{setting}", tmp_path / "agent.yaml")
    executor = UnixExecutor(config, tmp_path, "for a test")
    executor.stop(time.monotonic() + 5)
    assert any(f"runner_user {user} is not used" in note for note in executor.isolation.notes) is told


@pytest.fixture
def directory() -> Iterator[Path]:
    """Everybody's, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="flux-off-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def test_no_program_of_a_user_becomes_root_and_keeps_the_others_waiting(directory: Path) -> None:
    need("setpriv")
    shutil.copy(shutil.which("setpriv") or "", directory / "gain")
    (directory / "gain").chmod(0o4755)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _SPAWNER_OF_NOBODY, str(root), str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
    theirs.close()
    ours.settimeout(10)
    gaining = "setsid ./gain --reuid=0 sh -c 'echo root > said; exec sleep 15' || echo refused > said"
    scripts = [f"mkfifo said; ({gaining}) & read word < said; test $word = refused", "true"]
    ended: list[tuple[Any, ...]] = []
    try:
        for number, script in enumerate(scripts):
            argv, env = [b"/bin/sh", b"-c", script.encode()], {b"PATH": b"/usr/bin:/bin"}
            request = {"do": "run", "id": number, "argv": argv, "env": env, "cwd": str(directory), "uid": -1, "gid": -1}
            request |= {"rlimits": {}, "execution": b"e-%d" % number, "fds": ("stdin", "stdout")}
            with open(os.devnull, "r+b") as null:
                socket.send_fds(ours, [marshal.dumps(request)], [null.fileno()] * 2)
        while len(ended) < len(scripts):
            events = marshal.loads(ours.recv(1 << 16))
            ended += [
                (event["id"], event["status"]) for event in events if "event" in event and event["event"] == "exit"
            ]
    finally:
        ours.close()
        process.kill()
        process.wait()
    assert sorted(ended) == [(0, 0), (1, 0)]
