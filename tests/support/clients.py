"""The control plane's side of the wire without a control plane: a connector, a client, and what it was told."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxlib.control.agents.client.client import AgentClient
from fluxlib.control.agents.client.connector import AgentConnector
from fluxlib.control.agents.connection import ConnectionEvents, Taken
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline, Timers
from fluxlib.model import ExecutionRecord, ExecutionRequest, FunctionSpec
from fluxlib.pki import Authority, Identity
from tests.support.programs import make_zip

SCRIPT = """#!/bin/sh
case "$1" in
  echo) shift; for arg in "$@"; do echo "[$arg]"; done ;;
  cat) cat ;;
  exit) exit "$2" ;;
  count) echo run >> "$2"; sleep "$3"; echo done ;;
  sleep) echo started; exec sleep "$2" ;;
  bytes) printf '\\377\\000\\376' ;;
  much) head -c "$2" /dev/zero ;;
  drip) echo one; sleep 0.3; echo two; sleep 0.3; echo three ;;
esac
"""


class Told:
    """What a connection told, in order, and a way to wait for it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.said: list[tuple[str, Any]] = []

    def say(self, what: str, value: Any = None) -> None:
        with self._condition:
            self.said.append((what, value))
            self._condition.notify_all()

    def wait(self, wanted: Callable[[str, Any], bool], what: str, seconds: float = 15) -> Any:
        """The value of the first that fits."""

        def found() -> list[Any]:
            return [value for name, value in self.said if wanted(name, value)]

        with self._condition:
            assert self._condition.wait_for(found, seconds), f"never told: {what}; but {self.said}"
            return found()[0]

    def attached(self, times: int = 1) -> None:
        with self._condition:
            fits = self._condition.wait_for(lambda: self.said.count(("attached", True)) >= times, 15)
            assert fits, f"not attached {times} times: {self.said}"

    def detached(self) -> None:
        self.wait(lambda name, value: (name, value) == ("attached", False), "detached")

    def ended(self, execution_id: str, seconds: float = 15) -> ExecutionRecord:
        def fits(name: str, value: Any) -> bool:
            return name == "ended" and value.execution_id == execution_id

        record: ExecutionRecord = self.wait(fits, f"the end of {execution_id}", seconds)
        return record

    def missing(self, execution_id: str) -> None:
        self.wait(lambda name, value: (name, value) == ("missing", execution_id), f"{execution_id} is missing")

    def ended_or_missing(self, execution_id: str) -> None:
        def fits(name: str, value: Any) -> bool:
            return (name, value) == ("missing", execution_id) or (
                name == "ended" and value.execution_id == execution_id
            )

        self.wait(fits, f"the end of {execution_id}")

    def events(self) -> ConnectionEvents:
        return ConnectionEvents(
            ended=lambda record: self.say("ended", record),
            missing=lambda execution_id: self.say("missing", execution_id),
            full=lambda name: self.say("full", name),
            greeted=lambda instance_id: self.say("greeted", instance_id),
            freed=lambda name: self.say("freed", name),
            attached=lambda yes: self.say("attached", yes),
            stopping=lambda: self.say("stopping"),
        )


class Answer:
    """The answer to one execution. A second one is a fault."""

    def __init__(self, told: Told | None = None) -> None:
        self._arrived = threading.Event()
        self._told = told
        self.answers: list[ExecutionRecord | FluxError] = []

    def __call__(self, answer: ExecutionRecord | FluxError) -> None:
        self.answers.append(answer)
        if self._told is not None:
            self._told.say("answer", answer)
        self._arrived.set()

    @property
    def arrived(self) -> bool:
        return self._arrived.is_set()

    def get(self, seconds: float = 20) -> ExecutionRecord | FluxError:
        assert self._arrived.wait(seconds), "no answer"
        assert len(self.answers) == 1
        return self.answers[0]

    def record(self, seconds: float = 20) -> ExecutionRecord:
        answer = self.get(seconds)
        assert isinstance(answer, ExecutionRecord), answer
        return answer


class Client:
    """An AgentClient, what it told, and short ways to use it."""

    def __init__(self, connection: AgentClient, told: Told) -> None:
        self.connection, self.told = connection, told

    def start(self, execution_id: str, *args: str, name: str = "f", **fields: Any) -> Answer:
        answer = Answer(self.told)
        self.connection.execute(ExecutionRequest(execution_id, name, args, **fields), answer)
        return answer

    def run(self, execution_id: str, *args: str, **fields: Any) -> ExecutionRecord:
        return self.start(execution_id, *args, **fields).record()

    def deploy(self, archive: bytes = make_zip({"main.sh": SCRIPT}), **fields: Any) -> Taken:
        spec = FunctionSpec(**{"name": "f", "handler": "main.sh", "max_concurrency": 100, **fields})
        return self.connection.deploy(spec, spec.digest(), hashlib.sha256(archive).hexdigest(), archive)


class Side:
    """Flux's side: its identity (None = plain text) and one session."""

    def __init__(self, certs: Path | None, timers: Timers, session: str = "session-of-the-test") -> None:
        self.authority = Authority.open(certs) if certs is not None else None
        self._identity = self.authority.flux_identity() if self.authority is not None else None
        self.connector = AgentConnector(lambda: self._identity, session, timers)

    def identify(self, identity: Identity | None) -> None:
        self._identity = identity

    @contextmanager
    def connected(self, address: str, **how: Any) -> Iterator[Client]:
        """A client of the agent there, attached if it is one of ours."""
        probe = self.connector.probe(address, **how)
        told = Told()
        connection = self.connector.connect(probe, told.events())
        try:
            if probe.inventory is not None:
                told.attached()
            yield Client(connection, told)
        finally:
            connection.close(Deadline(0))


@contextmanager
def running_timers() -> Iterator[Timers]:
    timers = Timers("test-timers").start()
    try:
        yield timers
    finally:
        timers.stop(Deadline(5))
