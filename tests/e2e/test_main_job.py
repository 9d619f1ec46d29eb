"""From a zip to a result, with real processes over real mTLS: the examples of this repository on two agents."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.need import need
from tests.support.programs import Agent, Flux, make_zip, wait_until


@pytest.fixture(scope="module")
def primes(top: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The compiled example, as a zip."""
    need("cc")
    program = tmp_path_factory.mktemp("build") / "primes"
    subprocess.run(["cc", "-O2", "-static", "-o", program, top / "examples/hello-c/primes.c"], check=True)
    return make_zip({"primes": program.read_bytes()})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Flux, Agent, Agent]]:
    directory = tmp_path_factory.mktemp("pair")
    with (
        Flux(directory, health_interval_sec=0.5) as flux,
        Agent(directory, flux, "worker-1") as first,
        Agent(directory, flux, "worker-2") as second,
    ):
        flux.register(first)
        flux.register(second)
        yield flux, first, second


def put(flux: Flux, spec: str, archive: bytes) -> dict[str, Any]:
    status, answer = flux.api.call("PUT", "/functions", spec.encode())
    assert status == 201, answer
    status, answer = flux.api.call("PUT", f"/deploy/{yaml.safe_load(spec)['name']}", archive)
    assert status == 201, answer
    return dict(answer)


def deploy_examples(flux: Flux, top: Path, primes: bytes) -> None:
    for name, file in (("hello-shell", "hello.sh"), ("hello-python", "main.py")):
        directory = top / "examples" / name
        put(flux, (directory / "function.yaml").read_text(), make_zip({file: (directory / file).read_bytes()}))
    put(flux, (top / "examples/hello-c/function.yaml").read_text(), primes)


def test_the_three_examples(pair: tuple[Flux, Agent, Agent], top: Path, primes: bytes) -> None:
    flux, *_ = pair
    deploy_examples(flux, top, primes)
    status, answer = flux.api.execute("hello", "you")
    assert (status, answer["status"]) == (200, "success")
    assert "you" in answer["output"]
    assert answer["agent_id"] in ("worker-1", "worker-2")
    status, answer = flux.api.execute("primes", "100")
    assert (status, answer.get("output")) == (200, "25 primes below 100\n"), answer
    status, answer = flux.api.call("POST", "/execute/words", {"input": "to be or not to be"})
    assert status == 200, answer
    assert json.loads(answer["output"])["words"] == 6
    status, body, _ = flux.api.request("POST", "/execute/words", b"one two", {"Content-Type": "text/plain"})
    assert status == 200, body
    assert json.loads(json.loads(body)["output"])["words"] == 2


def test_plain_curl_works_as_with_the_original(pair: tuple[Flux, Agent, Agent], top: Path, primes: bytes) -> None:
    need("curl")
    flux, *_ = pair
    deploy_examples(flux, top, primes)
    command = ["curl", "-s", "-H", f"X-API-Key: {flux.api.key}", "-d", '{"args": ["curl"]}']
    done = subprocess.run([*command, f"{flux.api.url}/execute/hello"], capture_output=True, text=True, check=True)
    assert "curl" in json.loads(done.stdout)["output"]


def test_a_failure_is_an_answer(pair: tuple[Flux, Agent, Agent]) -> None:
    flux, *_ = pair
    put(flux, "name: fails\nhandler: run.sh\n", make_zip({"run.sh": "#!/bin/sh\necho before\nexit 7\n"}))
    status, answer = flux.api.execute("fails")
    assert (status, answer["status"], answer["error"]) == (500, "failed", "exit code 7")
    assert answer["output"] == "before\n"
    record = flux.api.call("GET", f"/executions/{answer['execution_id']}")[1]
    assert (record["status"], record["exit_code"], record["output"]) == ("failed", 7, "before\n")


def test_the_environment_is_clean(pair: tuple[Flux, Agent, Agent]) -> None:
    flux, *_ = pair
    spec = "name: environment\nhandler: run.sh\nenv: {GREETING: hi}\n"
    put(flux, spec, make_zip({"run.sh": "#!/bin/sh\nexec env\n"}))
    status, answer = flux.api.execute("environment")
    assert status == 200, answer
    found = dict(line.split("=", 1) for line in answer["output"].splitlines())
    assert found["GREETING"] == "hi"
    assert found["FLUX_FUNCTION_NAME"] == "environment"
    assert found["FLUX_EXECUTION_ID"] == answer["execution_id"]
    assert not {"AGENT_CONFIG", "FLUX_CONFIG", "PYTHONPATH"} & set(found)


def test_names_as_people_write_them_reach_the_program(pair: tuple[Flux, Agent, Agent]) -> None:
    flux, *_ = pair
    spec = "name: named\nhandler: ./bin//env.py\nenv:\n  spring.profiles.active: prod\n  node-options: x\n"
    # No shell is between: dash keeps such variables to itself.
    code = (
        "#!/usr/bin/env python3\nimport os\nfor name, value in os.environ.items():\n    print(name, value, sep='=')\n"
    )
    put(flux, spec, make_zip({"bin/env.py": code}))
    status, answer = flux.api.call("POST", "/execute/named/", {})
    assert status == 200, answer
    assert {"spring.profiles.active=prod", "node-options=x"} <= set(answer["output"].splitlines())


def test_a_call_whose_client_has_gone_is_cancelled_and_one_that_sends_no_more_is_answered(
    pair: tuple[Flux, Agent, Agent],
) -> None:
    need("curl")
    flux, *_ = pair
    put(flux, "name: waits\nhandler: w.sh\n", make_zip({"w.sh": '#!/bin/sh\nsleep "$1"\necho slept\n'}))
    connection = http.client.HTTPConnection("127.0.0.1", flux.port, timeout=30)
    connection.request("POST", "/execute/waits", '{"args": ["1"]}', {"X-API-Key": flux.api.key})
    connection.sock.shutdown(socket.SHUT_WR)
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["output"]) == (200, "slept\n")
    connection.close()

    command = ["curl", "-s", "-H", f"X-API-Key: {flux.api.key}", "-d", '{"args": ["60"]}']
    with subprocess.Popen([*command, f"{flux.api.url}/execute/waits"], stdout=subprocess.DEVNULL) as call:
        wait_until(lambda: "running" in statuses(flux, "waits"), "the call to run")
        call.terminate()
    wait_until(lambda: "cancelled" in statuses(flux, "waits"), "the call to be cancelled")


def statuses(flux: Flux, function: str) -> list[str]:
    return [record["status"] for record in flux.api.call("GET", f"/executions?function={function}")[1]["items"]]


def test_output_keeps_its_order_and_its_bytes(pair: tuple[Flux, Agent, Agent]) -> None:
    flux, *_ = pair
    script = "#!/bin/sh\nfor i in 1 2 3; do echo out $i; echo err $i >&2; done\nprintf '\\377\\000'\n"
    put(flux, "name: mixed\nhandler: run.sh\n", make_zip({"run.sh": script}))
    status, answer = flux.api.execute("mixed")
    assert status == 200
    lines = "".join(f"out {n}\nerr {n}\n" for n in (1, 2, 3))
    assert answer["output"] == lines + "�\x00"
    status, raw, _ = flux.api.request("GET", f"/executions/{answer['execution_id']}/output")
    assert (status, raw) == (200, lines.encode() + b"\xff\x00")


def test_an_agent_dies_and_another_joins(tmp_path: Path, top: Path, primes: bytes) -> None:
    """Nothing is answered wrongly while one is killed under load, and the newcomer gets everything."""
    with (
        Flux(tmp_path, health_interval_sec=0.3) as flux,
        Agent(tmp_path, flux, "worker-1") as first,
        Agent(tmp_path, flux, "worker-2") as second,
    ):
        flux.register(first)
        flux.register(second)
        deploy_examples(flux, top, primes)
        # Six find room for three each: both agents must take some, however busy the machine says they are.
        put(flux, "name: slow\nhandler: run.sh\nmax_concurrency: 3\n", make_zip({"run.sh": "#!/bin/sh\nsleep 60\n"}))
        answers: list[tuple[int, Any]] = []
        wrong: list[Any] = []
        stop = threading.Event()

        def caller() -> None:
            while not stop.is_set():
                status, answer = flux.api.execute("primes", "100")
                answers.append((status, answer))
                if status == 200 and answer["output"] != "25 primes below 100\n":
                    wrong.append(answer)
                if status not in (200, 429, 502, 503):
                    wrong.append((status, answer))

        threads = [threading.Thread(target=caller) for _ in range(4)]
        lost: list[tuple[int, Any]] = []
        hanging = [threading.Thread(target=lambda: lost.append(flux.api.execute("slow"))) for _ in range(6)]
        for thread in (*threads, *hanging):
            thread.start()
        wait_until(lambda: len(answers) > 40, "some answers")

        def both_run_slow() -> bool:
            _, page = flux.api.call("GET", "/executions?function=slow&status=running")
            on = Counter(record["agent_id"] for record in page["items"])
            return on["worker-1"] > 0 and on["worker-2"] > 0

        wait_until(both_run_slow, "slow ones to run on both agents")
        first.kill()
        third = Agent(tmp_path, flux, "worker-3")
        with third:
            flux.register(third)
            wait_until(lambda: flux.status_of("worker-1") == "offline", "the dead agent to be noticed")
            wait_until(
                lambda: any(answer.get("agent_id") == "worker-3" for _, answer in answers), "the newcomer to work"
            )
            count = len(answers)
            wait_until(lambda: len(answers) > count + 40, "more answers")
            # What the dead agent ran is a 502 with its ID, and was not run again.
            wait_until(lambda: any(status == 502 for status, _ in lost), "the lost ones to be told")
            stop.set()
            for thread in threads:
                thread.join(30)
            assert not wrong, wrong[:3]
            assert sum(status == 200 for status, _ in answers) > 60
            for status, answer in lost:
                assert (status, bool(answer["execution_id"])) == (502, True), answer
            _, agents = flux.api.call("GET", "/agents")
            assert {agent["id"]: agent["status"] for agent in agents} == {
                "worker-1": "offline",
                "worker-2": "online",
                "worker-3": "online",
            }
            running = flux.api.call("GET", "/executions?function=slow&status=running")[1]["items"]
            for record in running:
                if record["agent_id"] == "worker-2":
                    assert flux.api.call("DELETE", f"/executions/{record['execution_id']}")[0] == 200
            for thread in hanging:
                thread.join(30)
            assert not any(thread.is_alive() for thread in hanging)


def test_a_deploy_with_nobody_there_reaches_who_joins(tmp_path: Path) -> None:
    with Flux(tmp_path, health_interval_sec=0.5) as flux:
        answer = put(flux, "name: early\nhandler: run.sh\n", make_zip({"run.sh": "#!/bin/sh\necho here\n"}))
        assert (answer["deployed_count"], answer["total_agents"]) == (0, 0)
        assert flux.api.execute("early")[0] == 429
        with Agent(tmp_path, flux, "worker-1") as agent:
            flux.register(agent)
            assert flux.api.execute("early")[1]["output"] == "here\n"


def test_everything_survives_a_restart_of_both(tmp_path: Path) -> None:
    flux = Flux(tmp_path, health_interval_sec=0.5)
    agent = Agent(tmp_path, flux, "worker-1")
    with flux, agent:
        flux.register(agent)
        put(flux, "name: kept\nhandler: run.sh\n", make_zip({"run.sh": "#!/bin/sh\necho here\n"}))
        identifier = flux.api.execute("kept")[1]["execution_id"]
        assert agent.stop() == 0
        assert flux.stop() == 0
        agent.start()
        flux.start()
        wait_until(lambda: flux.status_of("worker-1") == "online", "the agent to be back")
        assert flux.api.execute("kept")[1]["output"] == "here\n"
        assert flux.api.call("GET", f"/executions/{identifier}")[1]["output"] == "here\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_stopping_waits_for_what_runs(tmp_path: Path) -> None:
    with Flux(tmp_path) as flux, Agent(tmp_path, flux, "worker-1") as agent:
        flux.register(agent)
        put(flux, "name: short\nhandler: run.sh\n", make_zip({"run.sh": "#!/bin/sh\nsleep 1.5\necho done\n"}))
        answers: list[tuple[int, Any]] = []
        caller = threading.Thread(target=lambda: answers.append(flux.api.execute("short")))
        caller.start()
        wait_until(lambda: flux.api.call("GET", "/executions?status=running")[1]["items"], "it to run")
        assert flux.stop() == 0
        caller.join(10)
        assert answers[0][0] == 200, answers
        assert answers[0][1]["output"] == "done\n"
