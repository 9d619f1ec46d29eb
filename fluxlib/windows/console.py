"""The console window: a double click on flux.exe, and what happens when the window is closed.

Microsoft, "SetConsoleCtrlHandler" and "HandlerRoutine": when its window is
closed a program gets CTRL_CLOSE_EVENT on a thread of its own, and is ended when
that handler returns or after 5 seconds.
"""

from __future__ import annotations

import ctypes
import io
import re
import sys
import threading
import traceback
from collections.abc import Callable
from ctypes.wintypes import BOOL, DWORD, HANDLE
from pathlib import Path

import fluxlib
from fluxlib.config.control import ControlConfig, load_control
from fluxlib.config.first_start import make_flux_yaml
from fluxlib.errors import ConfigInvalid
from fluxlib.lifecycle import StopSignal

assert sys.platform == "win32"

CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT = 2, 5, 6
STOP_WITHIN = 4.0
_SYSTEM_WAITS = 10.0  # longer than it does: the handler must not return before the work is done
_STD_INPUT_HANDLE = -10
_ENABLE_QUICK_EDIT_MODE, _ENABLE_EXTENDED_FLAGS = 0x40, 0x80
_DATA = "flux-data"
_PIECE = 30  # of a path: even if every character of it is a quote, its line fits

_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_kernel32.GetStdHandle.restype = HANDLE
_kernel32.GetConsoleMode.argtypes = (HANDLE, ctypes.c_void_p)
_kernel32.SetConsoleMode.argtypes = (HANDLE, DWORD)
_Handler = ctypes.WINFUNCTYPE(BOOL, DWORD)
_handlers: list[object] = []  # Windows keeps their addresses, so nobody may free them


def stop_when_closed(stop: StopSignal) -> Callable[[int], int]:
    """Closing the window, logging off and shutting down stop the program in order. The handler, for tests."""

    def on_event(event: int) -> int:
        if event not in (CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT):
            return 0  # Ctrl-C and Ctrl-Break are Python's signals
        stop.set(within=STOP_WITHIN)
        # Returning ends the process at once; its end by itself ends this thread too.
        threading.Event().wait(_SYSTEM_WAITS)
        return 1

    handler = _Handler(on_event)
    _handlers.append(handler)
    _kernel32.SetConsoleCtrlHandler(handler, True)
    return on_event


def in_own_window() -> bool:
    """Whether the console was opened for this program alone, as a double click does."""
    processes = (DWORD * 8)()
    count = int(_kernel32.GetConsoleProcessList(processes, len(processes)))
    # A program in one file is two processes: the one that unpacks it and the one that runs.
    return 1 <= count <= (2 if getattr(sys, "frozen", False) else 1)


def keep_open(run: Callable[[], int]) -> int:
    """Run the program; when it ends badly the window stays until somebody has read why."""
    _kernel32.SetConsoleTitleW("Flux")
    _end_quick_edit()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a folder may be called anything
    try:
        code = run()
    except Exception:
        traceback.print_exc()
        print("\nThis is a fault of Flux itself. Please report it with the lines above.", file=sys.stderr)
        code = 1
    if code:
        print("\nFlux has stopped. Fix the problem above and start it again.", file=sys.stderr)
        print("Press Enter to close this window.", file=sys.stderr, flush=True)
        if sys.stdin is not None:
            sys.stdin.readline()
    return code


def program_directory() -> Path:
    """Where the program lies: what a double click makes is made beside it."""
    return Path(sys.executable if getattr(sys, "frozen", False) else sys.argv[0]).resolve().parent


def log_file(data: Path) -> Path:
    """Where what the window shows is kept, in the directory of state and certificates."""
    return data / "flux.log"


def beside_program() -> tuple[ControlConfig, Path]:
    """(flux.yaml beside the program, the directory for its data); made on the first start.

    Raises ConfigInvalid with what to do.
    """
    path = program_directory() / "flux.yaml"
    print(f"Flux {fluxlib.__version__} is starting.", flush=True)
    try:
        made = make_flux_yaml(path, data=_DATA, listen_host="127.0.0.1", shutdown_sec=10)
    except ConfigInvalid as error:
        advice = "Move the program to a folder of your own, such as one in Documents, and start it there"
        raise ConfigInvalid(f"{error.message}. {advice}") from error
    if made:
        print(f"This is its first start here: it made {path}, with a new key.", flush=True)
    try:
        return load_control(path), path.parent / _DATA
    except ConfigInvalid as error:
        advice = f"Fix {path}, or rename it and start again to get a fresh one with a new key"
        faults = error.faults or (error.message,)
        raise ConfigInvalid(f"{path} cannot be used", [*faults, advice]) from error


def greet(config: ControlConfig) -> None:
    """Where everything is and what to do next."""
    print("\n".join(greeting(config)), flush=True)


def greeting(config: ControlConfig) -> tuple[str, ...]:
    url = config.own_url
    return (
        "",
        f"Flux answers at {url}, with one agent on this computer.",
        f"Your API key is in {config.path} (api_key). Keep it secret: it gives full control.",
        f"Functions, results and the log (flux.log) are kept in {config.state_dir.parent}.",
        "",
        "Your first function: open a second window (PowerShell) and paste these lines.",
        "",
        *first_function(config.path, url),
        "",
        "To stop Flux, press Ctrl-C here or close this window.",
        "",
    )


def first_function(flux_yaml: Path, url: str) -> list[str]:
    """Lines for PowerShell that make, deploy and call a function.

    None is wider than a console's 80 columns: a line that the console has wrapped is copied as two.
    """
    path = str(flux_yaml)
    pieces = [path[at : at + _PIECE] for at in range(0, len(path), _PIECE)]
    return [
        # The window of an administrator opens in Windows' own directory.
        "cd ~",
        *(f"$f {'+=' if number else '='} {quoted(piece)}" for number, piece in enumerate(pieces)),
        # By its literal path: elsewhere brackets are wildcards.
        r"$k = (sls '^api_key: *(\S+)' -LiteralPath $f).Matches[0].Groups[1].Value",
        f"$u = {quoted(url)}",
        "$h = @{Headers = @{'X-API-Key' = $k}}",
        "Set-Content hello.bat '@echo Hello, %~1, from %FLUX_FUNCTION_NAME%'",
        "Compress-Archive hello.bat hello.zip -Force",
        'irm $u/functions @h -Method Put -Body "name: hello`nhandler: hello.bat"',
        "irm $u/deploy/hello @h -Method Put -InFile hello.zip",
        'irm $u/execute/hello @h -Method Post -Body \'{"args": ["you"]}\'',
    ]


def quoted(text: str) -> str:
    """A string of PowerShell that stands for itself; to it typographic single quotes are single quotes too."""
    return "'" + re.sub("(['\u2018-\u201b])", r"\1\1", text) + "'"


def _end_quick_edit() -> None:
    """A click into the window would select text, and every thread that logs would wait until it is let go."""
    mode, handle = DWORD(), _kernel32.GetStdHandle(_STD_INPUT_HANDLE)
    if _kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
        _kernel32.SetConsoleMode(handle, (mode.value & ~_ENABLE_QUICK_EDIT_MODE) | _ENABLE_EXTENDED_FLAGS)
