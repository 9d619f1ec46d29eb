"""The built packages, for the tests that look at what people install."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import fluxlib
from tests.support.need import need, need_root


@dataclass(frozen=True)
class Package:
    """One .deb and what is in it."""

    name: str
    deb: Path
    root: Path  # unpacked

    @property
    def program(self) -> Path:
        return self.root / "usr/lib" / self.name / self.name

    @property
    def inside(self) -> Path:
        """Everything beside the program that it is frozen with."""
        return self.program.parent / "_internal"


@pytest.fixture(scope="session")
def debs(top: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the packages of this tree: built now, or already there where FLUX_DEBS says."""
    if os.environ.get("FLUX_DEBS"):
        return Path(os.environ["FLUX_DEBS"])
    need("dpkg-buildpackage", "dh", "objdump", "python3-config")
    into = tmp_path_factory.mktemp("debs")
    subprocess.run([top / "scripts/deb", into], check=True, stdin=subprocess.DEVNULL)
    return into


@pytest.fixture(scope="session", params=["flux", "flux-agent"])
def package(request: pytest.FixtureRequest, debs: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    need("dpkg-deb")
    name = str(request.param)
    (deb,) = debs.glob(f"{name}_{fluxlib.__version__}_*.deb")
    root = tmp_path_factory.mktemp(name)
    subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return Package(name, deb, root)


@pytest.fixture
def as_root() -> None:
    need_root()
