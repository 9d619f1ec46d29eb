"""Print the notices of everything a frozen program carries: `third_party.py dist/flux`.

The Python packages' come from the environment that runs this, the libraries'
from Debian's copyright files. A component without a notice fails the build.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from PyInstaller.archive.readers import CArchiveReader

_NOTICE = re.compile(r"(^|/)(licen[cs]e|copying|notice|authors)[^/]*$", re.IGNORECASE)
_OURS = ("flux", "fluxlib")


def imported_names(program: Path) -> set[str]:
    """The dotted modules inside the program's archive, and the packages of the files beside it."""
    archive = CArchiveReader(str(program / program.name))
    names = set(archive.open_embedded_archive("PYZ.pyz").toc)
    inside = program / "_internal"
    for path in inside.rglob("*.so"):
        module = path.relative_to(inside).as_posix().partition(".")[0]
        names.add(module.replace("/", "."))
    return names


def carried(names: set[str]) -> list[Distribution]:
    """The distributions that own any of these modules, PyInstaller (its start code is inside) included."""
    found = []
    for distribution in distributions():
        modules = {
            file.as_posix().removesuffix("/__init__.py").partition(".")[0].replace("/", ".")
            for file in distribution.files or []
            if file.suffix in (".py", ".so")
        }
        if modules & names or distribution.metadata["Name"].lower() == "pyinstaller":
            found.append(distribution)
    return sorted(found, key=lambda item: item.metadata["Name"].lower())


def notices(distribution: Distribution) -> str:
    texts = [
        Path(str(distribution.locate_file(file))).read_text(errors="replace").strip()
        for file in distribution.files or []
        if ".dist-info/" in file.as_posix() and _NOTICE.search(file.as_posix())
    ]
    if not texts:
        # Named by an expression only: the text of every such licence is in /usr/share/common-licenses or short.
        licence = distribution.metadata["License-Expression"] or distribution.metadata["License"]
        if not licence:
            raise SystemExit(f"{distribution.metadata['Name']} carries no licence: look for it and add it here")
        texts = [f"Licence: {licence}"]
    return "\n\n".join(texts)


def system_packages(program: Path) -> dict[str, str]:
    """The Debian packages that the bundled libraries, Python included, come from, and their copyright files."""
    found: dict[str, str] = {}
    for path in sorted((program / "_internal").glob("lib*.so*")):
        answer = subprocess.run(["dpkg-query", "--search", f"*/{path.name}"], capture_output=True, text=True)
        for line in answer.stdout.splitlines():
            package = line.partition(":")[0]
            notice = Path("/usr/share/doc") / package / "copyright"
            if notice.exists():
                found[package] = notice.read_text(errors="replace").strip()
    return found


def main() -> None:
    program = Path(sys.argv[1])
    names = {name for name in imported_names(program) if name.split(".")[0] not in _OURS}
    print(f"What {program.name} is frozen with, and under which terms.")
    for distribution in carried(names):
        title = f"{distribution.metadata['Name']} {distribution.version}"
        print(f"\n\n{'=' * 79}\n{title}\n{'=' * 79}\n{notices(distribution)}")
    for package, text in system_packages(program).items():
        print(f"\n\n{'=' * 79}\n{package} (Debian)\n{'=' * 79}\n{text}")


main()
