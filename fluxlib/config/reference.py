"""Every setting as Markdown, made from the declarations the readers use."""

from __future__ import annotations

from dataclasses import MISSING, Field
from enum import Enum
from pathlib import Path
from typing import Any

from fluxlib.config.agent import AgentConfig
from fluxlib.config.control import ControlConfig, RetentionConfig
from fluxlib.config.function import FunctionFile
from fluxlib.config.keys import ApiKey
from fluxlib.config.providers import AutoscalingConfig, AwsConfig, GcpConfig, NodeType
from fluxlib.config.reader import Between, OneOf, Setting, settings_of

SECTIONS: tuple[tuple[str, type, str], ...] = (
    ("flux.yaml", ControlConfig, "The control plane. `FLUX_CONFIG` names the file, else `flux.yaml` here."),
    ("flux.yaml: api_keys[]", ApiKey, "A list of keys beside `api_key`."),
    ("flux.yaml: retention", RetentionConfig, "How much is kept of ended executions, beside `execution_ttl`."),
    ("flux.yaml: providers.aws", AwsConfig, "Nodes on Amazon EC2; absent = none."),
    ("flux.yaml: providers.gcp", GcpConfig, "Nodes on Google Compute Engine; absent = none."),
    ("flux.yaml: providers.*.autoscaling", AutoscalingConfig, "Each provider's own."),
    ("flux.yaml: providers.*.autoscaling.node_types[]", NodeType, "A list of machine types."),
    ("agent.yaml", AgentConfig, "An agent. `AGENT_CONFIG` names the file, else `agent.yaml` here."),
    ("A function (`PUT /functions`)", FunctionFile, "What a function is; see `examples/`."),
)
# Where the default depends on the machine.
_CHOSEN = {
    "state_dir": (
        "`/var/lib/flux` (agents: `/var/lib/flux-agent`) as root or installed,"
        " `%PROGRAMDATA%` on Windows, else beside the file"
    ),
    "certs_dir": "`/etc/flux/certs` as root, `%PROGRAMDATA%\\flux\\certs` on Windows, else beside the file",
}


def settings_markdown(only: str = "") -> str:
    """A table for each section, or for the one titled ``only``."""
    parts = []
    for title, cls, about in SECTIONS:
        if only not in ("", title):
            continue
        rows = [_row(field, declared) for field, declared in settings_of(cls)]
        parts += [f"## {title}", "", about, "", "| setting | takes | default | why |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts)


def _row(field: Field[Any], declared: Setting) -> str:
    takes = {
        "string": "text",
        "strings": "a list of texts",
        "map": "names and texts",
        "section": "see below",
    }.get(declared.kind, declared.kind)
    if isinstance(declared.check, Between):
        takes = f"{declared.kind} between {declared.check}"
    elif isinstance(declared.check, OneOf):
        takes = str(declared.check)
    unit = f", {declared.unit}" if declared.unit else ""
    return f"| `{declared.key}` | {takes}{unit} | {_default(field, declared)} | {_cell(declared.why)} |"


def _default(field: Field[Any], declared: Setting) -> str:
    if declared.required:
        return "required"
    if declared.key in _CHOSEN:
        return _CHOSEN[declared.key]
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(value, Enum):
        value = value.value
    if declared.kind == "section" or value in ("", (), None) or value == {} or value == Path():
        return "-"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
