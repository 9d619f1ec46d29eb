"""Flux with one agent on this machine: `make run`, and a double click on flux.exe.

The agent is a process of its own, reached over mutual TLS on loopback as any
other. It is held by a pipe: when Flux closes it, or is gone without a word, the
agent stops. A Ctrl-C in the terminal reaches Flux alone, which stops the two in
order.
"""

from __future__ import annotations

import contextlib
import locale
import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import yaml

from fluxlib.clock import steady_time
from fluxlib.config.agent import load_agent, read_agent
from fluxlib.config.control import ControlConfig
from fluxlib.config.environment import for_child
from fluxlib.config.files import AGENT_PORT, read_file
from fluxlib.config.first_start import write_new
from fluxlib.control.app import Control, say_what_is_odd
from fluxlib.errors import AgentRevoked, CannotStart, FluxError, InUse
from fluxlib.filelock import ExclusiveLock
from fluxlib.lifecycle import Deadline, Loop, StopSignal, pause
from fluxlib.log import relay
from fluxlib.pki.authority import Authority, enrolment_files
from fluxlib.pki.reading import normalised, read_leaf

log = logging.getLogger(__name__)

LOCAL_ID = "local"
# Held in the state directory while `flux run` has it.
LOCK = "run.lock"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
# Its own shutdown_sec, and the time it gives itself to kill what is left.
_AGENT_STOPS_WITHIN = 7.0
# How long the greeting waits for the agent, and how often it looks.
_COMES_UP_WITHIN, _LOOK_EVERY = 5.0, 0.02
# An agent that has lived for this long has not failed in a row.
_STABLE = 60.0


def prepare_agent(config: ControlConfig, directory: Path, port: int = AGENT_PORT) -> Path:
    """The local agent's configuration in ``directory``, made on the first start; its path. Raises CannotStart."""
    path = directory / "agent.yaml"
    try:
        if not path.exists():
            _make_agent(config, path, port)
        elif not config.disable_grpc_tls and _has_own_certificates(path):
            _mend_certificates(config, directory.resolve())
    except OSError as error:
        raise _cannot_write(error, directory) from error
    return path


def _cannot_write(error: OSError, directory: Path) -> CannotStart:
    where = error.filename or directory
    return CannotStart(f"{where} cannot be written: {error.strerror}. Name a directory of your own with --state")


def _make_agent(config: ControlConfig, path: Path, port: int) -> None:
    directory = path.parent
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    settings = {
        "agent_id": LOCAL_ID,
        "port": port,
        "listen_host": "127.0.0.1",
        "state_dir": "state",
        # A development machine is neither set up nor meant to hold strangers' programs apart; Windows' jobs need
        # no setting up.
        "isolation": "default" if sys.platform == "win32" else "off",
        "shutdown_sec": 1,
        "tls": {"enabled": False},
    }
    if config.disable_grpc_tls:
        settings["insecure"] = True  # it listens on the loopback address alone
    else:
        settings["tls"] = yaml.safe_load(_write_certificates(Authority.open(config.certs_dir), directory))["tls"]
    write_new(path, "# The agent of this machine, made by Flux.\n" + yaml.safe_dump(settings, sort_keys=False))


def _write_certificates(authority: Authority, directory: Path, *, after: int = 0) -> bytes:
    """New ones, enrolled after ``after`` (epoch milliseconds); the agent.yaml that goes with them."""
    files = enrolment_files(authority.issue_agent(LOCAL_ID, after=after), LOCAL_ID, AGENT_PORT)
    config = files.pop("agent.yaml")
    for name, content in files.items():
        with open(os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(content)
    return config


def _has_own_certificates(path: Path) -> bool:
    """Whether the agent uses the certificates that Flux made for it; others are left alone."""
    agent = read_agent(read_file(path), path)
    return [agent.tls_ca_cert, agent.tls_cert_file, agent.tls_key_file] == _certificate_files(path.resolve().parent)


def _certificate_files(directory: Path) -> list[Path]:
    return [directory / name for name in ("ca.pem", "agent.pem", "agent-key.pem")]


def _mend_certificates(config: ControlConfig, directory: Path) -> None:
    """New ones where Flux would refuse this agent for ever: they expired while nothing ran, or the CA is new.

    Nobody else enrols it again.
    """
    authority = Authority.open(config.certs_dir)
    ca, certificate, key = _certificate_files(directory)
    if _is_that_of(authority, ca) and read_leaf(certificate, key, authority.ca_pem) is not None:
        return
    log.warning("the local agent's certificate has expired or is of another CA: it gets a new one")
    _write_certificates(authority, directory)


def _is_that_of(authority: Authority, ca: Path) -> bool:
    try:
        return normalised(ca.read_bytes()) == normalised(authority.ca_pem)
    except (FileNotFoundError, ValueError):
        return False


class LocalAgent:
    """Keeps the agent's process alive, on a port that is free at each start.

    ``enrol(after)`` gives it new certificates, enrolled after that time (epoch milliseconds).
    """

    def __init__(self, config_file: Path, enrol: Callable[[int], object]) -> None:
        self._config_file = config_file
        self._enrol = enrol
        self._may_enrol = True  # later a deregistered agent stays away until the next start
        self._wanted_port = load_agent(config_file).port
        self._port = 0
        self._join: Callable[[str], object] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._launched_at = 0.0
        self._joined = False
        self._failures = 0
        self._not_before = 0.0
        self._problem = ""
        self._lock = threading.Lock()
        self._stopping = False
        self._watch = Loop("local-agent", self.tick, 0.5, steady_time)

    def start(self) -> LocalAgent:
        """Starts the process; it comes up beside the caller. Raises CannotStart."""
        self._launch(steady_time())
        return self

    def join(self, join: Callable[[str], object], within: Deadline) -> None:
        """``join(address)`` makes it known to Flux, now and whenever it has moved; waits for the first time."""
        self._join = join
        self._join_first(within)
        if not self._joined:
            self._join_first(within)
        self._watch.start()

    def _join_first(self, within: Deadline) -> None:
        while not (answers := self._answers()) and within.remaining() and self._lives():
            pause(_LOOK_EVERY)
        if answers:
            self.tick(steady_time())

    def warnings(self) -> list[str]:
        """Why there is no agent on this machine now."""
        return [f"the agent of this machine: {self._problem}"] if self._problem else []

    def tick(self, now: float) -> None:
        """Make it known once it answers; start it again when it has ended. ``now`` is epoch seconds."""
        with self._lock:
            if self._stopping:
                return
            if self._process is not None and self._process.poll() is not None:
                self._ended(self._process.returncode, now)
            if self._process is None:
                if now >= self._not_before:
                    self._launch(now)
                return
        if self._failures and now - self._launched_at > _STABLE:
            self._failures = 0
        if not self._joined and now >= self._not_before and self._join is not None and self._answers():
            self._make_known(now)

    def _make_known(self, now: float) -> None:
        assert self._join is not None
        try:
            self._join(f"127.0.0.1:{self._port}")
            self._joined, self._problem = True, ""
            self._may_enrol = False
        except AgentRevoked as error:
            if not self._may_enrol:
                self._not_joined(error, now)
                return
            log.info("the local agent was deregistered: it gets a new certificate")
            self._may_enrol = False
            self._replace(error.revoked_at, now)
        except FluxError as error:
            self._not_joined(error, now)

    def _not_joined(self, error: FluxError, now: float) -> None:
        if error.message != self._problem:
            log.warning("the local agent cannot be registered yet: %s", error.message)
        self._problem = error.message
        self._not_before = now + self._pause()

    def _replace(self, revoked_at: int, now: float) -> None:
        """Start it again with new certificates."""
        with self._lock:
            if self._stopping:
                return
            self._enrol(revoked_at)
            process, self._process = self._process, None
            if process is not None:
                _end(process, _AGENT_STOPS_WITHIN)
            self._launch(now)

    def _lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _pause(self) -> float:
        self._failures += 1
        return min(_FIRST_PAUSE * float(2 ** min(self._failures - 1, 10)), _LONGEST_PAUSE)

    def stop(self, deadline: Deadline) -> None:
        self._watch.stop(deadline)
        with self._lock:
            self._stopping = True
            process, self._process = self._process, None
        if process is not None:
            _end(process, max(1.0, min(deadline.remaining(), _AGENT_STOPS_WITHIN)))

    def _launch(self, now: float) -> None:
        port = usable_port(self._wanted_port)
        if port != self._port:
            self._port, self._joined = port, False
        self._launched_at = now
        program = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "flux"]
        environment = for_child(AGENT_CONFIG=str(self._config_file))
        if not getattr(sys, "frozen", False):
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            self._process = subprocess.Popen(
                [*program, "agent", "--until-stdin-closes", "--port", str(port)],
                stdin=subprocess.PIPE,
                env=environment,
                stderr=subprocess.PIPE if sys.platform == "win32" else None,
                # Out of the terminal's foreground group: stopping it is Flux's to say.
                start_new_session=sys.platform != "win32",
                # A console of its own that nobody sees: closing Flux's window ends what is attached to it,
                # and the functions, which share their agent's, would end before anybody could say why.
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)
                | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        except OSError as error:
            raise CannotStart(f"the local agent cannot be started: {error}") from error
        if self._process.stderr is not None:
            # Windows' consoles cannot be written to from another console.
            threading.Thread(
                target=_copy_log, args=(self._process.stderr,), name="local-agent-log", daemon=True
            ).start()

    def _ended(self, code: int, now: float) -> None:
        again_in = self._pause()
        self._problem = f"it ended with {code}"
        log.error("the local agent ended with %d; starting it again in %.1f s", code, again_in)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
        self._not_before = now + again_in

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
            return True
        return False


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        log.warning("the local agent did not stop in time: killing it")
        process.kill()
        process.wait()


def _copy_log(source: IO[bytes]) -> None:
    """What the agent says goes where this process says it, until the agent has ended."""
    with source:
        for line in source:
            relay(line.decode(locale.getencoding(), "replace").rstrip("\r\n"))


def usable_port(wanted: int) -> int:
    """The wanted port, or another one while that is taken (by an agent that is installed here, say)."""
    for port in (wanted, 0):
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            if sys.platform != "win32":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise CannotStart("no port is free on 127.0.0.1")


def serve_local(
    config: ControlConfig, directory: Path, stop: StopSignal, greet: Callable[[ControlConfig], None]
) -> int:
    """Run Flux and its local agent until told to stop; the exit code. Raises FluxError when it cannot start.

    ``greet`` is called once Flux answers, for the person in front of it.
    """
    lock = _hold(config, directory)
    try:
        return _serve(config, directory, stop, greet)
    finally:
        lock.release()


def _hold(config: ControlConfig, directory: Path) -> ExclusiveLock:
    """Before anything is started: a second one would fail at the agent's directory or the port, and say only that."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return ExclusiveLock(directory / LOCK, "stop it first")
    except InUse as error:
        raise CannotStart(f"already running here ({error.holder}), it answers at {config.own_url}") from error
    except OSError as error:
        raise _cannot_write(error, directory) from error


def _serve(config: ControlConfig, directory: Path, stop: StopSignal, greet: Callable[[ControlConfig], None]) -> int:
    say_what_is_odd(config)
    # First, because it comes up while Flux is built, and would be missed by it otherwise.
    agent_config = prepare_agent(config, directory / "agent")

    def enrol(after: int) -> None:
        if _has_own_certificates(agent_config):
            _write_certificates(Authority.open(config.certs_dir), agent_config.parent, after=after)

    agent = LocalAgent(agent_config, enrol).start()
    control: Control | None = None
    try:
        control = Control(config, stop.fail)
        control.warn(agent.warnings)
        control.start()
        running = control
        agent.join(lambda address: running.join_own(LOCAL_ID, address), Deadline(_COMES_UP_WITHIN))
        greet(config)
        stop.wait()
        log.info("stopping: what callers wait for may end for %.0f s; once more ends it at once", config.shutdown_sec)
    finally:
        # Flux first: what callers wait for may end; then the agent, which records what it has to end.
        # In a hurry each gets half of the time.
        if control is not None:
            control.stop(Deadline(stop.seconds(2 * config.shutdown_sec) / 2))
        agent.stop(Deadline(stop.seconds(2 * _AGENT_STOPS_WITHIN) / 2))
    log.info("stopped")
    return 1 if stop.failed else 0


def greet(config: ControlConfig) -> None:
    print("\n".join(welcome(config)), flush=True)


def welcome(config: ControlConfig) -> list[str]:
    """What to do next, in plain words."""
    url, path = config.own_url, shlex.quote(str(config.path))
    return [
        "",
        f"Flux answers at {url}, with one agent on this machine.",
        f"The key is in {config.path} (api_key).",
        "Next, in a second terminal here (the README goes on from there):",
        f"  export KEY=$(sed -n 's/^api_key: *//p' {path}) FLUX={url}",
        '  curl -H "X-API-Key: $KEY" -X PUT --data-binary @examples/hello-shell/function.yaml $FLUX/functions',
        "Ctrl-C stops both.",
        "",
    ]
