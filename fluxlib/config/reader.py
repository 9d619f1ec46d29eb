"""Typed reading of YAML from outside: every fault at once, each with its key's path.

Used for flux.yaml, agent.yaml and function files alike. What YAML makes
dangerous is refused before it is read: aliases (a small file can unfold into
gigabytes), duplicate keys (the second silently wins), and anything but plain
values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from dataclasses import field as dataclass_field
from typing import Any, TypeVar

import yaml

from fluxlib.errors import InvalidInput

T = TypeVar("T")

MAX_BYTES = 1024 * 1024
_MAX_DEPTH = 20


class Faults:
    """Everything found wrong so far."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, path: str, problem: str) -> None:
        self.found.append(f"{path}: {problem}" if path else problem)

    def raise_if_any(self, what: str, error: type[InvalidInput] = InvalidInput) -> None:
        if self.found:
            raise error(what, self.found)


Check = Callable[[Any], str | None]
"""Says what is wrong with a value of the right type, or None."""


@dataclass(frozen=True)
class Setting:
    """One setting, declared once: the reader, `check-config`, the examples and the documentation use this."""

    key: str  # as it is spelt in YAML; dots for keys inside a mapping
    kind: str  # "string", "integer", "number", "boolean", "strings", "map", or "section"
    why: str
    unit: str = ""
    required: bool = False
    check: Check | None = None
    convert: Callable[[Any], Any] | None = None


def setting(
    key: str,
    kind: str,
    default: Any = MISSING,
    *,
    why: str,
    unit: str = "",
    check: Check | None = None,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field that is a setting. Without a default it is required."""
    declared = Setting(key, kind, why, unit, default is MISSING, check, convert)
    metadata = {"setting": declared}
    if default is MISSING:
        return dataclass_field(metadata=metadata)
    if isinstance(default, dict | list):
        return dataclass_field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclass_field(default=default, metadata=metadata)


def settings_of(cls: type) -> list[tuple[Field[Any], Setting]]:
    """The settings of a configuration class in their order."""
    return [(field, field.metadata["setting"]) for field in fields(cls) if "setting" in field.metadata]


# ---- checks ------------------------------------------------------------------


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must be between {low:g} and {high:g}, is {value:g}"


def one_of(*allowed: str) -> Check:
    return lambda value: None if value in allowed else f"must be one of {', '.join(allowed)}{_nearest(value, allowed)}"


def not_blank(value: Any) -> str | None:
    return None if str(value).strip() else "must not be empty"


# ---- YAML --------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader without what makes YAML dangerous."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not taken", event.start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", None)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None.__class__):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=True)


_BOOL, _TIMESTAMP = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
# As in YAML 1.2: "off" is a text (an isolation profile, for one), and so is a date.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (_BOOL, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_mapping(data: bytes | str, what: str, error: type[InvalidInput] = InvalidInput) -> dict[str, Any]:
    """The document's mapping. Raises ``error`` for anything else; an empty document is an empty mapping."""
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > MAX_BYTES:
        raise error(f"{what} is larger than {MAX_BYTES // 1024} KiB")
    try:
        text = raw.decode("utf-8")
        document = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as fault:
        raise error(f"{what} is not UTF-8: byte {fault.start}") from fault
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        problem = getattr(fault, "problem", None) or str(fault) or type(fault).__name__
        raise error(f"{what} is not valid YAML: {problem}{where}") from fault
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise error(f"{what} must be a mapping of keys to values, is {_type_name(document)}")
    faulty = [key for key in document if not isinstance(key, str)]
    if faulty:
        raise error(f"{what}: keys must be text, {faulty[0]!r} is not")
    return document


# ---- values ------------------------------------------------------------------


def take(
    cls: type[T],
    data: Mapping[str, Any],
    path: str,
    faults: Faults,
    *,
    ignored: Mapping[str, str] | None = None,
    warnings: list[str] | None = None,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """The keyword arguments for ``cls`` from ``data``, faults collected.

    ``ignored`` keys give their warning instead of a fault; ``more`` keys are
    somebody else's and left alone. Sections (kind "section") are the caller's.
    """
    values: dict[str, Any] = {}
    known: set[str] = set(more) | set(ignored or ())
    nested: dict[str, set[str]] = {}
    for field, declared in settings_of(cls):
        outer, _, inner = declared.key.partition(".")
        known.add(outer)
        if inner:
            nested.setdefault(outer, set()).add(inner)
        if declared.kind == "section":
            continue
        present, value = _lookup(data, declared.key)
        where = f"{path}{declared.key}"
        if not present or value is None:
            if declared.required:
                faults.add(where, "is required")
            continue
        taken = typed(value, declared.kind, where, faults)
        if taken is None:
            continue
        if isinstance(taken, str) and (problem := _text_problem(taken)):
            faults.add(where, problem)
            continue
        problem = declared.check(taken) if declared.check else None
        if problem:
            faults.add(where, problem)
            continue
        values[field.name] = declared.convert(taken) if declared.convert else taken
    for key in data:
        if ignored and key in ignored:
            if warnings is not None:
                warnings.append(f"{path}{key}: {ignored[key]}")
        elif key not in known:
            faults.add(f"{path}{key}", f"unknown key{_nearest(str(key), sorted(known))}")
        elif key in nested:
            _check_nested(data[key], nested[key], f"{path}{key}", faults)
    return values


def typed(value: Any, kind: str, path: str, faults: Faults) -> Any:
    """``value`` as ``kind``, or None with a fault."""
    reader = _KINDS[kind]
    taken = reader(value)
    if taken is None:
        article = "an" if kind[0] in "aeiou" else "a"
        words = {"strings": "a list of texts", "map": "a mapping of names to texts"}
        faults.add(path, f"must be {words.get(kind, f'{article} {kind}')}, is {_type_name(value)}")
    return taken


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    # The original's files spell ports as text.
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e18 else None  # NaN fails the comparison too


# What YAML 1.1 took for true and false, in files people have.
_WORDS = {"yes": True, "on": True, "no": False, "off": False}


def _boolean(value: Any) -> bool | None:
    if isinstance(value, str):
        return _WORDS.get(value.lower())
    return value if isinstance(value, bool) else None


def _strings(value: Any) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(item, str) and not _text_problem(item) for item in value):
        return None
    return tuple(value)


def _map(value: Any) -> dict[str, str] | None:
    if not isinstance(value, dict):
        return None
    taken: dict[str, str] = {}
    for key, item in value.items():
        if not isinstance(key, str) or isinstance(item, list | dict) or item is None:
            return None
        # A person writes PORT: 80 and DEBUG: true and means the text.
        text = str(item).lower() if isinstance(item, bool) else str(item)
        if "\0" in key or "\0" in text:
            return None
        taken[key] = text
    return taken


_KINDS: dict[str, Callable[[Any], Any]] = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "strings": _strings,
    "map": _map,
}


def _lookup(data: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    outer, _, inner = key.partition(".")
    if not inner:
        return key in data, data.get(key)
    section = data.get(outer)
    return (inner in section, section.get(inner)) if isinstance(section, dict) else (False, None)


def _check_nested(value: Any, known: set[str], path: str, faults: Faults) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        faults.add(path, f"must be a mapping, is {_type_name(value)}")
        return
    for key in value:
        if key not in known:
            faults.add(f"{path}.{key}", f"unknown key{_nearest(str(key), sorted(known))}")


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "must not contain NUL"
    return "is longer than 64 KiB" if len(text) > 65536 else None


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:100], known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _type_name(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
