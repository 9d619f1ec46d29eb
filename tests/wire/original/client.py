"""A control plane's calls as the original makes them, over anybody's agent.

    python client.py ADDRESS [--tls CA CERT KEY] < SCRIPT > ANSWERS

SCRIPT is JSON: a list of [call, fields, seconds]. Each answer is a line of JSON
with the response's fields, or {"grpc": STATUS}. Bytes travel as Latin-1 text, large ones as their SHA-256.
A call named "gather" runs its list of calls at the same time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import original_pb2 as pb
import original_pb2_grpc

LIMIT = 50 * 1024 * 1024
REQUESTS = {
    "RegisterFunction": pb.FunctionConfig,
    "DeployFunction": pb.DeploymentPackage,
    "ExecuteFunction": pb.ExecutionRequest,
    "CancelExecution": pb.CancelExecutionRequest,
    "GetExecution": pb.GetExecutionRequest,
    "HealthCheck": pb.HealthCheckRequest,
    "ReportNodeStatus": pb.NodeStatusRequest,
}


def plain(value):
    if isinstance(value, bytes) and len(value) > 1024 * 1024:
        return hashlib.sha256(value).hexdigest()
    return value.decode("latin-1") if isinstance(value, bytes) else value


def call(stub, name, fields, seconds):
    if name == "gather":
        with ThreadPoolExecutor(len(fields)) as pool:
            return [one.result() for one in [pool.submit(call, stub, *item) for item in fields]]
    fields = dict(fields)
    if "archive_file" in fields:
        fields["code_archive"] = Path(fields.pop("archive_file")).read_bytes()
    if "config" in fields:
        fields["config"] = pb.FunctionConfig(**fields["config"])
    try:
        response = getattr(stub, name)(REQUESTS[name](**fields), timeout=seconds)
    except grpc.RpcError as error:
        return {"grpc": error.code().name, "details": error.details()}
    return {field.name: plain(getattr(response, field.name)) for field in response.DESCRIPTOR.fields}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--tls", nargs=3, metavar=("CA", "CERT", "KEY"))
    options = parser.parse_args()
    settings = [("grpc.max_receive_message_length", LIMIT), ("grpc.max_send_message_length", LIMIT)]
    if options.tls:
        ca, cert, key = (Path(name).read_bytes() for name in options.tls)
        settings.append(("grpc.ssl_target_name_override", "flux-agent"))
        channel = grpc.secure_channel(options.address, grpc.ssl_channel_credentials(ca, key, cert), settings)
    else:
        channel = grpc.insecure_channel(options.address, settings)
    with channel:
        stub = original_pb2_grpc.AgentServiceStub(channel)
        for name, fields, seconds in json.load(sys.stdin):
            print(json.dumps(call(stub, name, fields, seconds)), flush=True)


if __name__ == "__main__":
    main()
