"""`flux service install|remove|run` and the same of flux-agent: what the commands do around the service itself."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxlib import log
from fluxlib.config.first_start import make_flux_yaml
from fluxlib.errors import ConfigInvalid, FluxError, NotFound
from fluxlib.lifecycle import Deadline, StopSignal, pause

assert sys.platform == "win32"

from fluxlib.windows import service
from fluxlib.windows.console import first_function, quoted
from fluxlib.windows.service import AGENT, CONTROL, LOCAL_AGENT, Service

if TYPE_CHECKING:
    from fluxlib.config.control import ControlConfig

ACTIONS = ("install", "remove", "run")
_REGISTERED_WITHIN = 60.0


def which(*, agent: bool, local_agent: bool, directory: Path | None) -> Service:
    """The service that a command is about; ``directory`` is where it was installed to keep its things."""
    found = AGENT if agent else LOCAL_AGENT if local_agent else CONTROL
    return found if directory is None else replace(found, directory=directory)


def command(action: str, chosen: Service) -> int:
    """The exit code. Raises FluxError."""
    if action == "run":
        return service.run(chosen, lambda stop: _serve(chosen, stop))
    is_control = chosen.name == CONTROL.name
    if action == "install":
        lines = _install_control(chosen) if is_control else _install_agent(chosen)
    else:
        lines = _remove([LOCAL_AGENT, chosen] if is_control else [chosen])
    print("\n".join(lines))
    return 0


# ---- install -----------------------------------------------------------------------


def _install_control(control: Service) -> list[str]:
    """Flux, and an agent on this computer. Raises FluxError; no service is left then."""
    from fluxlib.config.agent import load_agent
    from fluxlib.config.control import load_control
    from fluxlib.local import prepare_agent, usable_port

    # A service that cannot start is hard to ask why: everything is checked first.
    service.make_private(control.directory)
    flux_yaml = control.directory / "flux.yaml"
    made = make_flux_yaml(flux_yaml, data=".", listen_host="127.0.0.1")
    config = load_control(flux_yaml)
    service.make_private(LOCAL_AGENT.directory)
    agent_yaml = prepare_agent(config, LOCAL_AGENT.directory, usable_port(config.agent_port))
    agent = load_agent(agent_yaml)
    service.install(control)
    try:
        service.install(LOCAL_AGENT)
        problem = _register(config, f"127.0.0.1:{agent.port}")
    except BaseException:
        with contextlib.suppress(FluxError):
            _remove([LOCAL_AGENT, control])
        raise
    if config.listen_host in ("127.0.0.1", "::1", "localhost"):
        reach = f"Only this computer reaches it: set `listen_host` in {flux_yaml} to change that (plain HTTP)."
    else:
        reach = f"Other computers reach it at port {config.port}, once the firewall lets them (docs/windows.md)."
    return [
        "Made:" if made else f"Made ({flux_yaml} was there already):",
        f"  {service.installed_program(control)}, a copy of this program",
        f"  the service {control.name}, which answers at {config.own_url}",
        f"  the service {LOCAL_AGENT.name}, which runs functions on this computer",
        f"  {control.directory}: flux.yaml, certificates, state and {control.log_file.name}",
        f"  {LOCAL_AGENT.directory}: agent.yaml, its certificates, state and {LOCAL_AGENT.log_file.name}",
        "Both services run as accounts of their own and start with Windows.",
        reach,
        f"Your API key is in {flux_yaml} (api_key), which only administrators can read.",
        *([f"The agent is not registered yet: {problem}"] if problem else []),
        "",
        "Your first function: paste these lines into a PowerShell started as administrator.",
        "",
        *first_function(flux_yaml, config.own_url),
        "",
        f"To undo this: & {quoted(str(service.installed_program(control)))} service remove",
    ]


def _install_agent(agent: Service) -> list[str]:
    from fluxlib.config.agent import load_agent

    service.make_private(agent.directory)
    path = agent.directory / "agent.yaml"
    if not path.exists():
        raise ConfigInvalid(
            f"{path} was not found. Make one with `flux enroll NAME` on the machine where Flux runs,"
            f" and copy its four files to {agent.directory}"
        )
    config = load_agent(path)
    service.install(agent)
    return [
        "Made:",
        f"  {service.installed_program(agent)}, a copy of this program",
        f"  the service {agent.name}, which listens on {config.listen_host}:{config.port} and starts with Windows",
        f"  {agent.directory}: its state and {agent.log_file.name}, beside agent.yaml",
        "",
        "Flux on another machine reaches it once the firewall lets it:",
        f"  New-NetFirewallRule -DisplayName {quoted(agent.title)} -Direction Inbound -Protocol TCP"
        f" -LocalPort {config.port} -Action Allow",
        f"Register it where Flux runs: POST /agents/register with the address of this computer and port {config.port}.",
        f"To undo this: & {quoted(str(service.installed_program(agent)))} service remove",
    ]


def _register(config: ControlConfig, address: str) -> str:
    """Make the agent known to the Flux of this computer; why that failed, or nothing."""
    request = urllib.request.Request(
        f"{config.own_url}/agents/register",
        data=json.dumps({"address": address}).encode(),
        headers={"X-API-Key": config.api_key, "Content-Type": "application/json"},
    )
    # By no proxy: it is this computer.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = Deadline(_REGISTERED_WITHIN)
    while True:
        try:
            with opener.open(request, timeout=30):
                return ""
        except urllib.error.HTTPError as error:
            with error:
                problem = error.read(2000).decode(errors="replace").strip()
        except OSError as error:
            problem = str(error)
        # Both come up in their own time.
        if not deadline.remaining():
            return problem
        pause(0.5)


# ---- remove ------------------------------------------------------------------------


def _remove(services: list[Service]) -> list[str]:
    """Raises NotFound when none of them is installed, Forbidden."""
    removed = []
    for one in services:
        with contextlib.suppress(NotFound):
            service.remove(one)
            removed.append(one)
    if not removed:
        raise NotFound(f"there is no service {services[-1].name} here")
    program = service.installed_program(services[-1])
    gone = service.remove_program(services[-1])
    kept = [one.directory for one in services if one.directory.exists()]
    return [
        "Removed:",
        *(f"  the service {one.name}" for one in removed),
        f"  {program}" if gone else f"It still runs, so delete it yourself: {program}",
        "Configuration, certificates and data stay. To delete them too:",
        *(f"  Remove-Item -Recurse -LiteralPath {quoted(str(directory))}" for directory in kept),
    ]


# ---- run ---------------------------------------------------------------------------


def _serve(chosen: Service, stop: StopSignal) -> int:
    # Only the service manager's call gets here; a person's has no directory of the service's to write a log to.
    log.set_up(file=chosen.log_file, console=False)
    serve: Callable[[Service, StopSignal], int] = _serve_control if chosen.name == CONTROL.name else _serve_agent
    return serve(chosen, stop)


def _serve_control(chosen: Service, stop: StopSignal) -> int:
    from fluxlib.config.control import load_control

    config = load_control(chosen.directory / "flux.yaml")
    log.set_up(config.log_level, file=chosen.log_file, console=False)
    from fluxlib.control.app import serve

    return serve(config, stop)


def _serve_agent(chosen: Service, stop: StopSignal) -> int:
    from fluxlib.agent.app import serve
    from fluxlib.config.agent import load_agent

    config = load_agent(chosen.directory / "agent.yaml")
    log.set_up(config.log_level, file=chosen.log_file, console=False)
    return serve(config, stop)
