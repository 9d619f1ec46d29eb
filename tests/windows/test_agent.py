"""Flux on Linux with an agent on Windows, over mutual TLS: what a fleet of both kinds sees."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.programs import Flux, make_zip, wait_until
from tests.support.wine import WineAgent
from tests.windows.c_program import assert_still
from windows.lab import Lab

pytestmark = pytest.mark.windows


@pytest.fixture(scope="module")
def flux(lab: Lab, program: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flux]:
    """Flux with one Windows agent and two functions on it."""
    directory = tmp_path_factory.mktemp("fleet")
    with Flux(directory) as flux, WineAgent(lab, directory, flux, "windows-1", kill_grace_sec=0.2) as agent:
        flux.register(agent)
        flux.api.deploy({"name": "exe", "handler": "bin/main.exe", "max_concurrency": 10}, {"bin/main.exe": program})
        batch = "@echo off\r\necho hello %~1, %GREETING%\r\nexit /b %2\r\n"
        flux.api.deploy({"name": "batch", "handler": "hello.bat", "env": {"GREETING": "moin"}}, {"hello.bat": batch})
        yield flux


def test_the_agent_says_that_it_is_windows(flux: Flux) -> None:
    _, agents = flux.api.call("GET", "/agents")
    assert agents[0]["platform"] == "windows/amd64"
    assert agents[0]["status"] == "online"


def test_an_exe_runs_with_its_arguments_and_exit_code(flux: Flux) -> None:
    status, answer = flux.api.execute("exe", "0", "two words", 'a "quote"', "%PATH%", "")
    assert status == 200, answer
    assert answer["output"] == '[0][two words][a "quote"][%PATH%][]'
    status, answer = flux.api.execute("exe", "7")
    assert (status, answer["error"]) == (500, "exit code 7")


def test_a_batch_file_runs(flux: Flux) -> None:
    status, answer = flux.api.execute("batch", "big world", "0")
    assert (status, answer["output"].strip()) == (200, "hello big world, moin")
    assert flux.api.execute("batch", "x", "3")[1]["error"] == "exit code 3"


def test_a_zip_of_compress_archive_runs(flux: Flux, program: bytes) -> None:
    """Windows PowerShell's has backslashes between directories."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (("bin\\main.exe", program), ("data\\deep\\words.txt", b"kept")):
            entry = zipfile.ZipInfo("x")
            # Not by the constructor, which would make them slashes on Windows.
            entry.filename, entry.create_system, entry.external_attr = name, 0, 0x20
            archive.writestr(entry, content)
    assert flux.api.call("PUT", "/functions", b"name: compressed\nhandler: bin/main.exe\n")[0] == 201
    status, answer = flux.api.call("PUT", "/deploy/compressed", buffer.getvalue())
    assert status == 201, answer
    status, answer = flux.api.execute("compressed", "0", "from a backslash")
    assert (status, answer["output"]) == (200, "[0][from a backslash]"), answer


@pytest.mark.parametrize("arg", ["%PATH%", "a&b", 'quo"te', "a\nb", "!x!", "^", "|", "<", ">"])
def test_arguments_cmd_would_parse_are_400(flux: Flux, arg: str) -> None:
    status, answer = flux.api.execute("batch", arg, "0")
    assert status == 400, answer
    assert "cmd.exe" in answer["error"]


def test_cancel_kills_the_tree(flux: Flux, tmp_path: Path) -> None:
    status, accepted = flux.api.call("POST", "/execute/exe/async", {"args": ["tree", f"Z:{tmp_path}/beat"]})
    assert status == 202, accepted
    files = [tmp_path / "beat.parent", tmp_path / "beat.child"]
    wait_until(lambda: all(file.exists() for file in files), "both to beat")
    status, answer = flux.api.call("DELETE", f"/executions/{accepted['execution_id']}")
    assert (status, answer["status"]) == (200, "cancelled")
    assert flux.api.ended(accepted["execution_id"])["status"] == "cancelled"
    assert_still(files)


def test_timeout_kills_the_tree(flux: Flux, program: bytes, tmp_path: Path) -> None:
    flux.api.deploy({"name": "brief", "handler": "main.exe", "timeout": 2}, {"main.exe": program})
    status, answer = flux.api.execute("brief", "tree", f"Z:{tmp_path}/beat")
    assert (status, answer["error"]) == (500, "execution timed out after 2s")
    assert_still([tmp_path / "beat.parent", tmp_path / "beat.child"])


def test_what_wine_cannot_hold_a_function_to_is_refused(flux: Flux, program: bytes) -> None:
    flux.api.deploy({"name": "limited", "handler": "main.exe", "resources": {"memory": 64}}, {"main.exe": program})
    status, answer = flux.api.execute("limited", "0")
    assert status == 429, answer
    assert "cannot enforce memory" in answer["error"]


def test_a_program_of_linux_is_not_placed_there(flux: Flux) -> None:
    flux.api.call("PUT", "/functions", b"name: shell\nhandler: run.sh\n")
    status, answer = flux.api.call("PUT", "/deploy/shell", make_zip({"run.sh": "#!/bin/sh\n"}))
    assert status == 201
    assert answer["problem"].startswith(
        "no agent can run shell: the agent is windows/amd64, the function is for unix/any"
    )
    status, answer = flux.api.execute("shell")
    assert status in (404, 409, 429, 503), answer


def test_a_handler_is_what_its_bytes_say(flux: Flux, program: bytes) -> None:
    flux.api.deploy({"name": "bare", "handler": "main"}, {"main": program})
    assert flux.api.execute("bare", "0")[1]["exit_code"] == 0
    flux.api.call("PUT", "/functions", b"name: script\nhandler: main.py\n")
    status, answer = flux.api.call("PUT", "/deploy/script", make_zip({"main.py": "print(1)\n"}))
    assert status == 201
    assert "Windows cannot run the handler main.py" in answer["problem"]


def test_a_zip_with_names_that_windows_cannot_hold_is_refused_by_the_agent(flux: Flux, program: bytes) -> None:
    flux.api.call("PUT", "/functions", b"name: names\nhandler: main.exe\n")
    for name in ("aux.js", "JSON::PP.3pm", "etc.", "MAIN.EXE"):
        status, answer = flux.api.call("PUT", "/deploy/names", make_zip({"main.exe": program, name: "x"}))
        assert (status, answer["agents"][0]["status"]) == (201, "failed"), answer
        assert "rename" in answer["problem"]


def test_the_suite_of_the_executor_passes_under_wine(lab: Lab) -> None:
    """tests/windows/inside, run by the Windows Python; on Windows itself pytest collects it directly."""
    ran = lab.run(["-m", "pytest", "tests/windows/inside", r"--basetemp=C:\tests"])
    text = ran.stdout.decode(errors="replace")
    assert ran.returncode == 0, text
    assert " passed" in text
