"""The commands of the program. A configuration or start that fails is told in a sentence, never a traceback.

Each command imports what it needs itself: an agent has no use for the control plane's settings, nor `--version` for
anybody's.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fluxlib
from fluxlib.config.roles import ROLES
from fluxlib.errors import ConfigInvalid, FluxError

if TYPE_CHECKING:
    from fluxlib.config.control import ControlConfig
    from fluxlib.lifecycle import StopSignal


# sysexits.h's EX_CONFIG: systemd's units do not start the program again after it (RestartPreventExitStatus).
CONFIG_INVALID = 78


def main(arguments: list[str], default: str = "serve") -> int:
    """Run one command; its exit code. ``default`` is the command of a call that names none."""
    parser = _parser(default)
    name = parser.prog
    options = parser.parse_args(arguments or [default])
    try:
        return int(options.run(options))
    except ConfigInvalid as error:
        lines = [f"  - {fault}" for fault in error.faults]
        head = error.message.removesuffix("; ".join(error.faults)).rstrip()
        print("\n".join([f"{name}: {head}", *lines]), file=sys.stderr)
        return CONFIG_INVALID
    except FluxError as error:
        print(f"{name}: {error.message}", file=sys.stderr)
        return 1


def _parser(default: str) -> argparse.ArgumentParser:
    """The commands of the program; ``default`` is "agent" in the agent's own, which has only what it carries."""
    alone = default == "agent"
    name = "flux-agent" if alone else "flux"
    parser = argparse.ArgumentParser(
        prog=name,
        description="Serverless without containers: zip any executable, send it with curl, run it on plain machines.",
        epilog=(
            "Without a command it runs the agent. AGENT_CONFIG names the configuration file."
            if alone
            else "Without a command it serves. FLUX_CONFIG and AGENT_CONFIG name the configuration files."
        ),
    )
    parser.add_argument("--version", action="version", version=f"{name} {fluxlib.__version__}")
    # Without ``required``, which tells of a wrong option that a command is missing; ``main`` always names one.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    if not alone:
        _control_commands(commands)

    agent = commands.add_parser("agent", help="run an agent")
    # How `flux run` holds its agent: see fluxlib.local.
    agent.add_argument("--until-stdin-closes", action="store_true", help=argparse.SUPPRESS)
    agent.add_argument("--port", type=int, help=argparse.SUPPRESS)
    agent.set_defaults(run=_agent)

    check = commands.add_parser("check-config", help="say what is wrong with a configuration file, all of it")
    check.add_argument("file", nargs="?", type=Path, help="default: the one that would be used")
    about_agent = argparse.SUPPRESS if alone else "it is an agent.yaml"
    check.add_argument("--agent", action="store_true", default=alone, help=about_agent)
    check.add_argument("--settings", action="store_true", help="print every setting there is, with default and reason")
    check.set_defaults(run=_check_config)

    if sys.platform == "win32":
        from fluxlib.windows.services import ACTIONS

        service = commands.add_parser("service", help="install or remove this program as a Windows service")
        service.add_argument("action", choices=ACTIONS)
        service.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
        service.add_argument("--local-agent", action="store_true", help=argparse.SUPPRESS)
        service.set_defaults(run=_service, agent=alone)
    return parser


def _control_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    commands.add_parser("serve", help="run the control plane (the default)").set_defaults(run=_serve)

    run = commands.add_parser("run", help="run the control plane with an agent on this machine")
    run.add_argument("--state", type=Path, default=Path("flux-data"), metavar="DIR", help="everything is kept here")
    # What a double click on Windows means: see fluxlib.windows.console.
    run.add_argument("--window", action="store_true", help=argparse.SUPPRESS)
    run.set_defaults(run=_run)

    enroll = commands.add_parser("enroll", help="make certificates and agent.yaml for an agent added by hand")
    enroll.add_argument("agent_id", metavar="AGENT_ID")
    enroll.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="where its directory is made")
    enroll.set_defaults(run=_enroll)

    keys = commands.add_parser("keys", help="manage API keys").add_subparsers(required=True, metavar="ACTION")
    add = keys.add_parser("add", help="make a key and print it")
    add.add_argument("name")
    add.add_argument("--role", choices=ROLES, required=True)
    add.add_argument("--function", action="append", default=[], metavar="NAME", help="only for this one; repeatable")
    add.set_defaults(run=_keys_add)
    remove = keys.add_parser("remove", help="take a key away")
    remove.add_argument("name")
    remove.set_defaults(run=_keys_remove)
    keys.add_parser("list", help="names and roles").set_defaults(run=_keys_list)


def _serve(options: argparse.Namespace) -> int:
    from fluxlib.config.control import load_control
    from fluxlib.config.environment import is_named
    from fluxlib.config.files import find_config
    from fluxlib.config.first_start import make_flux_yaml

    path = find_config("FLUX_CONFIG", "flux.yaml", "flux")
    if not is_named("FLUX_CONFIG") and make_flux_yaml(path):
        print(f"flux: made {path.absolute()} with a new api_key, and an embedded store beside it", file=sys.stderr)
    config = load_control(path)
    _log(config.log_level)
    from fluxlib.control.app import serve

    return serve(config, _stop_signal())


def _run(options: argparse.Namespace) -> int:
    from fluxlib.local import greet, serve_local

    if sys.platform == "win32" and options.window:
        from fluxlib.windows import console

        config, state = console.beside_program()
        greet = console.greet
        _log(config.log_level, console.log_file(state))
    else:
        config, state = first_local_config(options.state), options.state
        _log(config.log_level)
    return serve_local(config, state, _stop_signal(), greet)


def first_local_config(state: Path) -> ControlConfig:
    """The configuration in ``state``, made on the first start. Raises ConfigInvalid."""
    from fluxlib.config.control import load_control
    from fluxlib.config.first_start import make_flux_yaml

    path = state / "flux.yaml"
    make_flux_yaml(path, data=".", listen_host="127.0.0.1", shutdown_sec=10)
    return load_control(path)


def _agent(options: argparse.Namespace) -> int:
    import threading
    from dataclasses import replace

    from fluxlib.agent.app import serve
    from fluxlib.config.agent import load_agent
    from fluxlib.config.files import existing_config

    config = load_agent(existing_config("AGENT_CONFIG", "agent.yaml", "flux-agent"))
    if options.port:
        config = replace(config, port=options.port)
    _log(config.log_level)
    stop = _stop_signal()
    if options.until_stdin_closes:
        threading.Thread(target=_stop_with_stdin, args=(stop,), name="stdin", daemon=True).start()
    return serve(config, stop)


def _stop_with_stdin(stop: StopSignal) -> None:
    # Not sys.stdin: its lock, held by a thread that waits, makes the interpreter abort when it ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    stop.set()


def _check_config(options: argparse.Namespace) -> int:
    from fluxlib import checking
    from fluxlib.config.files import existing_config

    if options.settings:
        return checking.show_settings(agent=options.agent)
    variable, name, package = (
        ("AGENT_CONFIG", "agent.yaml", "flux-agent") if options.agent else ("FLUX_CONFIG", "flux.yaml", "flux")
    )
    return checking.check_config(options.file or existing_config(variable, name, package), agent=options.agent)


def _enroll(options: argparse.Namespace) -> int:
    from fluxlib import administration

    return administration.enroll(_control_config(), options.agent_id, options.output)


def _keys_add(options: argparse.Namespace) -> int:
    from fluxlib import administration

    return administration.add_key(_control_path(), options.name, options.role, tuple(options.function))


def _keys_remove(options: argparse.Namespace) -> int:
    from fluxlib import administration

    return administration.remove_key(_control_path(), options.name)


def _keys_list(options: argparse.Namespace) -> int:
    from fluxlib import administration

    return administration.list_keys(_control_config())


def _service(options: argparse.Namespace) -> int:
    if sys.platform == "win32":
        from fluxlib.windows import services

        which = services.which(agent=options.agent, local_agent=options.local_agent, directory=options.directory)
        return services.command(options.action, which)
    raise AssertionError("a command of Windows")


def _control_path() -> Path:
    from fluxlib.config.files import existing_config

    return existing_config("FLUX_CONFIG", "flux.yaml", "flux")


def _control_config() -> ControlConfig:
    from fluxlib.config.control import load_control

    return load_control(_control_path())


def _stop_signal() -> StopSignal:
    from fluxlib.lifecycle import StopSignal

    stop = StopSignal().install()
    if sys.platform == "win32":
        from fluxlib.windows import console

        console.stop_when_closed(stop)
    return stop


def _log(level: str, file: Path | None = None) -> None:
    from fluxlib import log
    from fluxlib.config.environment import under_journald

    log.set_up(level, timestamps=not under_journald(), file=file)
