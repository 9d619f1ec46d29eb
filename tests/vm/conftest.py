"""One machine with one agent for all tests here: a boot costs more than all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.lab import debian
from tests.support.machine import Machine
from tests.support.programs import free_port
from tests.vm.rig import PORT, GuestAgent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/vm/" in str(item.path):
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    port = free_port()
    with Machine(debian(), tmp_path_factory.mktemp("vm"), name="lab", forwards={port: PORT}, memory_mb=1536) as machine:
        yield machine


@pytest.fixture(scope="session")
def agent(machine: Machine) -> Iterator[GuestAgent]:
    (port,) = [ours for ours, theirs in machine.forwards.items() if theirs == PORT]
    agent = GuestAgent(machine, port)
    agent.install()
    yield agent
    agent.close()
