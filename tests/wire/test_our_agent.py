"""The original control plane over our agent: every call of the contract, TLS on and off."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Agent, Flux, make_zip, wait_until

SCRIPT = """#!/bin/sh
case "$1" in
  args) shift; for arg in "$@"; do echo "[$arg]"; done ;;
  env) echo "$GREETING $FLUX_FUNCTION_NAME" ;;
  exit) exit "$2" ;;
  signal) kill -9 $$ ;;
  sleep) echo started; exec sleep "$2" ;;
  bytes) printf '\\377\\000\\376' ;;
esac
"""

Client = Callable[..., list[Any]]


class Ours:
    """Our agent and how the original reaches it."""

    def __init__(self, agent: Agent, tls: tuple[str, str, str] | None, archive: Path) -> None:
        self.agent, self.tls, self.archive = agent, tls, archive


@pytest.fixture(scope="module", params=["tls", "plain"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ours]:
    from fluxlib.pki import Authority

    directory = tmp_path_factory.mktemp("ours")
    with_tls = request.param == "tls"
    flux = Flux(directory, tls=with_tls)  # for its certificates only: it is never started
    tls = None
    if with_tls:
        identity = Authority.open(flux.certs).flux_identity()
        files = {"ca": identity.ca_pem, "cert": identity.cert_pem, "key": identity.key_pem}
        for name, pem in files.items():
            (directory / f"{name}.pem").write_bytes(pem)
        tls = tuple(str(directory / f"{name}.pem") for name in ("ca", "cert", "key"))
    archive = directory / "code.zip"
    archive.write_bytes(make_zip({"main.sh": SCRIPT}))
    with Agent(directory, flux, "worker-1", max_output_mb=60, kill_grace_sec=0.3) as agent:
        yield Ours(agent, tls, archive)  # type: ignore[arg-type]


def _config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"name": "wired", "handler": "main.sh", "max_concurrency": 2, "timeout_seconds": 20}
    config |= {"max_concurrency_behavior": "exit", "env": {"GREETING": "hi"}}
    return config | changes


@pytest.fixture
def deployed(ours: Ours, original_client: Client) -> Ours:
    _ready(ours, original_client, _config())
    return ours


def _ready(ours: Ours, client: Client, config: dict[str, Any], archive: Path | None = None) -> None:
    deploy = {"function_name": config["name"], "archive_file": str(archive or ours.archive), "config": config}
    answers = client(
        ours.agent.address, [["RegisterFunction", config, 10], ["DeployFunction", deploy, 30]], tls=ours.tls
    )
    assert [answer.get("success") for answer in answers] == [True, True], answers


def _run(ours: Ours, client: Client, *args: str, name: str = "wired", **fields: Any) -> dict[str, Any]:
    request = {"function_name": name, "args": list(args), "execution_id": fields.pop("execution_id", ""), **fields}
    if not request["execution_id"]:
        request["execution_id"] = f"wire-{threading.get_native_id()}-{abs(hash((args, name))):x}-{len(fields)}"
    return dict(client(ours.agent.address, [["ExecuteFunction", request, 60]], tls=ours.tls)[0])


def test_health_and_node_status(ours: Ours, original_client: Client) -> None:
    health, status = original_client(
        ours.agent.address, [["HealthCheck", {}, 3], ["ReportNodeStatus", {}, 5]], tls=ours.tls
    )
    assert health["healthy"] is True
    assert health["version"]
    assert status["agent_id"] == "worker-1"
    assert status["memory_total_mb"] > 0
    assert status["max_tasks"] == 256


def test_arguments_and_environment_arrive_unchanged(deployed: Ours, original_client: Client) -> None:
    answer = _run(deployed, original_client, "args", "a b", "", "'\"$HOME`", "é")
    assert answer["error"] == ""
    assert answer["output"].encode("latin-1").decode() == "[a b]\n[]\n['\"$HOME`]\n[é]\n"
    assert _run(deployed, original_client, "env")["output"] == "hi wired\n"


def test_output_is_bytes(deployed: Ours, original_client: Client) -> None:
    assert _run(deployed, original_client, "bytes")["output"] == "\xff\x00\xfe"


@pytest.mark.parametrize(
    ("args", "error"),
    [(("exit", "7"), "exit code 7"), (("signal",), "exit code -1")],
)
def test_failures_in_the_originals_words(
    deployed: Ours, original_client: Client, args: tuple[str, ...], error: str
) -> None:
    assert _run(deployed, original_client, *args)["error"] == error


def test_unknown_function_is_an_answer_not_a_status(ours: Ours, original_client: Client) -> None:
    assert _run(ours, original_client, name="nobody")["error"] == "function not found"


def test_a_timeout_in_the_originals_words(ours: Ours, original_client: Client) -> None:
    _ready(ours, original_client, _config(name="brief", timeout_seconds=1))
    answer = _run(ours, original_client, "sleep", "30", name="brief")
    assert answer["error"] == "execution timed out after 1s"
    assert answer["output"] == "started\n"
    assert 900 <= answer["duration_ms"] < 10_000


def test_a_full_function_says_at_capacity(ours: Ours, original_client: Client) -> None:
    _ready(ours, original_client, _config(name="narrow", max_concurrency=1))
    asking = [
        ["ExecuteFunction", {"function_name": "narrow", "args": ["sleep", "0.5"], "execution_id": f"narrow-{i}"}, 60]
        for i in range(3)
    ]
    answers = original_client(ours.agent.address, [["gather", asking, 60]], tls=ours.tls)[0]
    assert sorted(answer["error"] for answer in answers) == ["", *["function narrow at capacity"] * 2]


def test_async_record_and_cancel(deployed: Ours, original_client: Client) -> None:
    accepted = _run(deployed, original_client, "sleep", "60", execution_id="async-1", **{"async": True})
    assert accepted["error"] == ""

    def record() -> dict[str, Any]:
        answer = original_client(
            deployed.agent.address, [["GetExecution", {"execution_id": "async-1"}, 5]], tls=deployed.tls
        )[0]
        assert answer["found"] is True
        return dict(json.loads(answer["data"].encode("latin-1")))

    running = wait_until(lambda: (one := record())["output"] and one, "its first output")
    assert running["status"] == "running"
    assert running["agent_id"] == "worker-1"
    assert "status_at" not in running
    cancelled = original_client(
        deployed.agent.address,
        [["CancelExecution", {"execution_id": "async-1"}, 5], ["CancelExecution", {"execution_id": "async-1"}, 5]],
        tls=deployed.tls,
    )
    assert cancelled[0]["success"] is True
    assert cancelled[1]["success"] is False
    ended = record()
    assert ended["status"] == "cancelled"
    assert ended["status_at"]
    missing = original_client(
        deployed.agent.address, [["GetExecution", {"execution_id": "never-was"}, 5]], tls=deployed.tls
    )[0]
    assert missing["found"] is False


def test_async_at_capacity_is_refused_with_the_same_words(ours: Ours, original_client: Client) -> None:
    _ready(ours, original_client, _config(name="single", max_concurrency=1))
    first = _run(ours, original_client, "sleep", "60", name="single", execution_id="single-1", **{"async": True})
    assert first["error"] == ""
    second = _run(ours, original_client, "sleep", "60", name="single", execution_id="single-2", **{"async": True})
    assert second["error"] == "function single at capacity"
    original_client(ours.agent.address, [["CancelExecution", {"execution_id": "single-1"}, 5]], tls=ours.tls)


def test_a_cancel_is_answered_within_the_originals_deadline(ours: Ours, original_client: Client) -> None:
    stubborn = ours.archive.with_name("stubborn.zip")
    stubborn.write_bytes(make_zip({"main.sh": "#!/bin/sh\ntrap '' TERM\necho up\nwhile :; do sleep 1; done\n"}))
    _ready(ours, original_client, _config(name="stubborn"), stubborn)
    _run(ours, original_client, name="stubborn", execution_id="stubborn-1", **{"async": True})
    answer = original_client(
        ours.agent.address, [["CancelExecution", {"execution_id": "stubborn-1"}, 5]], tls=ours.tls
    )[0]
    assert answer["success"] is True


def test_near_fifty_mebibytes_each_way(ours: Ours, original_client: Client, tmp_path: Path) -> None:
    noise = random.Random(7).randbytes(45 * 1024 * 1024)
    large = tmp_path / "large.zip"
    with zipfile.ZipFile(large, "w") as archive:
        archive.writestr("main.sh", "#!/bin/sh\ncat noise\n")
        archive.writestr("noise", noise)
    _ready(ours, original_client, _config(name="large"), large)
    answer = _run(ours, original_client, name="large")
    assert answer["error"] == ""
    assert answer["output"] == hashlib.sha256(noise).hexdigest()


def test_bad_archives_are_refused_with_an_answer(ours: Ours, original_client: Client, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    for content in (b"not a zip", make_zip({"../../outside.sh": "#!/bin/sh\n"}), make_zip({"other.sh": "#!/bin/sh\n"})):
        bad.write_bytes(content)
        deploy = {"function_name": "wired", "archive_file": str(bad), "config": _config()}
        answer = original_client(ours.agent.address, [["DeployFunction", deploy, 30]], tls=ours.tls)[0]
        assert answer["success"] is False
        assert answer["message"]
