"""`flux service install|remove|run` and the same of flux-agent: what the commands do around the service itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fluxlib import log
from fluxlib.config.first_start import make_flux_yaml
from fluxlib.errors import ConfigInvalid
from fluxlib.lifecycle import StopSignal

assert sys.platform == "win32"

from fluxlib.windows import service

ACTIONS = ("install", "remove", "run")


def command(action: str, directory: Path | None, *, agent: bool) -> int:
    """The exit code; ``directory`` is where the service was installed to keep its things. Raises FluxError."""
    which = service.AGENT if agent else service.CONTROL
    if directory is not None:
        which = replace(which, directory=directory)
    if action == "run":
        return service.run(which, lambda stop: _serve(which, stop, agent))
    if action == "remove":
        lines = service.remove(which)
    else:
        service.make_private(which.directory)
        _check_configuration(which, agent)
        lines = service.install(which)
    print("\n".join(lines))
    return 0


def _check_configuration(which: service.Service, agent: bool) -> None:
    """A service that cannot start is hard to ask why. Raises ConfigInvalid."""
    if not agent:
        from fluxlib.config.control import load_control

        path = which.directory / "flux.yaml"
        if make_flux_yaml(path, data="."):
            print(f"Made {path} with a new key: whoever has it may do everything.")
        load_control(path)
        return
    from fluxlib.config.agent import load_agent

    path = which.directory / "agent.yaml"
    if not path.exists():
        raise ConfigInvalid(f"there is no {path}: make it and its certificates with `flux enroll`, where Flux runs")
    load_agent(path)


def _serve(which: service.Service, stop: StopSignal, agent: bool) -> int:
    # Only the service manager's call gets here; a person's has no directory of the service's to write a log to.
    log.set_up(file=which.log_file)
    return (_serve_agent if agent else _serve_control)(which, stop)


def _serve_control(which: service.Service, stop: StopSignal) -> int:
    from fluxlib.config.control import load_control

    config = load_control(which.directory / "flux.yaml")
    log.set_up(config.log_level, file=which.log_file)
    from fluxlib.control.app import serve

    return serve(config, stop)


def _serve_agent(which: service.Service, stop: StopSignal) -> int:
    from fluxlib.agent.app import serve
    from fluxlib.config.agent import load_agent

    config = load_agent(which.directory / "agent.yaml")
    log.set_up(config.log_level, file=which.log_file)
    return serve(config, stop)
