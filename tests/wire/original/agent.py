"""An agent as the original is described: the seven calls, and nothing beyond them.

    python agent.py ID [--tls CA CERT KEY] [--port PORT] [--home DIRECTORY]

Prints its port. Runs real programs from real zips. What it does not do is the
point: no inventory, no streams, no fields of ours, texts instead of statuses, no
code without RegisterFunction, no record or cancel of a synchronous execution, no
kill of more than the leader, and the HTTP/2 ping policy of a Go server at its
defaults (GOAWAY for a client that pings more often than every five minutes).
What it does was compared with the real program (test_originals.py).
"""

from __future__ import annotations

import argparse
import contextlib
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


class Run:
    """One program: its leader alone is killed, and it has ended when nobody holds its output any more."""

    def __init__(self, config, request, directory, on_output):
        self.output = bytearray()
        self.cancelled = False
        self.timed_out = False
        self._begun = time.monotonic()
        handler = directory / config.name / config.handler
        environment = {**os.environ, "HOME": "/home/flux-runner", "FLUX_EXECUTION_ID": request.execution_id}
        self._process = subprocess.Popen(
            [handler, *request.args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, **config.env},
            cwd=handler.parent,
            start_new_session=True,
        )
        self._on_output = on_output
        self._timer = threading.Timer(config.timeout_seconds, self._time_out)
        self._timeout_seconds = config.timeout_seconds
        if config.timeout_seconds:
            self._timer.start()

    def cancel(self):
        self.cancelled = True
        self._process.kill()

    def _time_out(self):
        self.timed_out = True
        self._process.kill()

    def wait(self):
        """(output, error, milliseconds)"""
        while piece := os.read(self._process.stdout.fileno(), 32 * 1024):
            self.output += piece
            # The original does so with every piece, which takes it very long for 50 MiB.
            if len(self.output) < 1024 * 1024:
                self._on_output(bytes(self.output))
        code = self._process.wait()
        self._process.stdout.close()
        self._timer.cancel()
        # What is left of its process group goes at last.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        error = f"exit code {code if code > 0 else -1}" if code else ""
        if self.timed_out:
            error = f"execution timed out after {self._timeout_seconds}s"
        return bytes(self.output), error, int((time.monotonic() - self._begun) * 1000)


class OriginalAgent(original_pb2_grpc.AgentServiceServicer):
    """``directory`` has the code, and ``agent.db``: functions and records, also those of an earlier process."""

    def __init__(self, agent_id: str, directory: Path) -> None:
        self.started = time.monotonic()
        self.agent_id, self.directory = agent_id, directory
        self.lock = threading.Lock()
        self.active: dict[str, int] = {}
        self.cancels: dict[str, threading.Event | Run] = {}
        self.store = directory / "agent.db"
        self.functions: dict[str, pb.FunctionConfig] = {}
        self.records: dict[str, dict] = {}
        if self.store.exists():
            kept = json.loads(self.store.read_text())
            self.records = kept["records"]
            self.functions = {
                name: pb.FunctionConfig.FromString(bytes.fromhex(text)) for name, text in kept["functions"].items()
            }

    def _save(self) -> None:
        """Under the lock."""
        functions = {name: config.SerializeToString().hex() for name, config in self.functions.items()}
        made = self.store.with_suffix(".new")
        made.write_text(json.dumps({"functions": functions, "records": self.records}))
        made.replace(self.store)

    def RegisterFunction(self, request, context):
        with self.lock:
            self.functions[request.name] = request
            self._save()
        return pb.FunctionAck(success=True, message="Function registered")

    def DeployFunction(self, request, context):
        # The settings that come with the code are ignored.
        if request.function_name not in self.functions:
            return pb.DeploymentAck(success=False, message="function not registered")
        target = self.directory / request.function_name
        try:
            with zipfile.ZipFile(io.BytesIO(request.code_archive)) as archive:
                archive.extractall(target)
        except (zipfile.BadZipFile, OSError) as error:
            return pb.DeploymentAck(success=False, message=str(error))
        for path in target.rglob("*"):
            path.chmod(0o755)
        return pb.DeploymentAck(success=True, message="Deployed successfully")

    def ExecuteFunction(self, request, context):
        config = self.functions.get(request.function_name)
        if config is None:
            return pb.ExecutionResponse(error="function not found")
        with self.lock:
            # Zero is no limit.
            if config.max_concurrency > 0 and self.active.get(config.name, 0) >= config.max_concurrency:
                return pb.ExecutionResponse(error=f"function {config.name} at capacity")
            self.active[config.name] = self.active.get(config.name, 0) + 1
        if getattr(request, "async"):
            self.cancels[request.execution_id] = threading.Event()
            threading.Thread(target=self._run_async, args=(config, request), daemon=True).start()
            return pb.ExecutionResponse()
        # No record, and nothing that CancelExecution finds: only its caller can end it, by hanging up.
        try:
            run = Run(config, request, self.directory, lambda output: None)
        except OSError as error:
            self._free(config)
            return pb.ExecutionResponse(error=f"failed to start: {error}")
        if not context.add_callback(run.cancel):
            run.cancel()
        output, error, duration = run.wait()
        self._free(config)
        if len(output) > LIMIT - 1024:
            size = f"({len(output)} vs. {LIMIT})"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"grpc: trying to send message larger than max {size}")
        return pb.ExecutionResponse(output=output, error=error, duration_ms=duration)

    def _free(self, config) -> None:
        with self.lock:
            self.active[config.name] -= 1

    def _run_async(self, config, request) -> None:
        record = {
            "execution_id": request.execution_id,
            "agent_id": self.agent_id,
            "function_name": config.name,
            "status": "running",
            "started_at": stamp(),
        }

        def keep(output, **fields):
            text = output.decode("utf-8", "replace")
            with self.lock:
                # Empty fields are left out.
                self.records[request.execution_id] = record | ({"output": text} if text else {}) | fields
                self._save()

        keep(b"")
        early = self.cancels[request.execution_id]
        output, error, duration = b"", "", 0
        try:
            run = Run(config, request, self.directory, keep)
        except OSError as trouble:
            error, cancelled = f"failed to start: {trouble}", early.is_set()
        else:
            self.cancels[request.execution_id] = run
            if early.is_set():
                run.cancel()
            output, error, duration = run.wait()
            cancelled = run.cancelled
        status = "cancelled" if cancelled else "failed" if error else "success"
        fields = {"status": status, "status_at": stamp(), "duration_ms": duration}
        if cancelled or error:
            fields["error"] = "execution cancelled" if cancelled else error
        keep(output, **fields)
        del self.cancels[request.execution_id]
        self._free(config)

    def CancelExecution(self, request, context):
        # True as long as it has not ended, also when it was cancelled before.
        cancel = self.cancels.get(request.execution_id)
        if cancel is None:
            return pb.CancelExecutionResponse(success=False, message="execution not found or already completed")
        if isinstance(cancel, Run):
            cancel.cancel()
        else:
            cancel.set()
        return pb.CancelExecutionResponse(success=True)

    def GetExecution(self, request, context):
        record = self.records.get(request.execution_id)
        if record is None:
            return pb.GetExecutionResponse(found=False)
        data = json.dumps(record).encode()
        if len(data) > LIMIT - 1024:
            size = f"({len(data)} vs. {LIMIT})"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"grpc: trying to send message larger than max {size}")
        return pb.GetExecutionResponse(found=True, data=data)

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
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--home", type=Path)
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
    directory = options.home or Path(tempfile.mkdtemp(prefix="original-agent-"))
    directory.mkdir(exist_ok=True)
    original_pb2_grpc.add_AgentServiceServicer_to_server(OriginalAgent(options.agent_id, directory), server)
    if options.tls:
        ca, cert, key = (Path(name).read_bytes() for name in options.tls)
        credentials = grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True)
        port = server.add_secure_port(f"127.0.0.1:{options.port}", credentials)
    else:
        port = server.add_insecure_port(f"127.0.0.1:{options.port}")
    server.start()
    print(port, flush=True)
    sys.stdin.read()  # the test closes it
    server.stop(0).wait()


if __name__ == "__main__":
    main()
