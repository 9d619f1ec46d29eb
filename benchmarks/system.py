"""Flux and its agents as processes, for one measurement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import floor, load, processes
from tests.support.programs import API_KEY, Agent, Api, Flux

# What every benchmark function declares unless it says otherwise.
PLENTY = {"max_concurrency": 250, "max_concurrency_behavior": "wait", "timeout": 120}


@dataclass(frozen=True)
class Options:
    """``smoke``: as little as shows that everything runs. ``seconds`` is the length of one burst."""

    smoke: bool = False
    seconds: float = 5.0
    lab: bool = False


@dataclass
class System:
    """What runs. Agents' isolation is off unless the measurement says otherwise."""

    directory: Path
    flux: Flux
    agents: list[Agent]
    floor_binary: Path
    program: Path

    @property
    def api(self) -> Api:
        return self.flux.api

    @property
    def url(self) -> str:
        return self.flux.api.url

    @property
    def pids(self) -> dict[str, int]:
        """Process IDs by name, for ``processes.usage``."""
        named = {"flux": self.flux, **{agent.agent_id: agent for agent in self.agents}}
        if len(self.agents) == 1:
            named = {"flux": self.flux, "agent": self.agents[0]}
        return {name: program.process.pid for name, program in named.items() if program.process is not None}

    def floor_cpu_ms(self) -> float:
        """Measured anew each time: the machine drifts."""
        return floor.measure(self.floor_binary, self.program)["cpu_ms"]

    def deploy(self, name: str, content: bytes | str, **spec: Any) -> None:
        self.api.deploy({"name": name, "handler": "program", **PLENTY, **spec}, {"program": content})

    def deploy_program(self, name: str, **spec: Any) -> None:
        """The small compiled one."""
        self.deploy(name, self.program.read_bytes(), **spec)

    def call(self, name: str, args: list[str] | None = None, suffix: str = "") -> bytes:
        """The bytes of one call, for ``load.run``."""
        body = json.dumps({"args": args or []}).encode()
        return load.post(f"{self.url}/execute/{name}{suffix}", API_KEY, body)

    def get(self, path: str) -> bytes:
        return load.get(f"{self.url}{path}", API_KEY)

    def run(self, request: bytes, connections: int, seconds: float, at_most: int = 0) -> load.Outcome:
        return load.run(self.url, request, connections, seconds, at_most)

    def usage(self) -> processes.Usage:
        return processes.usage(self.pids)


@contextmanager
def system(agents: int = 1, *, settings: dict[str, Any] | None = None, **agent_settings: Any) -> Iterator[System]:
    """A Flux with ``settings`` and its agents over mTLS, synchronized. Everything is gone afterwards."""
    with floor.workshop() as directory, ExitStack() as stack:
        flux = stack.enter_context(Flux(directory, **(settings or {})))
        fleet = []
        for number in range(1, agents + 1):
            agent = Agent(directory, flux, f"worker-{number}", **{"max_tasks": 300, **agent_settings})
            fleet.append(stack.enter_context(agent))
            flux.register(agent)
        yield System(directory, flux, fleet, directory / "floor", directory / "program")
