"""Real programs under a real agent, profile ``off``: what they get, how they end, what is left of them."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxlib.agent.executions import sendable
from fluxlib.agent.server import _json_that_fits
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.rpc import codec, tls
from tests.agent.running import Running, running
from tests.support.need import need_root
from tests.support.programs import is_alive, make_zip, wait_until

# One agent for the whole module: its pool of threads grows while a test runs.
pytestmark = pytest.mark.leaks("threads of the module's agent")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = {"network": "{node_private_ip: 10.0.0.7}", "max_output_mb": 2}
    with running(tmp_path_factory.mktemp("agent"), **settings) as made:
        assert made.deploy().success
        assert made.deploy("brief", timeout_seconds=1).success
        yield made


def ended(response: Any) -> Any:
    return codec.record_from_json(response.record)


def test_arguments_reach_it_as_they_are(agent: Running) -> None:
    words = ["two words", "$HOME", "*", "'", '"', "ünï", "", "--help", ";ls"]
    answer = agent.run("say", *words)
    assert answer.output.decode() == " ".join(words) + "\n"


def test_its_environment_is_clean(agent: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "x")
    agent.deploy("greeter", env={"GREETING": "hi", "FLUX_EXECUTION_ID": "forged"})
    answer = agent.run("env", name="greeter", execution_id="env-1")
    variables = dict(line.split("=", 1) for line in answer.output.decode().splitlines())
    expected = {"GREETING": "hi", "FLUX_EXECUTION_ID": "env-1", "FLUX_FUNCTION_NAME": "greeter", "LANG": "C.UTF-8"}
    assert expected.items() <= variables.items()
    assert variables["FLUX_NODE_PRIVATE_IP"] == "10.0.0.7"
    assert "/usr/bin" in variables["PATH"]
    assert set(variables) <= {
        *expected,
        "FLUX_NODE_PRIVATE_IP",
        "PATH",
        "HOME",
        "TMPDIR",
        "PWD",
        "USER",
        "LOGNAME",
        "SHELL",
        "LC_ALL",
        "PYTHONUNBUFFERED",
        "_",
        "SHLVL",
        "OLDPWD",
    }


def test_it_knows_who_it_is_and_writes_utf8_unbuffered(agent: Running) -> None:
    variables = dict(line.split("=", 1) for line in agent.run("env").output.decode().splitlines())
    assert variables["USER"] == variables["LOGNAME"] != ""
    assert (variables["LANG"], variables["LC_ALL"], variables["PYTHONUNBUFFERED"]) == ("C.UTF-8", "C.UTF-8", "1")
    if os.geteuid() == 0:
        assert int(agent.run("id").output.split()[0]) == pwd.getpwnam(variables["USER"]).pw_uid


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "", "LC_ALL": "C.UTF-8"}),
        ({"LANG": "de_DE.UTF-8"}, {"LANG": "de_DE.UTF-8", "LC_ALL": None}),
        ({"LC_TIME": "de_DE.UTF-8"}, {"LANG": "C.UTF-8", "LC_TIME": "de_DE.UTF-8", "LC_ALL": None}),
        ({"LC_ALL": "C"}, {"LC_ALL": "C"}),
        ({"USER": "me", "HOME": "/nowhere"}, {"USER": "me", "HOME": "/nowhere"}),
    ],
)
def test_what_the_function_says_of_its_environment_counts(
    agent: Running, own: dict[str, str], expected: dict[str, str | None]
) -> None:
    agent.deploy("own", env=own)
    variables = dict(line.split("=", 1) for line in agent.run("env", name="own").output.decode().splitlines())
    assert {name: variables.get(name) for name in expected} == expected


# One that functions' users can reach, as the environment of the tests may not be.
SYSTEM_PYTHON = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or ""
PYTHON = f"#!{SYSTEM_PYTHON}\n"
needs_python = pytest.mark.skipif(not SYSTEM_PYTHON, reason="no python3 outside of home directories")


@needs_python
def test_what_python_prints_is_in_order_and_not_lost_at_a_timeout(agent: Running) -> None:
    order = 'import sys\nprint("1")\nprint("2", file=sys.stderr)\nprint("3 \\u20ac")\n'
    agent.deploy("order", make_zip({"main.sh": PYTHON + order}))
    assert agent.run(name="order").output.decode() == "1\n2\n3 \u20ac\n"
    agent.deploy("slow", make_zip({"main.sh": PYTHON + 'import time\nprint("step")\ntime.sleep(60)\n'}))
    agent.run(name="slow", execution_id="slow-1", asynchronous=True)
    wait_until(lambda: agent.record("slow-1").output == b"step\n", "its output while it runs")
    agent.cancel("slow-1")
    assert agent.record("slow-1").output == b"step\n"


@needs_python
def test_byte_code_that_came_in_the_zip_is_used(agent: Running, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("X = 1\n")
    main = PYTHON + "import helper, importlib._bootstrap_external as b, os\n"
    main += "path = b.cache_from_source(helper.__file__)\n"
    main += "data = open(path, 'rb').read()\n"
    main += "b._validate_timestamp_pyc(data, int(os.stat(helper.__file__).st_mtime), 6, 'helper', {})\nprint('valid')\n"
    (tmp_path / "main.sh").write_text(main)
    subprocess.run([SYSTEM_PYTHON, "-m", "compileall", "-q", "."], cwd=tmp_path, check=True)
    command = [SYSTEM_PYTHON, "-m", "zipfile", "-c", "code.zip", "main.sh", "helper.py", "__pycache__"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert agent.deploy("compiled", (tmp_path / "code.zip").read_bytes()).success
    answer = agent.run(name="compiled")
    assert answer.output == b"valid\n", answer


def test_what_will_not_start_is_said_when_it_is_deployed(agent: Running) -> None:
    answer = agent.deploy("broken", make_zip({"main.sh": "#!/gone/python3\n"}))
    assert answer.success
    assert answer.cannot_start == "main.sh asks for /gone/python3, which is not on this machine"
    assert answer.cannot_start in answer.warnings
    assert agent.deploy("broken").cannot_start == ""


def test_standard_input_and_none(agent: Running) -> None:
    data = bytes(range(256)) * 4096
    assert agent.run("cat", stdin=data).output == data
    assert agent.run("cat").output == b""


def test_both_outputs_in_the_order_written(agent: Running) -> None:
    assert agent.run("both").output == b"one\ntwo\nthree\nfour\n"


def test_its_directories(agent: Running) -> None:
    code, home = agent.run("pwd").output.decode().splitlines()
    assert Path(code, "main.sh").is_file()
    assert os.stat(home).st_mode & 0o777 == 0o700
    assert os.listdir(home) == []
    agent.deploy("worker", working_directory="work")
    work, home = agent.run("pwd", name="worker").output.decode().splitlines()
    assert work == home != code


def test_code_that_was_removed_and_came_again_is_where_it_starts(agent: Running) -> None:
    from fluxlib.rpc.gen import flux_pb2 as pb

    agent.deploy("again")
    first = agent.run("pwd", name="again").output.decode().splitlines()[0]
    assert agent.stub.RemoveFunction(pb.RemoveFunctionRequest(function_name="again"), timeout=5).success
    agent.deploy("again")
    assert agent.run("pwd", name="again").output.decode().splitlines()[0] == first


def test_what_one_leaves_in_its_work_directory_the_next_does_not_find(agent: Running) -> None:
    agent.deploy(
        "messy", make_zip({"main.sh": "#!/bin/sh\ncd; ls -A; echo x > left; mkdir d; chmod 0 d; chmod 777 .\n"})
    )
    for _ in range(3):
        assert agent.run(name="messy").output == b""


def test_it_cannot_write_to_its_code_or_the_agents_state(agent: Running) -> None:
    code = agent.run("pwd").output.decode().splitlines()[0]
    targets = [f"{code}/main.sh", f"{code}/new"]
    if os.geteuid() == 0:
        # An agent without root has no other user to run functions as, and its state is its own to write.
        targets += [f"{Path(code).parent}/spec.json", f"{agent.directory}/x"]
    for target in targets:
        assert agent.run("touch", target).error != "", target
        assert not target.endswith("new") or not os.path.exists(target)


def test_as_root_it_runs_as_somebody_else(agent: Running) -> None:
    need_root()
    uid, gid = agent.run("id").output.decode().split()
    assert int(uid) > 0
    assert int(gid) > 0


def test_the_output_cap(agent: Running) -> None:
    answer = agent.run("spam", str(3 * 1024 * 1024))
    record = ended(answer)
    assert len(answer.output) == record.output_bytes == 2 * 1024 * 1024
    assert record.truncated
    assert record.exit_code == 0, "it must not be stopped for saying too much"


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("#!/no/such/interpreter\n", "interpreter"),
        ("plain text\n", "neither a program"),
        ("\x7fELF garbage", "cut off or damaged"),
    ],
)
def test_what_cannot_be_started_says_why(agent: Running, handler: str, words: str) -> None:
    assert agent.deploy("broken", make_zip({"main.sh": handler})).success
    answer = agent.run(name="broken")
    assert answer.error_kind == ErrorKind.CANNOT_START
    assert answer.error.startswith("cannot start: exec: ")
    assert words in answer.error


def test_few_open_files_are_its_own_affair(agent: Running) -> None:
    script = """#!/bin/sh
    ulimit -Sn; ulimit -Hn; ulimit -n 4096 || echo no
    """
    agent.deploy("thrifty", make_zip({"main.sh": script}), max_open_files=16)
    agent.run("sleep", "60", execution_id="bystander", asynchronous=True)
    for max_open_files in (1, 5):
        agent.deploy("starved", max_open_files=max_open_files)
        assert agent.run("say", "x", name="starved").error
    for _ in range(2):
        output = agent.run(name="thrifty").output.decode().split("\n")
        assert output[:2] == ["16", "16"]
        assert output[-2] == "no", "it took its limit back"
        assert agent.run("say", "x").output == b"x\n"
    assert agent.record("bystander").status == "running", "the spawner died with it"
    agent.cancel("bystander")


def test_a_timeout_lets_it_say_goodbye(agent: Running) -> None:
    began = time.monotonic()
    answer = agent.run("polite", name="brief", execution_id="polite-1")
    assert answer.error == "execution timed out after 1s"
    assert answer.output.startswith(b"started\n")
    assert answer.output.endswith(b"bye\n")
    assert ended(answer).exit_code == 7
    assert time.monotonic() - began < 5


def test_a_stubborn_one_is_killed_after_the_grace(agent: Running) -> None:
    agent.run("stubborn", execution_id="stubborn-1", asynchronous=True)
    wait_until(lambda: agent.record("stubborn-1").output, "it to run")
    began = time.monotonic()
    answer = agent.cancel("stubborn-1")
    took = time.monotonic() - began
    assert answer.success
    assert answer.status == "cancelled"
    assert 0.3 <= took < 3
    assert agent.record("stubborn-1").signal == 9


@pytest.mark.parametrize("how", ["cancel", "end", "timeout"])
def test_a_daemonised_grandchild_dies_with_it(agent: Running, how: str) -> None:
    name = "brief" if how == "timeout" else "hello"
    execution_id = f"daemon-{how}"
    agent.run("daemon", "0" if how == "end" else "60", name=name, execution_id=execution_id, asynchronous=True)
    pid = int(wait_until(lambda: agent.record(execution_id).output, "the grandchild's number"))
    if how == "cancel":
        assert is_alive(pid)
        assert agent.cancel(execution_id).success
    wait_until(lambda: agent.record(execution_id).status.ended, "its end")
    # Told ended means that nothing of it is alive.
    assert not is_alive(pid)


def test_a_caller_that_hangs_up_cancels(agent: Running) -> None:
    from fluxlib.rpc.gen import flux_pb2 as pb

    call = agent.stub.ExecuteFunction.future(
        pb.ExecutionRequest(function_name="hello", args=["sleep", "60"], execution_id="hung-up")
    )
    wait_until(lambda: (one := agent.record("hung-up")) and one.output, "it to run")
    call.cancel()
    record = wait_until(lambda: (one := agent.record("hung-up")).status.ended and one, "it to be cancelled", 5)
    assert (record.status, record.error) == ("cancelled", "cancelled: the caller is gone")


def test_cancels_of_the_unknown_and_the_ended(agent: Running) -> None:
    assert agent.cancel("nobody").message == "execution not found"
    agent.run("say", "x", execution_id="over")
    answer = agent.cancel("over")
    assert (answer.success, answer.message, answer.status) == (False, "execution already ended: success", "success")


def test_output_while_it_runs_and_after(agent: Running) -> None:
    agent.run("sleep", "0.3", execution_id="live", asynchronous=True)
    pieces = list(agent.read("live", follow=True))
    assert b"".join(piece.data for piece in pieces) == b"started\n"
    assert pieces[-1].ended
    assert [(one.data, one.offset, one.ended) for one in agent.read("live", 3, max_bytes=2)] == [(b"rt", 3, False)]
    assert [(one.data, one.ended) for one in agent.read("live", 8, follow=True)] == [(b"", True)]
    assert [one.found for one in agent.read("nobody")] == [False]


def test_a_large_binary_output_fits_into_every_answer() -> None:
    # NUL is six bytes in JSON.
    record = ExecutionRecord("one", "hello", status=ExecutionStatus.SUCCESS, output=bytes(10_000_000), exit_code=0)
    data = _json_that_fits(record, with_output=True)
    assert len(data) <= tls.MESSAGE_LIMIT
    shown = codec.record_from_json(data)
    assert shown.truncated
    assert len(shown.output or b"") > 7_000_000
    assert sendable(record) is record
    cut = sendable(record, 1000)
    assert (len(cut.output or b""), cut.truncated) == (1000, True)
