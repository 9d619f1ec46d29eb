"""The console window: what closing it does to what runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxlib.config.control import load_control
from fluxlib.windows import console

pytestmark = pytest.mark.windows

# The whole agent, with a function that runs; then the window is closed, as Windows tells it: on a thread of its own.
CLOSED = r"""
import sys, threading
from pathlib import Path
import grpc
from fluxlib.agent.app import serve
from fluxlib.config.agent import load_agent
from fluxlib.lifecycle import StopSignal
from fluxlib.rpc.gen import flux_pb2 as pb, flux_pb2_grpc
from fluxlib.windows import console
from tests.support.programs import make_zip

home = Path(sys.argv[1])
config = load_agent(home / "agent.yaml")
stop = StopSignal().install()
handler = console.stop_when_closed(stop)

def close_when_it_runs():
    with grpc.insecure_channel(f"127.0.0.1:{config.port}") as channel:
        grpc.channel_ready_future(channel).result(30)
        stub = flux_pb2_grpc.AgentServiceStub(channel)
        function = pb.FunctionConfig(name="sleeper", handler="sleep.bat")
        code = make_zip({"sleep.bat": "@echo up\r\n@ping -n 300 127.0.0.1 >nul\r\n"})
        package = pb.DeploymentPackage(function_name="sleeper", code_archive=code, config=function)
        assert stub.DeployFunction(package).success
        request = pb.ExecutionRequest(function_name="sleeper", execution_id="run-1")
        setattr(request, "async", True)
        stub.ExecuteFunction(request)
        print("closing", flush=True)
    handler(2)  # CTRL_CLOSE_EVENT; returns only when it is too late

threading.Thread(target=close_when_it_runs, daemon=True).start()
sys.exit(serve(config, stop))
"""
AGENT = (
    "agent_id: local\nport: {port}\nlisten_host: 127.0.0.1\nstate_dir: state\nshutdown_sec: 60\n"
    "tls: {{enabled: false}}\ninsecure: true\n"
)


def test_closing_the_window_ends_what_runs_as_agent_stopped(tmp_path: Path) -> None:
    from fluxlib.store import open_record_store
    from tests.support.programs import free_port

    (tmp_path / "agent.yaml").write_text(AGENT.format(port=free_port()))
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED, str(tmp_path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline().strip() == b"closing"
        began = time.monotonic()
        code = process.wait(30)
    assert code == 0
    assert time.monotonic() - began < 5, "Windows would have ended it"
    store = open_record_store("sqlite", "", tmp_path / "state", "local")
    try:
        record = store.record("run-1")
    finally:
        store.close()
    assert record is not None
    assert (record.status.value, record.error) == ("failed", "agent stopped")


def test_ctrl_c_is_left_to_python() -> None:
    from fluxlib.lifecycle import StopSignal

    stop = StopSignal()
    handler = console.stop_when_closed(stop)
    assert handler(0) == 0
    assert handler(1) == 0
    assert not stop.is_set()


def test_the_greeting_names_the_key_the_address_and_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "flux.yaml"
    path.write_text(
        "api_key: 0123456789abcdef0123\nport: 7300\nstate_dir: flux-data/state\ncerts_dir: flux-data/certs\n"
    )
    words = "\n".join(console.greeting(load_control(path)))
    assert "full control" in words
    assert "flux.log" in words
    assert str(path) in words
    assert "http://127.0.0.1:7300" in words
    assert str(tmp_path / "flux-data") in words
    assert "0123456789abcdef0123" not in words


@pytest.mark.parametrize(
    "path",
    [
        r"C:\flux\flux.yaml",
        "C:\\Users\\O'Brien\\[my] flux, the \u2018second\u2019 one & more $x `y %z%\\flux.yaml",
        "C:\\" + "'" * 100 + "\\flux.yaml",
        "C:\\" + "\\".join(["a long name of a directory, as people have them"] * 5) + "\\flux.yaml",
    ],
)
def test_the_lines_to_paste_survive_any_path_and_wrap_nowhere(path: str) -> None:
    lines = console.first_function(Path(path), "http://127.0.0.1:65535")
    assert max(len(line) for line in lines) < 80
    assert all(line.isprintable() for line in lines)
    texts = [re.fullmatch(r"\$f \+?= '(.*)'", line) for line in lines]
    said = [re.sub("(['\u2018-\u201b])\\1", r"\1", text[1]) for text in texts if text is not None]
    assert "".join(said) == path
    # Two of them are one, a single one would end the string.
    for text in texts:
        assert text is None or not re.search("['\u2018-\u201b]", re.sub("(['\u2018-\u201b])\\1", "", text[1]))
    joined = "\n".join(lines)
    assert "-LiteralPath $f" in joined
    for step in ("$u/functions", "$u/deploy/hello", "$u/execute/hello"):
        assert step in joined
