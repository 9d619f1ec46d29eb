"""The limit of open files: an agent's own, and that of the programs it starts."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import psutil
import pytest

from fluxlib.descriptors import MOST, raise_limit
from tests.agent.running import Running
from tests.support.programs import Agent, Flux, make_zip


@contextlib.contextmanager
def _serving(directory: Path, *, soft: int, hard: int) -> Iterator[tuple[Agent, Running]]:
    without_tls = cast(Flux, SimpleNamespace(tls=False))
    prefix = ("prlimit", f"--nofile={soft}:{hard}", "--")
    with (
        Agent(directory, without_tls, "worker-1", prefix=prefix) as agent,
        grpc.insecure_channel(agent.address) as channel,
    ):
        yield agent, Running(directory, channel, cast(Any, None))


def test_an_agent_takes_all_it_may_have_and_gives_programs_what_they_are_to_have(tmp_path: Path) -> None:
    with _serving(tmp_path, soft=256, hard=4096) as (agent, calls):
        assert agent.process is not None
        assert psutil.Process(agent.process.pid).rlimit(psutil.RLIMIT_NOFILE) == (4096, 4096)
        code = make_zip({"main.sh": "#!/bin/sh\nulimit -Sn\n"})
        calls.deploy("usual", code)
        calls.deploy("few", code, max_open_files=77)
        # Not only the first, for which the spawner still has the limit it was started with.
        for name, limit in (("usual", 1024), ("few", 77), ("usual", 1024)):
            answer = calls.run(name=name)
            assert answer.output.decode().strip() == str(limit), (name, answer.error)


@pytest.mark.parametrize(
    ("before", "after"), [((512, 1024), (1024, 1024)), ((1024, 1 << 20), (MOST, 1 << 20)), ((99_999, 1 << 20), None)]
)
def test_it_is_raised_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int] | None
) -> None:
    limits = [before]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.append(both))
    assert raise_limit() == (after or before)[0]
    assert limits[1:] == ([after] if after else [])
