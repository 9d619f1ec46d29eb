"""The very first step of the program: is this process the spawner, or the whole program?

A frozen agent starts its spawner as itself with a private argument. That process
must stay small, so nothing else is imported before this is known.
"""

from __future__ import annotations

import os
import sys

_SPAWNER = "--flux-spawner"


def start(arguments: list[str] | None = None, default: str = "serve") -> int:
    """Run the command that ``arguments`` name; ``default`` when they name none. The exit code.

    Without ``arguments`` those of this process, as the installed command calls it.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments and arguments[0] == _SPAWNER and sys.platform != "win32":
        from fluxlib.spawner import main as spawner

        spawner.main(int(arguments[1]), arguments[2:])
        return 0
    if sys.platform == "win32":
        from fluxlib.windows import unpacked

        unpacked.keep_tidy()
    elif sys.getfilesystemencoding() != "utf-8":
        # Names in zips and the words of calls are UTF-8, whatever the locale this was started in.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    from fluxlib.cli import main

    if sys.platform == "win32" and not arguments:
        from fluxlib.windows import console

        if console.in_own_window():
            words = ["run", "--window"] if default == "serve" else []
            return console.keep_open(lambda: main(words, default))
    try:
        return main(arguments, default)
    except KeyboardInterrupt:
        # Before the command has taken the signal over: nothing has been started yet.
        return 130
