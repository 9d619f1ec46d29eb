"""What an operator greps for: each event of docs/reliability.md's table is found in the log of real processes."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.rig import Marks, deploy, pass_time
from tests.faults.test_table import _FAST, Redis, World
from tests.support.programs import TOP, Agent, Flux, Program, wait_until

_TABLE = (TOP / "docs/reliability.md").read_text(encoding="utf-8").partition("## What to look for in the log")[2]
GREP = re.compile(_TABLE.partition("grep -iE '")[2].partition("'")[0], re.IGNORECASE)


def lines_of_the_table() -> list[str]:
    rows = re.findall(r"^\| .+ \| `(.+)` \|$", _TABLE.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 10
    return rows


def pattern_of(line: str) -> re.Pattern[str]:
    """Capital words stand for anything."""
    return re.compile(".+".join(re.escape(part) for part in re.split(r"\b[A-Z]+\b", line)))


@pytest.mark.parametrize("line", lines_of_the_table())
def test_the_grep_finds_the_line_whatever_it_is_about(line: str) -> None:
    assert GREP.search(re.sub(r"\b[A-Z]+\b", "x", line)), line


@pytest.mark.parametrize("line", lines_of_the_table())
def test_the_line_is_one_that_flux_logs(line: str) -> None:
    """As it is in the source, whose placeholders are the table's capital words."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (TOP / "fluxlib/control").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*"', "", source)
    fixed = [part for part in re.split(r"\b[A-Z]+\b|\b3\b", line) if part.strip(" ()")]
    assert re.search(".{0,8}".join(re.escape(part) for part in fixed), joined), line


def found(programs: Iterable[Program], begin: str) -> bool:
    """Whether the grep over their logs finds the line of the table that begins so."""
    (line,) = [line for line in lines_of_the_table() if line.startswith(begin)]
    grepped = [one for program in programs for one in program.log.read_text().splitlines() if GREP.search(one)]
    return any(pattern_of(line).search(one) for one in grepped)


@pytest.mark.faults
def test_an_operators_grep_finds_what_happened(tmp_path: Path) -> None:
    with Marks() as marks, Redis(tmp_path / "redis") as redis:
        settings = {**_FAST, "redis_addr": redis.address, "max_waiting": 4}
        first = Flux(tmp_path, "first", **settings)
        second = Flux(tmp_path, "second", certs_dir=str(first.certs), **settings)
        with first, Agent(tmp_path, first, "worker-1", detach_grace_sec=2) as agent, second:
            both = (first, second)
            first.register(agent)
            deploy(first, marks, "job", max_concurrency=1, max_concurrency_behavior="wait")
            deploy(first, marks, "short", timeout=1)
            wait_until(lambda: second.status_of("worker-1") == "online", "the second to see the agent")

            assert second.api.execute("short", "plain", "30")[1]["timed_out"]
            wait_until(lambda: found(both, "timeout of execution"), "the timeout")

            agent.kill()
            wait_until(lambda: found(both, "agent ID is unreachable"), "the agent to be missed")
            wait_until(lambda: found(both, "agent ID has been unreachable"), "the agent to be given up")
            agent.start()
            wait_until(lambda: second.api.execute("job", "plain", "0")[0] == 200, "the agent to be back")

            world = World(first, agent, redis, marks)
            for _ in range(3):
                world.submit("plain", "3")
            first.kill()
            wait_until(lambda: found(both, "adopted N orphaned"), "the other one's executions to be adopted")

            def is_full() -> bool:
                return second.api.call("POST", "/execute/job/async", {"args": ["plain", "6"]})[0] == 503

            wait_until(is_full, "the backlog to be full")
            wait_until(lambda: found(both, "the backlog is full"), "the refusal")

            wait_until(lambda: second.api.call("GET", "/health")[1]["leader"], "the second to lead")
            redis.signal(signal.SIGSTOP)
            pass_time(17)  # a lease of 15 s
            redis.signal(signal.SIGCONT)
            for begin in ("leader lease expired", "own lease was not renewed"):
                wait_until(lambda line=begin: found(both, line), begin)  # type: ignore[misc]
