"""Settings declared once, and the reader that holds a document to them: every fault at once, each with its path.

Used for flux.yaml, agent.yaml and function files alike; ``check-config``, the
examples and the documentation are made from or checked against the same
declarations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from dataclasses import field as dataclass_field
from typing import Any, TypeVar

from fluxlib.config.document import Plain
from fluxlib.errors import InvalidInput

T = TypeVar("T")

_MAX_FAULTS = 50
_MAX_TEXT = 65536
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_LEADING_ZERO = re.compile(r"[+-]?0+[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,2})?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_URL = re.compile(r"https?://[!-~]+")
# As YAML 1.1 has it, so that an original's `enabled: yes` is taken.
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Faults:
    """Everything found wrong so far. A hostile document may hold thousands: some are listed, all are counted."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._unlisted = 0

    @property
    def full(self) -> bool:
        return len(self.found) >= _MAX_FAULTS

    def add(self, path: str, problem: str) -> None:
        if self.full:
            self._unlisted += 1
        else:
            self.found.append(f"{path}: {problem}" if path else problem)

    def raise_if_any(self, what: str, error: type[InvalidInput] = InvalidInput) -> None:
        if self.found:
            more = [f"and {self._unlisted} more"] if self._unlisted else []
            raise error(what, [*self.found, *more])


Check = Callable[[Any], str | None]
"""Says what is wrong with a value of the right type, or None."""


@dataclass(frozen=True)
class Setting:
    """One setting. ``key`` is as it is spelt in YAML, a dot for each mapping it is inside of."""

    key: str
    kind: str  # "string", "integer", "number", "boolean", "strings", "map", or "section"
    why: str
    unit: str = ""
    required: bool = False
    check: Check | None = None
    each: Check | None = None  # of every item of a list, of every name of a map
    convert: Callable[[Any], Any] | None = None

    @property
    def wanted(self) -> str:
        """What its value must be, with the unit: ``a whole number of seconds``."""
        unit = _UNITS.get(self.unit, self.unit)
        return f"{_KIND_NAMES[self.kind]} of {unit}" if unit else _KIND_NAMES[self.kind]

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value of the right kind, or None."""
        problem = self.check(value) if self.check else None
        if problem and self.unit and isinstance(self.check, Between):
            return f"must be {self.wanted} between {self.check}, is {value:.15g}"
        return problem


def setting(
    key: str,
    kind: str,
    default: Any = MISSING,
    *,
    why: str,
    unit: str = "",
    check: Check | None = None,
    each: Check | None = None,
    convert: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field that is a setting. Without a default it is required; a secret one stays out of ``repr``."""
    metadata = {"setting": Setting(key, kind, why, unit, default is MISSING, check, each, convert)}
    if default is MISSING:
        return dataclass_field(metadata=metadata, repr=not secret)
    if isinstance(default, dict | list):
        return dataclass_field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclass_field(default=default, metadata=metadata, repr=not secret)


def settings_of(cls: type) -> list[tuple[Field[Any], Setting]]:
    """The settings of a configuration class in their order."""
    return [(field, field.metadata["setting"]) for field in fields(cls) if "setting" in field.metadata]


# ---- checks ------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    low: float
    high: float

    def __call__(self, value: Any) -> str | None:
        return None if self.low <= value <= self.high else f"must be between {self}, is {value:.15g}"

    def __str__(self) -> str:
        return f"{self.low:.15g} and {self.high:.15g}"


@dataclass(frozen=True)
class OneOf:
    allowed: tuple[str, ...]

    def __call__(self, value: Any) -> str | None:
        return None if value in self.allowed else f"must be one of {self}{nearest(value, self.allowed)}"

    def __str__(self) -> str:
        return ", ".join(self.allowed)


def between(low: float, high: float) -> Check:
    return Between(low, high)


def one_of(*allowed: str) -> Check:
    return OneOf(allowed)


def path_problem(value: Any) -> str | None:
    if value.startswith("~"):
        return "~ is not expanded here: write the directory out"
    return None


def url_problem(value: Any) -> str | None:
    return None if _URL.fullmatch(value) else "must be an http:// or https:// URL"


def user_problem(value: Any) -> str | None:
    return None if _USER.fullmatch(value) else "is no user's name"


def nearest(word: str, known: Collection[str]) -> str:
    """`` (did you mean X?)`` when something known is close, else nothing. A mapping tells where each has its place."""
    import difflib  # only a document with a mistake in it needs it

    close = difflib.get_close_matches(word[:100], sorted(known), 1)
    if not close:
        return ""
    return f" (did you mean {known[close[0]] if isinstance(known, Mapping) else close[0]}?)"


# ---- values ------------------------------------------------------------------


def take(cls: type[T], data: Mapping[str, Any], path: str, faults: Faults) -> dict[str, Any]:
    """The keyword arguments for ``cls`` from ``data``; faults are collected, faulty and absent settings left out.

    Unknown keys are faults. Sections (kind "section") are the caller's to read.
    """
    tree = _key_tree(cls)
    values: dict[str, Any] = {}
    for field, declared in settings_of(cls):
        if declared.kind == "section":
            continue
        value = _look_up(data, declared.key)
        before = len(faults.found)
        taken = _typed(value, declared, f"{path}{declared.key}", faults)
        if taken is not None and len(faults.found) == before:
            values[field.name] = declared.convert(taken) if declared.convert else taken
    _check_keys(data, tree, path, faults)
    return values


def _typed(value: Any, declared: Setting, path: str, faults: Faults) -> Any:
    """The checked value; None when it is absent or faulty."""
    if value is None or (declared.kind == "string" and isinstance(value, str) and not value.strip()):
        if declared.required:
            faults.add(path, "is required" if value is None else "must not be empty")
        return None
    taken = _KINDS[declared.kind](value)
    if taken is None:
        faults.add(path, f"must be {declared.wanted}, is {_described(value, declared.kind)}")
        return None
    if isinstance(taken, str):
        # It ends up in headers, paths, commands and log lines.
        problem = _text_problem(taken) if taken.isprintable() else "must be one line of printable characters"
        if problem:
            faults.add(path, problem)
            return None
    if isinstance(taken, tuple | dict):
        taken = _items(taken, declared, path, faults)
    problem = declared.problem(taken)
    if problem:
        faults.add(path, problem)
    return taken


def _items(taken: tuple[Any, ...] | dict[str, Any], declared: Setting, path: str, faults: Faults) -> Any:
    """The texts of a list or map, each checked."""
    texts: list[tuple[str, str]] = []
    pairs = taken.items() if isinstance(taken, dict) else enumerate(taken)
    for key, item in pairs:
        where = f"{path}.{shown(key)}" if isinstance(key, str) else f"{path}[{key}]"
        if item is None and isinstance(key, str):
            item = ""  # `NAME:` with nothing behind it
        if not isinstance(item, str):
            faults.add(where, f"must be text, is {type_name(item)}")
            continue
        checked = key if isinstance(key, str) else str(item)
        problem = _text_problem(item) or _text_problem(checked) or (declared.each(checked) if declared.each else None)
        if problem:
            faults.add(where, problem)
        texts.append((str(key), str(item)))
    return dict(texts) if isinstance(taken, dict) else tuple(text for _, text in texts)


def _string(value: Any) -> str | None:
    # A key or a tag may be all digits, a region `no`: what was written counts.
    return str(value) if isinstance(value, str) else None


def _integer(value: Any) -> int | None:
    # The original's files spell ports as text. A leading zero is octal to some: refused.
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value.strip()) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else None


def _boolean(value: Any) -> bool | None:
    return _BOOLEANS.get(value.strip().lower()) if isinstance(value, str) else None


_KINDS: dict[str, Callable[[Any], Any]] = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "strings": lambda value: tuple(value) if isinstance(value, list) else None,
    "map": lambda value: value if isinstance(value, dict) else None,
}
_KIND_NAMES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "strings": "a list of texts",
    "map": "a mapping of names to texts (NAME: TEXT)",
}
_UNITS = {"s": "seconds", "%": "percent"}


def _described(value: Any, kind: str) -> str:
    """A value that is not of its kind: as it was written where that says more, and cannot be a secret."""
    if kind not in ("integer", "number", "boolean") or not isinstance(value, str) or not value.strip():
        return type_name(value)
    leading_zero = kind == "integer" and _LEADING_ZERO.fullmatch(value.strip())
    return shown(value) + (" (leave leading zeros out)" if leading_zero else "")


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "must not contain NUL"
    return f"is longer than {_MAX_TEXT // 1024} KiB" if len(text) > _MAX_TEXT else None


def type_name(value: Any) -> str:
    """What a value of a document is, for people."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, Plain) and _NUMBER.fullmatch(value):
        return "a number"
    if isinstance(value, Plain) and value.lower() in _BOOLEANS:
        return "true or false"
    return "nothing" if value is None else "text"


# ---- keys --------------------------------------------------------------------


def _key_tree(cls: type) -> dict[str, set[str]]:
    """The outer keys with the inner ones of those that are mappings of settings."""
    tree: dict[str, set[str]] = {}
    for _, declared in settings_of(cls):
        outer, _, inner = declared.key.partition(".")
        tree.setdefault(outer, set()).update({inner} if inner else ())
    return tree


def _look_up(data: Mapping[str, Any], key: str) -> Any:
    outer, _, inner = key.partition(".")
    value = data.get(outer)
    if not inner:
        return value
    return value.get(inner) if isinstance(value, dict) else None


def _check_keys(data: Mapping[str, Any], tree: Mapping[str, set[str]], path: str, faults: Faults) -> None:
    # A setting is often looked for beside its section: `memory` for `resources.memory`.
    places = {inner: f"{outer}.{inner}" for outer, names in tree.items() for inner in names}
    places |= {outer: outer for outer in tree}
    for key, value in data.items():
        inner = tree.get(key)
        if inner is None:
            _unknown_key(key, places, path, faults)
        elif inner and isinstance(value, dict):
            for name in value:
                if name not in inner:
                    _unknown_key(name, places | {one: one for one in inner}, f"{path}{key}.", faults)
        elif inner and value is not None:
            faults.add(f"{path}{key}", f"must be a mapping, is {type_name(value)}")


def _unknown_key(key: str, known: Collection[str], path: str, faults: Faults) -> None:
    # Looking for the nearest key costs a millisecond; nobody reads the thousandth.
    faults.add(f"{path}{shown(key)}", f"unknown key{'' if faults.full else nearest(key, known)}")


def shown(key: str) -> str:
    """A key from outside, safe in a line of text."""
    text = key if key.isprintable() else ascii(key)[1:-1]
    return text if len(text) <= 80 else f"{text[:80]}…"
