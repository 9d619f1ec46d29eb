"""The part of kernel32 the executor needs: constants, structures and calls that raise OSError.

Names and layouts are Microsoft's (Windows SDK: winnt.h, winbase.h, jobapi2.h,
processthreadsapi.h). Both pointers and handles are as wide as the process.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_size_t, c_uint64, c_void_p, sizeof
from ctypes.wintypes import BOOL, DWORD, HANDLE, LARGE_INTEGER, LPCWSTR, LPWSTR, WORD
from typing import Any

assert sys.platform == "win32"

INVALID_HANDLE_VALUE = c_void_p(-1).value
INFINITE = 0xFFFFFFFF
WAIT_OBJECT_0 = 0
WAIT_TIMEOUT = 0x102

# GetLastError
ERROR_FILE_NOT_FOUND = 2
ERROR_PATH_NOT_FOUND = 3
ERROR_ACCESS_DENIED = 5
ERROR_BROKEN_PIPE = 109
ERROR_BAD_EXE_FORMAT = 193
ERROR_FILENAME_EXCED_RANGE = 206
ERROR_EXE_MACHINE_TYPE_MISMATCH = 216
ERROR_VIRUS_DELETED = 226
ERROR_DIRECTORY = 267
ERROR_ELEVATION_REQUIRED = 740
ERROR_OPERATION_ABORTED = 995
ERROR_IO_PENDING = 997
ERROR_NOT_FOUND = 1168
ERROR_ACCESS_DISABLED_BY_POLICY = 1260
ERROR_SXS_CANT_GEN_ACTCTX = 14001
ERROR_SHARING_VIOLATION = 32
ERROR_VIRUS_INFECTED = 225

# CreateProcessW
CREATE_SUSPENDED = 0x4
CREATE_NEW_PROCESS_GROUP = 0x200
CREATE_UNICODE_ENVIRONMENT = 0x400
CREATE_NO_WINDOW = 0x08000000
EXTENDED_STARTUPINFO_PRESENT = 0x80000
STARTF_USESTDHANDLES = 0x100
PROC_THREAD_ATTRIBUTE_HANDLE_LIST = 0x20002
STATUS_CONTROL_C_EXIT = 0xC000013A
STILL_ACTIVE = 259

# Pipes and files
GENERIC_READ = 0x80000000
GENERIC_WRITE = 0x40000000
FILE_SHARE_READ = 0x1
FILE_SHARE_WRITE = 0x2
OPEN_EXISTING = 3
PIPE_ACCESS_INBOUND = 0x1
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x80000
FILE_FLAG_OVERLAPPED = 0x40000000
PIPE_TYPE_BYTE = 0x0
PIPE_REJECT_REMOTE_CLIENTS = 0x8
DUPLICATE_SAME_ACCESS = 0x2

# SetErrorMode: no dialog that waits for somebody who is not there
SEM_FAILCRITICALERRORS = 0x1
SEM_NOGPFAULTERRORBOX = 0x2
CTRL_BREAK_EVENT = 1

# Job objects
JobObjectBasicAccountingInformation = 1
JobObjectAssociateCompletionPortInformation = 7
JobObjectExtendedLimitInformation = 9
JobObjectCpuRateControlInformation = 15
JOB_OBJECT_LIMIT_ACTIVE_PROCESS = 0x8
JOB_OBJECT_LIMIT_JOB_MEMORY = 0x200
JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION = 0x400
JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE = 0x2000
JOB_OBJECT_CPU_RATE_CONTROL_ENABLE = 0x1
JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP = 0x4
JOB_OBJECT_MSG_ACTIVE_PROCESS_ZERO = 4
JOB_OBJECT_MSG_EXIT_PROCESS = 7
JOB_OBJECT_MSG_ABNORMAL_EXIT_PROCESS = 8
JOB_OBJECT_MSG_JOB_MEMORY_LIMIT = 10


class SECURITY_ATTRIBUTES(ctypes.Structure):
    _fields_ = (("nLength", DWORD), ("lpSecurityDescriptor", c_void_p), ("bInheritHandle", BOOL))


class OVERLAPPED(ctypes.Structure):
    _fields_ = (
        ("Internal", c_size_t),
        ("InternalHigh", c_size_t),
        ("Offset", DWORD),
        ("OffsetHigh", DWORD),
        ("hEvent", HANDLE),
    )


class STARTUPINFOW(ctypes.Structure):
    _fields_ = (
        ("cb", DWORD),
        ("lpReserved", LPWSTR),
        ("lpDesktop", LPWSTR),
        ("lpTitle", LPWSTR),
        *((name, DWORD) for name in ("dwX", "dwY", "dwXSize", "dwYSize")),
        *((name, DWORD) for name in ("dwXCountChars", "dwYCountChars", "dwFillAttribute", "dwFlags")),
        ("wShowWindow", WORD),
        ("cbReserved2", WORD),
        ("lpReserved2", c_void_p),
        ("hStdInput", HANDLE),
        ("hStdOutput", HANDLE),
        ("hStdError", HANDLE),
    )


class STARTUPINFOEXW(ctypes.Structure):
    _fields_ = (("StartupInfo", STARTUPINFOW), ("lpAttributeList", c_void_p))


class PROCESS_INFORMATION(ctypes.Structure):
    _fields_ = (("hProcess", HANDLE), ("hThread", HANDLE), ("dwProcessId", DWORD), ("dwThreadId", DWORD))


class JOBOBJECT_BASIC_LIMIT_INFORMATION(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", LARGE_INTEGER),
        ("PerJobUserTimeLimit", LARGE_INTEGER),
        ("LimitFlags", DWORD),
        ("MinimumWorkingSetSize", c_size_t),
        ("MaximumWorkingSetSize", c_size_t),
        ("ActiveProcessLimit", DWORD),
        ("Affinity", c_size_t),
        ("PriorityClass", DWORD),
        ("SchedulingClass", DWORD),
    )


class IO_COUNTERS(ctypes.Structure):
    _fields_ = tuple(
        (f"{what}{kind}Count", c_uint64) for kind in ("Operation", "Transfer") for what in ("Read", "Write", "Other")
    )


class JOBOBJECT_EXTENDED_LIMIT_INFORMATION(ctypes.Structure):
    _fields_ = (
        ("BasicLimitInformation", JOBOBJECT_BASIC_LIMIT_INFORMATION),
        ("IoInfo", IO_COUNTERS),
        ("ProcessMemoryLimit", c_size_t),
        ("JobMemoryLimit", c_size_t),
        ("PeakProcessMemoryUsed", c_size_t),
        ("PeakJobMemoryUsed", c_size_t),
    )


class JOBOBJECT_BASIC_ACCOUNTING_INFORMATION(ctypes.Structure):
    _fields_ = (
        ("TotalUserTime", LARGE_INTEGER),
        ("TotalKernelTime", LARGE_INTEGER),
        ("ThisPeriodTotalUserTime", LARGE_INTEGER),
        ("ThisPeriodTotalKernelTime", LARGE_INTEGER),
        ("TotalPageFaultCount", DWORD),
        ("TotalProcesses", DWORD),
        ("ActiveProcesses", DWORD),
        ("TotalTerminatedProcesses", DWORD),
    )


class JOBOBJECT_ASSOCIATE_COMPLETION_PORT(ctypes.Structure):
    _fields_ = (("CompletionKey", c_void_p), ("CompletionPort", HANDLE))


class JOBOBJECT_CPU_RATE_CONTROL_INFORMATION(ctypes.Structure):
    _fields_ = (("ControlFlags", DWORD), ("CpuRate", DWORD))


_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)


def _raise_if_false(result: int, function: object, arguments: tuple[object, ...]) -> int:
    if not result:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


def _raise_if_invalid(result: int, function: object, arguments: tuple[object, ...]) -> int:
    if result is None or result == INVALID_HANDLE_VALUE:
        raise ctypes.WinError(ctypes.get_last_error())
    return result


def _declare(name: str, result: Any, *arguments: Any, check: Any = _raise_if_false) -> Any:
    function = getattr(_kernel32, name)
    function.restype, function.argtypes = result, arguments
    if check is not None:
        function.errcheck = check
    return function


CloseHandle = _declare("CloseHandle", BOOL, HANDLE)
CreateJobObject = _declare("CreateJobObjectW", HANDLE, c_void_p, LPCWSTR)
SetInformationJobObject = _declare("SetInformationJobObject", BOOL, HANDLE, DWORD, c_void_p, DWORD)
QueryInformationJobObject = _declare("QueryInformationJobObject", BOOL, HANDLE, DWORD, c_void_p, DWORD, c_void_p)
AssignProcessToJobObject = _declare("AssignProcessToJobObject", BOOL, HANDLE, HANDLE)
TerminateJobObject = _declare("TerminateJobObject", BOOL, HANDLE, DWORD)
TerminateProcess = _declare("TerminateProcess", BOOL, HANDLE, DWORD)
GetExitCodeProcess = _declare("GetExitCodeProcess", BOOL, HANDLE, c_void_p)
GetCurrentProcess = _declare("GetCurrentProcess", HANDLE, check=None)
DuplicateHandle = _declare("DuplicateHandle", BOOL, HANDLE, HANDLE, HANDLE, c_void_p, DWORD, BOOL, DWORD)
CreateProcess = _declare(
    *("CreateProcessW", BOOL, LPCWSTR, LPWSTR, c_void_p, c_void_p, BOOL, DWORD, c_void_p, LPCWSTR, c_void_p, c_void_p)
)
InitializeProcThreadAttributeList = _declare(
    "InitializeProcThreadAttributeList", BOOL, c_void_p, DWORD, DWORD, c_void_p, check=None
)
UpdateProcThreadAttribute = _declare(
    "UpdateProcThreadAttribute", BOOL, c_void_p, DWORD, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p
)
DeleteProcThreadAttributeList = _declare("DeleteProcThreadAttributeList", None, c_void_p, check=None)
ResumeThread = _declare("ResumeThread", DWORD, HANDLE, check=None)  # (DWORD)-1 = failed
WaitForSingleObject = _declare("WaitForSingleObject", DWORD, HANDLE, DWORD, check=None)
CreateNamedPipe = _declare(
    *("CreateNamedPipeW", HANDLE, LPCWSTR, DWORD, DWORD, DWORD, DWORD, DWORD, DWORD, c_void_p),
    check=_raise_if_invalid,
)
CreateFile = _declare(
    "CreateFileW", HANDLE, LPCWSTR, DWORD, DWORD, c_void_p, DWORD, DWORD, HANDLE, check=_raise_if_invalid
)
ReadFile = _declare("ReadFile", BOOL, HANDLE, c_void_p, DWORD, c_void_p, c_void_p, check=None)
CancelIoEx = _declare("CancelIoEx", BOOL, HANDLE, c_void_p, check=None)
CreateIoCompletionPort = _declare("CreateIoCompletionPort", HANDLE, HANDLE, HANDLE, c_void_p, DWORD)
GetQueuedCompletionStatus = _declare(
    "GetQueuedCompletionStatus", BOOL, HANDLE, c_void_p, c_void_p, c_void_p, DWORD, check=None
)
PostQueuedCompletionStatus = _declare("PostQueuedCompletionStatus", BOOL, HANDLE, DWORD, c_void_p, c_void_p)
GenerateConsoleCtrlEvent = _declare("GenerateConsoleCtrlEvent", BOOL, DWORD, DWORD)
GetConsoleProcessList = _declare("GetConsoleProcessList", DWORD, c_void_p, DWORD, check=None)
SetErrorMode = _declare("SetErrorMode", DWORD, DWORD, check=None)


def inheritable() -> SECURITY_ATTRIBUTES:
    return SECURITY_ATTRIBUTES(sizeof(SECURITY_ATTRIBUTES), None, True)


def has_console() -> bool:
    """Whether this process shares a console with anything: a service has none."""
    one = DWORD()
    return bool(GetConsoleProcessList(byref(one), 1))


def is_wine() -> bool:
    """Whether this is Wine, not Windows."""
    return hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")
