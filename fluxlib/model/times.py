"""Epoch seconds in text and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

# As ``rfc3339`` writes it: read without a look at what else the standard allows.
_OURS = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{3})Z", re.ASCII)


def rfc3339(seconds: float) -> str:
    """Epoch seconds as RFC 3339 in UTC with milliseconds."""
    whole, milliseconds = divmod(round(seconds * 1_000_000) // 1000, 1000)
    return f"{_second(whole)}.{milliseconds:03d}Z"


def epoch(text: str | None) -> float:
    """RFC 3339 (Go's nanoseconds included) to epoch seconds; 0.0 for nothing and for Go's zero time."""
    if not text or text.startswith("0001-"):
        return 0.0
    ours = _OURS.fullmatch(text)
    if ours is not None:
        return _epoch_of_second(ours[1]) + int(ours[2]) / 1000
    trimmed = re.sub(r"(\.\d{6})\d+", r"\1", text)
    return datetime.fromisoformat(trimmed).timestamp()


# Executions of one moment share their seconds.


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").removesuffix("+00:00")


@lru_cache(maxsize=64)
def _epoch_of_second(text: str) -> float:
    return datetime.fromisoformat(text + "+00:00").timestamp()
