"""An agent as the original is described: the seven calls, and nothing beyond them.

    python agent.py ID [--tls CA CERT KEY]

Prints its port. Runs real programs from real zips. What it does not do is the
point: no inventory, no streams, no fields of ours, texts instead of statuses,
and the HTTP/2 ping policy of a Go server at its defaults (GOAWAY for a client
that pings more often than every five minutes).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import original_pb2 as pb
import original_pb2_grpc

LIMIT = 50 * 1024 * 1024


def stamp() -> str:
    # Go prints nanoseconds.
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + ".123456789Z"


class OriginalAgent(original_pb2_grpc.AgentServiceServicer):
    def __init__(self, agent_id: str, directory: Path) -> None:
        self.started = time.monotonic()
        self.agent_id, self.directory = agent_id, directory
        self.lock = threading.Lock()
        self.functions: dict[str, pb.FunctionConfig] = {}
        self.active: dict[str, int] = {}
        self.records: dict[str, dict] = {}
        self.processes: dict[str, subprocess.Popen] = {}

    def RegisterFunction(self, request, context):
        self.functions[request.name] = request
        return pb.FunctionAck(success=True, message="registered")

    def DeployFunction(self, request, context):
        target = self.directory / request.function_name
        with zipfile.ZipFile(io.BytesIO(request.code_archive)) as archive:
            archive.extractall(target)
        for path in target.rglob("*"):
            path.chmod(0o755)
        if request.HasField("config") and request.config.name:
            self.functions[request.function_name] = request.config
        return pb.DeploymentAck(success=True, message="deployed")

    def ExecuteFunction(self, request, context):
        config = self.functions.get(request.function_name)
        if config is None:
            return pb.ExecutionResponse(error="function not found")
        with self.lock:
            if self.active.get(config.name, 0) >= (config.max_concurrency or 5):
                return pb.ExecutionResponse(error=f"function {config.name} at capacity")
            self.active[config.name] = self.active.get(config.name, 0) + 1
        if getattr(request, "async"):
            self.records[request.execution_id] = {
                "execution_id": request.execution_id,
                "agent_id": self.agent_id,
                "function_name": config.name,
                "status": "running",
                "output": "",
                "error": "",
                "duration_ms": 0,
                "started_at": stamp(),
            }
            threading.Thread(target=self._run, args=(config, request, None), daemon=True).start()
            return pb.ExecutionResponse()
        return self._run(config, request, context)

    def _run(self, config, request, context):
        begun = time.monotonic()
        process = subprocess.Popen(
            [self.directory / config.name / config.handler, *request.args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], **config.env},
            cwd=self.directory / config.name,
            start_new_session=True,
        )
        self.processes[request.execution_id] = process

        def kill():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

        # Go's exec.CommandContext kills a program whose context is already done, too.
        if context is not None and not context.add_callback(kill):
            kill()
        error = ""
        try:
            output, _ = process.communicate(timeout=config.timeout_seconds or None)
            if process.returncode:
                error = f"exit code {process.returncode if process.returncode > 0 else -1}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            error = f"execution timed out after {config.timeout_seconds}s"
        duration = int((time.monotonic() - begun) * 1000)
        with self.lock:
            self.active[config.name] -= 1
            record = self.records.get(request.execution_id)
            if record is not None and record["status"] == "running":
                record.update(
                    status="failed" if error else "success",
                    output=output.decode("utf-8", "replace"),
                    error=error,
                    duration_ms=duration,
                    status_at=stamp(),
                )
        return pb.ExecutionResponse(output=output, error=error, duration_ms=duration)

    def CancelExecution(self, request, context):
        process = self.processes.get(request.execution_id)
        if process is None or process.poll() is not None:
            return pb.CancelExecutionResponse(success=False, message="execution not found")
        with self.lock:
            record = self.records.get(request.execution_id)
            if record is not None:
                record.update(status="cancelled", status_at=stamp())
        os.killpg(process.pid, signal.SIGKILL)
        return pb.CancelExecutionResponse(success=True, message="cancelled")

    def GetExecution(self, request, context):
        record = self.records.get(request.execution_id)
        if record is None:
            return pb.GetExecutionResponse(found=False)
        return pb.GetExecutionResponse(found=True, data=json.dumps(record).encode())

    def HealthCheck(self, request, context):
        return pb.HealthCheckResponse(healthy=True, version="1.0.0")

    def ReportNodeStatus(self, request, context):
        return pb.NodeStatusResponse(
            agent_id=self.agent_id,
            cpu_percent=5.0,
            memory_percent=20.0,
            memory_total_mb=8192,
            memory_used_mb=1638,
            active_tasks=sum(self.active.values()),
            uptime_seconds=int(time.monotonic() - self.started),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("agent_id")
    parser.add_argument("--tls", nargs=3, metavar=("CA", "CERT", "KEY"))
    options = parser.parse_args()
    server = grpc.server(
        ThreadPoolExecutor(64),
        options=[
            ("grpc.max_receive_message_length", LIMIT),
            ("grpc.max_send_message_length", LIMIT),
            # Go's keepalive enforcement at its defaults, as C-core says the same thing.
            ("grpc.http2.min_ping_interval_without_data_ms", 300_000),
            ("grpc.http2.max_ping_strikes", 2),
            ("grpc.keepalive_permit_without_calls", 0),
        ],
    )
    directory = Path(tempfile.mkdtemp(prefix="original-agent-"))
    original_pb2_grpc.add_AgentServiceServicer_to_server(OriginalAgent(options.agent_id, directory), server)
    if options.tls:
        ca, cert, key = (Path(name).read_bytes() for name in options.tls)
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()  # the test closes it
    server.stop(0).wait()


if __name__ == "__main__":
    main()
