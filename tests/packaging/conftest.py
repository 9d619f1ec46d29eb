"""The built packages, for the tests that look at what people install."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import fluxlib
from tests.support.need import need
from tests.support.packages import packages


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
def debs() -> Path:
    """A directory with the packages of this tree."""
    return packages()


@pytest.fixture(scope="session", params=["flux", "flux-agent"])
def package(request: pytest.FixtureRequest, debs: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    need("dpkg-deb")
    name = str(request.param)
    (deb,) = debs.glob(f"{name}_{fluxlib.__version__}_*.deb")
    root = tmp_path_factory.mktemp(name)
    subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return Package(name, deb, root)
