"""The program: `python flux.py`, `python -m flux`, and what PyInstaller freezes."""

import sys

from fluxlib.start import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
