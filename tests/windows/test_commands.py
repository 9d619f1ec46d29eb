"""Command lines and environments for Windows, checked anywhere: pure text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxlib.agent.executor import windows_commands as commands
from fluxlib.config.environment import windows_basics
from fluxlib.errors import InvalidInput

ROOT = r"C:\Windows"
WORDS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20)
# What makes quoting hard, far more often than chance would.
NASTY = st.lists(st.text(st.sampled_from(' \t"\\ab'), max_size=12), max_size=6)


def parse(line: str) -> list[str]:
    """CommandLineToArgvW by Microsoft's description ("Parsing C command-line arguments"), the program's name apart."""
    assert line[0] == '"'
    name, _, rest = line[1:].partition('"')
    words, word, inside, started, at = [name], "", False, False, 0
    while at < len(rest):
        char = rest[at]
        if char == "\\":
            end = at
            while end < len(rest) and rest[end] == "\\":
                end += 1
            count, at, started = end - at, end, True
            if at < len(rest) and rest[at] == '"':
                word += "\\" * (count // 2)
                if count % 2:
                    word += '"'
                    at += 1
            else:
                word += "\\" * count
            continue
        if char == '"':
            started = True
            if inside and rest[at + 1 : at + 2] == '"':
                word += '"'
                at += 1
            else:
                inside = not inside
        elif char in " \t" and not inside:
            if started:
                words.append(word)
            word, started = "", False
        else:
            word, started = word + char, True
        at += 1
    return [*words, word] if started else words


@given(NASTY)
def test_hard_words_come_back(args: list[str]) -> None:
    assert parse(commands.join([r"C:\a b\x.exe", *args])) == [r"C:\a b\x.exe", *args]


@given(st.lists(WORDS, max_size=6))
def test_any_words_come_back(args: list[str]) -> None:
    program, line = commands.command_line([r"C:\x.exe", *args], ROOT)
    assert program == r"C:\x.exe"
    assert parse(line) == [r"C:\x.exe", *args]


@given(st.lists(WORDS, max_size=4))
def test_batch_lines_hold_no_syntax_of_cmd_outside_the_quotes_we_put(args: list[str]) -> None:
    try:
        program, line = commands.command_line([r"C:\code\x.bat", *args], ROOT)
    except InvalidInput:
        assert any(char in arg for arg in args for char in '"%!^&|<>\r\n\0')
        return
    assert program == r"C:\Windows\System32\cmd.exe"
    head, inner = line.split(" /c ", 1)
    assert head.endswith("/v:off /s")
    assert not set(inner) & set("%!^&|<>\r\n")
    assert inner.count('"') % 2 == 0


def test_batch_arguments_are_quoted_only_where_cmd_needs_it() -> None:
    _, line = commands.command_line([r"C:\code\x.cmd", "World", "a b", "", r"C:\dir", "x;y"], ROOT)
    assert line.endswith(r'/c ""C:\code\x.cmd" World "a b" "" C:\dir "x;y""')


def test_refusals_name_every_argument_and_what_it_holds() -> None:
    with pytest.raises(InvalidInput) as refused:
        commands.check_arguments("run.bat", ("fine", 'say "%X%"', "a\r\nb"))
    assert refused.value.faults == ('argument 2 contains " %', "argument 3 contains line ends")
    commands.check_arguments("run.exe", ("fine", 'say "%X%"', "a\r\nb"))
    with pytest.raises(InvalidInput, match="NUL"):
        commands.check_arguments("run.exe", ("\0",))


def test_powershell_is_told_to_ask_nobody() -> None:
    program, line = commands.command_line([r"C:\code\x.ps1", "a b"], ROOT)
    assert program.endswith("powershell.exe")
    assert parse(line)[1:] == [
        *("-NoLogo", "-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass"),
        *("-File", r"C:\code\x.ps1", "a b"),
    ]


@pytest.mark.parametrize("handler", ["100%.bat", "a&b.cmd"])
def test_handlers_windows_cannot_run(handler: str) -> None:
    with pytest.raises(InvalidInput):
        commands.check_handler(handler)


@pytest.mark.parametrize("handler", ["a.exe", "bin/A.EXE", "x.bat", "x.Cmd", "x.ps1", "100%.exe", "run"])
def test_handlers_windows_can_run(handler: str) -> None:
    commands.check_handler(handler)


def test_a_path_cmd_would_misread_is_refused() -> None:
    with pytest.raises(InvalidInput, match="state_dir"):
        commands.command_line([r"C:\50% off\x.bat"], ROOT)


def test_environments_merge_without_regard_to_case() -> None:
    merged = commands.merge_environments({"Path": "a", "X": "1"}, {"PATH": "b"})
    assert merged == {"PATH": "b", "X": "1"}
    assert commands.environment_block({"b": "2", "A": "1"}) == "A=1\0b=2\0\0"
    for bad in ({"": "x"}, {"a=b": "x"}, {"a": "x\0"}):
        with pytest.raises(InvalidInput):
            commands.environment_block(bad)


def test_a_function_knows_its_user_machine_and_public_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"USERNAME": "me", "COMPUTERNAME": "BOX", "PUBLIC": r"D:\Public", "SECRET": "x"}.items():
        monkeypatch.setenv(name, value)
    basics = windows_basics()
    assert (basics["USERNAME"], basics["COMPUTERNAME"], basics["PUBLIC"]) == ("me", "BOX", r"D:\Public")
    assert "SECRET" not in basics
    # A service of a virtual account may have none of them.
    for name in ("USERNAME", "COMPUTERNAME", "PUBLIC", "SystemDrive"):
        monkeypatch.delenv(name, raising=False)
    basics = windows_basics()
    assert basics["USERNAME"]
    assert basics["COMPUTERNAME"]
    assert basics["PUBLIC"] == r"C:\Users\Public"
