"""Flux and its agent as Windows services: installed, removed, run.

A service runs as a virtual account of its own (``NT SERVICE\\flux``), which has
no password and owns nothing but its data directory; the program is copied to
Program Files, where that account can read it and only administrators can
change it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ctypes import byref
from dataclasses import dataclass
from pathlib import Path

from fluxlib.config.environment import program_files
from fluxlib.config.files import system_directory
from fluxlib.errors import Conflict, FluxError, Forbidden, NotFound
from fluxlib.lifecycle import StopSignal, pause

assert sys.platform == "win32"

from fluxlib.windows import advapi

log = logging.getLogger(__name__)

_STATE_CHANGES_WITHIN = 60.0
_SHOWS_WITHIN = 5.0
_PROCESS_ENDS_WITHIN = 10.0
_RESTART_AFTER_MS = (5_000, 30_000, 60_000)
_FORGET_FAILURES_AFTER = 3600
# At shutdown Windows ends services after 5 seconds.
_SHUTDOWN_WITHIN = 4.0
_STOP_HINT_MS = 60_000


@dataclass(frozen=True, slots=True)
class Service:
    """What is installed under which name."""

    name: str
    title: str
    description: str
    directory: Path  # its configuration, state and log
    program: str  # the copy in Program Files that it runs, without .exe
    options: str = ""  # of `service run`

    @property
    def account(self) -> str:
        return rf"NT SERVICE\{self.name}"

    @property
    def log_file(self) -> Path:
        return self.directory / f"{self.name}.log"


CONTROL = Service(
    "flux",
    "Flux",
    "Serverless without containers: the control plane, with its HTTP API.",
    system_directory("flux"),
    "flux",
)
# The agent that comes with Flux. A service of its own, so that functions cannot read Flux's keys.
LOCAL_AGENT = Service(
    "flux-local-agent",
    "Flux local agent",
    "Runs functions for the Flux on this computer.",
    system_directory("flux-local-agent"),
    "flux",
    "--local-agent ",
)
AGENT = Service(
    "flux-agent",
    "Flux agent",
    "Runs functions for Flux on this computer.",
    system_directory("flux-agent"),
    "flux-agent",
)


def install(service: Service) -> None:
    """Copy the program, register the service, start it. Its configuration has to be there.

    Raises Forbidden without administrator's rights, Conflict when it is installed already; then nothing is left.
    """
    # A service's own environment need not say where ProgramData is.
    line = f'{_command(service)} service run {service.options}--directory "{service.directory}"'
    with _manager(advapi.SC_MANAGER_CONNECT | advapi.SC_MANAGER_CREATE_SERVICE) as manager:
        try:
            handle = advapi.CreateService(
                *(manager, service.name, service.title, _all_rights()),
                *(advapi.SERVICE_WIN32_OWN_PROCESS, advapi.SERVICE_AUTO_START, advapi.SERVICE_ERROR_NORMAL),
                *(line, None, None, None, service.account, None),
            )
        except OSError as error:
            if error.winerror == advapi.ERROR_SERVICE_EXISTS:
                raise Conflict(f"the service {service.name} is installed already: remove it first") from error
            raise _translated(error, f"the service {service.name} cannot be registered") from error
        try:
            _copy_program(service)
            _configure(handle, service)
            make_private(service.directory, service.account)
            advapi.StartService(handle, 0, None)
            _wait_for(handle, advapi.SERVICE_RUNNING, service)
            _see_it_stay(handle, service)
        except BaseException as error:
            with contextlib.suppress(OSError, FluxError):
                _stop(handle, service)
            with contextlib.suppress(OSError):
                advapi.DeleteService(handle)
            if service is not LOCAL_AGENT:
                remove_program(service)
            if isinstance(error, OSError):
                raise _translated(error, f"the service {service.name} cannot be started") from error
            raise
        finally:
            advapi.CloseServiceHandle(handle)


def remove(service: Service) -> None:
    """Stop it and take it out; its data stays, and so does the program's copy. Raises Forbidden, NotFound."""
    with _manager(advapi.SC_MANAGER_CONNECT) as manager:
        try:
            handle = advapi.OpenService(manager, service.name, _all_rights())
        except OSError as error:
            if error.winerror == advapi.ERROR_SERVICE_DOES_NOT_EXIST:
                raise NotFound(f"there is no service {service.name} here") from error
            raise _translated(error, f"the service {service.name} cannot be opened") from error
        try:
            _stop(handle, service)
            advapi.DeleteService(handle)
        except OSError as error:
            raise _translated(error, f"the service {service.name} cannot be removed") from error
        finally:
            advapi.CloseServiceHandle(handle)


def _stop(handle: int, service: Service) -> None:
    try:
        advapi.ControlService(handle, advapi.SERVICE_CONTROL_STOP, byref(advapi.SERVICE_STATUS()))
    except OSError as error:
        if error.winerror != advapi.ERROR_SERVICE_NOT_ACTIVE:
            raise
    _wait_for(handle, advapi.SERVICE_STOPPED, service)


def remove_program(service: Service) -> bool:
    """Delete the program's copy in Program Files; whether it is gone. It may be the one that runs this."""
    program = installed_program(service)
    if not getattr(sys, "frozen", False):
        return not program.exists()
    deadline = time.monotonic() + _PROCESS_ENDS_WITHIN
    while True:
        try:
            program.unlink(missing_ok=True)
            break
        except OSError:
            # The service has stopped, and its process may take a moment longer.
            if time.monotonic() > deadline or Path(sys.executable) == program:
                return False
            pause(0.2)
    with contextlib.suppress(OSError):  # the other program may be there
        program.parent.rmdir()
    return True


def run(service: Service, serve: Callable[[StopSignal], int]) -> int:
    """What the service manager starts: hand the thread over, and serve until told to stop.

    Raises FluxError when somebody else started it.
    """
    process = _Process(service, serve)
    table = (advapi.SERVICE_TABLE_ENTRY * 2)()
    table[0] = advapi.SERVICE_TABLE_ENTRY(service.name, process.main)
    try:
        advapi.StartServiceCtrlDispatcher(table)
    except OSError as error:
        if error.winerror == advapi.ERROR_FAILED_SERVICE_CONTROLLER_CONNECT:
            raise FluxError("`service run` is for the service manager: use `service install`") from error
        raise
    return process.code


class _Process:
    """The running service. Windows calls ``main`` and the control handler on threads of its own."""

    def __init__(self, service: Service, serve: Callable[[StopSignal], int]) -> None:
        self._service = service
        self._serve = serve
        self._stop = StopSignal()
        self._handle = 0
        self.code = 0
        self.main = advapi.ServiceMain(self._main)
        self._control = advapi.ControlHandler(self._on_control)

    def _main(self, _count: int, _arguments: object) -> None:
        self._handle = advapi.RegisterServiceCtrlHandlerEx(self._service.name, self._control, None)
        self._report(advapi.SERVICE_RUNNING)
        try:
            self.code = self._serve(self._stop)
        except FluxError as error:
            log.error("%s", error.message)
            self.code = 1
        except BaseException:
            log.exception("the service failed")
            self.code = 1
        self._report(advapi.SERVICE_STOPPED)

    def _on_control(self, control: int, _kind: int, _data: object, _context: object) -> int:
        if control in (advapi.SERVICE_CONTROL_STOP, advapi.SERVICE_CONTROL_SHUTDOWN):
            self._report(advapi.SERVICE_STOP_PENDING)
            self._stop.set(within=_SHUTDOWN_WITHIN if control == advapi.SERVICE_CONTROL_SHUTDOWN else None)
        return 0

    def _report(self, state: int) -> None:
        status = advapi.SERVICE_STATUS(advapi.SERVICE_WIN32_OWN_PROCESS, state)
        if state == advapi.SERVICE_RUNNING:
            status.dwControlsAccepted = advapi.SERVICE_ACCEPT_STOP | advapi.SERVICE_ACCEPT_SHUTDOWN
        elif state == advapi.SERVICE_STOP_PENDING:
            status.dwWaitHint = _STOP_HINT_MS
        elif self.code:
            status.dwWin32ExitCode = advapi.ERROR_SERVICE_SPECIFIC_ERROR
            status.dwServiceSpecificExitCode = self.code
        advapi.SetServiceStatus(self._handle, byref(status))


@contextlib.contextmanager
def _manager(access: int) -> Iterator[int]:
    try:
        manager = advapi.OpenSCManager(None, None, access)
    except OSError as error:
        raise _translated(error, "the service manager cannot be reached") from error
    try:
        yield manager
    finally:
        advapi.CloseServiceHandle(manager)


def _all_rights() -> int:
    return (
        advapi.DELETE
        | advapi.SERVICE_CHANGE_CONFIG
        | advapi.SERVICE_QUERY_STATUS
        | advapi.SERVICE_START
        | advapi.SERVICE_STOP
    )


def installed_program(service: Service) -> Path:
    return program_files() / "Flux" / f"{service.program}.exe"


def _command(service: Service) -> str:
    """How it is started: the copy in Program Files, or Python with this script where nothing is frozen."""
    if getattr(sys, "frozen", False):
        return f'"{installed_program(service)}"'
    return f'"{sys.executable}" "{Path(sys.argv[0]).resolve()}"'


def _copy_program(service: Service) -> None:
    source, target = Path(sys.executable), installed_program(service)
    # The local agent's is that of Flux, which runs already.
    if not getattr(sys, "frozen", False) or source == target or service is LOCAL_AGENT:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise _translated(error, f"{target} cannot be written") from error


def _configure(handle: int, service: Service) -> None:
    advapi.ChangeServiceConfig2(
        handle, advapi.SERVICE_CONFIG_DESCRIPTION, byref(advapi.SERVICE_DESCRIPTION(service.description))
    )
    actions = (advapi.SC_ACTION * len(_RESTART_AFTER_MS))(
        *(advapi.SC_ACTION(advapi.SC_ACTION_RESTART, delay) for delay in _RESTART_AFTER_MS)
    )
    failure = advapi.SERVICE_FAILURE_ACTIONS(_FORGET_FAILURES_AFTER, None, None, len(actions), actions)
    advapi.ChangeServiceConfig2(handle, advapi.SERVICE_CONFIG_FAILURE_ACTIONS, byref(failure))
    # An exit code counts as a failure too, not only a crash.
    flag = advapi.SERVICE_FAILURE_ACTIONS_FLAG(True)
    try:
        advapi.ChangeServiceConfig2(handle, advapi.SERVICE_CONFIG_FAILURE_ACTIONS_FLAG, byref(flag))
    except OSError as error:
        if error.winerror != advapi.ERROR_INVALID_LEVEL:  # Wine does not know it
            raise


def make_private(directory: Path, *accounts: str) -> None:
    """A directory for the system, administrators and these accounts alone: keys are in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _translated(error, f"{directory} cannot be made") from error
    # *S-1-5-18 is SYSTEM, *S-1-5-32-544 Administrators, whatever this Windows calls them.
    rights = [f"{who}:(OI)(CI)F" for who in ("*S-1-5-18", "*S-1-5-32-544", *accounts)]
    command = ["icacls", str(directory), "/inheritance:r", "/grant:r", *rights]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise FluxError(f"the rights of {directory} cannot be set: {(done.stderr or done.stdout).strip()}")


def _wait_for(handle: int, state: int, service: Service) -> None:
    """Raises FluxError when it ends up elsewhere."""
    deadline = time.monotonic() + _STATE_CHANGES_WITHIN
    status = advapi.SERVICE_STATUS()
    while time.monotonic() < deadline:
        advapi.QueryServiceStatus(handle, byref(status))
        if status.dwCurrentState == state:
            return
        if status.dwCurrentState == advapi.SERVICE_STOPPED and status.dwWin32ExitCode:
            break
        pause(0.2)
    raise FluxError(f"the service {service.name} did not come up or down: see {service.log_file}")


def _see_it_stay(handle: int, service: Service) -> None:
    """A port that is taken shows after a moment only. Raises FluxError."""
    deadline = time.monotonic() + _SHOWS_WITHIN
    status = advapi.SERVICE_STATUS()
    while time.monotonic() < deadline:
        pause(0.2)
        advapi.QueryServiceStatus(handle, byref(status))
        if status.dwCurrentState != advapi.SERVICE_RUNNING:
            raise FluxError(f"the service {service.name} ended at once: {service.log_file} says why")


def _translated(error: OSError, what: str) -> FluxError:
    if error.winerror == advapi.ERROR_ACCESS_DENIED:
        return Forbidden(f"{what}: start PowerShell with “Run as administrator” and try again")
    if error.winerror == advapi.ERROR_SERVICE_MARKED_FOR_DELETE:
        return Conflict(f"{what}: it is being removed, close the Services window and try again")
    return FluxError(f"{what}: {ctypes.FormatError(error.winerror).strip() if error.winerror else error}")
