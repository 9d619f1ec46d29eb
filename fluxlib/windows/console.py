"""The console window: a double click on flux.exe, and what happens when the window is closed.

Microsoft, "SetConsoleCtrlHandler" and "HandlerRoutine": when its window is
closed a program gets CTRL_CLOSE_EVENT on a thread of its own, and is ended when
that handler returns or after 5 seconds.
"""

from __future__ import annotations

import ctypes
import io
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
        print("\nFlux has stopped. Put right what is said above, then start it again.", file=sys.stderr)
        print("Press Enter to close this window.", file=sys.stderr, flush=True)
        if sys.stdin is not None:
            sys.stdin.readline()
    return code


def program_directory() -> Path:
    """Where the program lies: what a double click makes is made beside it."""
    return Path(sys.executable if getattr(sys, "frozen", False) else sys.argv[0]).resolve().parent


def beside_program() -> tuple[ControlConfig, Path]:
    """(flux.yaml beside the program, where its agent is kept); made on the first start.

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
        advice = f"Put {path} right; or rename it, and the next start makes a new one, with a new key"
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
        f"The key is in {config.path}, behind api_key. Whoever has it may do everything.",
        f"Functions and results are kept in {config.state_dir.parent}.",
        "",
        "Next, in a second window (PowerShell):",
        f"  $key = (Select-String '^api_key: *(\\S+)' '{config.path}').Matches[0].Groups[1].Value",
        f'  curl.exe -H "X-API-Key: $key" {url}/functions',
        "",
        "To stop Flux, press Ctrl-C here or close this window.",
        "",
    )


def _end_quick_edit() -> None:
    """A click into the window would select text, and every thread that logs would wait until it is let go."""
    mode, handle = DWORD(), _kernel32.GetStdHandle(_STD_INPUT_HANDLE)
    if _kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
        _kernel32.SetConsoleMode(handle, (mode.value & ~_ENABLE_QUICK_EDIT_MODE) | _ENABLE_EXTENDED_FLAGS)
