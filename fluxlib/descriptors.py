"""How many files and connections this process may have open."""

from __future__ import annotations

import contextlib
import sys

# More than any process of Flux needs: a hard limit may be a billion, and there are programs that close them all.
MOST = 65_536
# Where the kernel of macOS stops, whatever its hard limit says.
_MOST_OF_MACOS = 10_240


def raise_limit() -> int:
    """The soft limit, raised as far as the hard one lets it, at most to MOST.

    Login shells and service managers leave it at 1024, for programs that use select. Children inherit it.
    """
    if sys.platform == "win32":
        return MOST  # Windows has none
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST
    wanted = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    for attempt in (wanted, min(wanted, _MOST_OF_MACOS)):
        if attempt > soft:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (attempt, hard))
                return attempt
    return soft
