"""An agent in the lab's machine, as its systemd unit runs it, driven from here over its gRPC port."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import yaml

from fluxlib.model import FunctionSpec
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc
from tests.support.lab import TOP
from tests.support.machine import GUEST_TREE, Machine
from tests.support.programs import make_zip, wait_until

PORT = 50052
_OPTIONS = [("grpc.max_receive_message_length", 50 * 1024 * 1024)]
STATE = "/var/lib/flux-agent"
FUNCTIONS = Path(__file__).parent / "functions"
SPAWNER = "$(pgrep -f '[s]pawner/main.py')"  # in a shell there
UNIT = "/sys/fs/cgroup/system.slice/flux-agent.service"
# The unit as the package installs it, with this tree's program.
_DROP_IN = f"""[Service]
Environment=PYTHONPATH={GUEST_TREE}:/opt/site
Environment=PYTHONDONTWRITEBYTECODE=1
ExecStart=
ExecStart=/usr/bin/python3 {GUEST_TREE}/flux.py agent
"""


class GuestAgent:
    """``configure`` before anything else."""

    def __init__(self, machine: Machine, port: int) -> None:
        self.machine = machine
        self._port = port
        self._numbers = itertools.count(1)
        self._channel: grpc.Channel | None = None
        self._stub: Any = None

    def install(self) -> None:
        machine = self.machine
        machine.put_tree()
        machine.put(TOP / "debian/flux-agent.service", "/etc/systemd/system/flux-agent.service")
        machine.write("/etc/systemd/system/flux-agent.service.d/tree.conf", _DROP_IN)
        machine.run("useradd --system --no-create-home --shell /usr/sbin/nologin flux-runner")
        machine.run("mkdir -p -m 0755 /etc/flux-agent && systemctl daemon-reload")

    def configure(self, isolation: str, *, wait: bool = True, **settings: Any) -> None:
        """Start, or start again, under a profile. Without ``wait`` it may fail to."""
        document = {
            "agent_id": "lab",
            "isolation": isolation,
            "tls": {"enabled": False},
            "insecure": True,
            "kill_grace_sec": 0.5,
        }
        text = yaml.safe_dump({**document, "shutdown_sec": 1, **settings})
        self.machine.write("/etc/flux-agent/agent.yaml", text, 0o600)
        self.machine.run("systemctl reset-failed flux-agent; systemctl restart flux-agent", check=wait)
        if wait:
            self.connect()

    def connect(self) -> None:
        """To the agent that runs now, once it answers."""
        self.close()
        deadline = time.monotonic() + 60
        while True:
            # A channel that was refused waits longer and longer before it tries again.
            self._channel = grpc.insecure_channel(f"{self.machine.address}:{self._port}", _OPTIONS)
            self._stub = flux_pb2_grpc.AgentServiceStub(self._channel)
            try:
                self._stub.HealthCheck(pb.HealthCheckRequest(), timeout=3)
                return
            except grpc.RpcError as error:
                self.close()
                if time.monotonic() > deadline:
                    journal = self.machine.run("journalctl -u flux-agent -o cat -n 40 --no-pager")
                    raise AssertionError(f"the agent does not answer: {error}\n{journal}") from error
                threading.Event().wait(0.2)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    # -- functions ---------------------------------------------------------------------

    def deploy(self, name: str, handler: str, **fields: Any) -> FunctionSpec:
        """The script tests/vm/functions/HANDLER as function ``name``."""
        files: Mapping[str, bytes] = {handler: (FUNCTIONS / handler).read_bytes(), "secret.txt": name.encode()}
        return self.deploy_files(name, handler, files, **fields)

    def deploy_files(self, name: str, handler: str, files: Mapping[str, bytes], **fields: Any) -> FunctionSpec:
        defaults: dict[str, Any] = {"timeout_seconds": 60, "max_concurrency": 64}
        spec = FunctionSpec(name=name, handler=handler, **(defaults | fields))
        answer = self._offer(spec, make_zip(files))
        assert answer.success, answer.message
        return spec

    def refusal(self, name: str, handler: str, **fields: Any) -> tuple[str, str]:
        """(error kind, words) of a deploy that the agent does not take."""
        spec = FunctionSpec(name=name, handler=handler, **fields)
        answer = self._offer(spec, make_zip({handler: (FUNCTIONS / handler).read_bytes()}))
        assert not answer.success
        return pb.ErrorKind.Name(answer.error_kind).removeprefix("ERROR_KIND_").lower(), answer.message

    def _offer(self, spec: FunctionSpec, archive: bytes) -> Any:
        message = pb.DeploymentPackage(
            function_name=spec.name, code_archive=archive, config=codec.spec_to_message(spec, spec.digest())
        )
        return self._stub.DeployFunction(message, timeout=30)

    def run(self, name: str, *args: str, timeout: float = 100) -> dict[str, Any]:
        """The ended record, with ``output`` as text."""
        request = pb.ExecutionRequest(function_name=name, args=args, execution_id=self._identifier())
        answer = self._stub.ExecuteFunction(request, timeout=timeout)
        record = codec.record_from_json(answer.record).to_json(with_output=False) if answer.record else {}
        return {**record, "error": answer.error, "output": answer.output.decode(errors="replace")}

    def start(self, name: str, *args: str) -> str:
        """The ID of an execution that goes on by itself."""
        identifier = self._identifier()
        request = pb.ExecutionRequest(function_name=name, args=args, execution_id=identifier)
        setattr(request, "async", True)
        answer = self._stub.ExecuteFunction(request, timeout=20)
        assert not answer.error, answer.error
        return identifier

    def record(self, identifier: str) -> dict[str, Any]:
        answer = self._stub.GetExecution(pb.GetExecutionRequest(execution_id=identifier), timeout=60)
        assert answer.found
        return dict(json.loads(answer.data))

    def ended(self, identifier: str, seconds: float = 60) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            record = self.record(identifier)
            return record if record["status"] != "running" else None

        return dict(wait_until(look, f"{identifier} to end", seconds))

    def said(self, identifier: str, words: str) -> str:
        """Its output once that contains ``words``."""

        def look() -> str | None:
            output = str(self.record(identifier)["output"])
            return output if words in output else None

        return str(wait_until(look, f"{identifier} to say {words!r}", 60))

    def cancel(self, identifier: str) -> None:
        answer = self._stub.CancelExecution(pb.CancelExecutionRequest(execution_id=identifier), timeout=30)
        assert answer.success, answer.message

    def inventory(self) -> Any:
        return self._stub.GetInventory(pb.InventoryRequest(), timeout=10)

    def _identifier(self) -> str:
        return f"lab-{next(self._numbers)}-{time.time_ns():x}"

    # -- the machine -------------------------------------------------------------------

    def groups(self) -> list[str]:
        """The executions that have a cgroup."""
        return self.machine.run(f"cd {UNIT}/fn 2>/dev/null && ls -d */ 2>/dev/null || true").split()

    def processes_of_functions(self) -> list[str]:
        """Everything that runs with a number from uid_range."""
        listing = self.machine.run("ps -eo uid,pid,stat,args --no-headers")
        return [line for line in listing.splitlines() if int(line.split()[0]) >= 1879048192]
