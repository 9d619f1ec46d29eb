"""The Debian packages of this tree, built once for whatever tests need them.

    debs = packages()                 # flux_0.1.0_amd64.deb, flux-agent_0.1.0_amd64.deb, ...
    older = packages("0.0.9")         # the same tree as an earlier version

They are kept in .lab/ under a digest of what goes into them, so only a changed tree
is built again (about a minute). FLUX_DEBS names a directory that has them already, whatever version is asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import fluxlib
from tests.support.need import need

TOP = Path(__file__).resolve().parents[2]
SOURCES = (
    *("flux.py", "flux_agent.py", "flux.spec", "fluxlib", "debian", "requirements/build.txt", "scripts"),
    *("example.flux.yaml", "example.agent.yaml", "CHANGELOG.md"),
)
_KEPT_SECONDS = 24 * 3600.0


def packages(version: str = "") -> Path:
    """The directory that holds them. Skips (fails in CI) where they cannot be built."""
    given = os.environ.get("FLUX_DEBS")
    if given:
        return Path(given)
    need("dpkg-buildpackage", "dh", "objdump", "python3-config")
    cache = Path(os.environ.get("FLUX_LAB", TOP / ".lab"))
    cache.mkdir(exist_ok=True)
    with (cache / "debs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target = cache / f"debs-{_digest(version)}"
        if not target.exists():
            _forget_old(cache)
            new = cache / "debs-new"
            shutil.rmtree(new, ignore_errors=True)
            # What tests install need not be small: compressing takes longer than everything else.
            environment = {**os.environ, "DPKG_DEB_COMPRESSOR_LEVEL": "0"}
            subprocess.run([TOP / "scripts/deb", new, version], check=True, stdin=subprocess.DEVNULL, env=environment)
            new.rename(target)
        return target


def package(name: str, version: str = "") -> Path:
    """One of them: ``flux`` or ``flux-agent``."""
    (found,) = packages(version).glob(f"{name}_{version or fluxlib.__version__}_*.deb")
    return found


def _digest(version: str) -> str:
    digest = hashlib.sha256(version.encode())
    for name in SOURCES:
        path = TOP / name
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(TOP)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _forget_old(cache: Path) -> None:
    for old in cache.glob("debs-*"):
        if old.is_dir() and time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old)
