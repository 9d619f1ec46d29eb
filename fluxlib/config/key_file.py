"""Adding a key to flux.yaml's ``api_keys``, or taking one away, without touching another line of the file.

The places come from YAML's own marks; the result is read again, and is only
given back when nothing but that key has changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from fluxlib.config.control import read_control
from fluxlib.config.keys import ApiKey
from fluxlib.errors import Conflict, Internal, NotFound

_SECTION = "api_keys"


def with_key(text: str, key: ApiKey, path: Path) -> str:
    """flux.yaml's text with one key more. Raises Conflict for a name that is taken, ConfigInvalid for a bad file."""
    before = read_control(text, path)
    if any(other.name == key.name for other in before.api_keys):
        raise Conflict(f"there is a key called {key.name} already: `flux keys remove {key.name}` takes it away")
    node = _section(text)
    if node is None:
        body = text if text.endswith("\n") or not text else text + "\n"
        made = f"{body}{_SECTION}:\n{_entry(key, '  ')}"
    elif isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        indent = " " * node.start_mark.column
        end = _end_of(text, node.value[-1])
        made = text[:end] + _entry(key, indent) + text[end:]
    else:
        written = "".join(_entry(other, "  ") for other in (*before.api_keys, key))
        made = f"{text[: node.start_mark.index].rstrip(' ')}\n{written}{text[node.end_mark.index :].lstrip(' ')}"
    return _checked(made, path, (*before.api_keys, key), text)


def without_key(text: str, name: str, path: Path) -> str:
    """flux.yaml's text without the key called ``name``. Raises NotFound, ConfigInvalid."""
    before = read_control(text, path)
    left = tuple(key for key in before.api_keys if key.name != name)
    if len(left) == len(before.api_keys):
        known = ", ".join(key.name for key in left) or "none"
        raise NotFound(f"there is no key called {name} in {path}; there are: {known}")
    node = _section(text)
    assert isinstance(node, yaml.SequenceNode)
    if node.flow_style or not left:
        written = f"\n{''.join(_entry(key, '  ') for key in left)}" if left else " []\n"
        end = _end_of(text, node.value[-1]) if not node.flow_style else node.end_mark.index
        rest = text[end:].removeprefix("\n") if node.flow_style else text[end:]
        made = f"{text[: node.start_mark.index].rstrip()}{written}{rest}"
    else:
        index = next(number for number, key in enumerate(before.api_keys) if key.name == name)
        begin = text.rfind("\n", 0, node.value[index].start_mark.index) + 1
        made = text[:begin] + text[_end_of(text, node.value[index]) :]
    return _checked(made, path, left, text)


def _section(text: str) -> yaml.Node | None:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    return next((value for name, value in root.value if name.value == _SECTION), None)


def _end_of(text: str, node: yaml.Node) -> int:
    """Just behind the last line of a block node: its own mark lies behind the comments and blank lines that follow."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    newline = text.find("\n", node.end_mark.index)
    return len(text) if newline < 0 else newline + 1


def _entry(key: ApiKey, indent: str) -> str:
    lines = [f"- name: {key.name}", f"  role: {key.role}", f"  key_hash: {key.key_hash}"]
    if key.functions:
        lines.append(f"  functions: [{', '.join(key.functions)}]")
    return "".join(f"{indent}{line}\n" for line in lines)


def _checked(made: str, path: Path, keys: tuple[ApiKey, ...], before: str) -> str:
    wanted = replace(read_control(before, path), api_keys=keys)
    if read_control(made, path) != wanted:
        raise Internal(f"{path} cannot be changed without changing more than the key: edit it by hand")
    return made
