"""The greeting's lines, pasted into PowerShell: only on Windows, since Wine has a stub of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib.agent.executor import winapi
from fluxlib.config.first_start import make_flux_yaml
from fluxlib.windows.console import first_function
from tests.support.programs import Api, free_port, wait_until

pytestmark = [pytest.mark.windows, pytest.mark.skipif(winapi.is_wine(), reason="Wine has only a stub of PowerShell")]


@pytest.mark.parametrize("shell", ["powershell", "pwsh"])
def test_the_lines_to_paste_run_a_first_function(tmp_path: Path, shell: str) -> None:
    """Windows PowerShell 5.1 and PowerShell 7: their Compress-Archive and their content types differ."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    home, port = tmp_path / "O'Brien's [first] flux", free_port()
    flux_yaml = home / "flux.yaml"
    make_flux_yaml(flux_yaml, data=".", listen_host="127.0.0.1", port=port)
    url = f"http://127.0.0.1:{port}"
    api = Api(url)

    def agent_is_online() -> bool:
        try:
            return [agent["status"] for agent in api.call("GET", "/agents", timeout=2)[1]] == ["online"]
        except OSError:
            return False

    flux = subprocess.Popen(
        [sys.executable, "-m", "flux", "run", "--state", str(home)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(agent_is_online, "the agent to be online", 60)
        done = subprocess.run(
            [shell, "-NoProfile", "-NonInteractive", "-Command", "-"],
            input="\n".join([*first_function(flux_yaml, url), ""]),
            env={**os.environ, "USERPROFILE": str(tmp_path), "HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        flux.kill()
        flux.wait(20)
    assert "Hello, you, from hello" in done.stdout, done.stdout + done.stderr
    assert done.stderr == ""
