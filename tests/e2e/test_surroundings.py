"""Names, arguments and output are UTF-8 from end to end, in whatever locale the programs were started."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.programs import Agent, Flux, make_zip

SCRIPT = '#!/bin/sh\ncat "grüße.txt"\necho "$1 $WHO"\nls *.txt\n'


@pytest.mark.parametrize("locale", ["C", "de_DE.ISO-8859-1"])
def test_utf8_whatever_the_locale(tmp_path: Path, locale: str) -> None:
    if locale != "C":
        localedef = shutil.which("localedef")
        made = localedef and subprocess.run(
            [localedef, "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / locale)], capture_output=True, check=False
        )
        if not made or not (tmp_path / locale).is_dir():
            pytest.skip("no sources of locales on this machine")
    environment = {"LC_ALL": locale, "LOCPATH": str(tmp_path), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flux = Flux(tmp_path)
    flux.environment = {**flux.environment, **environment}
    with flux:
        agent = Agent(tmp_path, flux, "worker-1")
        agent.environment = {**agent.environment, **environment}
        with agent:
            flux.register(agent)
            spec = {"name": "greet", "handler": "run.sh", "env": {"WHO": "Жора"}}
            flux.api.deploy(spec, {"run.sh": SCRIPT, "grüße.txt": "hello €\n"})
            status, answer = flux.api.execute("greet", "日本")
            assert (status, answer["output"]) == (200, "hello €\n日本 Жора\ngrüße.txt\n")


def test_a_zip_of_another_system_runs_here(tmp_path: Path) -> None:
    """What PowerShell writes, deployed and run; what nobody here can run is said first."""
    corpus = Path(__file__).parents[1] / "archive" / "corpus"
    with Flux(tmp_path) as flux, Agent(tmp_path, flux, "worker-1") as agent:
        flux.register(agent)
        flux.api.call("PUT", "/functions", b"name: corpus\nhandler: run.sh\n")
        for tool in ("powershell", "infozip-links", "bsdtar"):
            status, answer = flux.api.call("PUT", "/deploy/corpus", (corpus / f"{tool}.zip").read_bytes())
            assert (status, "problem" in answer) == (201, False), answer
            assert flux.api.execute("corpus")[1]["output"] == "data\nhello\n"
        status, answer = flux.api.call("PUT", "/deploy/corpus", make_zip({"run.sh": "#!/gone/sh\n"}))
        assert status == 201
        assert next(iter(answer)) == "problem"
        reason = "run.sh asks for /gone/sh, which is not on this machine"
        assert answer["problem"] == f"no agent can run corpus: {reason} (worker-1)"
        assert answer["warnings"] == [reason]
        assert flux.api.execute("corpus")[1]["error"] == f"cannot start: exec: {reason}"
        status, answer = flux.api.call("PUT", "/deploy/corpus", make_zip({"run.sh": b"MZ" + bytes(100)}))
        assert (status, answer["agents"][0]["status"]) == (201, "skipped")
        assert answer["problem"].startswith("no agent can run corpus: the agent is linux/")
