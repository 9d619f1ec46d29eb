"""What Windows shows of the programs, made from code: `python windows/resources.py DIRECTORY`.

flux.ico                 the icon, in the sizes Explorer asks for
flux-version.txt         PyInstaller's source of the version resource (right click, Properties, Details)
flux-agent-version.txt
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
SIZES = (256, 64, 48, 32, 16)
_SAMPLES = 4  # per pixel and direction, for smooth edges

_BACKGROUND, _ARROW = (27, 54, 93), (255, 196, 61)
_CORNER = 0.2


def icon(sizes: tuple[int, ...] = SIZES) -> bytes:
    """An .ico of PNG images (Windows Vista and later read these in every size)."""
    images = [_png(size) for size in sizes]
    offset = 6 + 16 * len(images)
    header, entries = struct.pack("<HHH", 0, 1, len(images)), b""
    for size, image in zip(sizes, images, strict=True):
        # A byte holds the size; 0 stands for 256.
        entries += struct.pack("<BBBBHHII", size % 256, size % 256, 0, 0, 1, 32, len(image), offset)
        offset += len(image)
    return header + entries + b"".join(images)


def _colour(x: float, y: float) -> tuple[int, int, int] | None:
    """The picture on the unit square: two chevrons on a rounded ground. None is outside."""
    dx, dy = max(_CORNER - x, x - 1 + _CORNER, 0.0), max(_CORNER - y, y - 1 + _CORNER, 0.0)
    if dx * dx + dy * dy > _CORNER * _CORNER:
        return None
    for left in (0.22, 0.47):
        # A chevron is a band of constant width that bends at half height.
        along = x - left - 0.26 * (1 - abs(y - 0.5) / 0.26)
        if 0 <= along <= 0.13 and abs(y - 0.5) <= 0.26:
            return _ARROW
    return _BACKGROUND


def _png(size: int) -> bytes:
    rows = bytearray()
    steps = [(n + 0.5) / _SAMPLES for n in range(_SAMPLES)]
    for row in range(size):
        rows.append(0)  # no filter
        for column in range(size):
            seen = [_colour((column + x) / size, (row + y) / size) for y in steps for x in steps]
            inside = [colour for colour in seen if colour is not None]
            mean = [sum(colour[part] for colour in inside) // max(1, len(inside)) for part in range(3)]
            rows += bytes([*mean, 255 * len(inside) // len(seen)])
    header = struct.pack(">IIBBBBB", size, size, 8, 6, 0, 0, 0)  # 8 bits, RGBA
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(rows), 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def version_file(program: str, description: str, version: str) -> str:
    """The text PyInstaller's ``version=`` takes."""
    numbers = (*(int(part) for part in version.split(".")), 0)
    words = {
        "CompanyName": "The Flux project",
        "FileDescription": description,
        "FileVersion": version,
        "InternalName": program,
        "LegalCopyright": "Apache License 2.0",
        "OriginalFilename": f"{program}.exe",
        "ProductName": "Flux",
        "ProductVersion": version,
    }
    strings = ",\n        ".join(f"StringStruct({name!r}, {value!r})" for name, value in words.items())
    # 040904B0: English (United States), Unicode.
    return f"""VSVersionInfo(
  ffi=FixedFileInfo(filevers={numbers}, prodvers={numbers}, mask=0x3F, flags=0, OS=0x40004, fileType=1, subtype=0),
  kids=[
    StringFileInfo([StringTable('040904B0', [
        {strings}])]),
    VarFileInfo([VarStruct('Translation', [0x0409, 1200])]),
  ],
)
"""


def write(directory: Path) -> None:
    sys.path.insert(0, str(TOP))
    from fluxlib import __version__

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "flux.ico").write_bytes(icon())
    for program, description in (("flux", "Flux: serverless without containers"), ("flux-agent", "Flux agent")):
        (directory / f"{program}-version.txt").write_text(version_file(program, description, __version__))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
