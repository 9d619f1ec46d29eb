"""The part of advapi32 that services need (Windows SDK: winsvc.h). Calls raise OSError."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_void_p
from ctypes.wintypes import BOOL, DWORD, HANDLE, LPCWSTR, LPWSTR
from typing import Any

assert sys.platform == "win32"

ERROR_ACCESS_DENIED = 5
ERROR_INVALID_LEVEL = 124
ERROR_SERVICE_EXISTS = 1073
ERROR_SERVICE_DOES_NOT_EXIST = 1060
ERROR_SERVICE_NOT_ACTIVE = 1062
ERROR_SERVICE_MARKED_FOR_DELETE = 1072
ERROR_FAILED_SERVICE_CONTROLLER_CONNECT = 1063
ERROR_SERVICE_SPECIFIC_ERROR = 1066

SC_MANAGER_CONNECT, SC_MANAGER_CREATE_SERVICE = 0x1, 0x2
DELETE = 0x10000
SERVICE_CHANGE_CONFIG, SERVICE_QUERY_STATUS, SERVICE_START, SERVICE_STOP = 0x2, 0x4, 0x10, 0x20
SERVICE_WIN32_OWN_PROCESS = 0x10
SERVICE_AUTO_START = 2
SERVICE_ERROR_NORMAL = 1
SERVICE_CONFIG_DESCRIPTION, SERVICE_CONFIG_FAILURE_ACTIONS, SERVICE_CONFIG_FAILURE_ACTIONS_FLAG = 1, 2, 4
SC_ACTION_RESTART = 1

SERVICE_STOPPED, SERVICE_START_PENDING, SERVICE_STOP_PENDING, SERVICE_RUNNING = 1, 2, 3, 4
SERVICE_CONTROL_STOP, SERVICE_CONTROL_INTERROGATE, SERVICE_CONTROL_SHUTDOWN = 1, 4, 5
SERVICE_ACCEPT_STOP, SERVICE_ACCEPT_SHUTDOWN = 0x1, 0x4


class SERVICE_STATUS(ctypes.Structure):
    _fields_ = tuple(
        (name, DWORD)
        for name in (
            *("dwServiceType", "dwCurrentState", "dwControlsAccepted", "dwWin32ExitCode"),
            *("dwServiceSpecificExitCode", "dwCheckPoint", "dwWaitHint"),
        )
    )


class SERVICE_DESCRIPTION(ctypes.Structure):
    _fields_ = (("lpDescription", LPWSTR),)


class SC_ACTION(ctypes.Structure):
    _fields_ = (("Type", DWORD), ("Delay", DWORD))


class SERVICE_FAILURE_ACTIONS(ctypes.Structure):
    _fields_ = (
        ("dwResetPeriod", DWORD),
        ("lpRebootMsg", LPWSTR),
        ("lpCommand", LPWSTR),
        ("cActions", DWORD),
        ("lpsaActions", POINTER(SC_ACTION)),
    )


class SERVICE_FAILURE_ACTIONS_FLAG(ctypes.Structure):
    _fields_ = (("fFailureActionsOnNonCrashFailures", BOOL),)


ServiceMain = ctypes.WINFUNCTYPE(None, DWORD, c_void_p)
ControlHandler = ctypes.WINFUNCTYPE(DWORD, DWORD, DWORD, c_void_p, c_void_p)


class SERVICE_TABLE_ENTRY(ctypes.Structure):
    _fields_ = (("lpServiceName", LPWSTR), ("lpServiceProc", ServiceMain))


_advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)


def _raise_if_false(result: int, function: object, arguments: tuple[object, ...]) -> int:
    if not result:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


def _declare(name: str, result: Any, *arguments: Any, check: Any = _raise_if_false) -> Any:
    function = getattr(_advapi32, name)
    function.restype, function.argtypes = result, arguments
    if check is not None:
        function.errcheck = check
    return function


OpenSCManager = _declare("OpenSCManagerW", HANDLE, LPCWSTR, LPCWSTR, DWORD)
OpenService = _declare("OpenServiceW", HANDLE, HANDLE, LPCWSTR, DWORD)
CreateService = _declare(
    *("CreateServiceW", HANDLE, HANDLE, LPCWSTR, LPCWSTR, DWORD, DWORD, DWORD, DWORD, LPCWSTR),
    *(LPCWSTR, c_void_p, LPCWSTR, LPCWSTR, LPCWSTR),
)
ChangeServiceConfig2 = _declare("ChangeServiceConfig2W", BOOL, HANDLE, DWORD, c_void_p)
StartService = _declare("StartServiceW", BOOL, HANDLE, DWORD, c_void_p)
ControlService = _declare("ControlService", BOOL, HANDLE, DWORD, c_void_p)
QueryServiceStatus = _declare("QueryServiceStatus", BOOL, HANDLE, c_void_p)
DeleteService = _declare("DeleteService", BOOL, HANDLE)
CloseServiceHandle = _declare("CloseServiceHandle", BOOL, HANDLE, check=None)
StartServiceCtrlDispatcher = _declare("StartServiceCtrlDispatcherW", BOOL, c_void_p)
RegisterServiceCtrlHandlerEx = _declare("RegisterServiceCtrlHandlerExW", HANDLE, LPCWSTR, ControlHandler, c_void_p)
SetServiceStatus = _declare("SetServiceStatus", BOOL, HANDLE, c_void_p)
