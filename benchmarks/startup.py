"""How long the programs take to start, frozen against the source tree, and what they weigh.

    python -m benchmarks.startup [--frozen DIR] [--rounds 5] [--json FILE]

``DIR`` holds ``flux/flux`` and ``flux-agent/flux-agent``, as PyInstaller's dist
or /usr/lib of a machine with the packages; by default build/frozen, made when
missing. Every figure is the median of the rounds; the first round, which reads
the files from disk, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import processes
from benchmarks.table import markdown

TOP = Path(__file__).resolve().parents[1]
_GIVE_UP = 60.0


@dataclass(frozen=True)
class Row:
    """Milliseconds from exec to the first answer, CPU until then, and what it holds when idle."""

    program: str
    what: str
    wall_ms: float
    cpu_ms: float
    rss_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n")[0])
    parser.add_argument("--frozen", type=Path, default=TOP / "build/frozen")
    parser.add_argument("--source", action="store_true", help="the source tree alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure(None if options.source else frozen_programs(options.frozen), options.rounds)
    print(as_table(rows))
    for name in () if options.source else ("flux", "flux-agent"):
        print(f"{name}: {size(options.frozen / name) / 1e6:.0f} MB on disk")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def frozen_programs(directory: Path) -> Path:
    """``directory`` with both programs in it. Raises CalledProcessError when they cannot be frozen."""
    if not (directory / "flux/flux").exists():
        command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN"]
        command += ["--distpath", str(directory), "--workpath", str(TOP / "build/freezing"), "flux.spec"]
        subprocess.run(command, check=True, cwd=TOP)
    return directory


def measure(frozen: Path | None, rounds: int) -> list[Row]:
    """From the source tree, and from ``frozen`` when it is given."""
    source = [sys.executable, "-m", "flux"]
    programs: dict[str, dict[str, Sequence[str]]] = {
        "flux": {"source": source},
        "flux-agent": {"source": [*source, "agent"]},
    }
    if frozen is not None:
        for program, ways in programs.items():
            ways["frozen"] = [str(frozen / program / program)]
    rows = []
    for program, ways in programs.items():
        for way, command in ways.items():
            version = [*(source if way == "source" else command), "--version"]
            rows.append(_row(f"{program}, {way}", "--version", lambda v=version: _run(v), rounds))
    for way, command in programs["flux"].items():
        rows.append(_row(f"flux, {way}", "GET /health", lambda c=command: _flux(c), rounds))
    for way, command in programs["flux-agent"].items():
        rows.append(_row(f"flux-agent, {way}", "port open", lambda c=command: _agent(c), rounds))
    return rows


def as_table(rows: Sequence[Row]) -> str:
    heads = ["program", "until", "ms", "CPU ms", "RSS MB"]
    return markdown(heads, [(row.program, row.what, row.wall_ms, row.cpu_ms, row.rss_mb) for row in rows])


def size(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class _Start:
    wall: float
    cpu: float
    rss: int


def _row(program: str, what: str, start: Callable[[], _Start], rounds: int) -> Row:
    start()
    starts = [start() for _ in range(rounds)]
    return Row(
        program,
        what,
        statistics.median(one.wall for one in starts) * 1e3,
        statistics.median(one.cpu for one in starts) * 1e3,
        statistics.median(one.rss for one in starts) / 1e6,
    )


def _run(command: Sequence[str]) -> _Start:
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=TOP, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return _Start(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def _flux(command: Sequence[str]) -> _Start:
    with tempfile.TemporaryDirectory() as directory:
        port = _free_port()
        config = Path(directory) / "flux.yaml"
        settings = {"api_key": "benchmark-of-the-start", "listen_host": "127.0.0.1", "port": port}
        settings |= {"state_dir": f"{directory}/state", "certs_dir": f"{directory}/certs"}
        config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        config.chmod(0o600)
        # The authority is made once in a life, not at every start.
        _until(command, {"FLUX_CONFIG": str(config)}, lambda: _is_healthy(port))
        return _until(command, {"FLUX_CONFIG": str(config)}, lambda: _is_healthy(port))


def _agent(command: Sequence[str]) -> _Start:
    with tempfile.TemporaryDirectory() as directory:
        port = _free_port()
        config = Path(directory) / "agent.yaml"
        config.write_text(
            f'agent_id: start\nport: {port}\nlisten_host: 127.0.0.1\nstate_dir: state\nisolation: "off"\n'
            "tls: {enabled: false}\n"
        )
        config.chmod(0o600)
        return _until(command, {"AGENT_CONFIG": str(config)}, lambda: _is_open(port))


def _until(command: Sequence[str], environment: dict[str, str], ready: Callable[[], bool]) -> _Start:
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=TOP, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = bytearray()
    reader = threading.Thread(target=lambda pipe=process.stderr: said.extend(pipe.read()), name="stderr")
    reader.start()
    try:
        pause = threading.Event()
        while not ready():
            if process.poll() is not None or time.perf_counter() - begin > _GIVE_UP:
                raise SystemExit(f"{' '.join(command)} did not come up:\n{said.decode(errors='replace')[-2000:]}")
            pause.wait(0.002)
        wall = time.perf_counter() - begin
        used = processes.usage({"it": process.pid})
        return _Start(wall, used.cpu["it"], used.total_rss)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(_GIVE_UP)
        reader.join()
        process.stderr.close()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
