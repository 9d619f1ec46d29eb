"""The README's lines, copied and pasted: `flux run` in a directory with the examples, and a shell beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from fluxlib.config.control import read_control
from fluxlib.config.files import AGENT_PORT
from fluxlib.config.first_start import make_flux_yaml
from fluxlib.local import prepare_agent, welcome
from fluxlib.pki.certificates import AGENT_LIFE, AGENT_USES, cert_pem, load_key, sign
from fluxlib.pki.identity import AGENT_NAME, agent_server_name, utc_now
from fluxlib.pki.signer import Signer
from tests.support.need import need
from tests.support.programs import Api, Flux, Program, free_port, is_alive, wait_until


def _blocks(text: str) -> list[str]:
    """The shell blocks of "Try it", in order, without the ones that fetch and start."""
    part = text.split("## Try it")[1].split("\n## ")[0]
    found = [
        textwrap.dedent(block) for block in re.findall(r"^[ ]*```sh\n(.*?)^[ ]*```", part, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if "make run" not in block]


class Run(Program):
    """What `make run` starts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "run", ["run", "--state", ".state"], {})

    def start(self) -> Self:
        self.log.unlink(missing_ok=True)
        return super().start()

    def ready(self) -> bool:
        super().ready()
        said = self.log.read_text()
        # On a busy machine the greeting does not wait for the agent for ever.
        return "Ctrl-C stops both" in said and "is synchronized" in said


@pytest.mark.skipif(sys.platform == "win32", reason="a Unix shell's lines")
def test_copy_and_paste(top: Path, tmp_path: Path) -> None:
    need("curl", "bash")
    blocks = _blocks((top / "README.md").read_text())
    assert len(blocks) == 6
    shutil.copytree(top / "examples", tmp_path / "examples")
    # As the first start makes it, but for the port.
    port, made = free_port(), tmp_path / ".state" / "flux.yaml"
    assert make_flux_yaml(made, data=".", listen_host="127.0.0.1", port=port)
    assert made.stat().st_mode & 0o777 == 0o600
    with Run(tmp_path):
        script = "\n".join(["set -eu", *blocks]).replace(":7227", f":{port}").replace("curl -H", "curl -sS --fail -H")
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    registered, deployed, executed, accepted, listed = _documents(done.stdout)
    assert (registered["status"], deployed["deployed_count"]) == ("registered", 1)
    assert "you" in executed["output"]
    assert accepted["status"] == "accepted"
    assert {one["execution_id"] for one in listed["items"]} == {executed["execution_id"], accepted["execution_id"]}


def _documents(text: str) -> list[Any]:
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text.rstrip()):
        document, end = decoder.raw_decode(text, at)
        found.append(document)
        at = end + len(text[end:]) - len(text[end:].lstrip())
    return found


def test_the_key_is_found_where_the_readme_says(top: Path) -> None:
    """What `flux run` prints and the README's line read the same file."""
    config = read_control("api_key: a-key-of-some-length\n", Path(".state/flux.yaml"))
    assert any(".state/flux.yaml" in line for line in welcome(config))
    assert "sed -n 's/^api_key: *//p' .state/flux.yaml" in (top / "README.md").read_text()


def test_every_page_the_readme_names_is_there(top: Path) -> None:
    for page in [top / "README.md", *(top / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_stopping_leaves_no_agent(tmp_path: Path) -> None:
    """Also when Flux dies without a word: its agent is held by a pipe."""
    directory = tmp_path / "home"
    directory.mkdir()
    run = Run(directory)
    make_flux_yaml(directory / ".state" / "flux.yaml", data=".", port=free_port())
    with run:
        assert run.process is not None
        children = psutil.Process(run.process.pid).children(recursive=True)
        assert children
        run.kill()
        wait_until(lambda: not any(is_alive(child.pid) for child in children), "the agent to stop with it")


def test_a_second_start_says_that_it_runs_already_and_where(tmp_path: Path) -> None:
    make_flux_yaml(tmp_path / ".state" / "flux.yaml", data=".", port=(port := free_port()))
    with Run(tmp_path) as run:
        assert run.process is not None
        command = [sys.executable, "-m", "flux", "run", "--state", ".state"]
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert again.returncode == 1
        assert again.stderr == (
            f"flux: already running here (process {run.process.pid}), it answers at http://127.0.0.1:{port}\n"
        )
        assert Api(f"http://127.0.0.1:{port}", None).request("GET", "/health")[0] == 200


@pytest.mark.skipif(sys.platform == "win32", reason="a Unix shell's lines")
def test_the_greeting_can_be_pasted_whatever_the_state_directory_is_called(tmp_path: Path) -> None:
    path = tmp_path / "it's $HOME here" / "flux.yaml"
    make_flux_yaml(path)
    config = read_control(path.read_text(), path)
    (line,) = [line for line in welcome(config) if "export KEY=" in line]
    done = subprocess.run(["sh", "-c", f'{line}\necho "$KEY"'], capture_output=True, text=True, check=True)
    assert done.stdout == f"{config.api_key}\n"


def test_a_taken_agent_port_is_no_obstacle(tmp_path: Path) -> None:
    """The agent moves to another port, its record moves with it, and what it has stays."""
    path = tmp_path / ".state" / "flux.yaml"
    make_flux_yaml(path, data=".", port=(port := free_port()))
    config = read_control(path.read_text(), path)
    # Its usual port may be any other test's just now.
    agent = prepare_agent(config, path.parent / "agent")
    agent.write_text(agent.read_text().replace(str(AGENT_PORT), str(free_port())))
    api = Api(f"http://127.0.0.1:{port}", config.api_key)
    run = Run(tmp_path)
    with run:
        api.deploy({"name": "here", "handler": "run.sh"}, {"run.sh": "#!/bin/sh\necho here\n"})
        before = api.call("GET", "/agents")[1][0]["address"]
    with socket.create_server(("127.0.0.1", int(before.rpartition(":")[2]))), Run(tmp_path):
        wait_until(lambda: api.call("GET", "/agents")[1][0]["status"] == "online", "the agent to be back")
        assert api.call("GET", "/agents")[1][0]["address"] != before
        assert api.execute("here")[1]["output"] == "here\n"


def _ended(state: Path) -> None:
    """As after a year in which nothing ran."""
    signer = Signer.open(state / "certs" / "ca" / "ca.pem", state / "certs" / "ca" / "ca-key.pem")
    key = load_key((state / "agent" / "agent-key.pem").read_bytes())
    names, began = [AGENT_NAME, agent_server_name("local")], utc_now() - AGENT_LIFE - timedelta(days=1)
    made = sign(signer._ca, signer._ca_key, key.public_key(), "local", names, AGENT_LIFE, began, AGENT_USES)
    (state / "agent" / "agent.pem").write_bytes(cert_pem(made))


def _of_another_authority(state: Path) -> None:
    shutil.rmtree(state / "certs")


def _lost(state: Path) -> None:
    (state / "agent" / "agent-key.pem").unlink()


@pytest.mark.parametrize("fate", [_ended, _of_another_authority, _lost])
def test_the_local_agent_gets_certificates_that_flux_takes(tmp_path: Path, fate: Callable[[Path], None]) -> None:
    """There is nobody who would enrol it again."""
    state = tmp_path / ".state"
    make_flux_yaml(state / "flux.yaml", data=".", port=(port := free_port()))
    key = read_control((state / "flux.yaml").read_text(), Path("x")).api_key
    config = read_control((state / "flux.yaml").read_text(), state / "flux.yaml")
    first = (prepare_agent(config, state / "agent").parent / "agent.pem").read_bytes()
    prepare_agent(config, state / "agent")
    assert (state / "agent" / "agent.pem").read_bytes() == first
    fate(state)
    with Run(tmp_path):
        assert Api(f"http://127.0.0.1:{port}", key).call("GET", "/agents")[1][0]["status"] == "online"
    assert {file.stat().st_mode & 0o777 for file in (state / "agent").glob("*.pem")} == {0o600}


def test_a_deregistered_local_agent_is_enrolled_again_at_the_next_start(tmp_path: Path) -> None:
    """Its certificates are revoked, and nobody else would make new ones."""
    state = tmp_path / ".state"
    make_flux_yaml(state / "flux.yaml", data=".", port=(port := free_port()))
    api = Api(f"http://127.0.0.1:{port}", read_control((state / "flux.yaml").read_text(), Path("x")).api_key)
    with Run(tmp_path):
        api.deploy({"name": "here", "handler": "run.sh"}, {"run.sh": "#!/bin/sh\necho here\n"})
        assert api.call("DELETE", "/agents/local")[0] == 200
        assert api.call("GET", "/agents")[1] == []
    with Run(tmp_path):
        wait_until(lambda: [one["status"] for one in api.call("GET", "/agents")[1]] == ["online"], "it to be back")
        assert api.execute("here")[1]["output"] == "here\n"


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="needs another user")
def test_a_state_directory_that_cannot_be_written_is_told(top: Path, tmp_path: Path) -> None:
    as_nobody = ["setpriv", "--reuid", "65534", "--clear-groups"]
    if subprocess.run([*as_nobody, "test", "-r", top / "flux.py"]).returncode:
        pytest.skip("this clone can be read by its owner only")
    state = tmp_path / "state"
    make_flux_yaml(state / "flux.yaml", data=".", port=free_port())
    for path in (tmp_path, *tmp_path.parents[:3], state, state / "flux.yaml"):
        path.chmod(path.stat().st_mode | 0o055)
    done = subprocess.run(
        [*as_nobody, sys.executable, "-m", "flux", "run", "--state", str(state)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "--state" in done.stderr
    assert "Traceback" not in done.stderr


def test_keys_are_taken_over_while_it_runs(tmp_path: Path) -> None:
    with Flux(tmp_path) as flux:
        made = subprocess.run(
            [sys.executable, "-m", "flux", "keys", "add", "looker", "--role", "read"],
            env={**os.environ, "FLUX_CONFIG": str(flux.config_file)},
            capture_output=True,
            text=True,
            check=True,
        )
        looker = Api(flux.api.url, made.stdout.strip())
        wait_until(lambda: "took the keys" in flux.log.read_text(), "the new key to be taken over")
        assert looker.call("GET", "/functions")[0] == 200
        flux.config_file.write_text(flux.config_file.read_text().replace("looker", "looker\n    role: nonsense"))
        wait_until(lambda: "keys stay as they are" in flux.log.read_text(), "the bad file to be seen")
        assert looker.call("GET", "/functions")[0] == 200
