"""Directories as deep as a hostile program makes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def nest(
    top: str | Path, levels: int, name: str = "deeper", at_level: Callable[[int, int], None] | None = None
) -> None:
    """Deeper than any path reaches. ``at_level(directory, level)`` may put something in each, by its descriptor."""
    at = os.open(top, os.O_RDONLY)
    for level in range(levels):
        if at_level is not None:
            at_level(at, level)
        os.mkdir(name, dir_fd=at)
        inner = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
