"""What every fault test needs: a function that leaves a mark for each start, and the account of what was accepted."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.programs import Api, Flux, make_zip, wait_until

# Each start is one line; a short append is atomic. TERM is ignored where a cancel must take its whole grace.
SCRIPT = """#!/bin/sh
[ "$1" = stubborn ] && trap '' TERM
echo "$FLUX_EXECUTION_ID" >> "$MARKS"
echo started
end=$(($(date +%s) + ${2:-0}))
while [ "$(date +%s)" -lt "$end" ]; do sleep 0.1; done
echo done
"""
FINAL = ("success", "failed", "cancelled")


class Marks:
    """A file where functions of any user may append: pytest's own directories are closed to them."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="flux-marks-"))
        self._directory.chmod(0o755)
        self.path = self._directory / "starts"
        self.path.touch()
        self.path.chmod(0o666)

    def starts(self) -> Counter[str]:
        return Counter(self.path.read_text().split())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._directory)


def deploy(flux: Flux, marks: Marks, name: str, **fields: Any) -> None:
    spec = {"name": name, "handler": "run.sh", "env": {"MARKS": str(marks.path)}, "timeout": 60, **fields}
    status, answer = flux.api.call("PUT", "/functions", yaml.safe_dump(spec).encode())
    assert status == 201, answer
    status, answer = flux.api.call("PUT", f"/deploy/{name}", make_zip({"run.sh": SCRIPT}))
    assert status == 201, answer


class SyncCall:
    """A synchronous call in a thread of its own. ``answer`` is (status, JSON), or the error of a broken connection."""

    def __init__(self, api: Api, name: str, *args: str) -> None:
        self.answer: tuple[int, Any] | OSError | None = None
        self._thread = threading.Thread(target=self._run, args=(api, name, args), name="sync-call")
        self._thread.start()

    def _run(self, api: Api, name: str, args: tuple[str, ...]) -> None:
        try:
            self.answer = api.execute(name, *args, timeout=120)
        except OSError as error:
            self.answer = error
        except ValueError as error:  # half an answer
            self.answer = OSError(str(error))

    def join(self, seconds: float = 60) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "a synchronous caller still hangs"


def known(api: Api, name: str) -> list[dict[str, Any]]:
    """Every record of one function, all pages."""
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, page = api.call("GET", f"/executions?function={name}&limit=100&cursor={cursor}")
        assert status == 200, page
        found += page["items"]
        cursor = page.get("next") or ""
        if not cursor:
            return found


def settle(api: Api, name: str, seconds: float = 60) -> dict[str, dict[str, Any]]:
    """All records of the function once none of them runs or waits any more."""

    def look() -> dict[str, dict[str, Any]] | None:
        try:
            records = known(api, name)
        except (OSError, AssertionError):
            return None
        if any(record["status"] not in FINAL for record in records):
            return None
        return {record["execution_id"]: record for record in records}

    settled = wait_until(look, f"every execution of {name} to have ended", seconds)
    assert isinstance(settled, dict)
    return settled


def account(records: dict[str, dict[str, Any]], accepted: Iterable[str], marks: Marks) -> None:
    """Everything accepted has a final status with a reason, nothing ran twice, nothing is left alive."""
    missing = [identifier for identifier in accepted if identifier not in records]
    assert not missing, f"lost: {missing}"
    for record in records.values():
        assert record["status"] in FINAL, record
        assert record["status"] == "success" or record["error"], f"no reason: {record}"
    twice = {identifier: count for identifier, count in marks.starts().items() if count > 1}
    assert not twice, f"ran twice: {twice}"
    for record in records.values():
        if record["status"] == "success":
            assert marks.starts()[record["execution_id"]] == 1, f"a success that never ran: {record}"
    wait_until(lambda: not alive(records), "no process to be left", 15)


def alive(records: Iterable[str]) -> list[int]:
    """Processes whose environment names one of these executions."""
    return having(f"FLUX_EXECUTION_ID={identifier}" for identifier in records)


def having(variables: Iterable[str]) -> list[int]:
    """Living processes with one of these (NAME=VALUE) in their environment."""
    wanted = {variable.encode() for variable in variables}
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                zombie = file.read().rpartition(b")")[2].split()[0] == b"Z"
            with open(f"/proc/{name}/environ", "rb") as file:
                if not zombie and wanted & set(file.read().split(b"\0")):
                    found.append(int(name))
        except OSError:
            continue
    return found


def pass_time(seconds: float) -> None:
    """Frozen for longer than the deadlines: here time itself is what is tested."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= end, "time to pass", seconds + 10)
