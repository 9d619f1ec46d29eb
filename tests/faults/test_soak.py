"""Twenty thousand mixed executions at 64 connections on two agents: everything that could grow stays flat."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.rig import having
from tests.support.programs import API_KEY, Agent, Flux, Program, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

COUNT = int(os.environ.get("FLUX_SOAK_EXECUTIONS", "20000"))
CONNECTIONS = 64
SCRIPT = """#!/bin/sh
case "$1" in
  fail) exit 3 ;;
  big) head -c 100000 /dev/zero | tr '\\0' x ;;
  child) (sleep 0.2; echo late) >/dev/null 2>&1 & ;;
  sleep) sleep "$2" ;;
esac
echo ok
"""


class Figures:
    """What one program holds, its children included."""

    def __init__(self, program: Program) -> None:
        assert program.process is not None
        main = psutil.Process(program.process.pid)
        family = [main, *main.children(recursive=True)]
        self.rss_mb = sum(process.memory_info().rss for process in family) / 2**20
        self.threads = sum(process.num_threads() for process in family)
        self.descriptors = sum(process.num_fds() for process in family)
        self.processes = len(family)

    def __repr__(self) -> str:
        return f"{self.rss_mb:.0f} MB, {self.threads} threads, {self.descriptors} fds, {self.processes} processes"


class Client:
    """One kept connection, and a second one for calls it walks away from."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._accepted = ""
        self._random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[Any] = []

    def run(self, count: int) -> None:
        for _ in range(count):
            kind = self._random.choices(
                ["ok", "fail", "big", "child", "async", "follow", "cancel", "leave", "missing"],
                [48, 10, 5, 5, 17, 3, 5, 2, 5],
            )[0]
            getattr(self, f"_{kind}")()
            self.outcomes[kind] += 1
        self._connection.close()

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = json.dumps(body).encode() if body is not None else None
        self._connection.request(method, path, data, {"X-API-Key": API_KEY})
        with self._connection.getresponse() as response:
            return response.status, json.loads(response.read())

    def _expect(self, found: tuple[int, Any], code: int, **fields: Any) -> Any:
        if found[0] != code or any(found[1].get(name) != value for name, value in fields.items()):
            self.wrong.append((code, fields, found))
        return found[1]

    def _ok(self) -> None:
        self._expect(self._ask("POST", "/execute/soak", {"args": ["plain"]}), 200, output="ok\n")

    def _fail(self) -> None:
        self._expect(self._ask("POST", "/execute/soak", {"args": ["fail"]}), 500, error="exit code 3")

    def _big(self) -> None:
        self._expect(self._ask("POST", "/execute/soak", {"args": ["big"]}), 200, output="x" * 100_000 + "ok\n")

    def _child(self) -> None:
        self._expect(self._ask("POST", "/execute/soak", {"args": ["child"]}), 200, output="ok\n")

    def _submit(self, *args: str) -> str:
        answer = self._expect(self._ask("POST", "/execute/soak/async", {"args": args}), 202, status="accepted")
        return str(answer.get("execution_id"))

    def _async(self) -> None:
        """Accept one; the one before must have ended well, or be on its way."""
        before, self._accepted = self._accepted, self._submit("plain")
        if before:
            code, record = self._ask("GET", f"/executions/{before}")
            if record.get("status") == "running":
                self._accepted = before
            else:
                self._expect((code, record), 200, status="success", output="ok\n")

    def _follow(self) -> None:
        identifier = self._submit("plain")
        self._connection.request("GET", f"/executions/{identifier}/output?follow=1", headers={"X-API-Key": API_KEY})
        with self._connection.getresponse() as response:
            found = response.status, response.read()
        if found != (200, b"ok\n"):
            self.wrong.append(("follow", found))

    def _cancel(self) -> None:
        identifier = self._submit("sleep", "20")
        self._expect(self._ask("DELETE", f"/executions/{identifier}"), 200, status="cancelled")

    def _leave(self) -> None:
        """A call nobody waits for any more: it must not go on for its hour."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        body = json.dumps({"args": ["sleep", "3600"]})
        connection.request("POST", "/execute/soak", body, {"X-API-Key": API_KEY})
        connection.close()

    def _missing(self) -> None:
        self._expect(self._ask("POST", "/execute/nothing", {}), 404)


def test_twenty_thousand(tmp_path: Path) -> None:
    mark = str(tmp_path)
    spec = {
        "name": "soak",
        "handler": "run.sh",
        "max_concurrency": 100,
        "max_concurrency_behavior": "wait",
        "env": {"SOAK": mark},
    }
    with (
        Flux(tmp_path, execution_ttl=20) as flux,
        Agent(tmp_path, flux, "worker-1", execution_ttl=20) as first,
        Agent(tmp_path, flux, "worker-2", execution_ttl=20) as second,
    ):
        programs: tuple[Program, ...] = (flux, first, second)
        flux.register(first)
        flux.register(second)
        flux.api.deploy(spec, {"run.sh": SCRIPT})
        outcomes: Counter[str] = Counter()

        def load(count: int, seed: int) -> list[Figures]:
            clients = [Client(flux.port, seed + number) for number in range(CONNECTIONS)]
            threads = [
                threading.Thread(target=client.run, args=(count // CONNECTIONS,), name="soak") for client in clients
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(800)
            for client in clients:
                assert not client.wrong, client.wrong[:3]
                outcomes.update(client.outcomes)
            wait_until(lambda: not flux.api.call("GET", "/executions?status=running")[1]["items"], "all to end", 60)
            return [Figures(program) for program in programs]

        # Pools, caches and the store's pages fill first; a leak goes on growing.
        warm = load(COUNT // 4, 0)
        done = load(COUNT - COUNT // 4, 1000)
        print(*(f"{program.name}: {a} -> {b}" for program, a, b in zip(programs, warm, done, strict=True)), sep="\n")
        print(outcomes)
        assert sum(outcomes.values()) >= COUNT - 2 * CONNECTIONS
        wait_until(lambda: not having([f"SOAK={mark}"]), "no process of a function to be left", 10)
        for program, before, after in zip(programs, warm, done, strict=True):
            assert after.rss_mb < before.rss_mb * 1.25 + 25, (program.name, before, after)
            assert after.threads <= before.threads + 12, (program.name, before, after)
            assert after.descriptors <= before.descriptors + 40, (program.name, before, after)
            assert after.processes <= before.processes, (program.name, before, after)
