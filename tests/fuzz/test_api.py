"""The API against its own document: requests made by schemathesis, answered by a real Flux with a real agent.

``FUZZ`` scales it: 1 (the default) is more than 5 000 requests.
No 5xx that Flux is to blame for, no status the document does not name, no body that breaks its schema; afterwards
both still work, and their logs hold no traceback.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.test_agent import generated, mutated, seeds
from tests.support.programs import API_KEY, Agent, Flux, enrolled

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]

SCALE = float(os.environ.get("FUZZ", "1"))
EXAMPLES = max(20, int(165 * SCALE))  # of each operation, once as the document wants it, once against it
# Each on a Flux of its own, so that they may run beside each other. What must have come of it, or it proves nothing.
SHARDS = {
    "fleet": {
        ("POST /agents/register", 201),
        ("POST /agents/register", 502),
        ("POST /agents/{agent_id}/enroll", 200),
        ("POST /agents/{agent_id}/drain", 200),
        ("DELETE /agents/{agent_id}", 200),
        ("DELETE /agents/{agent_id}", 404),
        ("GET /resources", 200),
    },
    "functions": {
        ("PUT /functions", 201),
        ("PUT /functions", 400),
        ("GET /functions", 200),
        ("PUT /deploy/{name}", 201),
        ("PUT /deploy/{name}", 400),
        ("DELETE /functions/{name}", 200),
    },
    "executions": {
        ("POST /execute/{name}", 200),
        ("POST /execute/{name}", 500),
        ("POST /execute/{name}", 400),
        ("POST /execute/{name}", 404),
        ("POST /execute/{name}/async", 202),
        ("GET /executions", 200),
        ("GET /executions/{execution_id}", 200),
        ("GET /executions/{execution_id}/output", 200),
        ("DELETE /executions/{execution_id}", 409),
    },
}
SCRIPT = '#!/bin/sh\n[ "$1" = fail ] && exit 3\nprintf "%s\\n" "$@"; cat\n'
FITS = re.compile(r"[^/@?#]+:\d{1,5}")


def shard_of(path: str) -> str:
    if path.startswith(("/function", "/deploy")):
        return "functions"
    return "executions" if path.startswith("/exec") else "fleet"


@dataclass
class Ground:
    """Where it happens, and what has been seen."""

    flux: Flux
    agent: Agent
    executions: list[str] = field(default_factory=list)
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)

    def aim(self, case: Any, chance: random.Random) -> None:
        """Let most requests hit something that is there: names made up at random never would."""
        label, params = case.operation.label, case.path_parameters
        hit = chance.random() < 0.6
        if "name" in params and hit:
            params["name"] = "spare" if label.startswith(("PUT", "DELETE")) else chance.choice(["hello", "fails"])
        if "agent_id" in params and hit:
            params["agent_id"] = "spare" if label.endswith("/enroll") else "worker-1"
        if "execution_id" in params and hit and self.executions:
            params["execution_id"] = chance.choice(self.executions[-50:])
        registers = label == "POST /agents/register" and isinstance(case.body, dict)
        # Whatever could be an address is one of this machine's: no test knocks at strangers' doors.
        if registers and FITS.fullmatch(str(case.body.get("address", ""))):
            case.body["address"] = self.agent.address if hit else "127.0.0.1:1"

    def judge(self, case: Any, response: Any) -> None:
        label, status = case.operation.label, response.status_code
        self.seen[label, status] += 1
        is_json = response.headers.get("content-type", [""])[0] == "application/json"
        data = response.json() if is_json else {}
        if isinstance(data, dict) and "execution_id" in data:
            self.executions.append(data["execution_id"])
        if status < 500:
            return
        # A function that failed is an answer; everything else needs a cause that this ground has.
        failed = status == 500 and "error_id" not in data and data.get("status") in ("failed", "cancelled")
        away = status == 502 and label == "POST /agents/register" and "nothing listens" in data["error"]
        no_clouds = status == 503 and "provider" in data["error"]
        log = self.flux.log.read_text(errors="replace")[-4000:]
        assert failed or away or no_clouds, f"{label} was answered {status}: {response.text[:2000]}\n{log}"

    def mend(self, label: str) -> None:
        """What a request may have taken away is given back for the next one."""
        if label in ("DELETE /agents/{agent_id}", "POST /agents/{agent_id}/drain"):
            if not self.flux.status_of(self.agent.agent_id):
                # Deregistered: its certificates are revoked.
                self.agent.stop()
                enrolled(self.flux.certs, self.agent.agent_id, self.agent.home / "certs")
                self.agent.start()
            self.flux.register(self.agent)
            self.flux.api.call("POST", f"/agents/{self.agent.agent_id}/undrain")
        elif label == "DELETE /functions/{name}":
            self.deploy("spare")

    def deploy(self, function: str) -> None:
        spec = {"name": function, "handler": "main.sh", "timeout": 5, "max_concurrency": 50}
        self.flux.api.deploy(spec, {"main.sh": SCRIPT if function != "fails" else "#!/bin/sh\nexit 7\n"})


@pytest.fixture
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        with Flux(directory) as flux, Agent(directory, flux, "worker-1", max_tasks=16) as agent:
            flux.register(agent)
            ground = Ground(flux, agent)
            for function in ("hello", "fails", "spare"):
                ground.deploy(function)
            yield ground


@pytest.mark.parametrize("shard", SHARDS)
def test_no_request_gets_what_the_document_does_not_say(ground: Ground, shard: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi import checks

    originals = seeds()
    zips = st.integers(0, 2**32).map(random.Random)
    schemathesis.openapi.media_type(
        "application/zip",
        zips.map(
            lambda chance: generated(chance) if chance.random() < 0.5 else mutated(chance.choice(originals), chance)
        ),
    )
    held = [
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]
    headers = {"X-API-Key": API_KEY}

    def probe(operation: Any, mode: GenerationMode, examples: int) -> None:
        @given(case=operation.as_strategy(generation_mode=mode), chance=st.integers(0, 2**32).map(random.Random))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            # A real Flux remembers: making a failure smaller would look for another one.
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def one(case: Any, chance: random.Random) -> None:
            ground.aim(case, chance)
            response = case.call(headers=headers)
            ground.judge(case, response)
            case.validate_response(response, checks=held)
            ground.mend(operation.label)

        one()

    for result in schemathesis.openapi.from_url(f"{ground.flux.api.url}/openapi.json").get_all_operations():
        operation = result.ok()
        if shard_of(operation.path) == shard:
            # Where nothing is taken nothing can be wrong, and one request is as good as the next.
            takes = bool({"parameters", "requestBody"} & set(operation.definition.raw))
            probe(operation, GenerationMode.POSITIVE, EXAMPLES if takes else EXAMPLES // 5)
            if takes:
                probe(operation, GenerationMode.NEGATIVE, EXAMPLES)

    assert set(ground.seen) >= SHARDS[shard], (sorted(ground.seen.items()), ground.flux.log.read_text()[-4000:])
    total = sum(ground.seen.values())
    assert total >= 8 * EXAMPLES
    print(f"{shard}: {total} requests", dict(sorted(ground.seen.items())))
    status, answer = ground.flux.api.execute("hello", "still here")
    assert (status, answer["output"]) == (200, "still here\n")
    for program in (ground.flux, ground.agent):
        assert "Traceback" not in program.log.read_text(errors="replace"), program.log.read_text()[-4000:]
