"""The tests in ``inside`` run in a Windows Python: on Windows itself, or under Wine through test_agent.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from windows.lab import Lab

collect_ignore = [] if sys.platform == "win32" else ["inside"]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The Wine lab; every Windows program in it is ended afterwards."""
    from tests.support.wine import the_lab

    made = the_lab()
    yield made
    made.shut_down()


@pytest.fixture(scope="session")
def program(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small .exe that says its arguments, and with ``tree FILE`` leaves a detached child behind."""
    from tests.windows.c_program import SOURCE
    from windows.lab import compile_c

    path = tmp_path_factory.mktemp("c") / "main.exe"
    compile_c(SOURCE, path)
    return path.read_bytes()
