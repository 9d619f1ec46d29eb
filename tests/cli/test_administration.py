"""The commands, as processes: what they print, what they write, what they refuse."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib.config.agent import load_agent
from fluxlib.config.control import load_control, read_control
from fluxlib.config.files import system_directory
from fluxlib.config.key_file import with_key, without_key
from fluxlib.config.keys import ApiKey
from fluxlib.errors import Conflict, NotFound
from fluxlib.local import welcome

KEY = "a-key-of-more-than-sixteen-characters"
HASH = "e" * 64


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flux", *arguments],
        cwd=directory,
        env={**os.environ, "FLUX_CONFIG": str(directory / "flux.yaml")},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "flux.yaml").write_text(f"# mine\napi_key: {KEY}\ncerts_dir: certs\nport: 7999\n")
    (tmp_path / "flux.yaml").chmod(0o600)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        f"api_key: {KEY}",
        f"api_key: {KEY}\napi_keys: []\nport: 7000\n",
        f"api_key: {KEY}\napi_keys:\n# nothing yet\nport: 7000\n",
        f"# top\napi_key: {KEY}\napi_keys:\n- name: q\n  role: admin\n  key_hash: {HASH}\n\n# after\nport: 7000\n",
        f"api_key: {KEY}\napi_keys: [{{name: q, role: admin, key_hash: {HASH}}}]\nport: 7000\n",
        f"api_key: {KEY}\napi_keys:\n    - name: q\n      role: read\n"
        f"      key_hash: {HASH}\n      functions:\n      - a\n",
    ],
)
def test_a_key_is_added_and_removed_in_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "flux.yaml"
    before = read_control(text, path)
    first = ApiKey(name="first", role="read", key_hash="1" * 64)
    second = ApiKey(name="second", role="invoke", key_hash="2" * 64, functions=("a", "b"))
    added = with_key(with_key(text, first, path), second, path)
    assert read_control(added, path).api_keys == (*before.api_keys, first, second)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in added.splitlines() if line.startswith("#")
    ]
    with pytest.raises(Conflict):
        with_key(added, first, path)
    removed = without_key(without_key(added, "second", path), "first", path)
    assert read_control(removed, path) == before
    with pytest.raises(NotFound, match="first"):
        without_key(removed, "first", path)


def test_keys_are_made_listed_and_removed(home: Path) -> None:
    made = run(home, "keys", "add", "ci", "--role", "deploy", "--function", "hello")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    text = (home / "flux.yaml").read_text()
    assert key not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert text.startswith("# mine\n")
    if os.name == "posix":
        assert stat.S_IMODE((home / "flux.yaml").stat().st_mode) == 0o600
    assert "ci: deploy, only hello" in run(home, "keys", "list").stdout
    again = run(home, "keys", "add", "ci", "--role", "read")
    assert again.returncode == 1
    assert "already" in again.stderr
    limited = run(home, "keys", "add", "boss", "--role", "admin", "--function", "hello")
    assert (limited.returncode, limited.stdout) == (1, "")
    assert "cannot limit an admin" in limited.stderr
    assert run(home, "keys", "remove", "ci").returncode == 0
    assert "ci" not in run(home, "keys", "list").stdout


def test_a_link_to_the_configuration_stays_one(home: Path) -> None:
    real = home / "managed" / "flux.yaml"
    real.parent.mkdir()
    (home / "flux.yaml").rename(real)
    (home / "flux.yaml").symlink_to("managed/flux.yaml")
    assert run(home, "keys", "add", "ci", "--role", "deploy").returncode == 0
    assert (home / "flux.yaml").is_symlink()
    assert "name: ci" in real.read_text()
    if os.name == "posix":
        assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert run(home, "keys", "remove", "ci").returncode == 0
    assert "name: ci" not in real.read_text()


def test_enrolling_writes_a_directory_an_agent_can_use(home: Path) -> None:
    done = run(home, "enroll", "worker-1")
    assert done.returncode == 0, done.stderr
    directory = home / "worker-1"
    assert sorted(path.name for path in directory.iterdir()) == ["agent-key.pem", "agent.pem", "agent.yaml", "ca.pem"]
    if os.name == "posix":
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    config = load_agent(directory / "agent.yaml")
    assert (config.agent_id, config.tls_enabled) == ("worker-1", True)
    again = run(home, "enroll", "worker-1")
    assert again.returncode == 1
    assert "already" in again.stderr


@pytest.mark.parametrize(
    ("listens_on", "answers_at"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.5", "10.0.0.5"), ("fd00::5", "[fd00::5]")],
)
def test_what_to_do_next_names_an_address_that_answers(home: Path, listens_on: str, answers_at: str) -> None:
    path = home / "flux.yaml"
    path.write_text(f"{path.read_text()}listen_host: '{listens_on}'\n")
    assert f" http://{answers_at}:7999/agents/register\n" in run(home, "enroll", "worker-1").stdout
    assert f"Flux answers at http://{answers_at}:7999, with one agent" in "\n".join(welcome(load_control(path)))


def test_an_enrolment_that_cannot_be_written_leaves_nothing(home: Path) -> None:
    """As on a full disk: whoever finds the directory takes it for an agent's."""
    assert run(home, "enroll", "worker-1").returncode == 0
    code = """
import resource
from fluxlib import administration
from fluxlib.cli import main
write = administration.enrolment_files
def then_full(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    return write(*arguments)
administration.enrolment_files = then_full
raise SystemExit(main(["enroll", "worker-2"]))
"""
    environment = {**os.environ, "FLUX_CONFIG": str(home / "flux.yaml")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "worker-2 cannot be written: File too large" in done.stderr
    assert not (home / "worker-2").exists()
    assert run(home, "enroll", "worker-2").returncode == 0


def test_a_place_that_cannot_be_looked_at_is_named(home: Path) -> None:
    done = run(home, "enroll", "worker-1", "--output", "x" * 300)
    assert done.returncode == 1
    assert "cannot be written: File name too long" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("agent_id", ["flux", "flux-agent", "../x", "*.x", "UPPER", "a" * 64, ""])
def test_what_is_no_agents_id_is_not_enrolled(home: Path, agent_id: str) -> None:
    done = run(home, "enroll", agent_id)
    assert done.returncode == 1
    assert "agent's ID" in done.stderr
    assert sorted(path.name for path in home.iterdir()) == ["flux.yaml"]


def test_every_fault_of_a_file_is_told(home: Path) -> None:
    (home / "flux.yaml").write_text("api_kay: x\nport: 0\nlog_level: loud\n")
    done = run(home, "check-config")
    assert done.returncode == 1
    for words in ("api_kay", "api_key", "port", "log_level"):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    serve = run(home, "serve")
    # What systemd's units do not start again after.
    assert serve.returncode == 78
    assert "port: " in serve.stderr


def test_the_agents_own_program_gives_its_own_name_with_a_fault(tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text("agent_id: worker\nport: many\n")
    environment = {key: value for key, value in os.environ.items() if key != "AGENT_CONFIG"}
    top = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, top / "flux_agent.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 78
    assert done.stderr.startswith("flux-agent: ")
    assert "port: must be a whole number" in done.stderr


def test_a_missing_file_that_was_named_is_no_first_start(tmp_path: Path) -> None:
    done = run(tmp_path, "serve")
    assert done.returncode == 78
    assert "there is no" in done.stderr
    assert not (tmp_path / "flux.yaml").exists()


@pytest.mark.parametrize(
    ("command", "name", "advice"),
    [
        (["agent"], "agent.yaml", "flux enroll NAME"),
        (["check-config", "--agent"], "agent.yaml", "flux enroll NAME"),
        (["enroll", "worker-1"], "flux.yaml", "FLUX_CONFIG"),
    ],
)
def test_a_missing_file_is_told_with_the_places_looked_in(
    tmp_path: Path, command: list[str], name: str, advice: str
) -> None:
    installed = system_directory("flux-agent" if name == "agent.yaml" else "flux")
    if (installed / name).exists():
        pytest.skip(f"{installed / name} is there")
    environment = {key: value for key, value in os.environ.items() if key not in ("FLUX_CONFIG", "AGENT_CONFIG")}
    done = subprocess.run(
        [sys.executable, "-m", "flux", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 78
    assert f"{name} was found neither in {tmp_path} nor in {installed}" in done.stderr
    assert advice in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="directories are closed by Unix' modes")
def test_a_working_directory_one_may_not_enter_is_no_traceback(tmp_path: Path) -> None:
    """`sudo -u flux flux keys list`, as root in its own home."""
    code = """
import os
from fluxlib.cli import main
os.environ.pop("FLUX_CONFIG", None)
main(["keys", "list"])  # imports all of it: Python may lie where that user may not look either
os.chmod(".", 0)
if os.geteuid() == 0:
    os.seteuid(65534)
raise SystemExit(main(["keys", "list"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    tmp_path.chmod(0o700)
    assert "Traceback" not in done.stderr
    # An installed Flux's own file is found from anywhere.
    assert "flux.yaml cannot be read" in done.stderr or Path("/etc/flux/flux.yaml").exists()


def test_a_wrong_argument_is_the_arguments_fault(home: Path) -> None:
    done = run(home, "keys", "add", "x y", "--role", "invoke", "--function", "a b")
    assert done.returncode == 1
    assert "'x y'" in done.stderr
    assert "'a b'" in done.stderr
    assert "flux.yaml" not in done.stderr


def test_an_agents_file_is_known_as_one(home: Path) -> None:
    (home / "agent.yaml").write_text("agent_id: worker-1\ntls: {enabled: false}\ninsecure: true\n")
    done = run(home, "check-config", "agent.yaml")
    assert done.returncode == 1
    assert "--agent" in done.stdout
    assert run(home, "check-config", "--agent", "agent.yaml").returncode == 0


def test_the_settings_of_an_agent_are_told_alone(home: Path) -> None:
    everything = run(home, "check-config", "--settings").stdout
    agents = run(home, "check-config", "--agent", "--settings").stdout
    assert "`runner_user`" in agents
    assert agents.strip() in everything
    assert "`api_key`" in everything
    assert "`api_key`" not in agents


def test_a_wrong_option_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--nosuch")
    assert done.returncode == 2
    assert "unrecognized arguments: --nosuch" in done.stderr
