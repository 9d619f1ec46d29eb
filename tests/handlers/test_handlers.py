"""What a handler is, and the reason that is told when a machine cannot start it."""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib import handlers
from fluxlib.agent.diagnosis import exec_problem, start_problem
from fluxlib.errors import InvalidInput
from fluxlib.handlers import Head
from fluxlib.model import FunctionSpec, Platform

LINUX, WINDOWS = Platform("linux", "amd64"), Platform("windows", "amd64")
ELF = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 2, 62) + bytes(60)
PE = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", 0x8664) + bytes(20)
SCRIPT = b"#!/bin/sh\n"


@pytest.mark.parametrize(
    ("handler", "data", "platforms", "here", "words"),
    [
        ("run", ELF, (), LINUX, ""),
        ("run.exe", ELF, (), LINUX, ""),
        ("run.cmd", SCRIPT, (), LINUX, ""),
        ("run", PE, (), LINUX, "is a Windows program for amd64, and this agent runs on linux/amd64"),
        ("run.bat", b"@echo off", (), LINUX, "is a script for Windows"),
        ("run.bat", b"@echo off", ("unix",), LINUX, ""),
        ("run", SCRIPT, ("windows",), LINUX, "f is for windows/any, and this agent runs on linux/amd64"),
        ("run", SCRIPT, ("windows", "linux/amd64"), LINUX, ""),
        ("run", PE, ("linux",), LINUX, ""),  # Wine may be registered for it
        ("run", PE, (), WINDOWS, ""),
        ("run.ps1", b"", (), WINDOWS, ""),
        ("run.ps1", b"#!/usr/bin/env pwsh\n", (), WINDOWS, "is a script with a #! line"),
        ("run.ps1", b"#!/usr/bin/env pwsh\n", ("windows",), WINDOWS, ""),
        ("run.sh", SCRIPT, (), WINDOWS, "is a script with a #! line, and this agent runs on windows/amd64"),
        ("run.exe", ELF, (), WINDOWS, "is a Linux program for amd64"),
        ("run.py", b"print(1)", (), WINDOWS, "ends in .exe, .com, .bat, .cmd, .ps1"),
        ("run.py", b"print(1)", ("windows",), WINDOWS, "ends in .exe, .com, .bat, .cmd, .ps1"),
        ("run.py", b"print(1)", (), LINUX, ""),  # warned of
    ],
)
def test_platforms_count_first_then_bytes_then_the_suffix(
    handler: str, data: bytes, platforms: tuple[str, ...], here: Platform, words: str
) -> None:
    spec = FunctionSpec(name="f", handler=handler, platforms=tuple(map(Platform.parse, platforms)))
    if not words:
        handlers.check_runs_on(spec, Head(handler, data), here)
        return
    with pytest.raises(InvalidInput) as refused:
        handlers.check_runs_on(spec, Head(handler, data), here)
    assert words in refused.value.message


def test_64_bit_x86_is_given_32_bit_programs() -> None:
    assert Platform("windows", "amd64").matches(Platform("windows", "386"))
    assert not Platform("windows", "386").matches(Platform("windows", "amd64"))
    assert not Platform("linux", "arm64").matches(Platform("linux", "386"))


def problem(code_dir: Path, **env: str) -> str:
    return start_problem(FunctionSpec(name="f", handler="main", env=env), code_dir)


# What is in the file; the words of the reason, before the start and after it.
NEVER = {
    "a byte order mark": (b"\xef\xbb\xbf#!/bin/sh\necho ok\n", "UTF-8 byte order mark"),
    "UTF-16": ("\ufeff#!/bin/sh\n".encode("utf-16-le"), "UTF-16 text, as PowerShell's >"),
    "an empty first line": (b"\n#!/bin/sh\necho ok\n", "an empty line or spaces before its #! line"),
    "spaces": (b"  #!/bin/sh\n", "an empty line or spaces"),
    "CR LF": (b"#!/bin/sh\r\necho ok\r\n", "CR LF"),
    "CR": (b"#!/bin/sh\recho ok\r", "line ends of CR, as Macs"),
    "no interpreter": (b"#!\necho ok\n", "names no interpreter"),
    "empty": (b"", "is an empty file"),
    "text": (b"print('hello')\n", "neither a program nor a script"),
    "a missing interpreter": (b"#!/home/me/.venv/bin/python3\n", "/home/me/.venv/bin/python3, which is not on this"),
    "an interpreter without its path": (b"#!python3\n", "such as #!/usr/bin/env python3"),
    "a long first line": (b"#!/bin/sh " + b"x" * 300 + b"\n", "more than 255 bytes"),
    "a cut off program": (b"\x7fELF\2\1\1", "cut off or damaged"),
    "a jar": (b"PK\x03\x04" + bytes(30), "is a zip or jar file"),
    "a class": (b"\xca\xfe\xba\xbe\0\0\0\x3d", "is a Java class"),
    "WebAssembly": (b"\0asm\1\0\0\0", "is a WebAssembly module"),
}


def failed_start(path: Path) -> int:
    """The errno of starting it as the spawner does."""
    try:
        os.waitpid(os.posix_spawn(path, [str(path)], {}), 0)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("what", NEVER)
def test_the_reason_is_told_before_the_start_and_after_it(what: str, tmp_path: Path) -> None:
    data, words = NEVER[what]
    path = tmp_path / "main"
    path.write_bytes(data)
    path.chmod(0o755)
    assert words in problem(tmp_path)
    number = failed_start(path)
    if what != "a long first line":  # newer kernels cut it, older ones start something else
        assert number
        assert words in exec_problem(str(path), number, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "#!/bin/sh",
        "#! /bin/sh -e",
        "#!/usr/bin/env sh",
        "#!/usr/bin/env -S A=1 sh -e",
        "#!/usr/bin/env -Ssh -e",
        "#!lib/sh",
    ],
)
def test_what_starts_is_not_spoken_of(line: str, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "sh").symlink_to("/bin/sh")
    (tmp_path / "main").write_text(f"{line}\n")
    assert problem(tmp_path) == ""
    assert handlers.unix_hint(Head("main", line.encode())) == ""


@pytest.mark.parametrize("line", ["env gone", "env -S gone -u", "env -S -i A=1 -u HOME gone", "env -Sgone"])
def test_what_env_will_not_find_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "main").write_text(f"#!/usr/bin/{line}\n")
    assert problem(tmp_path) == "main asks for gone, which is not on the PATH of functions on this machine"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gone").symlink_to("/bin/sh")
    assert problem(tmp_path, PATH="/usr/bin:/run/flux/code/bin") == ""


def test_interpreters_in_the_code_are_found_where_isolation_shows_it(tmp_path: Path) -> None:
    (tmp_path / "main").write_text("#!/run/flux/code/bin/tool\n")
    assert "is not on this machine" in problem(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tool").symlink_to("/bin/sh")
    assert problem(tmp_path) == ""


def test_an_interpreter_outside_of_what_isolation_shows_is_named_beforehand(tmp_path: Path) -> None:
    tool = tmp_path / "venv" / "python3"
    tool.parent.mkdir()
    tool.symlink_to("/bin/sh")
    code = tmp_path / "code"
    code.mkdir()
    spec = FunctionSpec(name="f", handler="main")

    def told(line: str) -> str:
        (code / "main").write_text(f"#!{line}\n")
        return start_problem(spec, code, ("/usr", "/bin", "/lib"))

    assert told("/bin/sh") == told("/usr/bin/env sh") == ""
    assert told(str(tool)).startswith(f"main asks for {tool}, which functions on this machine cannot see")
    (code / "main").write_text(f"#!{tool}\n")
    assert start_problem(spec, code) == ""


def test_an_interpreter_that_lacks_its_own_is_named(tmp_path: Path) -> None:
    (tmp_path / "pip").write_text("#!/gone/python3\n")
    (tmp_path / "pip").chmod(0o755)
    (tmp_path / "main").write_text(f"#!{tmp_path}/pip\n")
    (tmp_path / "main").chmod(0o755)
    assert f"{tmp_path}/pip asks for /gone/python3" in problem(tmp_path)
    assert "/gone/python3" in exec_problem(str(tmp_path / "main"), failed_start(tmp_path / "main"), tmp_path)


def test_an_option_behind_env_is_told_how_it_works(tmp_path: Path) -> None:
    (tmp_path / "main").write_text("#!/usr/bin/env python3 -u\nprint(1)\n")
    hint = handlers.unix_hint(Head("main", (tmp_path / "main").read_bytes()))
    assert "#!/usr/bin/env -S python3 -u" in hint
    assert problem(tmp_path) == (hint if sys.platform == "linux" else "")


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ("/lib/ld-musl-none.so.1", "built for musl (Alpine Linux)"),
        ("/lib/ld-linux-none.so.2", "built for glibc or another processor"),
    ],
)
def test_a_missing_loader_is_named(loader: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "main"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = b"int main(void) { return 0; }"
    command = [compiler, "-x", "c", "-o", str(path), "-", f"-Wl,--dynamic-linker={loader}"]
    subprocess.run(command, input=source, check=True)
    for told in (problem(tmp_path), exec_problem(str(path), failed_start(path), tmp_path)):
        assert loader in told
        assert words in told


def test_a_program_of_another_processor_is_named(tmp_path: Path) -> None:
    other, name = (183, "arm64") if platform.machine() == "x86_64" else (62, "amd64")
    path = tmp_path / "main"
    path.write_bytes(b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HH", 2, other) + bytes(4000))
    path.chmod(0o755)
    assert f"is a Linux program for {name}, which this machine" in exec_problem(str(path), failed_start(path), tmp_path)


def test_what_isolation_hides_is_said_to_be_hidden(tmp_path: Path) -> None:
    """The interpreter is there for the agent, and was not for the function."""
    (tmp_path / "main").write_text("#!/bin/sh\n")
    assert "cannot see: isolation shows them only /usr" in exec_problem(str(tmp_path / "main"), 2, tmp_path)
    assert "may not be executed" in exec_problem(str(tmp_path / "main"), 13, tmp_path)
    assert exec_problem(str(tmp_path / "gone"), 2, tmp_path) == "gone is not there"
