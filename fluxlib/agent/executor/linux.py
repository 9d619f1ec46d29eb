"""Profiles default, strict and minimal: each run in a cgroup and as a user of its own.

The spawner starts it inside (``launcher``); this class gives it its user, its
cgroup and its plan, ends the tree through the cgroup, and reads what it used.
"""

from __future__ import annotations

import logging
import os
import resource
import select
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fluxlib.agent.executor import mounts, probe
from fluxlib.agent.executor.base import Exit, Isolation, Job, Limits
from fluxlib.agent.executor.cgroup import MIN_MILLICORES, Figures, RunGroup, is_empty
from fluxlib.agent.executor.hierarchy import Hierarchy
from fluxlib.agent.executor.launch import Launch
from fluxlib.agent.executor.launcher import DEFAULT, MINIMAL, Plan
from fluxlib.agent.executor.spawned import Spawned, SpawningExecutor
from fluxlib.agent.executor.spawner_link import SetUpRefused, SpawnerLink
from fluxlib.agent.executor.users import Users, check_range
from fluxlib.config.agent import AgentConfig
from fluxlib.errors import CannotStart, Unenforceable
from fluxlib.model import Enforcement, FunctionSpec, Network, WorkingDirectory

log = logging.getLogger(__name__)

_TRIAL = "trial"
_TRIAL_LIMITS = Limits(memory_bytes=64 * 1024**2, cpu_millicores=1000, processes=16)
_SIGKILL = 9
# How long something waits that the machine had no descriptor or no memory for (seconds).
_AGAIN = 1.0
# Also where the agent's configuration names no size.
_DEFAULT_TMP = 256 * 1024**2


class LinuxExecutor(SpawningExecutor):
    """Programs in cgroups. ``programs`` holds every function's code (``functions/``).

    Building it tries everything out. Raises Unenforceable with what this machine
    lacks and which setting to choose.
    """

    def __init__(self, config: AgentConfig, programs: Path) -> None:
        self._profile = config.isolation or DEFAULT
        probe.require(self._profile, probe.Host.here())
        self._hierarchy = Hierarchy.find(config.agent_id)
        self._left_behind = self._hierarchy.set_up()
        check_range(config.uid_first, config.uid_count)
        self._users = Users(config.uid_first, config.uid_count)
        self._programs = os.fspath(programs)
        self._tried = False
        hidden = dict.fromkeys((self._programs, os.fspath(config.state_dir)))
        # Told for real once the trial has shown it.
        unknown = Isolation(self._profile, frozenset())
        try:
            super().__init__(programs, unknown, self._profile, self._programs, *hidden)
        except SetUpRefused as refused:
            raise probe.explain(self._profile, refused.step.partition(":")[0], refused.number) from refused

    # -- what is asked -------------------------------------------------------------------

    def check(self, spec: FunctionSpec) -> tuple[str, ...]:
        held = self._isolation.enforces
        wanted = {
            f"resources.cpu {spec.cpu_millicores}: the smallest share is {MIN_MILLICORES} millicores": (
                0 < spec.cpu_millicores < MIN_MILLICORES
            ),
            "network: none: there are no network namespaces here": (
                spec.network is Network.NONE and Enforcement.NETWORK_NONE not in held
            ),
            "limits.tmp_size: isolation minimal gives no /tmp": (
                spec.tmp_size_mb > 0 and Enforcement.TMP_SIZE not in held
            ),
        }
        faults = [text for text, cannot in wanted.items() if cannot]
        if faults:
            raise Unenforceable(f"this agent cannot enforce {'; '.join(faults)}")
        return ()

    def clean_up_former_life(self) -> int:
        """What was left had to go before the users could be checked; how many runs that were."""
        return self._left_behind

    # -- one run -------------------------------------------------------------------------

    def needs_directory(self) -> bool:
        return self._profile == MINIMAL

    def new_launch(self) -> Launch:
        uid = self._users.take()
        return Launch(uid=uid, gid=uid)

    def prepare(self, launch: Launch, job: Job) -> None:
        code_dir, limits = os.fspath(job.code_dir), job.limits
        inside = code_dir.removeprefix(self._programs + "/")
        if inside == code_dir:
            raise CannotStart(f"the code of {job.execution_id} is not below {self._programs}")
        code, launch.home = mounts.CODE, mounts.WORK
        if self._profile == MINIMAL:
            # It has no /tmp of its own, and another's would outlive its user.
            code, launch.home, launch.tmp = code_dir, launch.directory, launch.directory
        launch.program = code + job.argv[0].removeprefix(code_dir)
        launch.cwd = launch.home if job.working_directory is WorkingDirectory.WORK else code
        if limits.open_files is not None:
            launch.rlimits[resource.RLIMIT_NOFILE] = limits.open_files
        if limits.file_size_bytes is not None:
            launch.rlimits[resource.RLIMIT_FSIZE] = limits.file_size_bytes
        launch.plan = Plan(
            code=os.fsencode(inside),
            work=os.fsencode(launch.directory),
            tmp_bytes=limits.tmp_bytes or _DEFAULT_TMP,
            no_network=job.network is Network.NONE,
        ).parts()
        group = self._hierarchy.make(job.execution_id, limits)
        launch.own, launch.fds = group, (group.fd,)

    def signal(self, spawned: Spawned, number: int) -> None:
        with self._lock:
            if spawned.pid is None:
                # Nothing is in its cgroup yet. Told when it is; a kill is not weakened by what comes after it.
                spawned.told = number if spawned.told != _SIGKILL else spawned.told
                return
        group: RunGroup = spawned.launch.own
        if number != _SIGKILL:
            group.signal(number)
            return
        try:
            group.kill()
        except OSError as error:
            # It opens a file. Here rather than with who asks: they have nothing better to do than this.
            log.warning("%s cannot be killed now: %s; trying again", spawned.job.execution_id, error)
            self._reactor.call_later(_AGAIN, lambda: self.signal(spawned, number))

    def finish(self, launch: Launch, ended: Exit, then: Callable[[Exit], None]) -> None:
        group: RunGroup | None = launch.own
        if group is None:
            then(ended)
            return
        figures = group.figures()
        if group.remove():
            # Nothing outlived the program: the figures were final.
            group.close()
            then(_with(ended, figures))
        else:
            self._reactor.call(lambda: self._end_rest(group, ended, then))

    def _end_rest(self, group: RunGroup, ended: Exit, then: Callable[[Exit], None]) -> None:
        """Kill what the program left behind and go on when the kernel says that it is gone."""
        events = -1

        def look() -> None:
            if not is_empty(events):
                return
            figures = group.figures()
            if not group.remove():
                return
            self._reactor.forget(events)
            os.close(events)
            group.close()
            then(_with(ended, figures))

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
            self._reactor.call_later(_AGAIN, lambda: self._end_rest(group, ended, then))
            return
        look()

    def end_trees(self, lost: list[Spawned]) -> None:
        for spawned in lost:
            group: RunGroup = spawned.launch.own
            try:
                group.kill()
            except OSError as error:
                log.error("what runs in %s cannot be ended: %s", group.path, error)

    def released(self, launch: Launch) -> None:
        self._users.give_back(launch.uid)

    # -- trying it out -------------------------------------------------------------------

    def greet(self, link: SpawnerLink) -> None:
        """The first spawner shows whether this machine lets it do what the profile promises."""
        if self._tried:
            return
        failed = self._try(link, no_network=False)
        if failed is not None:
            raise probe.explain(self._profile, *failed)
        notes = [*link.notes, *self._hierarchy.warnings]
        no_network = self._profile != MINIMAL and self._try(link, no_network=True) is None
        if self._profile != MINIMAL and not no_network:
            notes.append("there are no network namespaces here: functions with `network: none` are refused")
        group = self._hierarchy.make(_TRIAL, Limits())
        notes += probe.degraded(lambda name: os.path.exists(os.path.join(group.path, name)))
        group.remove()
        group.close()
        self._isolation = Isolation(self._profile, probe.enforces(self._profile, no_network), tuple(notes))
        self._tried = True

    def _try(self, link: SpawnerLink, *, no_network: bool) -> tuple[str, int] | None:
        """One run of every step but the program: None, or the step and errno that failed."""
        uid = self._users.take()
        group = self._hierarchy.make(_TRIAL, _TRIAL_LIMITS)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        plan = Plan(code=b".", work=b"", tmp_bytes=1024**2, no_network=no_network, trial=True)
        try:
            link.send(("run", 0, [b"trial"], {}, "/", uid, uid, {}, b"trial", plan.parts()), [null, group.fd])
            while True:
                answers = link.receive()
                if not answers:
                    raise CannotStart("the spawner died while it was tried out")
                for answer in answers:
                    if answer[0] == "failed":
                        return answer[2], answer[3]
                    if answer[0] == "exit":
                        return None if answer[2] == 0 else (f"ended with {answer[2]}", 0)
        finally:
            os.close(null)
            group.kill()
            group.wait_until_empty(5.0)
            group.remove()
            group.close()
            self._users.give_back(uid)


def _with(ended: Exit, figures: Figures) -> Exit:
    return replace(
        ended,
        out_of_memory=figures.out_of_memory,
        peak_memory_bytes=figures.peak_memory_bytes,
        cpu_seconds=figures.cpu_seconds,
    )
