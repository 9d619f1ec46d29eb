"""flux.exe and flux-agent.exe: built under Wine, started there as people start them."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import fluxlib
from tests.support.programs import wait_until
from tests.windows.c_program import assert_still
from tests.windows.programs import PORT, DoubleClicked, built, need_port
from windows.lab import Lab, windows_path

pytestmark = [pytest.mark.windows, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def programs(lab: Lab) -> Path:
    return built(lab)


@pytest.fixture
def home(programs: Path, tmp_path: Path) -> Path:
    """A directory of somebody's own with flux.exe in it."""
    shutil.copy(programs / "flux.exe", tmp_path / "flux.exe")
    return tmp_path


@pytest.fixture(scope="module")
def first(lab: Lab, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoubleClicked]:
    """The first start in a fresh directory."""
    need_port()
    directory = tmp_path_factory.mktemp("my flux")
    shutil.copy(programs / "flux.exe", directory / "flux.exe")
    flux = DoubleClicked(lab, directory).start()
    try:
        yield flux
    finally:
        flux.crash()
        wait_until(lambda: not flux.processes(), "the agent to notice")


@pytest.mark.parametrize("name", ["flux", "flux-agent"])
def test_version_and_its_resource(lab: Lab, programs: Path, name: str) -> None:
    exe = programs / f"{name}.exe"
    ran = subprocess.run(
        ["wine", exe, "--version"], env=lab.environment(), capture_output=True, stdin=subprocess.DEVNULL
    )
    assert ran.stdout.split()[-1].decode() == fluxlib.__version__
    script = """
import pefile, sys
pe = pefile.PE(sys.argv[1])
print([entry.id for entry in pe.DIRECTORY_ENTRY_RESOURCE.entries])
for block in pe.FileInfo[0]:
    for table in getattr(block, "StringTable", []):
        print({key.decode(): value.decode() for key, value in table.entries.items()})
"""
    said = lab.run(["-c", script, windows_path(exe)]).stdout.decode()
    assert f"'FileVersion': '{fluxlib.__version__}'" in said
    assert f"'OriginalFilename': '{name}.exe'" in said
    icons, version = 14, 16  # RT_GROUP_ICON, RT_VERSION
    assert f"{icons}, " in said
    assert f"{version}" in said


def test_nothing_of_the_lab_is_inside(programs: Path) -> None:
    for name in ("flux.exe", "flux-agent.exe"):
        data = (programs / name).read_bytes()
        assert b"python311.dll" in data  # the archive's table of contents is readable
        assert b"bcryptprimitives.dll" not in data
    agent = (programs / "flux-agent.exe").read_bytes()
    assert b"botocore" not in agent


def test_first_start_says_where_everything_is(first: DoubleClicked) -> None:
    assert first.config["api_key"].startswith("flux_")
    # Said after the API answers, which is what the start was waited for by.
    wait_until(lambda: "close this window" in first.words, "it to say where everything is")
    words = first.words
    assert f"it made {windows_path(first.directory / 'flux.yaml')}, with a new key" in words
    assert f"Flux answers at http://127.0.0.1:{PORT}" in words
    assert "Your API key is in" in words
    assert "second window" in words
    assert "close this window" in words
    status, answer = first.api.call("GET", "/health")
    assert (status, answer["status"]) == (200, "ok")


def test_the_log_is_kept_in_a_file(first: DoubleClicked) -> None:
    log = first.directory / "flux-data" / "flux.log"
    wait_until(lambda: "agent local" in log.read_text(errors="replace"), "the agent's lines in Flux's log")
    assert "Flux answers on 127.0.0.1:7227" in log.read_text()
    assert "agent local (windows/amd64) listens on" in log.read_text()


def test_batch_and_exe_functions_run(first: DoubleClicked, program: bytes) -> None:
    first.api.deploy({"name": "batch", "handler": "hello.bat"}, {"hello.bat": "@echo hello %~1\r\n"})
    first.api.deploy({"name": "exe", "handler": "main.exe"}, {"main.exe": program})
    status, answer = first.api.execute("batch", "my world")
    assert (status, answer["output"].strip()) == (200, "hello my world")
    status, answer = first.api.execute("exe", "3", "words")
    assert (status, answer["error"], answer["output"]) == (500, "exit code 3", "[3][words]")


def test_cancel_kills_the_tree(first: DoubleClicked, program: bytes, tmp_path: Path) -> None:
    execution_id = start_tree(first, program, tmp_path)
    assert first.api.call("DELETE", f"/executions/{execution_id}")[0] == 200
    assert first.api.ended(execution_id)["status"] == "cancelled"
    assert_still([tmp_path / "beat.parent", tmp_path / "beat.child"])


@pytest.mark.leaks("its second life is ended by the module's fixture")
def test_second_start_uses_the_same_state(lab: Lab, first: DoubleClicked, program: bytes, tmp_path: Path) -> None:
    """Ended the hard way with something running: the agent notices, ends it and knows why."""
    key = first.config["api_key"]
    execution_id = start_tree(first, program, tmp_path)
    first.crash()
    wait_until(lambda: not first.processes(), "the agent to notice")
    assert_still([tmp_path / "beat.parent", tmp_path / "beat.child"])
    left = unpacked(lab)
    assert left, "a killed program leaves what it unpacked"
    first.start()
    assert not [path for path in left if path.exists()]
    assert first.config["api_key"] == key
    assert first.words.count("first start") == 1
    assert {function["name"] for function in first.api.call("GET", "/functions")[1]["items"]} >= {"batch", "exe"}
    assert first.api.execute("batch", "again")[1]["output"].strip() == "hello again"
    record = first.api.ended(execution_id)
    assert (record["status"], record["error"]) == ("failed", "agent stopped")


def test_a_taken_port_is_explained_and_the_window_stays(lab: Lab, home: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (home / "flux.yaml").write_text(f"api_key: {'k' * 32}\nlisten_host: 127.0.0.1\nport: {port}\n")
        flux = failing(lab, home)
        assert f"cannot listen on 127.0.0.1:{port}: the port is in use by" in flux.words
        assert windows_path(home / "flux.yaml") in flux.words


def test_a_bad_file_is_explained_and_the_window_stays(lab: Lab, home: Path) -> None:
    (home / "flux.yaml").write_text("api_key: short\nport: many\ncolour: red\n")
    flux = failing(lab, home, 78)
    for words in ("port: must be a whole number", "colour: unknown key", "rename it and start again"):
        assert words in flux.words


def test_an_agent_without_configuration_says_where_it_looked(lab: Lab, programs: Path, tmp_path: Path) -> None:
    shutil.rmtree(lab.prefix / "drive_c" / "ProgramData" / "flux-agent", ignore_errors=True)
    done = subprocess.run(
        ["wine", programs / "flux-agent.exe"],
        cwd=tmp_path,
        env=lab.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    places = rf"agent.yaml was found neither in {windows_path(tmp_path)} nor in C:\ProgramData\flux-agent"
    assert places in done.stdout + done.stderr
    assert "flux enroll NAME" in done.stdout + done.stderr


def unpacked(lab: Lab) -> list[Path]:
    """The directories that our programs have unpacked themselves into."""
    users = lab.prefix / "drive_c" / "users"
    # Wine's own place for temporary files, and Windows'.
    found = [*users.glob("*/Temp/_MEI*/0-flux.txt"), *users.glob("*/AppData/Local/Temp/_MEI*/0-flux.txt")]
    return [path.parent for path in found]


def failing(lab: Lab, home: Path, code: int = 1) -> DoubleClicked:
    """A start that fails: it must say so and wait for Enter, then end."""
    flux = DoubleClicked(lab, home)
    with flux.log.open("ab") as log:
        flux.process = flux.spawn(log)
    try:
        wait_until(lambda: "Press Enter to close this window." in flux.words, "the explanation", 60)
        assert flux.process.poll() is None
        assert flux.process.stdin is not None
        flux.process.stdin.write(b"\n")
        flux.process.stdin.close()
        assert flux.process.wait(30) == code
    finally:
        flux.kill()
    return flux


def start_tree(flux: DoubleClicked, program: bytes, directory: Path) -> str:
    flux.api.deploy({"name": "tree", "handler": "main.exe"}, {"main.exe": program})
    status, accepted = flux.api.call("POST", "/execute/tree/async", {"args": ["tree", f"Z:{directory}/beat"]})
    assert status == 202, accepted
    files = [directory / "beat.parent", directory / "beat.child"]
    wait_until(lambda: all(file.exists() for file in files), "both to beat")
    return str(accepted["execution_id"])
