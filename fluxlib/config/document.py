"""YAML from outside as plain values, without what makes YAML dangerous or surprising.

Scalars stay the text they were written as (``1.10``, ``no``, ``0080``): a
setting's kind decides what they mean, not YAML's guess. Duplicate keys (the
second would silently win), tags, several documents and anything too large or
too deep are refused; aliases and merges are taken as long as the unfolded
document stays small.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import yaml

from fluxlib.errors import InvalidInput

MAX_BYTES = 256 * 1024
_MAX_DEPTH = 20
_MAX_NODES = 20_000  # aliases counted as often as they are used
_NULLS = ("", "~", "null", "Null", "NULL")
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
# libyaml is 25 times as fast, but not every build of PyYAML has it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Plain(str):
    """A scalar written without quotes; a quoted one is a ``str``."""

    __slots__ = ()


def load_mapping(data: bytes | str, what: str, error: type[InvalidInput] = InvalidInput) -> dict[str, Any]:
    """The document's mapping: texts, None, lists and mappings. An empty document is an empty mapping.

    ``what`` names the document in the ``error`` raised for anything else.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > MAX_BYTES:
        raise error(f"{what} is larger than {MAX_BYTES // 1024} KiB")
    try:
        document = _Builder(yaml.parse(_decoded(raw), Loader=_LOADER)).document()
    except UnicodeError as fault:
        raise error(f"{what} is not UTF-8 text: {fault}") from fault
    except _Refused as fault:
        raise error(f"{what} cannot be used: {fault}") from fault
    except yaml.YAMLError as fault:
        problem = getattr(fault, "problem", None) or getattr(fault, "reason", None) or type(fault).__name__
        where = _place(getattr(fault, "problem_mark", None))
        raise error(f"{what} is not valid YAML: {problem}{where}") from fault
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise error(
            f"{what} must be a mapping of keys to values, is {'a list' if isinstance(document, list) else 'text'}"
        )
    return document


def _decoded(raw: bytes) -> str:
    # Windows' editors and shells mark their files; PowerShell 5 writes UTF-16.
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16")
    return raw.decode("utf-8-sig")


class _Refused(Exception):
    """Valid YAML that is not taken."""

    def __init__(self, problem: str, event: yaml.Event) -> None:
        super().__init__(f"{problem}{_place(event.start_mark)}")


class _Builder:
    """One document from the parser's events."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._nodes = 0
        self._anchors: dict[str, tuple[Any, int]] = {}

    def document(self) -> Any:
        """The one document that says something; a --- with nothing behind it, as templates leave it, begins none."""
        found: Any = None
        next(self._events)  # the stream's start
        while not isinstance(begun := next(self._events), yaml.StreamEndEvent):
            value = self._value(next(self._events), 0)
            next(self._events)  # the document's end
            if found is not None and value is not None:
                raise _Refused("a second document begins", begun)
            found = value if found is None else found
        return found

    def _value(self, event: yaml.Event, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise _Refused(f"nested more than {_MAX_DEPTH} deep", event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        assert isinstance(event, yaml.NodeEvent)
        before = self._nodes
        self._count(1, event)
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TEXT_TAGS:
            raise _Refused(f"tags are not taken, {tag[:80]!a} is one", event)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = _scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(depth)
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._nodes - before)
        return value

    def _alias(self, event: yaml.AliasEvent) -> Any:
        # An anchor is known only once its value is complete: nothing can contain itself.
        name = event.anchor or ""
        if name not in self._anchors:
            raise _Refused(f"the alias {name[:80]!a} has no value before it", event)
        value, nodes = self._anchors[name]
        self._count(nodes, event)
        return value

    def _sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, depth + 1))
        return items

    def _mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._value(event, depth + 1)
            if not isinstance(key, str):
                raise _Refused("a key must be plain text", event)
            following = next(self._events)
            value = self._value(following, depth + 1)
            if key == "<<" and isinstance(key, Plain):
                self._merge(merged, value, following)
            elif key in values:
                raise _Refused(f"the key {key[:80]!a} appears twice", event)
            else:
                values[str(key)] = value
        return {**merged, **values}

    @staticmethod
    def _merge(into: dict[str, Any], value: Any, event: yaml.Event) -> None:
        sources = value if isinstance(value, list) else [value]
        for source in sources:
            if not isinstance(source, dict):
                raise _Refused("<< takes a mapping or a list of them", event)
            for key, item in source.items():
                into.setdefault(key, item)

    def _count(self, nodes: int, event: yaml.Event) -> None:
        self._nodes += nodes
        if self._nodes > _MAX_NODES:
            raise _Refused(f"more than {_MAX_NODES} values, aliases unfolded", event)


def _scalar(event: yaml.ScalarEvent) -> str | None:
    text: str = event.value
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise _Refused("half of a surrogate pair is no text", event)
    if not event.implicit[0]:
        return text
    return None if text in _NULLS else Plain(text)


def _place(mark: Any) -> str:
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
