"""A Job Object: what holds one execution's whole tree (Microsoft, "Job Objects").

Processes started by a member are members from birth; without the breakaway
flags none can leave. Closing the last handle ends them all, so a crashed agent
leaves nothing running.
"""

from __future__ import annotations

import os
import sys
from ctypes import Structure, byref, sizeof
from ctypes.wintypes import DWORD
from dataclasses import dataclass

from fluxlib.agent.executor.base import Limits

assert sys.platform == "win32"

from fluxlib.agent.executor import winapi

KILLED_EXIT_CODE = 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What a job's processes have used so far."""

    active: int
    cpu_seconds: float
    peak_memory_bytes: int


class JobObject:
    """One job with its limits set. Raises OSError when the system says no.

    ``port`` and ``key`` say where its notices go, None to nobody.
    """

    def __init__(self, limits: Limits, port: int | None, key: int) -> None:
        self.handle: int | None = winapi.CreateJobObject(None, None)
        try:
            self._limit(limits)
            if limits.cpu_millicores is not None:
                self._limit_cpu(limits.cpu_millicores)
            if port is not None:
                where = winapi.JOBOBJECT_ASSOCIATE_COMPLETION_PORT(key, port)
                self._set(winapi.JobObjectAssociateCompletionPortInformation, where)
        except BaseException:
            self.close()
            raise

    def assign(self, process: int) -> None:
        winapi.AssignProcessToJobObject(self.handle, process)

    def terminate(self) -> None:
        """End every process of the tree; those are on their way out when this returns, not gone."""
        if self.handle is not None:
            winapi.TerminateJobObject(self.handle, KILLED_EXIT_CODE)

    def usage(self) -> Usage:
        counts = winapi.JOBOBJECT_BASIC_ACCOUNTING_INFORMATION()
        self._get(winapi.JobObjectBasicAccountingInformation, counts)
        limits = winapi.JOBOBJECT_EXTENDED_LIMIT_INFORMATION()
        self._get(winapi.JobObjectExtendedLimitInformation, limits)
        cpu = (counts.TotalUserTime + counts.TotalKernelTime) / 1e7  # counted in 100 ns
        return Usage(counts.ActiveProcesses, cpu, limits.PeakJobMemoryUsed)

    def close(self) -> None:
        if self.handle is not None:
            winapi.CloseHandle(self.handle)
            self.handle = None

    def _limit(self, limits: Limits) -> None:
        extended = winapi.JOBOBJECT_EXTENDED_LIMIT_INFORMATION()
        basic = extended.BasicLimitInformation
        # A crash must end the program, not wait in a dialog for somebody to close it.
        flags = winapi.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE | winapi.JOB_OBJECT_LIMIT_DIE_ON_UNHANDLED_EXCEPTION
        if limits.processes is not None:
            flags |= winapi.JOB_OBJECT_LIMIT_ACTIVE_PROCESS
            basic.ActiveProcessLimit = limits.processes
        if limits.memory_bytes is not None:
            flags |= winapi.JOB_OBJECT_LIMIT_JOB_MEMORY
            extended.JobMemoryLimit = limits.memory_bytes
        basic.LimitFlags = flags
        self._set(winapi.JobObjectExtendedLimitInformation, extended)

    def _limit_cpu(self, millicores: int) -> None:
        # In hundredths of a per cent of the whole machine, at least one and at most all of it.
        rate = max(1, min(10_000, millicores * 10 // (os.cpu_count() or 1)))
        flags = winapi.JOB_OBJECT_CPU_RATE_CONTROL_ENABLE | winapi.JOB_OBJECT_CPU_RATE_CONTROL_HARD_CAP
        self._set(winapi.JobObjectCpuRateControlInformation, winapi.JOBOBJECT_CPU_RATE_CONTROL_INFORMATION(flags, rate))

    def _set(self, what: int, value: Structure) -> None:
        winapi.SetInformationJobObject(self.handle, what, byref(value), sizeof(value))

    def _get(self, what: int, value: Structure) -> None:
        winapi.QueryInformationJobObject(self.handle, what, byref(value), sizeof(value), None)


def exit_code(process: int) -> int:
    code = DWORD()
    winapi.GetExitCodeProcess(process, byref(code))
    return code.value
