"""The frozen control plane asks the clouds: their SDKs load parts of themselves by name, which freezing cannot see."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import IO

import pytest

from tests.packaging.conftest import Package
from tests.support.compute import Compute
from tests.support.ec2 import REGION, Ec2
from tests.support.programs import Flux, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class _Frozen(Flux):
    """A Flux whose program is a package's."""

    program: Path

    def spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [self.program],
            cwd=self.directory,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def test_both_clouds_are_asked(package: Package, tmp_path: Path) -> None:
    if package.name != "flux":
        pytest.skip("agents know no clouds")
    # Its one address is ours, and nothing answers at the port.
    with Ec2(["127.0.0.23"]) as ec2, Compute() as compute:
        scaling = {"name": "web", "min_nodes": 1, "node_types": [{"instance_type": "small"}]}
        aws = {"region": REGION, "ami": ec2.image(), "access_key_id": "flux", "secret_access_key": "words"}
        gcp = {"project_id": compute.project, "zone": compute.zone, "image": "projects/p/global/images/family/f"}
        providers = {
            "aws": {**aws, "endpoint_url": ec2.url, "ssh_port": free_port(), "autoscaling": scaling},
            "gcp": {**gcp, "endpoint_url": compute.url, "autoscaling": scaling},
        }
        flux = _Frozen(tmp_path, providers=providers, node_start_sec=4)
        flux.program = package.program
        with flux:
            status, answer = flux.api.call("POST", "/initialize")
            assert (status, answer["nodes"]) == (200, {"spawned": 0, "failed": 2}), answer
            # As far as SSH: paramiko is there as well.
            assert any("aws" in error and "wait for SSH" in error for error in answer["errors"]), answer
        assert any(request.method == "POST" and "instances" in request.path for request in compute.asked)
        assert "ModuleNotFoundError" not in flux.log.read_text()
