"""The example files are loaded as they are, and with every commented setting taken out of its comment."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from fluxlib.config.agent import AgentConfig, read_agent
from fluxlib.config.control import ControlConfig, read_control
from fluxlib.config.function import read_function
from fluxlib.config.providers import AutoscalingConfig, AwsConfig, GcpConfig
from fluxlib.config.reader import settings_of
from fluxlib.config.reference import settings_markdown

_SETTING = re.compile(r"# (?=[ ]*(?:- |\w+:))")


def _uncommented(text: str) -> str:
    return "\n".join(_SETTING.sub("", line, count=1) if line.startswith("# ") else line for line in text.splitlines())


def _keys(document: object, prefix: str = "") -> set[str]:
    if not isinstance(document, dict):
        return set()
    return {f"{prefix}{key}" for key in document} | {
        found for key, value in document.items() for found in _keys(value, f"{prefix}{key}.")
    }


def _declared(cls: type, prefix: str = "") -> set[str]:
    return {f"{prefix}{declared.key}" for _, declared in settings_of(cls)}


def test_the_flux_example_is_complete_and_loads(top: Path, tmp_path: Path) -> None:
    text = (top / "example.flux.yaml").read_text()
    assert any("api_key" in warning for warning in read_control(text, tmp_path / "flux.yaml").warnings)
    whole = _uncommented(text)
    # The two ways of naming a package and the empty values stand for "absent".
    document = yaml.safe_load(whole)
    wanted = _declared(ControlConfig)
    for provider, cls in (("aws", AwsConfig), ("gcp", GcpConfig)):
        wanted |= _declared(cls, f"providers.{provider}.")
    wanted |= _declared(AutoscalingConfig, "providers.aws.autoscaling.")
    assert wanted <= _keys(document)
    shown = {line.split(":")[0].strip("# ").strip() for line in text.splitlines() if '""' in line}
    kept = "\n".join(line for line in whole.splitlines() if line.split(":")[0].strip() not in shown or '""' not in line)
    config = read_control(kept, tmp_path / "flux.yaml")
    assert config.providers.aws is not None
    assert config.providers.aws.autoscaling.enabled
    assert config.providers.gcp is not None


def test_the_agent_example_is_complete_and_loads(top: Path, tmp_path: Path) -> None:
    text = (top / "example.agent.yaml").read_text()
    assert read_agent(text, tmp_path / "agent.yaml").agent_id == "worker-1"
    whole = _uncommented(text)
    assert _declared(AgentConfig) <= _keys(yaml.safe_load(whole))
    kept = "\n".join(line for line in whole.splitlines() if '""' not in line)
    config = read_agent(kept.replace("network:", "", 1), tmp_path / "agent.yaml")
    assert config.tls_enabled
    assert not config.warnings


def test_the_examples_defaults_are_the_defaults(top: Path, tmp_path: Path) -> None:
    """What is commented out says what holds anyway."""
    agent = _uncommented((top / "example.agent.yaml").read_text())
    kept = [line for line in agent.splitlines() if '""' not in line and not line.startswith("network:")]
    config = read_agent("\n".join(kept), tmp_path / "agent.yaml")
    defaults = read_agent("agent_id: worker-1\ntls: {enabled: false}\ninsecure: true", tmp_path / "agent.yaml")
    same = ("port", "max_tasks", "uid_range", "max_processes", "max_open_files", "max_file_size_mb", "tmp_size_mb")
    same += ("kill_grace_sec", "detach_grace_sec", "shutdown_sec", "max_output_mb", "execution_ttl_sec", "log_level")
    assert {name: getattr(config, name) for name in same} == {name: getattr(defaults, name) for name in same}


@pytest.mark.parametrize("name", ["hello-shell", "hello-python", "hello-c"])
def test_the_example_functions_are_functions(top: Path, name: str) -> None:
    spec = read_function((top / "examples" / name / "function.yaml").read_text())
    assert spec.name


def test_the_settings_page_is_current(top: Path) -> None:
    assert (top / "docs" / "settings.md").read_text().endswith(settings_markdown()), "run `make docs`"


def test_the_installed_command_starts(top: Path) -> None:
    """As pip's wrapper calls it: without an argument."""
    module, _, name = tomllib.loads((top / "pyproject.toml").read_text())["project"]["scripts"]["flux"].partition(":")
    wrapper = f"import sys; from {module} import {name}; sys.argv = ['flux', '--version']; sys.exit({name}())"
    done = subprocess.run([sys.executable, "-c", wrapper], cwd=top, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("flux")
