"""The agent's own program: what the flux-agent package and flux-agent.exe start."""

import sys

from fluxlib.start import start

if __name__ == "__main__":
    sys.exit(start(sys.argv[1:], default="agent"))
