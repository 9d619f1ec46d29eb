"""What an executor is: the one contract that Unix and Windows fill.

An executor creates sandboxes, starts programs in them, tells what they write and how they end, and kills
whole trees. It knows nothing of functions' slots, timeouts or records: those
are ``agent.executions``.

Rules every executor keeps:

- ``start`` returns once the program has been asked for, not once it runs. A
  program that cannot be started is told through ``on_exit`` with ``start_error``.
- ``on_output`` and ``on_exit`` are called from threads of the executor, never
  two at once for one job; after ``on_exit`` nothing more is called. They must
  not block: every other job's output waits behind them.
- ``on_exit`` is called exactly once for every job that ``start`` accepted, when
  nothing of its tree is alive any more and its output has been read to the end.
  When the first process ends, what it left behind is killed, not waited for.
- ``terminate`` and ``kill`` may be called from any thread, at any time, any
  number of times; on a job that has ended they do nothing.
- When a helper process dies or hangs, its jobs end with ``lost`` set and nothing of them
  left alive, and the helper is replaced.
- ``on_output`` returns whether it still wants output; what comes after a False is read as slowly as the program can
bear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fluxlib.model import Enforcement, FunctionSpec, Network, WorkingDirectory


@dataclass(frozen=True, slots=True)
class Limits:
    """Every figure in force for one job; None = not limited."""

    memory_bytes: int | None = None
    cpu_millicores: int | None = None
    processes: int | None = None
    open_files: int | None = None
    file_size_bytes: int | None = None
    tmp_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One program to run. ``argv[0]`` is the handler's absolute path inside ``code_dir``."""

    execution_id: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    code_dir: Path
    stdin: bytes = b""
    listen: int | None = None  # a listening socket that the program finds as descriptor 3; stays the caller's
    limits: Limits = field(default_factory=Limits)
    network: Network = Network.HOST
    working_directory: WorkingDirectory = WorkingDirectory.CODE


@dataclass(frozen=True, slots=True)
class Figures:
    """What a sandbox has used; None where this machine does not count it."""

    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job ended. Exactly one of ``exit_code``, ``signal``, ``start_error`` and ``lost`` says so."""

    exit_code: int | None = None
    signal: int | None = None
    start_error: str = ""  # "step: reason", the program never ran
    host_at_fault: bool = False  # with start_error: this machine cannot start anything now, whatever the program
    lost: bool = False  # a helper died with it; how it would have ended is unknown
    out_of_memory: bool = False
    peak_memory_bytes: int | None = None
    cpu_seconds: float | None = None


class Sandbox(Protocol):
    """What programs run in: a user, limits, directories. It outlives an invocation until it is destroyed.

    One invocation at a time. When a program left something behind that had to be killed, the sandbox is spent: it takes
    no further invocation.
    """

    @property
    def pid(self) -> int | None:
        """The running program's process ID, None before it is known."""

    def invoke(
        self,
        job: Job,
        on_output: Callable[[bytes], object],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
        on_error_output: Callable[[bytes], object] | None = None,
    ) -> None:
        """Start the job's program in it; see Executor.start, whose rules hold. Of the job only the program's half
        counts: the sandbox was created with the limits and the code of one.
        """

    def terminate(self) -> None:
        """Ask the whole tree to stop (SIGTERM; CTRL_BREAK on Windows)."""

    def kill(self) -> None:
        """End the whole tree, daemonised grandchildren included."""

    def figures(self) -> Figures:
        """What it has used so far."""

    def destroy(self) -> None:
        """Kill what runs in it and give back all that it holds. What runs is still told its end."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What is in force on this host: reported in GET /agents."""

    profile: str  # "default", "strict", "minimal", "off"
    enforces: frozenset[Enforcement]
    notes: tuple[str, ...] = ()  # reasons and warnings for people
    shows: tuple[str, ...] = ()  # the directories that functions see of the machine; empty = all


class Executor(Protocol):
    @property
    def isolation(self) -> Isolation: ...

    @property
    def problem(self) -> str:
        """Why no program can be started now, empty when programs can be. It heals by itself."""

    def create(self, job: Job) -> Sandbox:
        """A sandbox with the job's limits, network and code. Raises CannotStart, AtCapacity, Stopping."""

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        """Warnings about limits that are accepted but not held (profile ``off`` only).

        Raises Unenforceable when the function asks for a limit this host cannot hold it to,
        InvalidInput when this platform cannot be asked to run a file of its handler's name.
        """

    def check_args(self, handler: str, args: tuple[str, ...]) -> None:
        """Raises InvalidInput for arguments this platform cannot hand over unchanged."""

    def start(
        self,
        job: Job,
        on_output: Callable[[bytes], object],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
        on_error_output: Callable[[bytes], object] | None = None,
    ) -> Sandbox:
        """Run ``job`` in a sandbox of its own, which is destroyed before ``on_exit`` is called.

        Standard error goes to ``on_error_output`` where there is one, else to ``on_output`` in the order both were
        written. ``on_started(pid, ago)`` tells that the program was started so many seconds ago, before any
        on_exit.

        Raises CannotStart when the host is at fault and nothing was started,
        Stopping after ``stop`` was called.
        """

    def recover_previous_run(self, execution_ids: Collection[str]) -> int:
        """Kill and remove what the previous run of this agent left behind; how many jobs or processes that were.

        ``execution_ids`` are those that its records call unfinished.
        """

    def stop(self, deadline: float) -> None:
        """Kill what still runs and end every helper and thread by ``deadline`` (time.monotonic)."""
