"""Starting one Windows program so that nothing of it runs before its job holds it, and reading what it writes."""

from __future__ import annotations

import ctypes
import itertools
import ntpath
import os
import secrets
import sys
from collections.abc import Callable
from ctypes import byref, c_size_t, c_void_p, sizeof
from ctypes.wintypes import DWORD, HANDLE
from dataclasses import dataclass

assert sys.platform == "win32"

from fluxlib.agent.diagnosis import head_of
from fluxlib.agent.executor import winapi

_READ_SIZE = 64 * 1024
_pipe_numbers = itertools.count(1)


_PROGRAMS_FAULT = {
    winapi.ERROR_FILE_NOT_FOUND: "is not there",
    winapi.ERROR_PATH_NOT_FOUND: "is not there",
    winapi.ERROR_ACCESS_DENIED: "may not be executed",
    winapi.ERROR_SHARING_VIOLATION: "is in use by another program",
    winapi.ERROR_BAD_EXE_FORMAT: "is no program of this Windows (wrong processor, or damaged)",
    winapi.ERROR_EXE_MACHINE_TYPE_MISMATCH: "is no program of this Windows (wrong processor)",
    winapi.ERROR_SXS_CANT_GEN_ACTCTX: "needs libraries that are not on this machine (its side-by-side configuration)",
    winapi.ERROR_FILENAME_EXCED_RANGE: "has too long a path",
    winapi.ERROR_VIRUS_INFECTED: "was stopped by the virus scanner",
    winapi.ERROR_VIRUS_DELETED: "was removed by the virus scanner",
    winapi.ERROR_ACCESS_DISABLED_BY_POLICY: "is forbidden by a policy of this machine",
    winapi.ERROR_ELEVATION_REQUIRED: "asks for administrator's rights, which a function does not get",
}


def _what_else(program: str) -> str:
    """What a file is that Windows cannot run, where that says more than the error; empty for a Windows program."""
    try:
        head = head_of(program)
    except OSError:
        return ""
    return "" if head.data[:2] == b"MZ" else f"is {head.what}, which Windows cannot run"


class NotStarted(Exception):
    """The program is at fault, in words; the host is well."""


@dataclass
class Process:
    """A process that was created suspended. Handles are the caller's to close."""

    handle: int
    thread: int
    pid: int

    def resume(self) -> None:
        if winapi.ResumeThread(self.thread) == 0xFFFFFFFF:
            raise ctypes.WinError(ctypes.get_last_error())

    def ended(self, seconds: float = 0) -> bool:
        return bool(winapi.WaitForSingleObject(self.handle, int(seconds * 1000)) == winapi.WAIT_OBJECT_0)

    def close(self) -> None:
        winapi.CloseHandle(self.thread)
        winapi.CloseHandle(self.handle)


def create_suspended(program: str, line: str, block: str, cwd: str, stdin: int, output: int, flags: int) -> Process:
    """A process with exactly these two handles inherited. Raises NotStarted, OSError for the host's faults.

    Without the list every inheritable handle of the agent would go along: another function's
    pipe kept open by this one would hide that function's end.
    """
    startup = winapi.STARTUPINFOEXW()
    startup.StartupInfo.cb = sizeof(startup)
    startup.StartupInfo.dwFlags = winapi.STARTF_USESTDHANDLES
    startup.StartupInfo.hStdInput = stdin
    startup.StartupInfo.hStdOutput = startup.StartupInfo.hStdError = output
    size = c_size_t()
    winapi.InitializeProcThreadAttributeList(None, 1, 0, byref(size))  # fails, and says how large it has to be
    attributes = ctypes.create_string_buffer(size.value)
    if not winapi.InitializeProcThreadAttributeList(attributes, 1, 0, byref(size)):
        raise ctypes.WinError(ctypes.get_last_error())
    made = winapi.PROCESS_INFORMATION()
    handles = (HANDLE * 2)(stdin, output)
    try:
        winapi.UpdateProcThreadAttribute(
            attributes, 0, winapi.PROC_THREAD_ATTRIBUTE_HANDLE_LIST, handles, sizeof(handles), None, None
        )
        startup.lpAttributeList = ctypes.addressof(attributes)
        flags |= winapi.CREATE_SUSPENDED | winapi.CREATE_UNICODE_ENVIRONMENT | winapi.EXTENDED_STARTUPINFO_PRESENT
        # CreateProcessW writes into the command line, so it gets a buffer of its own.
        words, environment = ctypes.create_unicode_buffer(line), ctypes.create_unicode_buffer(block)
        winapi.CreateProcess(program, words, None, None, True, flags, environment, cwd, byref(startup), byref(made))
    except OSError as error:
        reason = _PROGRAMS_FAULT.get(error.winerror)
        if reason is None:
            raise
        raise NotStarted(f"create process: {ntpath.basename(program)} {_what_else(program) or reason}") from error
    finally:
        winapi.DeleteProcThreadAttributeList(attributes)
    return Process(made.hProcess, made.hThread, made.dwProcessId)


class OutputPipe:
    """What a program writes, read through the completion port: at most one buffer of it is in memory.

    A named pipe, because Windows' anonymous ones cannot be read without a thread each.
    ``writer`` is the program's end, inheritable.
    """

    def __init__(self, port: int, key: int, on_output: Callable[[bytes], object]) -> None:
        self._on_output = on_output
        self._buffer = ctypes.create_string_buffer(_READ_SIZE)
        self._overlapped = winapi.OVERLAPPED()
        self.pending = False  # a read is on its way: its memory must stay
        self.ended = False
        self.writer: int | None = None
        name = rf"\\.\pipe\flux-{os.getpid()}-{next(_pipe_numbers)}-{secrets.token_hex(8)}"
        access = winapi.PIPE_ACCESS_INBOUND | winapi.FILE_FLAG_OVERLAPPED | winapi.FILE_FLAG_FIRST_PIPE_INSTANCE
        mode = winapi.PIPE_TYPE_BYTE | winapi.PIPE_REJECT_REMOTE_CLIENTS
        self._reader: int | None = winapi.CreateNamedPipe(name, access, mode, 1, 0, _READ_SIZE, 0, None)
        try:
            security = winapi.inheritable()
            self.writer = winapi.CreateFile(
                name, winapi.GENERIC_WRITE, 0, byref(security), winapi.OPEN_EXISTING, 0, None
            )
            winapi.CreateIoCompletionPort(self._reader, port, key, 0)
        except BaseException:
            self.close()
            raise

    def close_writer(self) -> None:
        """The program has its own handle now; with ours open its end would never be seen."""
        if self.writer is not None:
            winapi.CloseHandle(self.writer)
            self.writer = None

    def read(self) -> None:
        """Ask for the next piece; the port tells when it is there, also when it is at once."""
        self.pending = True
        if winapi.ReadFile(self._reader, self._buffer, _READ_SIZE, None, byref(self._overlapped)):
            return
        if ctypes.get_last_error() != winapi.ERROR_IO_PENDING:
            # Broken: every writer is gone. Nothing is told by the port then.
            self.pending, self.ended = False, True

    def completed(self, succeeded: bool, size: int) -> None:
        """The read that ``read`` asked for is over."""
        self.pending = False
        if not succeeded:
            self.ended = True
            return
        if size:
            self._on_output(ctypes.string_at(self._buffer, size))
        self.read()

    def cancel(self) -> None:
        """Give up on writers that are outside the job and still hold it; the port tells when it is over."""
        if self.pending:
            winapi.CancelIoEx(self._reader, None)

    def close(self) -> None:
        self.close_writer()
        if self._reader is not None:
            winapi.CloseHandle(self._reader)
            self._reader = None


class CompletionPort:
    """One queue of notices from pipes and jobs."""

    def __init__(self) -> None:
        self.handle: int = winapi.CreateIoCompletionPort(winapi.INVALID_HANDLE_VALUE, None, None, 0)

    def wait(self, milliseconds: int) -> tuple[int, bool, int, int] | None:
        """(key, succeeded, number, address) of the next notice, None after ``milliseconds``."""
        number, key, address = DWORD(), c_void_p(), c_void_p()
        succeeded = winapi.GetQueuedCompletionStatus(
            self.handle, byref(number), byref(key), byref(address), milliseconds
        )
        if not succeeded and not address.value:
            return None
        return key.value or 0, bool(succeeded), number.value, address.value or 0

    def wake(self) -> None:
        winapi.PostQueuedCompletionStatus(self.handle, 0, None, None)

    def close(self) -> None:
        winapi.CloseHandle(self.handle)


def inheritable_copy(handle: int) -> int:
    """A duplicate that a child may be given."""
    ours = winapi.GetCurrentProcess()
    copy = HANDLE()
    winapi.DuplicateHandle(ours, handle, ours, byref(copy), 0, True, winapi.DUPLICATE_SAME_ACCESS)
    assert copy.value is not None
    return copy.value


def open_nul() -> int:
    """An empty standard input, inheritable."""
    security = winapi.inheritable()
    share = winapi.FILE_SHARE_READ | winapi.FILE_SHARE_WRITE
    handle = winapi.CreateFile("NUL", winapi.GENERIC_READ, share, byref(security), winapi.OPEN_EXISTING, 0, None)
    return int(handle)
