"""The tests in ``inside`` run in a Windows Python: on Windows itself, or under Wine through test_under_wine.py."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.platform == "win32" else ["inside"]
