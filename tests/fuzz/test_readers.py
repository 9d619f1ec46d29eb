"""Documents of every shape at the readers of flux.yaml, agent.yaml and functions: read or refused, never broken.

The words are those the readers know, so that most documents get past the first check. ``FUZZ`` scales it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxlib.config.agent import AgentConfig, read_agent
from fluxlib.config.control import ControlConfig, read_control
from fluxlib.config.function import FunctionFile, read_function
from fluxlib.config.keys import ApiKey
from fluxlib.config.providers import AutoscalingConfig, AwsConfig, GcpConfig, NodeType
from fluxlib.config.reader import settings_of
from fluxlib.control.http.bodies import json_object
from fluxlib.errors import InvalidInput

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(1800)]

SCALE = float(os.environ.get("FUZZ", "1"))
CLASSES = (ControlConfig, AgentConfig, FunctionFile, ApiKey, AwsConfig, GcpConfig, AutoscalingConfig, NodeType)
KEYS = sorted(
    {part for cls in CLASSES for field, found in settings_of(cls) for part in (found.key or field.name).split(".")}
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["a", "main.sh", "../x", "/etc", "a:1", "1+1", "0", "-1", "1e999", "admin", "exit", "wait", "0" * 64]
    ),
)
KEY = st.one_of(
    st.sampled_from([*KEYS, "providers", "aws", "gcp", "api_keys", "autoscaling", "node_types"]), st.text(max_size=8)
)
VALUE = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEY, inner, max_size=5)), max_leaves=25
)
LEAST: dict[str, tuple[Callable[[bytes], Any], dict[str, Any]]] = {
    "flux": (lambda data: read_control(data, Path("/x/flux.yaml")), {"api_key": "a-long-random-text-for-tests"}),
    "agent": (
        lambda data: read_agent(data, Path("/x/agent.yaml")),
        {"agent_id": "worker-1", "tls": {"enabled": False}, "insecure": True},
    ),
    "function": (read_function, {"name": "hello", "handler": "main.sh"}),
}


def refused(read: Callable[[bytes], Any], data: bytes) -> InvalidInput | None:
    """The refusal, None when it was read; anything else that is raised is a fault."""
    try:
        read(data)
    except InvalidInput as error:
        return error
    return None


def with_settings(test: Callable[..., None]) -> Callable[..., None]:
    return settings(
        max_examples=int(800 * SCALE), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )(test)


@pytest.mark.parametrize("kind", LEAST)
def test_documents_are_read_or_refused(kind: str) -> None:
    read, least = LEAST[kind]
    outcomes = {"read": 0, "refused": 0}

    @with_settings
    @given(st.dictionaries(KEY, VALUE, max_size=4), st.booleans())
    def one(document: dict[str, Any], complete: bool) -> None:
        data = yaml.safe_dump({**document, **least} if complete else document).encode()
        refusal = refused(read, data)
        outcomes["read" if refusal is None else "refused"] += 1
        if refusal is not None:
            assert refusal.message
            assert all(len(fault) < 2000 and fault.isprintable() for fault in refusal.faults), refusal.faults

    one()
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize("kind", LEAST)
def test_bytes_after_a_good_beginning(kind: str) -> None:
    read, least = LEAST[kind]
    beginning = yaml.safe_dump(least).encode()

    @with_settings
    @given(st.binary(max_size=80), st.integers(0, len(beginning)))
    def one(rest: bytes, kept: int) -> None:
        refusal = refused(read, beginning[:kept] + rest)
        assert refusal is None or refusal.message

    one()


@with_settings
@given(st.one_of(st.binary(max_size=100), VALUE.map(lambda value: json.dumps(value).encode())))
def test_bodies_are_objects_or_refused(data: bytes) -> None:
    try:
        found = json_object(data)
    except InvalidInput:
        return
    assert isinstance(found, dict)
