"""YAML from outside: what makes it dangerous or surprising is refused, and nothing else happens to a reader."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib.config.agent import read_agent
from fluxlib.config.control import read_control
from fluxlib.config.document import load_mapping
from fluxlib.config.function import read_function
from fluxlib.errors import InvalidInput

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "the key 'a' appears twice (line 2"),
        ("a: {b: 1, b: 2}\n", "the key 'b' appears twice"),
        (BOMB, "aliases unfolded"),
        ("a: &x [*x]\n", "has no value before it"),
        ("a: " + "[" * 1000 + "]" * 1000, "nested more than 20 deep"),
        ("\n".join("  " * depth + f"k{depth}:" for depth in range(100)), "nested more than 20 deep"),
        ("a: !!python/object/apply:os.system ['touch /tmp/x']\n", "tags are not taken"),
        ("a: !!binary aGk=\n", "tags are not taken"),
        ("a: 1\n---\na: 2\n", "a second document begins (line 2"),
        ("a: 1\n---\n---\nb\n", "a second document begins (line 3"),
        ("- a\n- b\n", "must be a mapping of keys to values, is a list"),
        ("just text\n", "must be a mapping of keys to values, is text"),
        ("{1: a, [x]: b}\n", "a key must be plain text"),
        ("? {a: b}\n: c\n", "a key must be plain text"),
        ("a: 'unclosed\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("\ta: b\n", "not valid YAML"),
        ("<<: text\n", "<< takes a mapping"),
        ("a: \x01\n", "not valid YAML"),
    ],
)
def test_refused(text: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidInput) as refused:
        load_mapping(text, "it")
    assert words in refused.value.message
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "raw", [b"a: \xff\xfe\xfd", b"\xff\xfea\x00:", b"x" * (256 * 1024 + 1), b"\x00", b"PK\x03\x04\x00"]
)
def test_bytes_that_are_no_text(raw: bytes) -> None:
    with pytest.raises(InvalidInput):
        load_mapping(raw, "it")


def test_taken() -> None:
    assert load_mapping("", "it") == {}
    assert load_mapping("# only a comment\n", "it") == {}
    assert load_mapping("a: ~\nb: ''\nc: 0080\n", "it") == {"a": None, "b": "", "c": "0080"}
    assert load_mapping("base: &b {x: 1, y: 2}\nd: {<<: *b, y: 3}\n", "it")["d"] == {"x": "1", "y": "3"}
    # As templates leave them.
    for text in ("a: 1\n---\n", "---\na: 1\n---\n# end\n", "a: 1\n...\n", "a: 1\n---\n---\n", "---\n---\na: 1\n"):
        assert load_mapping(text, "it") == {"a": "1"}
    # Windows' editors mark their files.
    assert load_mapping("\ufeffa: 1\r\nb: 2\r\n".encode(), "it") == {"a": "1", "b": "2"}
    assert load_mapping("a: 1\n".encode("utf-16"), "it") == {"a": "1"}


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    for read in (lambda: read_function(raw), lambda: read_control(raw, Path("f")), lambda: read_agent(raw, Path("f"))):
        with contextlib.suppress(InvalidInput):
            read()


WORDS = st.sampled_from(
    [
        "name",
        "handler",
        "env",
        "a",
        "1",
        "*x",
        "&x ",
        ": ",
        "\n",
        "\n  ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        '"',
        "!t ",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=40).map("".join))
def test_what_looks_like_yaml_is_read_or_refused(text: str) -> None:
    document: dict[str, object] = {}
    with contextlib.suppress(InvalidInput):
        document = load_mapping(text, "it")
    assert all(isinstance(key, str) for key in document)
