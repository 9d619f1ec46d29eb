"""Running programs on Linux: sandboxes of a user, a cgroup and directories, in which the spawner starts programs.

One executor for every profile. A profile is a list of steps (``spawner.sandbox``); what this class needs to know of it
are three facts: whether a program has a cgroup, a user of its own, and a view of the file system of its own. Where
there is a cgroup, this class ends the tree through it and reads what it used; under ``off`` the spawner ends a tree.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxlib.agent.diagnosis import exec_problem
from fluxlib.agent.executor import probe
from fluxlib.agent.executor.base import Exit, Figures, Isolation, Job, Limits
from fluxlib.agent.executor.cgroup import MIN_MILLICORES, Hierarchy, RunGroup, is_empty
from fluxlib.agent.executor.directories import WorkDirectories
from fluxlib.agent.executor.leftovers import kill_executions
from fluxlib.agent.executor.link import SetUpRefused, SpawnerLink
from fluxlib.agent.executor.reactor import InputPipe, OutputPipe, Reactor
from fluxlib.agent.executor.users import Users, check_range
from fluxlib.config.agent import AgentConfig
from fluxlib.config.files import API_PORT
from fluxlib.errors import CannotStart, InvalidInput, Stopping, Unenforceable
from fluxlib.model import Enforcement, FunctionSpec, Network, WorkingDirectory
from fluxlib.spawner.sandbox import CODE, DEFAULT, OFF, PROFILES, VIEW, WORK, Step

log = logging.getLogger(__name__)

_FIRST_RETRY = 0.2
_LAST_RETRY = 5.0
# How long a start waits for a new spawner; it takes a tenth of that.
_REPLACED_WITHIN = 5.0
# A spawner that leaves so many pings without an answer hangs, and is replaced.
_PING_EVERY = 2.0
_MISSED = 3
_TRIAL = "trial"
_TRIAL_LIMITS = Limits(memory_bytes=64 * 1024**2, cpu_millicores=1000, processes=16)
# How long something waits that the machine had no descriptor or no memory for (seconds).
_AGAIN = 1.0
# Also where the agent's configuration names no size.
_DEFAULT_TMP = 256 * 1024**2
# nobody's number on Linux: for machines without the named user.
_NOBODY = 65534
# Who a function without an account is to the programs that ask by USER and LOGNAME.
_NO_ACCOUNT = "function"
# Steps that depend on the function. Where they fail for these reasons it is the machine nevertheless.
_OF_THE_FUNCTION = ("exec", "change directory", "limits", "start")
_OF_THE_MACHINE = (errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EAGAIN)


class UnixSandbox:
    """The Sandbox of the contract. What belongs to the running program is set by each invocation."""

    __slots__ = (
        *("_executor", "directory", "ending", "gid", "group", "identifier", "inputs", "job", "keep", "name"),
        *("on_exit", "on_started", "outputs", "pending_signal", "pid", "running", "uid"),
    )

    def __init__(self, executor: UnixExecutor, name: str, uid: int, gid: int, *, keep: bool) -> None:
        self._executor = executor
        self.name = name
        self.uid, self.gid = uid, gid  # -1: the agent's own
        self.keep = keep  # after an invocation
        self.directory = ""  # the private work directory on disk, empty when it has none there
        self.group: RunGroup | None = None
        self.running = False
        self.identifier = 0
        self.job: Job | None = None
        self.pid: int | None = None
        self.outputs: list[OutputPipe] = []
        self.inputs: list[InputPipe] = []
        self.ending = False
        self.pending_signal: int | None = None  # one that came before the program was there
        self.on_exit: Callable[[Exit], None] = lambda ended: None
        self.on_started: Callable[[int, float], None] | None = None

    def invoke(
        self,
        job: Job,
        on_output: Callable[[bytes], object],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
        on_error_output: Callable[[bytes], object] | None = None,
    ) -> None:
        self._executor.invoke(self, job, (on_output, on_error_output), on_exit, on_started)

    def terminate(self) -> None:
        self._executor.signal(self, signal.SIGTERM)

    def kill(self) -> None:
        self._executor.signal(self, signal.SIGKILL)

    def figures(self) -> Figures:
        return self.group.figures() if self.group is not None else Figures()

    def destroy(self) -> None:
        self._executor.destroy(self)


class UnixExecutor:
    """See the module. ``programs`` holds every function's code (``functions/``).

    Building it tries everything out. Raises Unenforceable with what this machine lacks and which setting to choose.
    """

    def __init__(self, config: AgentConfig, programs: Path, why_off: str = "") -> None:
        profile = OFF if why_off else config.isolation or DEFAULT
        steps = PROFILES[profile]
        self._own_view = Step.MOUNTS in steps
        self._programs = os.fspath(programs)
        self._left_behind = 0
        self._hierarchy: Hierarchy | None = None
        self._users: Users | None = None
        self._runner = (-1, -1)
        if profile == OFF:
            self._runner = _runner(config.runner_user) if os.geteuid() == 0 else (-1, -1)
            self._isolation = _nothing_held(config.runner_user, self._runner[0], why_off)
        else:
            probe.require(profile, probe.Host.here())
            self._hierarchy = Hierarchy.find(config.agent_id)
            self._left_behind = self._hierarchy.set_up(config.reserve_memory_mb * 1024 * 1024)
            self._hierarchy.close_ports(listen={API_PORT, config.port}, connect={config.port})
            check_range(config.uid_first, config.uid_count)
            self._users = Users(config.uid_first, config.uid_count)
            # Reported once the trial has shown it.
            self._isolation = Isolation(profile, frozenset())
        self._tried = self._hierarchy is None
        hidden = dict.fromkeys((self._programs, os.fspath(config.state_dir)))
        users = (str(config.uid_first), str(config.uid_count))
        self._spawner_arguments = (profile, self._programs, *users, *hidden)
        self._directories = WorkDirectories(programs / "work")
        self._lock = threading.Lock()
        self._running: dict[int, UnixSandbox] = {}
        self._next = 0
        self._stopping = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._connected = threading.Event()
        self._problem = ""
        self._pings, self._missed = 0, 0
        self._retries: threading.Thread | None = None
        self._reactor = Reactor("programs-output")
        try:
            self._connect()
        except BaseException as error:
            self._reactor.stop(0.1)
            self._directories.stop(2.0)
            if isinstance(error, SetUpRefused) and profile != OFF:
                raise probe.explain(profile, error.step.partition(":")[0], error.number) from error
            raise
        self._reactor.start()
        self._reactor.call_later(_PING_EVERY, self._ping)

    @property
    def isolation(self) -> Isolation:
        return self._isolation

    @property
    def problem(self) -> str:
        return "" if self._connected.is_set() else self._problem or "the process that starts programs is being replaced"

    # -- what is asked -------------------------------------------------------------------

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        if self._hierarchy is None:
            asked = {
                "resources.memory": spec.memory_mb,
                "resources.cpu": spec.cpu_millicores,
                "limits.processes": spec.max_processes,
                "limits.tmp_size": spec.tmp_size_mb,
                "network: none": spec.network is Network.NONE,
            }
            return tuple(
                f"{name} is not enforced: isolation is off on this agent" for name, value in asked.items() if value
            )
        held = self._isolation.enforces
        wanted = {
            f"resources.cpu {spec.cpu_millicores}: the smallest share is {MIN_MILLICORES} millicores": (
                0 < spec.cpu_millicores < MIN_MILLICORES
            ),
            "network: none: there are no network namespaces here": (
                spec.network is Network.NONE and Enforcement.NETWORK_NONE not in held
            ),
            f"limits.tmp_size: isolation {self._isolation.profile} gives no /tmp": (
                spec.tmp_size_mb > 0 and Enforcement.TMP_SIZE not in held
            ),
        }
        faults = [text for text, cannot in wanted.items() if cannot]
        if faults:
            raise Unenforceable(f"this agent cannot enforce {'; '.join(faults)}")
        return ()

    def check_args(self, handler: str, args: tuple[str, ...]) -> None:
        if any("\0" in arg for arg in args):
            raise InvalidInput("an argument contains NUL, which no program can be given")

    def recover_previous_run(self, execution_ids: Collection[str]) -> int:
        """What has a cgroup had to go before the users could be checked. The rest is found by its environment, and by
        its home as well: the store may not have heard of the newest ones.
        """
        return self._left_behind + kill_executions(execution_ids, Path(self._programs, "work"))

    def create(self, job: Job) -> UnixSandbox:
        return self._create(job, keep=True)

    def start(
        self,
        job: Job,
        on_output: Callable[[bytes], object],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None = None,
        on_error_output: Callable[[bytes], object] | None = None,
    ) -> UnixSandbox:
        if not self._connected.is_set() and not self._reactor.is_here():
            self._connected.wait(_REPLACED_WITHIN)
        sandbox = self._create(job, keep=False)
        sandbox.invoke(job, on_output, on_exit, on_started, on_error_output)
        return sandbox

    def stop(self, deadline: float) -> None:
        with self._lock:
            if self._stopping.is_set():
                return
            self._stopping.set()
            left = list(self._running.values())
        for sandbox in left:
            sandbox.kill()
        with self._lock:
            self._idle.wait_for(lambda: not self._running, max(0.0, deadline - time.monotonic()))
        if self._retries is not None:
            self._retries.join(max(0.1, deadline - time.monotonic()))
        self._reactor.forget(self._link.fileno())
        self._reactor.stop(max(0.1, deadline - time.monotonic()))
        self._link.close(max(0.1, deadline - time.monotonic()))
        self._directories.stop(max(0.1, deadline - time.monotonic()))

    # -- sandboxes -----------------------------------------------------------------------

    def _create(self, job: Job, *, keep: bool) -> UnixSandbox:
        if self._stopping.is_set():
            raise Stopping("the agent is stopping")
        uid, gid = self._runner
        if self._users is not None:
            uid = gid = self._users.take()
        sandbox = UnixSandbox(self, job.execution_id, uid, gid, keep=keep)
        try:
            if not self._own_view:
                sandbox.directory = self._directories.make(uid, gid)
            if self._hierarchy is not None:
                sandbox.group = self._hierarchy.make(job.execution_id, job.limits)
        except BaseException:
            self._clear(sandbox)
            raise
        return sandbox

    def destroy(self, sandbox: UnixSandbox) -> None:
        with self._lock:
            sandbox.keep = False
            running = sandbox.running
        if running:
            sandbox.kill()  # its end takes the sandbox along
        else:
            self._release(sandbox)

    def _release(self, sandbox: UnixSandbox) -> None:
        """Give all back that it holds, unless it is kept."""
        if not sandbox.keep:
            self._remove_group(sandbox, lambda: self._clear(sandbox))

    def _clear(self, sandbox: UnixSandbox) -> None:
        """Give back its directory, and its user when nothing of that is left."""

        def released() -> None:
            if self._users is not None:
                self._users.give_back(sandbox.uid)

        if sandbox.directory:
            self._directories.remove(sandbox.directory, released)
        else:
            released()

    def _remove_group(self, sandbox: UnixSandbox, then: Callable[[], None]) -> None:
        """Kill what is left in its cgroup and remove that; ``then`` is called at once, or on the reactor's thread."""
        group = sandbox.group
        if group is None or group.fd < 0:
            then()
        elif group.remove():
            group.close()
            then()
        else:
            self._reactor.call(lambda: self._end_rest(group, remove=True, then=then))

    def _end_rest(self, group: RunGroup, *, remove: bool, then: Callable[[], None]) -> None:
        """Kill what the program left behind and go on when the kernel says that it is gone."""
        events = -1

        def look() -> None:
            if not is_empty(events) or (remove and not group.remove()):
                return
            self._reactor.forget(events)
            os.close(events)
            then()
            if remove:
                group.close()

        try:
            group.kill()
            events = group.events()
            self._reactor.watch(events, look, select.EPOLLPRI)
        except OSError as error:
            # No descriptor left, no memory, no watch: for a moment. Its user and its cgroup are not free before.
            log.warning("what %s left behind cannot be ended now: %s; trying again", group.path, error)
            if events >= 0:
                self._reactor.forget(events)
                os.close(events)
            self._reactor.call_later(_AGAIN, lambda: self._end_rest(group, remove=remove, then=then))
            return
        look()

    # -- invocations ---------------------------------------------------------------------

    def invoke(
        self,
        sandbox: UnixSandbox,
        job: Job,
        on_output: tuple[Callable[[bytes], object], Callable[[bytes], object] | None],
        on_exit: Callable[[Exit], None],
        on_started: Callable[[int, float], None] | None,
    ) -> None:
        """See Sandbox.invoke. When it fails, a sandbox that is not kept is gone."""
        with self._lock:
            if sandbox.running:
                raise CannotStart("a program runs in this sandbox already")
            sandbox.running, sandbox.ending = True, False
        sandbox.job, sandbox.pid, sandbox.pending_signal = job, None, None
        sandbox.on_exit, sandbox.on_started = on_exit, on_started
        sandbox.outputs, sandbox.inputs = [], []
        fds: dict[str, int] = {}
        try:
            try:
                request = self._request(sandbox, job)
                fds["stdin"] = self._input(sandbox, job.stdin)
                fds["stdout"] = self._output(sandbox, on_output[0])
                if on_output[1] is not None:
                    fds["stderr"] = self._output(sandbox, on_output[1])
                with self._lock:
                    if self._stopping.is_set():
                        raise Stopping("the agent is stopping")
                    self._next += 1
                    request["id"] = sandbox.identifier = self._next
                    self._running[sandbox.identifier] = sandbox
            except BaseException:
                for pipe in sandbox.outputs:
                    os.close(pipe.fd)
                for fed in sandbox.inputs:
                    fed.close()
                self._forget(sandbox)
                self._release(sandbox)
                raise
            self._ask(sandbox, request, fds)
        finally:
            for fd in fds.values():
                os.close(fd)

    def _ask(self, sandbox: UnixSandbox, request: dict[str, Any], fds: dict[str, int]) -> None:
        for pipe in sandbox.outputs:
            self._reactor.add_pipe(pipe)
        for fed in sandbox.inputs:
            self._reactor.feed(fed)
        more = {"cgroup": sandbox.group.fd} if sandbox.group is not None else {}
        if sandbox.job is not None and sandbox.job.listen is not None:
            more["listen"] = sandbox.job.listen
        try:
            self._link.send(request, {**fds, **more})
        except (InvalidInput, OSError) as error:
            if not self._claim(sandbox):
                return  # the spawner died with it: its end is reported with that of all it had
            self._reactor.call(lambda: self._drain(sandbox))
            self._forget(sandbox)
            self._release(sandbox)
            if isinstance(error, InvalidInput):
                raise
            raise CannotStart(f"the spawner cannot be asked: {error}") from error

    def _request(self, sandbox: UnixSandbox, job: Job) -> dict[str, Any]:
        """What the spawner is asked, without the identifier."""
        code_dir, limits = os.fspath(job.code_dir), job.limits
        inside = code_dir.removeprefix(self._programs + "/")
        if self._hierarchy is not None and inside == code_dir:
            raise CannotStart(f"the code of {job.execution_id} is not below {self._programs}")
        code, work, tmp = code_dir, sandbox.directory, "/tmp"
        if self._own_view:
            code, work = CODE, WORK
        elif self._hierarchy is not None:
            # It has no /tmp of its own, and another's would outlive its user.
            tmp = work
        rlimits = {}
        if limits.open_files is not None:
            rlimits[resource.RLIMIT_NOFILE] = limits.open_files
        if limits.file_size_bytes is not None:
            rlimits[resource.RLIMIT_FSIZE] = limits.file_size_bytes
        cwd = work if job.working_directory is WorkingDirectory.WORK else code
        user = f"flux-{sandbox.uid}" if self._own_view else user_name(sandbox.uid)
        own = {"HOME": work, "USER": user, "LOGNAME": user, "SHELL": "/bin/sh", "TMPDIR": tmp, "PWD": cwd}
        return {
            "do": "run",
            "argv": [os.fsencode(code + job.argv[0].removeprefix(code_dir)), *map(os.fsencode, job.argv[1:])],
            "env": {os.fsencode(name): os.fsencode(value) for name, value in {**own, **job.env}.items()},
            "cwd": cwd,
            "uid": sandbox.uid,
            "gid": sandbox.gid,
            "rlimits": rlimits,
            "execution": job.execution_id.encode(),
            "code": os.fsencode(inside),
            "work": os.fsencode(sandbox.directory),
            "tmp_bytes": limits.tmp_bytes or _DEFAULT_TMP,
            "no_network": job.network is Network.NONE,
        }

    def _input(self, sandbox: UnixSandbox, data: bytes) -> int:
        """The program's end of its standard input: a pipe, because event loops refuse files, and one that ends where
        there is no input. It belongs to the function's user, who could not open /dev/stdin otherwise.
        """
        read, write = os.pipe2(os.O_CLOEXEC)
        fed = InputPipe(write, data)
        try:
            self._give(sandbox, read)
            if data:
                fed.write()
        except BaseException:
            os.close(read)
            fed.close()
            raise
        if fed.left:
            sandbox.inputs.append(fed)
        else:
            fed.close()
        return read

    def _output(self, sandbox: UnixSandbox, on_output: Callable[[bytes], object]) -> int:
        read, write = os.pipe2(os.O_CLOEXEC)
        sandbox.outputs.append(OutputPipe(read, on_output))
        try:
            os.set_blocking(read, False)
            self._give(sandbox, write)
        except BaseException:
            os.close(write)
            raise
        return write

    @staticmethod
    def _give(sandbox: UnixSandbox, pipe: int) -> None:
        if sandbox.uid >= 0:
            os.fchown(pipe, sandbox.uid, sandbox.gid)

    def signal(self, sandbox: UnixSandbox, number: int) -> None:
        """To the whole tree; nothing when it has ended."""
        with self._lock:
            if not sandbox.running:
                return
            if sandbox.pid is None:
                # Sent when it is there; a kill is not weakened by what comes after it.
                if sandbox.pending_signal != signal.SIGKILL:
                    sandbox.pending_signal = int(number)
                return
        group = sandbox.group
        if group is None:
            try:
                self._link.send({"do": "signal", "id": sandbox.identifier, "signal": int(number)})
            except OSError:
                log.debug("the spawner is gone; what it started is being ended")
        elif number != signal.SIGKILL:
            group.signal(number)
        else:
            try:
                group.kill()
            except OSError as error:
                # It opens a file. Here rather than with who asks: they have nothing better to do than this.
                log.warning("%s cannot be killed now: %s; trying again", sandbox.name, error)
                self._reactor.call_later(_AGAIN, lambda: self.signal(sandbox, number))

    # -- between the spawner and the callbacks ---------------------------------------

    def _claim(self, sandbox: UnixSandbox) -> bool:
        """Whether the caller is the one who ends it."""
        with self._lock:
            first, sandbox.ending = not sandbox.ending, True
        return first

    def _forget(self, sandbox: UnixSandbox) -> None:
        with self._lock:
            self._running.pop(sandbox.identifier, None)
            sandbox.running = False
            if not self._running:
                self._idle.notify_all()

    def _on_events(self) -> None:
        events = self._link.receive()
        if not events:
            self._on_spawner_gone()
            return
        for event in events:
            try:
                self._on_event(event)
            except Exception:
                log.exception("an event of the spawner cannot be handled")

    def _on_event(self, event: dict[str, Any]) -> None:
        kind, identifier = event["event"], event["id"]
        if kind == "pong":
            self._missed = 0
            return
        sandbox = self._running.get(identifier)
        if sandbox is None:
            if kind == "started":
                # Asked of this spawner by a start that its predecessor's death had already ended.
                self._link.send({"do": "signal", "id": identifier, "signal": int(signal.SIGKILL)})
        elif kind == "started":
            with self._lock:
                sandbox.pid = event["pid"]
                pending = sandbox.pending_signal
            if pending is not None:
                self.signal(sandbox, pending)
            if sandbox.on_started is not None:
                # Reported late on purpose, by a clock that is the same for both processes.
                sandbox.on_started(event["pid"], time.monotonic() - event["at"])
        elif kind == "failed":
            self._end(sandbox, _failed(sandbox.job, event["step"], event["errno"]))
        elif kind == "exit":
            self._end(sandbox, _exit(event["status"], event["cpu_seconds"]))

    def _end(self, sandbox: UnixSandbox, ended: Exit) -> None:
        if not self._claim(sandbox):
            return
        group = sandbox.group
        if group is None:
            self._ended(sandbox, ended)
            return
        figures = group.figures()
        if sandbox.keep and not group.processes():
            self._ended(sandbox, _with(ended, figures))
        elif not sandbox.keep and group.remove():
            # Nothing outlived the program: the figures were final.
            group.close()
            self._ended(sandbox, _with(ended, figures))
        else:
            self._reactor.call(
                lambda: self._end_rest(group, remove=False, then=lambda: self._dead(sandbox, group, ended))
            )

    def _dead(self, sandbox: UnixSandbox, group: RunGroup, ended: Exit) -> None:
        """Read the figures before the cgroup is gone."""
        final = _with(ended, group.figures())
        if sandbox.keep:
            self._ended(sandbox, final)
        else:
            self._remove_group(sandbox, lambda: self._ended(sandbox, final))

    def _ended(self, sandbox: UnixSandbox, ended: Exit) -> None:
        # Only now: what still lived could write for ever.
        self._drain(sandbox)
        self._forget(sandbox)
        self._release(sandbox)
        sandbox.on_exit(ended)

    def _drain(self, sandbox: UnixSandbox) -> None:
        for pipe in sandbox.outputs:
            self._reactor.drain(pipe)
        for fed in sandbox.inputs:
            self._reactor.drop(fed)

    # -- the spawner process ---------------------------------------------------------

    def _connect(self) -> None:
        link = SpawnerLink(*self._spawner_arguments)
        try:
            self.greet(link)
            with self._lock:
                if self._stopping.is_set():
                    raise Stopping("the agent is stopping")
                self._link = link
                self._missed = 0
                # Before it is watched: its death is to undo this.
                self._connected.set()
                self._reactor.watch(link.fileno(), self._on_events)
        except BaseException:
            self._connected.clear()
            self._reactor.forget(link.fileno())
            link.close()
            raise

    def _ping(self) -> None:
        """It has one thread, so its answer shows that it can start programs."""
        if self._stopping.is_set():
            return
        if self._connected.is_set():
            # Counted and not timed: a machine that was suspended has missed nothing.
            if self._missed >= _MISSED:
                log.error("the spawner has not answered for %g s: killing it", self._missed * _PING_EVERY)
                self._link.kill()
                self._on_spawner_gone()
            else:
                self._missed += 1
                self._pings += 1
                self._link.ping(self._pings)
        self._reactor.call_later(_PING_EVERY, self._ping)

    def _on_spawner_gone(self) -> None:
        self._connected.clear()
        self._reactor.forget(self._link.fileno())
        with self._lock:
            stopping, lost = self._stopping.is_set(), list(self._running.values())
        self._link.close()
        if not stopping:
            log.error("the spawner died with %d running programs: they are ended, and it is started again", len(lost))
        if lost:
            try:
                self.end_trees(lost)
            except Exception:
                log.exception("what the spawner left running cannot be ended")
        # First the new one: the listener of an end may start something at once.
        connected = stopping or self._reconnect()
        for sandbox in lost:
            try:
                self._end(sandbox, Exit(lost=True))
            except Exception:
                log.exception("the end of %s cannot be reported", sandbox.name)
        if not connected:
            # Elsewhere: the ends of the lost may need this thread.
            retries = threading.Thread(target=self._retry, name="spawner-retries", daemon=True)
            with self._lock:
                if not self._stopping.is_set():
                    retries.start()
                    self._retries = retries

    def end_trees(self, lost: list[UnixSandbox]) -> None:
        """Kill what a dead spawner left running."""
        for sandbox in lost:
            if sandbox.group is not None:
                try:
                    sandbox.group.kill()
                except OSError as error:
                    log.error("what runs in %s cannot be ended: %s", sandbox.group.path, error)
            elif sandbox.pid is not None:
                for target in (os.killpg, os.kill):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        target(sandbox.pid, signal.SIGKILL)
        if self._hierarchy is None:
            kill_executions([sandbox.name for sandbox in lost])

    def _retry(self) -> None:
        pause = _FIRST_RETRY
        while not self._stopping.wait(pause) and not self._reconnect():
            pause = min(pause * 2, _LAST_RETRY)

    def _reconnect(self) -> bool:
        try:
            self._connect()
        except Stopping:
            return True
        except CannotStart as error:
            self._problem = error.message
            log.error("%s; trying again", error.message)
            return False
        except Exception as error:
            self._problem = f"the spawner cannot be started: {error}"
            log.exception("the spawner cannot be started; trying again")
            return False
        self._problem = ""
        return True

    # -- trying it out -------------------------------------------------------------------

    def greet(self, link: SpawnerLink) -> None:
        """The first spawner shows whether this machine lets it do what the profile promises."""
        if self._tried:
            return
        assert self._hierarchy is not None
        profile = self._isolation.profile
        failed = self._try(link, no_network=False)
        if failed is not None:
            raise probe.explain(profile, *failed)
        notes = [*link.notes, *self._hierarchy.warnings]
        no_network = self._own_view and self._try(link, no_network=True) is None
        if self._own_view and not no_network:
            notes.append("there are no network namespaces here: functions with `network: none` are refused")
        group = self._hierarchy.make(_TRIAL, Limits())
        notes += probe.degraded(lambda name: os.path.exists(os.path.join(group.path, name)))
        group.remove()
        group.close()
        shows = tuple(map(os.fsdecode, VIEW)) if self._own_view else ()
        self._isolation = Isolation(profile, probe.enforces(profile, no_network), tuple(notes), shows)
        self._tried = True

    def _try(self, link: SpawnerLink, *, no_network: bool) -> tuple[str, int] | None:
        """One run of every step but the program: None, or the step and errno that failed."""
        assert self._hierarchy is not None
        assert self._users is not None
        uid = self._users.take()
        group = self._hierarchy.make(_TRIAL, _TRIAL_LIMITS)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        request = {"do": "run", "id": 0, "argv": [b"trial"], "env": {}, "cwd": "/", "uid": uid, "gid": uid}
        request |= {"rlimits": {}, "execution": b"trial", "code": b".", "tmp_bytes": 1024**2}
        request |= {"no_network": no_network, "trial": True}
        try:
            link.send(request, {"stdin": null, "stdout": null, "cgroup": group.fd})
            while True:
                events = link.receive()
                if not events:
                    raise CannotStart("the spawner died while it was tried out")
                for event in events:
                    if event["event"] == "failed":
                        return event["step"], event["errno"]
                    if event["event"] == "exit":
                        return None if event["status"] == 0 else (f"ended with {event['status']}", 0)
        finally:
            os.close(null)
            group.kill()
            group.wait_until_empty(5.0)
            group.remove()
            group.close()
            self._users.give_back(uid)


@functools.lru_cache(1024)
def user_name(uid: int) -> str:
    """The account's name of a numeric user, -1 for the agent's own."""
    import pwd

    try:
        return pwd.getpwuid(uid if uid >= 0 else os.geteuid()).pw_name
    except KeyError:
        return _NO_ACCOUNT


def _runner(user: str) -> tuple[int, int]:
    """The unprivileged user functions run as when they have none of their own."""
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return _NOBODY, _NOBODY
    return (entry.pw_uid, entry.pw_gid) if entry.pw_uid else (_NOBODY, _NOBODY)


def _nothing_held(runner: str, uid: int, why: str) -> Isolation:
    notes = [f"isolation is off: {why}; functions can see and disturb each other"]
    if uid >= 0:
        notes.append(f"every function runs as user {uid}")
        if uid == _NOBODY and runner not in (AgentConfig.runner_user, "nobody"):
            notes.append(f"runner_user {runner} is not used: there is no such user here, or it is root")
    return Isolation(OFF, frozenset({Enforcement.OPEN_FILES, Enforcement.FILE_SIZE}), tuple(notes))


def _exit(status: int, cpu_seconds: float | None) -> Exit:
    """A wait status as the contract's Exit."""
    if os.WIFSIGNALED(status):
        return Exit(signal=os.WTERMSIG(status), cpu_seconds=cpu_seconds)
    return Exit(exit_code=os.WEXITSTATUS(status), cpu_seconds=cpu_seconds)


def _failed(job: Job | None, step: str, number: int) -> Exit:
    """Why a program could not be started, in words, and whether the machine is at fault."""
    if step == "exec" and job is not None:
        reason = exec_problem(job.argv[0], number, job.code_dir)
    else:
        reason = os.strerror(number)
    host_at_fault = number in _OF_THE_MACHINE or step not in _OF_THE_FUNCTION
    return Exit(start_error=f"{step}: {reason}", host_at_fault=host_at_fault)


def _with(ended: Exit, figures: Figures) -> Exit:
    return replace(
        ended,
        out_of_memory=figures.out_of_memory,
        peak_memory_bytes=figures.peak_memory_bytes,
        cpu_seconds=figures.cpu_seconds,
    )
