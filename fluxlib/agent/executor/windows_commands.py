"""How a Windows program is called: its command line, its environment. Pure, so it is tested everywhere.

Facts: a Windows program gets one string and takes it apart itself, nearly always
as CommandLineToArgvW does (Microsoft, "Parsing C command-line arguments"). A
batch file is run by cmd.exe, which parses the same string once more, with rules
that no quoting covers ("BatBadBut", CVE-2024-24576): what it might take for
syntax is refused, never escaped.
"""

from __future__ import annotations

import ntpath
import re
from collections.abc import Mapping, Sequence

from fluxlib.errors import InvalidInput

BATCH = (".bat", ".cmd")
POWERSHELL = (".ps1",)

# CreateProcessW takes 32 767 characters with the NUL at the end, cmd.exe 8 191.
_LONGEST = 32_766
_LONGEST_BATCH = 8_190
_CMD_SYNTAX = '"%!^&|<>\r\n'
_SHOWN = {"\r": "line ends", "\n": "line ends"}
# What cmd.exe neither splits at nor gives a meaning; everything else is put between quotes.
_PLAIN_FOR_CMD = re.compile(r"[A-Za-z0-9_./:\\+@#-]+")
_NEEDS_QUOTES = re.compile(r'[ \t\n\v"]')


def check_handler(handler: str) -> None:
    """Raises InvalidInput for a name that Windows cannot be asked to run."""
    if is_batch(handler) and any(char in handler for char in _CMD_SYNTAX):
        raise InvalidInput(f"Windows cannot run {handler}: cmd.exe reads % ! ^ & in its name as syntax")


def check_arguments(handler: str, args: Sequence[str]) -> None:
    """Raises InvalidInput for arguments that would not arrive as they are."""
    if any("\0" in arg for arg in args):
        raise InvalidInput("an argument contains NUL, which no program can be given")
    if is_batch(handler):
        faults = []
        for number, arg in enumerate(args, 1):
            found = dict.fromkeys(_SHOWN.get(char, char) for char in arg if char in _CMD_SYNTAX)
            if found:
                faults.append(f"argument {number} contains {' '.join(found)}")
        if faults:
            raise InvalidInput(
                f"{handler} is run by cmd.exe, which would read these as syntax; send them on standard input, or "
                "make the handler an .exe",
                faults,
            )


def is_batch(handler: str) -> bool:
    return handler.lower().endswith(BATCH)


def command_line(argv: Sequence[str], system_root: str) -> tuple[str, str]:
    """(the program to start, its command line) for a handler's absolute path and arguments.

    Raises InvalidInput when Windows cannot take it: too long, or a path cmd.exe misreads.
    """
    path, *args = argv
    check_arguments(path, args)
    suffix = ntpath.splitext(path)[1].lower()
    if suffix in BATCH:
        if any(char in path for char in _CMD_SYNTAX):
            raise InvalidInput(f"{path} cannot be given to cmd.exe: use a state_dir without % ! ^ & in it")
        program = ntpath.join(system_root, "System32", "cmd.exe")
        # /d: no AutoRun of the registry; /v:off and /e:on: not as the registry says; /s: only the outer quotes go.
        inner = " ".join([f'"{path}"', *(_for_cmd(arg) for arg in args)])
        line = f'"{program}" /d /e:on /v:off /s /c "{inner}"'
        longest = _LONGEST_BATCH
    elif suffix in POWERSHELL:
        program = ntpath.join(system_root, "System32", "WindowsPowerShell", "v1.0", "powershell.exe")
        options = ["-NoLogo", "-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass", "-File"]
        line = join([program, *options, path, *args])
        longest = _LONGEST
    else:
        program = path
        line = join([path, *args])
        longest = _LONGEST
    if len(line.encode("utf-16-le")) // 2 > longest:
        raise InvalidInput(f"the command line would be longer than the {longest} characters Windows takes")
    return program, line


def join(argv: Sequence[str]) -> str:
    """One string that CommandLineToArgvW and the C run time take apart into ``argv`` again.

    The first word has rules of its own: no escapes, so it must be a path (which holds no quotes).
    """
    return " ".join([f'"{argv[0]}"', *(quote(arg) for arg in argv[1:])])


def quote(arg: str) -> str:
    """One argument. Backslashes are literal unless a quote follows them."""
    if arg and not _NEEDS_QUOTES.search(arg):
        return arg
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', arg)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f'"{escaped}"'


def merge_environments(*layers: Mapping[str, str]) -> dict[str, str]:
    """Later layers win; names differ only by more than case, as Windows sees them."""
    merged: dict[str, tuple[str, str]] = {}
    for layer in layers:
        for name, value in layer.items():
            merged[name.upper()] = (name, value)
    return dict(merged.values())


def environment_block(environment: Mapping[str, str]) -> str:
    """The block CreateProcessW takes: sorted by upper-case name, each entry and the whole ended by NUL.

    Raises InvalidInput for what cannot be in one.
    """
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise InvalidInput(f"the environment variable {name!r} cannot be set on Windows")
    entries = sorted(environment.items(), key=lambda entry: entry[0].upper())
    return "".join(f"{name}={value}\0" for name, value in entries) + "\0"


def _for_cmd(arg: str) -> str:
    return arg if _PLAIN_FOR_CMD.fullmatch(arg) else f'"{arg}"'
