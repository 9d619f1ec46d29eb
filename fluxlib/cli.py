"""The commands of the program. A configuration or start that fails is told in a sentence, never a traceback."""

from __future__ import annotations

import argparse
import sys

import fluxlib
from fluxlib import log
from fluxlib.config.environment import under_journald
from fluxlib.config.files import find_config
from fluxlib.errors import FluxError
from fluxlib.lifecycle import StopSignal


def main(arguments: list[str], default: str = "serve") -> int:
    """Run one command; its exit code. ``default`` is the command of a call that names none."""
    options = _parser().parse_args(arguments or [default])
    try:
        return int(options.run(options))
    except FluxError as error:
        print(f"flux: {error.message}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flux", description="Serverless without containers.")
    parser.add_argument("--version", action="version", version=f"flux {fluxlib.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="run the control plane (the default)").set_defaults(run=_serve)
    commands.add_parser("agent", help="run an agent").set_defaults(run=_agent)
    return parser


def _serve(options: argparse.Namespace) -> int:
    from fluxlib.config.control import load_control
    from fluxlib.control.app import serve

    config = load_control(find_config("FLUX_CONFIG", "flux.yaml", "flux"))
    log.set_up(config.log_level, timestamps=not under_journald())
    return serve(config, StopSignal().install())


def _agent(options: argparse.Namespace) -> int:
    from fluxlib.agent.app import serve
    from fluxlib.config.agent import load_agent

    config = load_agent(find_config("AGENT_CONFIG", "agent.yaml", "flux-agent"))
    log.set_up(config.log_level, timestamps=not under_journald())
    return serve(config, StopSignal().install())
