"""Epoch seconds in text and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime


def rfc3339(seconds: float) -> str:
    """Epoch seconds as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def epoch(text: str | None) -> float:
    """RFC 3339 (Go's nanoseconds included) to epoch seconds; 0.0 for nothing and for Go's zero time."""
    if not text or text.startswith("0001-"):
        return 0.0
    trimmed = re.sub(r"(\.\d{6})\d+", r"\1", text)
    return datetime.fromisoformat(trimmed).timestamp()
