"""A machine that has no thread left."""

from __future__ import annotations

import threading

import pytest


def none_left(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """No thread whose name begins so can be started any more."""
    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name.startswith(prefix):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_others)
