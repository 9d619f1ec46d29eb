"""What the .debs carry: everything they need, nothing else, and nothing newer than the releases they promise."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PyInstaller.archive.readers import CArchiveReader

import fluxlib
from tests.packaging.conftest import Package
from tests.support.need import lacking, need

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Debian 12 has 2.36, Ubuntu 22.04 has 2.35: docs/packaging.md promises both.
NEWEST_GLIBC = (2, 35)
# What the packages depend on; every Debian and Ubuntu has it.
FROM_THE_SYSTEM = {"libstdc++.so.6", "libgcc_s.so.1", "libexpat.so.1"}
LIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1", "ld-linux-x86-64.so.2"}
LIBC |= {"ld-linux-aarch64.so.1"}
CLOUD = {"boto3", "botocore", "google.cloud.compute_v1", "paramiko"}
HTTP = {"flask", "waitress", "werkzeug", "jinja2", "fluxlib.control"}


def _binaries(package: Package) -> Iterator[Path]:
    for path in package.program.parent.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.open("rb").read(4) == b"\x7fELF":
            yield path


def _objdump(option: str, path: Path) -> str:
    return subprocess.run(["objdump", option, path], capture_output=True, text=True, check=True).stdout


def _modules(package: Package) -> set[str]:
    """Every module frozen into the program, compiled ones included."""
    names = set(CArchiveReader(str(package.program)).open_embedded_archive("PYZ.pyz").toc)
    for path in package.inside.rglob("*.so"):
        names.add(path.relative_to(package.inside).as_posix().partition(".")[0].replace("/", "."))
    return names


def _has(modules: set[str], wanted: str) -> bool:
    return any(name == wanted or name.startswith(f"{wanted}.") for name in modules)


def _newest_glibc(package: Package) -> dict[str, tuple[int, int]]:
    """By library, for those that name one."""
    need("objdump")
    newest = {}
    for path in _binaries(package):
        versions = re.findall(r"GLIBC_(\d+)\.(\d+)", _objdump("-T", path))
        if versions:
            newest[path.name] = max((int(major), int(minor)) for major, minor in versions)
    assert len(newest) > 15, "these are not all of the program's libraries"
    return newest


def test_no_library_wants_a_newer_glibc_than_is_promised(package: Package) -> None:
    if tuple(int(part) for part in platform.libc_ver()[1].split(".")) > (2, 36):
        lacking("packages for others are built on Debian 12: this machine's libraries are newer")
    newest = _newest_glibc(package)
    assert not {name: version for name, version in newest.items() if version > NEWEST_GLIBC}


def test_the_package_depends_on_the_glibc_it_needs(package: Package) -> None:
    major, minor = max(_newest_glibc(package).values())
    depends = subprocess.run(["dpkg-deb", "-f", package.deb, "Depends"], capture_output=True, text=True, check=True)
    assert f"libc6 (>= {major}.{minor})" in depends.stdout
    assert {"adduser", "libexpat1", "libgcc-s1", "libstdc++6"} <= set(depends.stdout.strip().split(", "))


def test_every_library_is_carried_or_depended_upon(package: Package) -> None:
    """dh_shlibdeps cannot look into a frozen program, so nothing else would notice."""
    need("objdump")
    carried = {path.name for path in _binaries(package)}
    missing = {
        f"{path.name} needs {library}"
        for path in _binaries(package)
        for library in re.findall(r"^\s+NEEDED\s+(\S+)", _objdump("-p", path), re.MULTILINE)
        if library not in carried | FROM_THE_SYSTEM | LIBC
    }
    assert not missing


def test_the_agent_carries_neither_clouds_nor_an_http_server(package: Package) -> None:
    modules = _modules(package)
    assert _has(modules, "fluxlib.agent.app")
    assert _has(modules, "grpc")
    wanted = CLOUD | HTTP if package.name == "flux" else set()
    assert {name for name in CLOUD | HTTP if _has(modules, name)} == wanted


def test_only_the_services_that_are_called_are_carried(package: Package) -> None:
    data = package.inside / "botocore/data"
    services = {path.name for path in data.iterdir() if path.is_dir()} if data.exists() else set()
    assert services == ({"ec2", "sts", "sso", "sso-oidc"} if package.name == "flux" else set())


def test_the_program_starts_and_says_its_version(package: Package) -> None:
    link = package.root / "usr/bin" / package.name
    said = subprocess.run([link, "--version"], capture_output=True, text=True, check=True, env={})
    assert fluxlib.__version__ in said.stdout


def test_flux_carries_the_agents_package(debs: Path, package: Package) -> None:
    agents = list((package.root / "usr/share/flux/agents").glob("*"))
    if package.name == "flux-agent":
        assert not agents
        return
    (built,) = debs.glob("flux-agent_*.deb")
    assert [path.name for path in agents] == [built.name]
    assert agents[0].read_bytes() == built.read_bytes()


def test_it_installs_only_where_its_manual_says(package: Package) -> None:
    name = package.name
    fine = (f"usr/lib/{name}/", f"usr/share/doc/{name}/", "usr/share/man/man1/", "usr/share/flux/agents/")
    fine += (f"usr/bin/{name}", f"lib/systemd/system/{name}.service", "etc/flux/flux.yaml.example")
    fine += (f"usr/share/lintian/overrides/{name}",)
    files = [path.relative_to(package.root).as_posix() for path in package.root.rglob("*") if not path.is_dir()]
    assert [
        path for path in files if not path.removeprefix("usr/").startswith(fine) and not path.startswith(fine)
    ] == []
    assert f"usr/share/man/man1/{name}.1.gz" in files
    assert f"usr/share/doc/{name}/third-party.txt.gz" in files


def test_lintian_has_no_complaint(debs: Path) -> None:
    need("lintian")
    (changes,) = debs.glob("flux_*.changes")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", "--no-tag-display-limit", changes],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
