"""The executor's contract on Windows: every program really runs, in a real job object."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fluxlib.agent.executions import Execution
from fluxlib.agent.executor import winapi
from fluxlib.agent.executor.base import Job, Limits
from fluxlib.agent.executor.jobobject import KILLED_EXIT_CODE
from fluxlib.agent.executor.windows import WindowsExecutor
from fluxlib.agent.records import new_record
from fluxlib.config.agent import AgentConfig
from fluxlib.errors import InvalidInput, Stopping, Unenforceable
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus, FunctionSpec, Network, WorkingDirectory
from tests.windows.inside.runs import Programs

pytestmark = pytest.mark.windows

WINE = winapi.is_wine()
SLEEP = "import time; print('up', flush=True); time.sleep(300)"
# A program that starts another of itself, which is detached from it as far as Windows lets it.
FAMILY = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], creationflags=0x8 | 0x200, stdout=subprocess.DEVNULL)
print('child', child.pid, flush=True)
"""


def child_of(text: str) -> int:
    return int(text.split("child ")[1].split()[0])


def gone(pid: int) -> bool:
    """Whether a process has ended; the system may take a moment to forget it."""
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.parametrize("code", [0, 1, 7, 255, 3221225477])
def test_exit_code_is_the_programs_own(programs: Programs, code: int) -> None:
    ran = programs.python(f"import ctypes; ctypes.windll.kernel32.ExitProcess({code})")
    assert ran.end().exit_code == code
    assert ran.end().signal is None
    assert ran.pid


def test_both_outputs_arrive_in_the_order_they_were_written(programs: Programs) -> None:
    ran = programs.python(
        "import os\nfor n in range(100): os.write(1, b'o%d ' % n); os.write(2, b'e%d ' % n)",
    )
    assert ran.text == "".join(f"o{n} e{n} " for n in range(100))


def test_large_output_is_read_to_its_end(programs: Programs) -> None:
    ran = programs.python("import os\nfor _ in range(100): os.write(1, b'x' * 100_000)")
    assert ran.end(60).exit_code == 0
    assert len(ran.output) == 10_000_000


def test_standard_input(programs: Programs) -> None:
    sent = bytes(range(256)) * 1000
    ran = programs.python("import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())", stdin=sent)
    assert ran.text.strip() == hashlib.sha256(sent).hexdigest()
    empty = programs.python("import sys; print(len(sys.stdin.buffer.read()))")
    assert empty.text.strip() == "0"


@pytest.mark.parametrize(
    "args",
    [
        ["plain", "with space", "tab\there"],
        ['"', '""', 'a"b', '"quoted"', '\\"', '\\\\"', "a\\\\b c\\"],
        ["", " ", "\\", "\\\\", "ends\\", "ends with space \\"],
        ["%PATH%", "!x!", "^", "&", "|", "<>", "line\nend", "'single'", "*.py", "?"],
        ["ümläut", "日本語", "\U0001f600"],
    ],
)
def test_arguments_reach_an_exe_unchanged(programs: Programs, args: list[str]) -> None:
    ran = programs.python("import sys; sys.stdout.buffer.write(repr(sys.argv[1:]).encode())", *args)
    assert ran.text == repr(args)


def test_environment_is_clean_and_has_what_windows_programs_need(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUX_TEST_SECRET", "the agent's own")
    ran = programs.python(
        "import os\nfor name, value in os.environ.items(): print(f'{name}={value}')\nprint('cwd', os.getcwd())",
        env={"Greeting": "hello", "temp_dir": "x", "tmp": "overridden"},
    )
    seen = dict(line.split("=", 1) for line in ran.text.splitlines() if "=" in line)
    assert "FLUX_TEST_SECRET" not in seen
    assert seen["GREETING"] == "hello"  # Python shows names in capitals, as Windows compares them
    assert seen["TMP"] == "overridden"
    assert seen["SYSTEMROOT"] == os.environ["SYSTEMROOT"]
    assert seen["USERNAME"]
    assert seen["COMPUTERNAME"]
    assert seen["PUBLIC"]
    assert f"cwd {seen['TEMP']}" in ran.text
    assert not Path(seen["TEMP"]).exists()  # the work directory, gone with the run


def test_working_directory_is_the_code_when_asked(programs: Programs) -> None:
    ran = programs.python("import os; print(os.getcwd())", cwd=WorkingDirectory.CODE)
    assert os.path.samefile(ran.text.strip(), programs.code)


def test_what_a_function_left_in_its_work_directory_goes(programs: Programs) -> None:
    ran = programs.python(
        "import os\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a/b/c', 0o444); print(os.getcwd())"
    )
    left = Path(ran.text.strip())
    deadline = time.monotonic() + 20
    while left.exists() and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert not left.exists()


# ---- batch files ---------------------------------------------------------------------


def test_batch_file_gets_its_arguments_and_gives_its_exit_code(programs: Programs) -> None:
    batch = programs.batch("args.bat", "@echo off\necho [%1] [%~2] [%~3] %GREETING%\nexit /b 5\n")
    ran = programs.run(batch, "world", "two words", "", env={"GREETING": "hi"})
    assert ran.text.strip() == "[world] [two words] [] hi"
    assert ran.end().exit_code == 5


def test_batch_file_in_a_directory_with_spaces(programs: Programs) -> None:
    home = programs.code / "with space"
    home.mkdir(exist_ok=True)
    batch = programs.batch("with space/my job.cmd", "@echo off\necho ran %~1\n")
    assert programs.run(batch, "a;b,c=d (e)").text.strip() == "ran a;b,c=d (e)"


@pytest.mark.parametrize("arg", ['"', "%PATH%", "!x!", "^", "a&calc", "|", "<", ">", "a\nb", "a\rb", "nul\0"])
@pytest.mark.parametrize("name", ["x.bat", "X.CMD"])
def test_batch_arguments_that_cmd_would_parse_are_refused(programs: Programs, name: str, arg: str) -> None:
    with pytest.raises(InvalidInput):
        programs.executor.check_args(name, ("fine", arg))
    with pytest.raises(InvalidInput):
        programs.run(str(programs.code / name), "fine", arg)


def test_too_long_command_lines_are_refused(programs: Programs) -> None:
    with pytest.raises(InvalidInput, match="32766"):
        programs.python("pass", "x" * 40_000)
    with pytest.raises(InvalidInput, match="8190"):
        programs.run(programs.batch("long.bat", "@echo off\n"), "x" * 9_000)


# ---- ends ------------------------------------------------------------------------------


def test_a_program_that_is_not_there_is_told_not_raised(programs: Programs) -> None:
    ended = programs.run(str(programs.code / "missing.exe")).end()
    assert "missing.exe is not there" in ended.start_error
    assert ended.exit_code is None


def test_a_file_that_is_no_program(programs: Programs) -> None:
    path = programs.code / "text.exe"
    path.write_text("this is no program")
    assert "text.exe is no Windows program" in programs.run(str(path)).end().start_error
    path = programs.code / "elf.exe"
    path.write_bytes(b"\x7fELF" + bytes(100))
    assert "elf.exe is a Linux program, which Windows cannot run" in programs.run(str(path)).end().start_error


def test_kill_ends_the_whole_tree(programs: Programs) -> None:
    ran = programs.python(FAMILY + SLEEP)
    ran.said(b"up")
    child = child_of(ran.output.decode())
    assert psutil.pid_exists(child)
    assert ran.job is not None
    ran.job.kill()
    ran.end()
    assert gone(child)
    assert gone(ran.pid)
    ran.job.kill()  # does nothing any more
    ran.job.terminate()


def test_what_a_program_leaves_behind_is_killed_not_waited_for(programs: Programs) -> None:
    began = time.monotonic()
    ran = programs.python(FAMILY)
    assert ran.end().exit_code == 0
    assert time.monotonic() - began < 20
    assert gone(child_of(ran.output.decode()))


def test_a_batch_files_children_die_with_it(programs: Programs) -> None:
    batch = programs.batch("family.bat", f'@echo off\n"{sys.executable}" %1\n')
    script = programs.code / "family.py"
    script.write_text(f"{FAMILY}\n{SLEEP}\n")
    ran = programs.run(batch, str(script))
    ran.said(b"up")
    assert ran.job is not None
    ran.job.kill()
    ran.end()
    assert gone(child_of(ran.output.decode()))


def test_terminate_ends_a_program_that_ignores_everything(programs: Programs) -> None:
    """With a console CTRL_BREAK comes first and the kill after the grace; without one the kill comes at once."""
    timers = Timers("test-timers").start()
    records: list[ExecutionRecord] = []
    ended, up = threading.Event(), threading.Event()

    def on_end(execution: Execution, record: ExecutionRecord) -> None:
        records.append(record)
        ended.set()

    code = "import signal; signal.signal(signal.SIGBREAK, signal.SIG_IGN); " + SLEEP
    job = Job("stubborn", (sys.executable, "-c", code), {}, programs.code)
    record = new_record("stubborn", "stubborn", "worker-1", False, ())
    execution = Execution(record, programs.executor, timers, 0.5, lambda execution: None, on_end)
    try:
        execution.launch(job, 0, lambda data: up.set())
        assert up.wait(30)
        execution.stop(ErrorKind.CANCELLED, "cancelled")
        assert ended.wait(30)
    finally:
        timers.stop(Deadline(5))
    assert records[0].status is ExecutionStatus.CANCELLED


def test_timeout_kills_the_tree(programs: Programs) -> None:
    timers = Timers("test-timers").start()
    records: list[ExecutionRecord] = []
    output = bytearray()
    ended = threading.Event()

    def on_end(execution: Execution, record: ExecutionRecord) -> None:
        records.append(record)
        ended.set()

    job = Job("timeout", (sys.executable, "-c", FAMILY + SLEEP), {}, programs.code)
    record = new_record("timeout", "timeout", "worker-1", False, ())
    execution = Execution(record, programs.executor, timers, 0.2, lambda execution: None, on_end)
    try:
        execution.launch(job, 3.0, output.extend)
        assert ended.wait(30)
    finally:
        timers.stop(Deadline(5))
    assert records[0].error_kind is ErrorKind.TIMEOUT
    assert records[0].error == "execution timed out after 3s"
    assert gone(child_of(output.decode()))


def test_many_at_once_keep_their_outputs_apart(programs: Programs) -> None:
    running = [programs.python(f"import time; print({n}); time.sleep(0.2); print({n})") for n in range(20)]
    assert [ran.text for ran in running] == [f"{n}\n{n}\n" for n in range(20)]


def test_nothing_is_left_of_many_runs(programs: Programs) -> None:
    def next_handle() -> int:
        """Handles are numbered from the bottom, in steps of 4 (Wine does not count them)."""
        gc.collect()  # each lock of Python's is a handle, and a run and who waits for it know each other
        handle = ctypes.windll.kernel32.CreateEventW(None, True, False, None)
        ctypes.windll.kernel32.CloseHandle(handle)
        return int(handle)

    batch = programs.batch("nothing.bat", "@exit /b 0\n")
    programs.run(batch).end()
    before = next_handle()
    for _ in range(40):
        programs.run(batch, stdin=b"x").end()
    programs.run(str(programs.code / "missing.exe")).end()
    # The last runs' threads may be at their end still, and hold some.
    deadline = time.monotonic() + 20
    while (more := next_handle() - before) >= 4 * 40 and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert more < 4 * 40, "one or more of each run"
    assert not list((programs.state / "work").iterdir())


# ---- limits ----------------------------------------------------------------------------


def test_limits_this_host_cannot_hold_are_refused(programs: Programs) -> None:
    with pytest.raises(Unenforceable, match="network: none"):
        programs.executor.check(FunctionSpec("f", "f.exe", network=Network.NONE))
    with pytest.raises(Unenforceable, match=r"limits\.file_size"):
        programs.executor.check(FunctionSpec("f", "f.exe", max_file_size_mb=1))
    with pytest.raises(InvalidInput, match=r"a&b\.bat"):
        programs.executor.check(FunctionSpec("f", "a&b.bat"))
    assert programs.executor.check(FunctionSpec("f", "f.exe")) == ()


def test_profiles_of_linux_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unenforceable, match="default"):
        WindowsExecutor(AgentConfig(agent_id="a", state_dir=tmp_path, isolation="strict"), tmp_path)


def test_off_takes_limits_and_says_that_it_does_not_hold_them(tmp_path: Path) -> None:
    off = Programs(tmp_path, tmp_path, isolation="off")
    try:
        assert off.executor.isolation.profile == "off"
        warnings = off.executor.check(FunctionSpec("f", "f.exe", memory_mb=10))
        assert warnings == ("resources.memory is not enforced: isolation is off on this agent",)
        assert off.python("print(1)", limits=Limits(memory_bytes=1, processes=1)).text == "1\n"
    finally:
        off.executor.stop(time.monotonic() + 10)


@pytest.mark.skipif(WINE, reason="Wine accepts these limits and holds nothing to them")
def test_memory_limit_is_out_of_memory(programs: Programs) -> None:
    ended = programs.python("x = bytearray(400_000_000)", limits=Limits(memory_bytes=200 * 1024**2)).end()
    assert ended.out_of_memory
    assert ended.peak_memory_bytes is not None
    assert ended.peak_memory_bytes <= 200 * 1024**2


@pytest.mark.skipif(WINE, reason="Wine accepts these limits and holds nothing to them")
def test_process_limit(programs: Programs) -> None:
    ran = programs.python(FAMILY, limits=Limits(processes=1))
    assert ran.end().exit_code != 0
    assert b"child" not in ran.output


@pytest.mark.skipif(WINE, reason="Wine keeps no CPU figures of jobs")
def test_cpu_rate_and_cpu_seconds(programs: Programs) -> None:
    busy = "import time\nend = time.monotonic() + 4\nwhile time.monotonic() < end: pass"
    ended = programs.python(busy, limits=Limits(cpu_millicores=250)).end()
    assert ended.cpu_seconds is not None
    assert 0.5 < ended.cpu_seconds < 2.0


# ---- stopping --------------------------------------------------------------------------


def test_stop_kills_what_runs_and_refuses_new(tmp_path: Path) -> None:
    own = Programs(tmp_path / "state", tmp_path)
    ran = own.python(SLEEP)
    ran.said(b"up")
    own.executor.stop(time.monotonic() + 10)
    assert [ended.exit_code for ended in ran.ends] == [KILLED_EXIT_CODE]
    assert gone(ran.pid)
    with pytest.raises(Stopping):
        own.python("pass")
