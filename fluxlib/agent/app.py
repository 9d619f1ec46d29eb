"""The agent as a process: everything built in one place, and stopped in an order that loses nothing."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fluxlib.agent.certificates import Certificates
from fluxlib.agent.executions import Executions, Settings
from fluxlib.agent.executor import build_executor, users_walk_to_code
from fluxlib.agent.executor.base import Executor, Limits
from fluxlib.agent.health import CHECK_EVERY, Health, StallDetector
from fluxlib.agent.monitor import Monitor
from fluxlib.agent.packages import Packages
from fluxlib.agent.program_dirs import lock_state_dir, programs_dir
from fluxlib.agent.records import Records
from fluxlib.config.agent import AgentConfig
from fluxlib.config.environment import function_basics, prepare_grpc, report_ready
from fluxlib.descriptors import raise_limit
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline, Loop, Parts, StopSignal, Timers
from fluxlib.pki.identity import Files
from fluxlib.store import open_record_store

log = logging.getLogger(__name__)

_MB = 1024 * 1024
_EXPIRE_EVERY = 30.0
_SPARE_THREADS = 64
_KILL_TIME = 5.0
# What the records get for their last writes (seconds).
_FLUSH = 1.0
_MAX_ARCHIVE = 2000 * _MB


class Agent:
    """One running agent."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._parts = Parts()
        state = config.state_dir
        _make_state_dir(state)
        # Before grpc is imported: forking is only safe now.
        prepare_grpc()
        try:
            # First of all: an agent begins by ending what the previous run left running.
            self._hold(state)
            programs = programs_dir(state) if users_walk_to_code(config) else state
            if programs != state:
                self._hold(programs)
            self._build(config, state, programs)
        except BaseException:
            self._parts.stop(Deadline(_KILL_TIME))
            raise

    def _hold(self, directory: Path) -> None:
        lock = lock_state_dir(directory)
        self._parts.add("state directory", lambda deadline: lock.release())

    def _build(self, config: AgentConfig, state: Path, programs: Path) -> None:
        parts = self._parts
        certificates = _certificates(config)
        records = Records(
            open_record_store(config.store, config.redis_addr, state, config.agent_id),
            state / "outputs",
            config.execution_ttl_sec,
            config.max_output_mb * _MB,
            config.max_output_store_mb * _MB,
        )
        # Even when no time is left: what is not kept here is lost.
        parts.add("records", lambda deadline: records.close(max(_FLUSH, deadline.remaining())))
        executor = build_executor(config, programs)
        # Stopped before the records close: it tells the end of what it still kills.
        parts.add("executor", lambda deadline: executor.stop(deadline.at))
        _recover_previous_run(executor, records)
        timers = Timers("agent-timers").start()
        parts.add("timers", timers.stop)
        packages = Packages(programs / "functions")
        parts.add("packages", packages.stop)
        monitor = Monitor(state)
        monitor.start()
        parts.add("monitor", monitor.stop)
        stalls = StallDetector()
        stalls.start()
        parts.add("stall detector", stalls.stop)
        expiry = Loop("record-expiry", records.tick, min(_EXPIRE_EVERY, config.execution_ttl_sec / 2)).start()
        parts.add("record expiry", expiry.stop)
        records.over = expiry.wake
        self._executions = Executions(_settings(config), packages, records, executor, timers)
        # Through the running table's lock: an agent that hangs there is not alive.
        health = Health(executor, records, state, self._executions.open_ids)
        checks = Loop("health", health.tick, CHECK_EVERY).start()
        parts.add("health", checks.stop)

        from fluxlib.agent.listener import Listener
        from fluxlib.agent.server import MAX_FOLLOWERS, AgentService, ServiceContext
        from fluxlib.agent.sessions import Sessions

        self._sessions = Sessions(self._executions, timers, stalls, monitor.instance_id, config.detach_grace_sec)
        context = ServiceContext(
            agent_id=config.agent_id,
            max_tasks=config.max_tasks,
            max_archive=_MAX_ARCHIVE,
            packages=packages,
            records=records,
            executions=self._executions,
            sessions=self._sessions,
            executor=executor,
            monitor=monitor,
            health=health,
            certificates=certificates,
            notes=(config.open_door,) if config.open_door else (),
        )
        # Room for every execution and a cancel that waits for each, every reader of output, and the short calls.
        threads = 2 * config.max_tasks + MAX_FOLLOWERS + _SPARE_THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="call")
        parts.add("calls", lambda deadline: self._pool.shutdown(wait=False, cancel_futures=True))
        self._listener = Listener(AgentService(context), self._pool, config.listen_host, config.port, certificates)
        isolation = executor.isolation
        for note in isolation.notes:
            (log.warning if isolation.profile == "off" else log.info)("%s", note)
        log.info(
            "agent %s (%s) listens on %s:%d, isolation %s%s",
            config.agent_id,
            monitor.platform,
            config.listen_host,
            self._listener.port,
            isolation.profile,
            "" if certificates is not None else ", without TLS",
        )

    @property
    def port(self) -> int:
        return self._listener.port

    def stop(self, seconds: float | None = None) -> None:
        """Shut down gracefully: announce it, drain, kill stragglers, release resources.

        ``seconds`` is what all of it may take, by default what agent.yaml says and the time to kill.
        New work is refused first, so that the wait ends; the server stays until the last answer has been
        sent, the records until the last end is written.
        """
        seconds = self._config.shutdown_sec + _KILL_TIME if seconds is None else seconds
        deadline, kill_time = Deadline(seconds), min(_KILL_TIME, seconds / 2)
        self._executions.refuse_new()
        self._sessions.announce_stopping()
        self._executions.stop(deadline.at - kill_time, deadline.at - kill_time / 2)
        self._sessions.close()
        self._listener.stop(deadline)
        self._parts.stop(deadline)


def serve(config: AgentConfig, stop: StopSignal) -> int:
    """Run an agent until told to stop; the process's exit code. Raises FluxError when it cannot start."""
    for warning in config.warnings:
        log.warning("%s: %s", config.path, warning)
    # Each run holds a few. The programs get limits of their own.
    raise_limit()
    agent = Agent(config)
    report_ready()
    stop.wait()
    log.info("stopping")
    agent.stop(stop.seconds(config.shutdown_sec + _KILL_TIME))
    log.info("stopped")
    return 0


def _recover_previous_run(executor: Executor, records: Records) -> None:
    """Kill what the previous run of this agent left running, then mark each as failed."""
    killed = executor.recover_previous_run(records.unfinished())
    ended = records.end_previous_run(time.time(), "the agent restarted while it ran")
    if ended or killed:
        log.warning("killed %d orphans of the previous run and marked %d executions as failed", killed, ended)


def _certificates(config: AgentConfig) -> Certificates | None:
    if not config.tls_enabled:
        return None
    assert config.tls_ca_cert is not None
    assert config.tls_cert_file is not None
    assert config.tls_key_file is not None
    return Certificates(Files(config.tls_ca_cert, config.tls_cert_file, config.tls_key_file), config.agent_id)


def _settings(config: AgentConfig) -> Settings:
    environment = function_basics()
    if config.node_private_ip:
        environment["FLUX_NODE_PRIVATE_IP"] = config.node_private_ip
    if config.node_public_ip:
        environment["FLUX_NODE_PUBLIC_IP"] = config.node_public_ip
    defaults = Limits(
        memory_bytes=config.max_memory_mb * _MB or None,
        cpu_millicores=config.max_cpu_millicores or None,
        processes=config.max_processes,
        open_files=config.max_open_files,
        file_size_bytes=config.max_file_size_mb * _MB,
        tmp_bytes=config.tmp_size_mb * _MB,
    )
    return Settings(
        config.agent_id, config.max_tasks, config.kill_grace_sec, defaults, environment, config.max_timeout_sec
    )


def _make_state_dir(path: Path) -> None:
    try:
        # Functions' users must be able to walk through to their code; what is private inside is 0700 itself.
        path.mkdir(mode=0o711, parents=True, exist_ok=True)
        path.chmod(0o711)
    except OSError as error:
        raise FluxError(f"the state directory {path} cannot be made: {error.strerror}: set `state_dir`") from error
