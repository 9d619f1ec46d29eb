"""`check-config`: what is wrong with a configuration file, and what could stand in it.

A module of its own because flux-agent has the command too, which carries nothing of what else administers Flux.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fluxlib.config.document import load_mapping
from fluxlib.config.files import read_file
from fluxlib.errors import ConfigInvalid, FluxError


def show_settings(*, agent: bool) -> int:
    """Print every setting there is; with ``agent`` those of agent.yaml."""
    from fluxlib.config.reference import settings_markdown

    print(settings_markdown("agent.yaml" if agent else ""), end="")
    return 0


def check_config(path: Path, *, agent: bool) -> int:
    """Print every fault and warning of a configuration file; 0 when it can be used."""
    if not agent and _looks_like_an_agents(path):
        print(f"{path} looks like an agent.yaml: flux check-config --agent {path}")
        return 1
    try:
        remarks = _of_an_agents(path) if agent else _of_flux(path)
    except ConfigInvalid as error:
        print(f"{path} cannot be used:" if error.faults else error.message)
        for fault in error.faults:
            print(f"  - {fault}")
        return 1
    for remark in remarks:
        print(remark)
    print(f"{path} is fine")
    return 0


def _of_an_agents(path: Path) -> list[str]:
    from fluxlib.config.agent import load_agent

    return [f"warning: {warning}" for warning in load_agent(path).warnings]


def _of_flux(path: Path) -> list[str]:
    from fluxlib.config.control import load_control

    config = load_control(path)
    if not config.disable_grpc_tls:
        _check_authority(config.certs_dir)
    return [f"warning: {warning}" for warning in config.warnings] + [f"note: {note}" for note in config.notes]


def _check_authority(certs_dir: Path) -> None:
    """Raises ConfigInvalid for a CA that Flux cannot use; one that this user may not read is not looked at."""
    from fluxlib.pki.authority import Authority

    if not os.access(certs_dir, os.R_OK | os.X_OK):
        return
    try:
        Authority.check(certs_dir)
    except FluxError as error:
        raise ConfigInvalid(error.message) from error


def _looks_like_an_agents(path: Path) -> bool:
    with contextlib.suppress(FluxError):
        document = load_mapping(read_file(path), str(path), ConfigInvalid)
        return "agent_id" in document and "api_key" not in document
    return False
