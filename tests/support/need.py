"""A missing service skips a test on a developer's machine and fails it in CI."""

from __future__ import annotations

import os
import shutil

import pytest


def need(*programs: str) -> None:
    """Skip (locally) or fail (in CI) unless every program is on the PATH."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        lacking(f"needs {', '.join(missing)} (`make test` as root installs it)")


def need_root() -> None:
    if os.name != "posix" or os.geteuid() != 0:
        lacking("needs root")


def lacking(reason: str) -> None:
    """Skip, or fail where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
