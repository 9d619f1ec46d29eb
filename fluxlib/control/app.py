"""The control plane as a process: everything built in one place, and stopped in an order that loses nothing."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fluxlib.config.control import ControlConfig
from fluxlib.config.environment import prepare_grpc, report_ready
from fluxlib.lifecycle import Deadline, Loop, Parts, StopSignal, Timers
from fluxlib.pki import Authority
from fluxlib.store import open_control_store

if TYPE_CHECKING:
    from fluxlib.control.nodes.parts import NodeParts

log = logging.getLogger(__name__)

_MB = 1024 * 1024
_EXECUTIONS_EVERY = 1.0
# Of the time to stop, what is kept for telling callers that their execution was let go.
_FAREWELL = 3.0
# What the store gets for its last writes, even when no time is left.
_FLUSH = 1.0


class Control:
    """One running control plane. Listens when it is made, serves from ``start``.

    ``on_failure(reason)`` is called when a part it cannot do without has ended by itself. Raises FluxError when it
    cannot be built (a store that is away, a port that is taken); nothing is left then.
    """

    def __init__(self, config: ControlConfig, on_failure: Callable[[str], object] = log.critical) -> None:
        self._on_failure = on_failure
        self._config = config
        self._parts = Parts()
        self._loops: list[Loop] = []
        self._stopping = False
        self._nodes: NodeParts | None = None
        try:
            self._build(config)
        except BaseException:
            self._parts.stop(Deadline(5))
            raise

    def _build(self, config: ControlConfig) -> None:
        prepare_grpc()  # before grpc is imported
        from fluxlib.control.agents.client.connector import AgentConnector
        from fluxlib.control.agents.enrolment import EnrolmentService
        from fluxlib.control.agents.fleet import Fleet
        from fluxlib.control.agents.health import Health
        from fluxlib.control.agents.leadership import RENEW_EVERY, Leadership
        from fluxlib.control.agents.membership import Membership
        from fluxlib.control.agents.pushes import FunctionPusher
        from fluxlib.control.agents.reconciler import AgentReconciler, revoked_at
        from fluxlib.control.agents.renewal import CHECK_EVERY, OwnIdentity, Renewal
        from fluxlib.control.agents.replication import Replication
        from fluxlib.control.executions.service import ExecutionService
        from fluxlib.control.functions.deploy import REFRESH_EVERY, FunctionService
        from fluxlib.control.http import Api
        from fluxlib.control.key_reload import LOOK_EVERY, KeyReload
        from fluxlib.control.server import WebServer
        from fluxlib.control.services import Services
        from fluxlib.control.status import SAMPLE_EVERY, StatusService

        session = secrets.token_hex(8)
        shared = bool(config.redis_addr)
        with_tls = not config.disable_grpc_tls

        store = open_control_store(config.redis_addr, config.state_dir)
        self._parts.add("store", lambda deadline: store.close(max(_FLUSH, deadline.remaining())))
        authority = Authority.open(config.certs_dir) if with_tls else None
        own = OwnIdentity(authority) if authority is not None else None
        timers = Timers("control-timers").start()
        self._parts.add("timers", timers.stop)

        leadership = self._leadership = Leadership(store, session, shared=shared)
        fleet = Fleet(store, leadership)
        pusher = FunctionPusher(fleet, store.archive)
        self._parts.add("pushes", pusher.stop)
        functions = self._functions = FunctionService(
            store, fleet, pusher, max_archive_bytes=config.max_archive_mb * _MB
        )
        executions = self._executions = ExecutionService(
            store,
            fleet,
            functions,
            timers,
            session,
            kill_grace=config.kill_grace_sec,
            keep_for=config.execution_ttl_sec,
            max_records=config.retention.max_records,
            max_waiting=config.max_waiting,
            max_backlog_bytes=config.max_backlog_mb * _MB,
            shared=shared,
            lease=lambda: leadership.lease,
        )
        revoked = partial(revoked_at, store)
        connector = AgentConnector(own.current if own is not None else lambda: None, session, timers, revoked)
        reconciler = AgentReconciler(
            store,
            fleet,
            connector,
            executions,
            functions,
            pusher,
            leadership,
            tls=with_tls,
            lost_after=config.agent_lost_after_sec,
        )
        membership = self._membership = Membership(fleet, reconciler, connector, executions)
        replication = Replication(
            store, fleet, reconciler, membership, executions, leadership, interval=config.health_interval_sec
        )
        health = Health(fleet, reconciler, leadership, interval=config.health_interval_sec)

        status = self._status = StatusService(
            store,
            fleet,
            tls=with_tls,
            leads=lambda: leadership.leads,
            connecting=fleet.untried,
            stopping=lambda: self._stopping,
        )
        self._add_loop(health.loop)
        self._add_loop(replication.loop)
        self._add_loop(Loop("leadership", leadership.tick, RENEW_EVERY))
        self._add_loop(Loop("executions", executions.tick, _EXECUTIONS_EVERY))
        self._add_loop(Loop("own-figures", status.tick, SAMPLE_EVERY))
        if shared:
            self._add_loop(Loop("functions", functions.tick, REFRESH_EVERY))
        if authority is not None and own is not None:
            renewal = Renewal(authority, own, fleet, leadership)
            status.warn(renewal.warnings)
            self._add_loop(Loop("renewal", renewal.tick, CHECK_EVERY))

        if config.providers.any():
            from fluxlib.control.nodes.parts import build_nodes

            self._nodes = build_nodes(
                config,
                authority or Authority.open(config.certs_dir),
                store,
                fleet,
                functions,
                executions,
                membership,
                leadership,
            )
            status.warn(self._nodes.warnings)
            for loop in self._nodes.loops:
                self._add_loop(loop)

        self.services = Services(
            config,
            functions,
            executions,
            membership,
            status,
            nodes=self._nodes.service if self._nodes is not None else None,
            enrolment=EnrolmentService(authority, fleet, config.agent_port, revoked) if authority is not None else None,
        )
        api = Api(self.services)
        reload = KeyReload(config.path, api.pipeline.keys.take)
        self._add_loop(Loop("keys", reload.tick, LOOK_EVERY))
        self._server = WebServer(api, config, on_failure=self._on_failure)
        status.watch(self._server)
        self._parts.add("HTTP", self._server.stop)

    def start(self) -> None:
        """Take over what a former life left, then serve. Raises StoreUnavailable."""
        self._leadership.tick(time.time())
        self._functions.refresh()
        self._executions.start()
        self._membership.start()
        for loop in self._loops:
            loop.start()
        self._server.start()
        log.info("Flux answers on %s:%d", self._config.listen_host, self._server.port)
        if self._config.disable_grpc_tls:
            log.warning(
                "connections to agents are WITHOUT TLS (disable_grpc_tls): anybody who reaches one can run programs"
            )

    def join_own(self, agent_id: str, address: str) -> None:
        """Take in the agent this process has started itself: it listens elsewhere when its port was taken.

        Raises AgentError with the reason, StoreUnavailable.
        """
        if any(view.record.agent_id == agent_id for view in self._membership.views()):
            self._membership.node_ready(agent_id, address)
        else:
            self._membership.register(address, legacy=False)

    def warn(self, warnings: Callable[[], Sequence[str]]) -> None:
        """Let /health tell these as well."""
        self._status.warn(warnings)

    def stop(self, deadline: Deadline) -> None:
        """Take nothing new, let what callers wait for end, then take the floor away.

        Queued and running asynchronous executions go on: the next life takes them over.
        """
        self._stopping = True
        # The listening socket closes at once, open requests are answered meanwhile.
        answering = threading.Thread(target=self._server.stop, args=(deadline,), name="http-stop")
        answering.start()
        self._guarded("executions", lambda: self._executions.stop(Deadline(deadline.remaining() - _FAREWELL)))
        nodes = self._nodes
        if nodes is not None:
            self._guarded("nodes", lambda: nodes.stop(deadline))
        for loop in self._loops:
            loop.stop(deadline)
        # Calls still in flight end as lost, and their callers are told.
        self._guarded("connections", lambda: self._membership.stop(Deadline(min(1.0, deadline.remaining()))))
        answering.join(deadline.remaining() + 2)
        self._guarded("leases", self._leadership.resign)
        self._parts.stop(deadline)

    def _add_loop(self, loop: Loop) -> None:
        self._loops.append(loop)
        self._status.watch(loop)

    def _guarded(self, name: str, stop: Callable[[], object]) -> None:
        """One failing stop never skips the next."""
        try:
            stop()
        except Exception:
            log.exception("stopping the %s failed", name)


def say_what_is_odd(config: ControlConfig) -> None:
    for warning in config.warnings:
        log.warning("%s: %s", config.path, warning)
    for note in config.notes:
        log.info("%s: %s", config.path, note)


def serve(config: ControlConfig, stop: StopSignal) -> int:
    """Run the control plane until told to stop; the exit code. Raises FluxError when it cannot start."""
    say_what_is_odd(config)
    control = Control(config, stop.fail)
    try:
        control.start()
        report_ready()
        stop.wait()
        log.info("stopping")
    finally:
        control.stop(Deadline(stop.seconds(config.shutdown_sec)))
    log.info("stopped")
    return 1 if stop.failed else 0
