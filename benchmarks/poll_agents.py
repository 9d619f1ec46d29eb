"""One Flux that polls a thousand agents: what it costs, and how late a dead one is noticed.

    python -m benchmarks.poll_agents --agents 1000 --processes 4 --seconds 60

The agents are real gRPC servers with certificates of their own, many to a process; they answer what a
health round asks. At the end one process is killed, and another one frozen: a vanished host closes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.table import markdown
from tests.support.programs import TOP, Flux, wait_until

INTERVAL = 10


@dataclass
class Host:
    """One process full of agents."""

    process: subprocess.Popen[bytes]
    agents: dict[str, int]  # agent ID → port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the polling is measured")
    parser.add_argument("--serve", nargs="+", metavar="ID", help=argparse.SUPPRESS)
    parser.add_argument("--certs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.certs))
        return
    with tempfile.TemporaryDirectory() as directory:
        print(measure(Path(directory), options.agents, options.processes, options.seconds))


def measure(directory: Path, count: int, processes: int, seconds: float) -> str:
    rows: list[list[object]] = []
    with ExitStack() as stack:
        flux = Flux(directory, health_interval_sec=INTERVAL)
        stack.enter_context(flux)
        ids = [f"agent-{number:05d}" for number in range(count)]
        began = time.monotonic()
        _enrol(flux.certs, ids)
        rows.append([f"making {count} certificates, s", time.monotonic() - began])
        share = -(-count // processes)
        hosts = [_host(ids[start : start + share], flux.certs) for start in range(0, count, share)]
        for host in hosts:
            stack.callback(_end, host)
        began = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            list(
                pool.map(lambda port: _register(flux, port), [port for host in hosts for port in host.agents.values()])
            )
        rows.append([f"registering {count} agents, s", time.monotonic() - began])
        wait_until(lambda: _online(flux) == set(ids), "everybody to be online", 120)
        rows += _cost(flux, hosts, seconds)
        # Started before anything dies, so that its own start is not in the way.
        rows.append(["killed: first and last noticed after, s", _noticed(flux, hosts[0], signal.SIGKILL)])
        if len(hosts) > 1:
            rows.append(["frozen: first and last noticed after, s", _noticed(flux, hosts[1], signal.SIGSTOP)])
    return markdown([f"{count} agents, asked every {INTERVAL} s", ""], rows)


def _cost(flux: Flux, hosts: Sequence[Host], seconds: float) -> list[list[object]]:
    assert flux.process is not None
    process = psutil.Process(flux.process.pid)
    before, others = process.cpu_times(), [psutil.Process(host.process.pid).cpu_times() for host in hosts]
    began = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    theirs = 0.0
    for host, earlier in zip(hosts, others, strict=True):
        now = psutil.Process(host.process.pid).cpu_times()
        theirs += now.user + now.system - earlier.user - earlier.system
    return [
        ["CPU of Flux, share of one core", f"{used / elapsed:.1%}"],
        ["CPU of all agents, share of one core", f"{theirs / elapsed:.1%}"],
        ["memory of Flux, MB", process.memory_info().rss / 2**20],
        ["threads of Flux", process.num_threads()],
    ]


def _noticed(flux: Flux, host: Host, number: int) -> str:
    """Seconds until the first and the last of them was offline. Three misses make one dead."""
    dead = set(host.agents)
    began = time.monotonic()
    host.process.send_signal(number)
    first = 0.0
    deadline = began + 20 * INTERVAL
    while True:
        gone = dead - _online(flux)
        now = time.monotonic() - began
        first = first or (now if gone else 0.0)
        if gone == dead:
            return f"{first:.1f} to {now:.1f}"
        if time.monotonic() > deadline:
            return f"{first:.1f} to never ({len(gone)} of {len(dead)})"
        time.sleep(0.25)


def _online(flux: Flux) -> set[str]:
    _, agents = flux.api.call("GET", "/agents")
    return {agent["id"] for agent in agents if agent["status"] == "online"}


def _register(flux: Flux, port: int) -> None:
    status, answer = flux.api.call("POST", "/agents/register", {"address": f"127.0.0.1:{port}"}, timeout=120)
    assert status == 201, answer


def _enrol(certs: Path, ids: Sequence[str]) -> None:
    from fluxlib.pki import Authority

    authority = Authority.open(certs)
    for agent_id in ids:
        identity, home = authority.issue_agent(agent_id), certs / "benchmark" / agent_id
        home.mkdir(parents=True)
        (home / "agent-key.pem").write_bytes(identity.key_pem)
        (home / "agent.pem").write_bytes(identity.cert_pem)


def _host(ids: Sequence[str], certs: Path) -> Host:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.poll_agents", "--certs", str(certs), "--serve", *ids],
        cwd=TOP,
        env={**os.environ, "PYTHONPATH": str(TOP)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    return Host(process, json.loads(process.stdout.readline()))


def _end(host: Host) -> None:
    host.process.kill()
    host.process.wait(10)
    if host.process.stdout is not None:
        host.process.stdout.close()


# -- a process full of agents ----------------------------------------------------------


async def serve(ids: Sequence[str], certs: Path) -> None:
    """Listen for each, say on standard output where, and answer until killed."""
    import grpc.aio

    from fluxlib.model import Inventory, NodeFigures, Platform
    from fluxlib.rpc import codec
    from fluxlib.rpc.gen import flux_pb2 as pb
    from fluxlib.rpc.gen import flux_pb2_grpc

    platform = Platform("linux", "amd64")

    class Agent(flux_pb2_grpc.AgentServiceServicer):  # type: ignore[misc]
        def __init__(self, agent_id: str) -> None:
            self.agent_id, self.instance = agent_id, os.urandom(8).hex()

        async def ReportNodeStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
            figures = NodeFigures(12.0, 30.0, 4096, 1200, max_tasks=8, uptime_seconds=60, collected_at=time.time())
            return codec.report_to_message(codec.NodeReport(self.agent_id, figures, self.instance, platform, "off", 0))

        async def GetInventory(self, request: Any, context: Any) -> Any:  # noqa: N802
            return codec.inventory_to_message(Inventory(self.agent_id, self.instance, platform=platform, max_tasks=8))

        async def HealthCheck(self, request: Any, context: Any) -> Any:  # noqa: N802
            return pb.HealthCheckResponse(healthy=True)

    ports, servers = {}, []
    ca = (certs / "ca" / "ca.pem").read_bytes()
    for agent_id in ids:
        home = certs / "benchmark" / agent_id
        pair = ((home / "agent-key.pem").read_bytes(), (home / "agent.pem").read_bytes())
        credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=True)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        flux_pb2_grpc.add_AgentServiceServicer_to_server(Agent(agent_id), server)
        ports[agent_id] = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        servers.append(server)
    print(json.dumps(ports), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
