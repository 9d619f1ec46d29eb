"""What every test gets: a state directory of its own, and a detector of leaks that is always on.

A test that leaves a thread or a child process behind fails. So does the whole run
when something is left after the last fixture's end: of a module's fixture, or a
function's program whose agent is gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.leaks import Detector, Places

_SESSION = pytest.StashKey[tuple[Detector, Places]]()
_FOUND = pytest.StashKey[list[str]]()


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads and children that appear during a test must be gone at its end.

    Waits a moment for those on their way out; module- and session-wide fixtures
    set up before the test are not counted. Mark ``leaks`` with a reason to have
    them looked for at the end of the session only.
    """
    detector = Detector()
    yield
    if request.node.get_closest_marker("leaks") is None and (left := detector.left(5)):
        pytest.fail(f"left behind: {left}")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """An empty directory only its owner may enter, as the programs make theirs."""
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(scope="session")
def top() -> Path:
    """The top of the source tree."""
    return Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks(reason): this test may leave threads or processes behind")
    config.stash[_FOUND] = []
    # Children the tests start must not need an installed package.
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)


# -- the end of a session: under xdist each worker has its own and reports what it found --


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and session.config.getoption("numprocesses", None):
        return  # xdist's own process runs no test, and its workers are its children
    places = Places()
    places.watch()
    session.config.stash[_SESSION] = (Detector(), places)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    # After the others: the last fixtures end in one of them.
    yield
    config = session.config
    if _SESSION in config.stash:
        detector, places = config.stash[_SESSION]
        places.add(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
        config.stash[_FOUND] = detector.left(10, places.orphans)
    if hasattr(config, "workerinput"):
        config.workeroutput["left_behind"] = config.stash[_FOUND]  # type: ignore[attr-defined]
    elif config.stash[_FOUND]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_FOUND] += getattr(node, "workeroutput", {}).get("left_behind", [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for one in config.stash[_FOUND]:
        terminalreporter.write_line(f"LEFT BEHIND at the end of the session: {one}", red=True)
