#!/bin/sh
# Builds dist/windows/flux.exe and flux-agent.exe on Linux, with the Windows Python of windows/lab.py under Wine.
# On Windows itself use windows/build.ps1.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
cd "$top"
python=${PYTHON:-${FLUX_VENV:-.venv}/bin/python}
"$python" windows/resources.py build/windows
exec "$python" windows/lab.py -m PyInstaller --noconfirm --log-level ERROR \
    --distpath dist/windows --workpath build/windows/work flux.spec
