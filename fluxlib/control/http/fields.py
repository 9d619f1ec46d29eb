"""What a route takes in its path, its query and its JSON body, each declared once with its check and its schema.

The readers below check by these declarations; the OpenAPI document is made
from them. A ``read`` takes a raw value and raises ValueError with what is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxlib.config.function import name_problem
from fluxlib.config.reader import nearest, shown
from fluxlib.errors import InvalidInput
from fluxlib.model import AGENT_ID, EXECUTION_ID, FUNCTION_NAME

Schema = Mapping[str, Any]
Read = Callable[[Any], Any]
_MAX_UNKNOWN = 10


@dataclass(frozen=True, slots=True)
class Field:
    """One value. ``default`` is what handlers see when it is absent."""

    name: str
    about: str
    schema: Schema
    read: Read
    default: Any = None
    required: bool = False


def take(fields: Sequence[Field], values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Every field's value. Raises InvalidInput with all that is wrong, unknown names included."""
    faults: list[str] = []
    taken: dict[str, Any] = {}
    known = {field.name for field in fields}
    for name in values:
        # Each costs a look for the nearest one: nobody reads the hundredth.
        if name not in known and len(faults) < _MAX_UNKNOWN:
            faults.append(f"{shown(name)}: is not known here{nearest(name, known)}")
    for field in fields:
        if field.name not in values:
            if field.required:
                faults.append(f"{field.name}: is missing")
            taken[field.name] = field.default
            continue
        try:
            taken[field.name] = field.read(values[field.name])
        except ValueError as error:
            faults.append(f"{field.name}: {error}")
    if faults:
        raise InvalidInput(f"{what} cannot be used", faults)
    return taken


# ---- readers -------------------------------------------------------------------


def matching(pattern: re.Pattern[str], otherwise: str) -> Read:
    """``otherwise`` says what it must be."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(otherwise)
        return value

    return read


def function_name(value: Any) -> str:
    problem = name_problem(value) if isinstance(value, str) else "must be a string"
    if problem:
        raise ValueError(problem)
    return str(value)


def flag(value: Any) -> bool:
    """A yes or no in a query, as people write it."""
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": True}
    if value not in known:
        raise ValueError("must be 1 or 0")
    return known[value]


def integer(low: int, high: int, unit: str) -> Read:
    def read(value: Any) -> int:
        if not value.isascii() or not value.isdigit() or len(value) > 19 or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number of {unit} between {low} and {high}")
        return int(value)

    return read


def choice(*allowed: str) -> Read:
    def read(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}{nearest(value, allowed)}")
        return str(value)

    return read


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def seconds(longest: float) -> Read:
    def read(value: Any) -> float:
        # Only floats: an integer with hundreds of digits, which JSON may hold, has none to be asked about.
        strange = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or strange:
            raise ValueError("must be a number of seconds")
        if not 0 <= value <= longest:
            raise ValueError(f"must be between 0 and {longest:g} seconds")
        return float(value)

    return read


def anything(value: Any) -> Any:
    """For what is accepted and ignored."""
    return value


# ---- what paths hold -----------------------------------------------------------


def pattern_schema(pattern: re.Pattern[str]) -> Schema:
    return {"type": "string", "pattern": f"^({pattern.pattern})$"}


NAME = Field("name", "a function's name", {**pattern_schema(FUNCTION_NAME), "maxLength": 64}, function_name)
FUNCTION = Field("function", "only those of this function", NAME.schema, function_name)
AGENT = Field(
    "agent_id",
    "an agent's ID",
    pattern_schema(AGENT_ID),
    matching(AGENT_ID, "must be 1 to 63 lower-case letters, digits and hyphens, no hyphen at either end"),
)
EXECUTION = Field(
    "execution_id",
    "an execution's ID",
    pattern_schema(EXECUTION_ID),
    matching(EXECUTION_ID, "must be 1 to 64 letters, digits and hyphens, no hyphen first"),
)
PARAMS = {field.name: field for field in (NAME, AGENT, EXECUTION)}


# ---- what queries hold ---------------------------------------------------------

_FLAG = {"type": "string", "enum": ["0", "1", "true", "false"]}
FORCE = Field("force", "1: although executions run or wait", _FLAG, flag, False)
TERMINATE = Field("terminate", "1: end the machine too, of a node Flux made", _FLAG, flag, False)
FOLLOW = Field("follow", "1: as it is written, until the execution ends", _FLAG, flag, False)
OFFSET = Field(
    "offset", "bytes to skip", {"type": "integer", "minimum": 0, "maximum": 2**53}, integer(0, 2**53, "bytes"), 0
)
_CURSOR = re.compile(r"[A-Za-z0-9._:=-]{0,200}")
CURSOR = Field(
    "cursor",
    "`next` of the page before",
    pattern_schema(_CURSOR),
    matching(_CURSOR, "must be the `next` of a page, unchanged"),
    "",
)
LIMIT = Field(
    "limit", "items on a page", {"type": "integer", "minimum": 1, "maximum": 1000}, integer(1, 1000, "items"), 100
)
_STATUSES = ("queued", "running", "success", "failed", "cancelled")
STATUS = Field(
    "status",
    "only those of this status; queued ones are running ones that no agent has yet",
    {"type": "string", "enum": list(_STATUSES)},
    choice(*_STATUSES),
)
