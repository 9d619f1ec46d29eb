"""Zips as tools really write them (corpus/README.md): each unpacks to the tree that went in."""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib import archive as archives
from fluxlib.archive import FIXED_TIME
from fluxlib.errors import InvalidInput
from tests.archive.make_corpus import BYTE_CODE, CHANGED, FILES
from tests.support.programs import make_zip

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.zip"))
# Whose programs leave directories out, or links to them; and whose zips do not tell when the sources were changed.
WITHOUT_LINKED_DIRECTORY = {"go", "go-plain"}
WITHOUT_TIMES = {"git", "go-plain"}
MORE = {"git": {"empty/.keep"}, "finder": {"__MACOSX/._run.sh"}}

by_tool = pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)


def unpacked(data: bytes, directory: Path, handler: str = "run.sh") -> dict[str, bytes]:
    """Every file by its path."""
    directory.mkdir(exist_ok=True)
    archives.inspect(data, handler)
    archives.unpack(data, handler, directory)
    return {str(one.relative_to(directory)): one.read_bytes() for one in directory.rglob("*") if one.is_file()}


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 20


@by_tool
def test_the_tree_comes_out_as_it_went_in(path: Path, tmp_path: Path) -> None:
    found = unpacked(path.read_bytes(), tmp_path)
    expected = {name: text.encode() for name, text in FILES.items()} | {"latest": FILES["lib/data"].encode()}
    if path.stem == "finder":
        expected = {unicodedata.normalize("NFD", name): data for name, data in expected.items()}
    inside = [name for name in (*FILES, BYTE_CODE) if name.startswith("lib/")]
    everything = {*expected, BYTE_CODE, *MORE.get(path.stem, ())}
    if path.stem not in WITHOUT_LINKED_DIRECTORY:
        everything |= {name.replace("lib/", "library/", 1) for name in inside}
        assert found["library/module.py"] == found["lib/module.py"]
    assert {name: found[name] for name in expected} == expected
    assert set(found) == everything
    assert (tmp_path / "empty").is_dir()
    assert not any(one.is_symlink() for one in tmp_path.rglob("*"))


@by_tool
def test_files_have_one_time_and_byte_code_is_valid(path: Path, tmp_path: Path) -> None:
    unpacked(path.read_bytes(), tmp_path)
    times = {str(one.relative_to(tmp_path)): one.stat().st_mtime for one in (tmp_path, *tmp_path.rglob("*"))}
    sources = {name for name in times if name.endswith("module.py")}
    assert {times[name] for name in times if name not in sources} == {FIXED_TIME}
    assert {times[name] for name in sources} == {FIXED_TIME if path.stem in WITHOUT_TIMES else CHANGED}


@by_tool
def test_nothing_is_warned_of_where_nothing_is_amiss(path: Path) -> None:
    warnings = archives.inspect(path.read_bytes(), "run.sh").warnings
    assert bool(warnings) == (path.stem == "explorer")
    assert all("code page 437" in one and "gr\\xfc\\xdfe.txt" in one for one in warnings)


# -- byte code ---------------------------------------------------------------------------------


def entry(name: str, date: tuple[int, ...], extra: bytes = b"") -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date)  # type: ignore[arg-type]
    info.extra = extra
    return info


def with_byte_code(source: str, time: int, size: int, changed: zipfile.ZipInfo, compiled: zipfile.ZipInfo) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("run.sh", "#!/bin/sh\n")
        made.writestr(changed, source)
        made.writestr(compiled, importlib.util.MAGIC_NUMBER + struct.pack("<III", 0, time, size) + b"code")
    return buffer.getvalue()


EXACT = struct.pack("<HHBI", 0x5455, 5, 1, CHANGED)
LATER = (2026, 1, 2, 3, 4, 10)
STALE = {
    "size differs": (CHANGED, 11, entry("m.py", (2026, 1, 2, 3, 4, 4), EXACT), LATER),
    "exact time differs": (CHANGED - 900, 10, entry("m.py", (2026, 1, 2, 3, 4, 4), EXACT), LATER),
    "local time in no zone": (CHANGED - 60, 10, entry("m.py", (2026, 1, 2, 3, 4, 4)), LATER),
    "local time days off": (CHANGED - 864_000, 10, entry("m.py", (2026, 1, 2, 3, 4, 4)), LATER),
    "edited after it was compiled": (CHANGED, 10, entry("m.py", (2026, 1, 2, 4, 4, 4)), LATER),
    "no time at all": (CHANGED, 10, entry("m.py", (1980, 1, 1, 0, 0, 0)), LATER),
}


@pytest.mark.parametrize("why", STALE)
def test_byte_code_that_may_be_of_another_source_is_left_stale(why: str, tmp_path: Path) -> None:
    time, size, source, date = STALE[why]
    compiled = entry("__pycache__/m.cpython-311.pyc", date)
    unpacked(with_byte_code("0123456789", time, size, source, compiled), tmp_path)
    assert (tmp_path / "m.py").stat().st_mtime == FIXED_TIME


@pytest.mark.parametrize("zone", [-12, -3.5, 0, 5.75, 14])
def test_local_times_count_in_every_zone(zone: float, tmp_path: Path) -> None:
    source = entry("m.py", (2026, 1, 2, 3, 4, 4))
    compiled = entry("__pycache__/m.cpython-311.pyc", LATER)
    unpacked(with_byte_code("0123456789", CHANGED - int(zone * 3600), 10, source, compiled), tmp_path)
    assert (tmp_path / "m.py").stat().st_mtime == CHANGED - int(zone * 3600)


def test_this_python_takes_the_byte_code(tmp_path: Path) -> None:
    """Compiled, zipped, unpacked, imported: nothing is compiled again."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "fresh.py").write_text("X = 1\n")
    os.utime(tree / "fresh.py", (CHANGED, CHANGED))
    subprocess.run([sys.executable, "-m", "compileall", "-q", "."], cwd=tree, check=True)
    files = {str(one.relative_to(tree)) for one in tree.rglob("*") if one.is_file()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in sorted(files):
            made.write(tree / name, name)
    code = tmp_path / "code"
    unpacked(buffer.getvalue(), code)
    command = [sys.executable, "-v", "-c", "import sys; sys.dont_write_bytecode = True; import fresh"]
    seen = subprocess.run(command, cwd=code, capture_output=True, text=True, check=True).stderr
    assert "fresh.cpython" in seen
    assert "matches" in seen
    assert "is stale" not in seen


# -- links -------------------------------------------------------------------------------------


def linked(links: dict[str, str], files: dict[str, str]) -> bytes:
    buffer = io.BytesIO(make_zip({"run.sh": "#!/bin/sh\n", **files}))
    with zipfile.ZipFile(buffer, "a") as made:
        for name, target in links.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            made.writestr(info, target)
    return buffer.getvalue()


INSIDE: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str]]] = {
    "to a file": ({"a": "d/f"}, {"d/f": "1"}, {"a": "1", "d/f": "1"}),
    "up and down": ({"d/e/a": "../../x/./f"}, {"x/f": "1"}, {"d/e/a": "1", "x/f": "1"}),
    "of a link": ({"a": "b", "b": "c"}, {"c": "1"}, {"a": "1", "b": "1", "c": "1"}),
    "to a directory": ({"a": "d/"}, {"d/f": "1", "d/g/h": "2"}, {"a/f": "1", "a/g/h": "2", "d/f": "1", "d/g/h": "2"}),
    "through a linked directory": ({"l": "d", "a": "l/f"}, {"d/f": "1"}, {"l/f": "1", "a": "1", "d/f": "1"}),
    "up from a linked directory": ({"l": "d/e", "a": "l/../f"}, {"d/e/x": "", "d/f": "1"},
                                   {"l/x": "", "a": "1", "d/e/x": "", "d/f": "1"}),
    "inside what is linked": ({"d/a": "f", "l": "d"}, {"d/f": "1"}, {"d/a": "1", "d/f": "1", "l/a": "1", "l/f": "1"}),
    "to an empty directory": ({"l": "d"}, {"d/": ""}, {}),
    "the handler's": ({"run": "run.sh"}, {}, {"run": "#!/bin/sh\n"}),
}  # fmt: skip


@pytest.mark.parametrize("what", INSIDE)
def test_links_that_stay_inside_become_copies(what: str, tmp_path: Path) -> None:
    links, files, expected = INSIDE[what]
    found = unpacked(linked(links, files), tmp_path, "run" if "run" in links else "run.sh")
    assert found == {"run.sh": b"#!/bin/sh\n", **{name: text.encode() for name, text in expected.items()}}
    assert not any(one.is_symlink() for one in tmp_path.rglob("*"))
    assert what != "to an empty directory" or (tmp_path / "l").is_dir()


OUTSIDE: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "absolute": ({"a": "/etc/passwd"}, {}, "leaves the zip, to '/etc/passwd'"),
    "above": ({"d/a": "../../etc/passwd"}, {}, "leaves the zip"),
    "above through a link": ({"l": "d", "d/a": "../../x"}, {"d/f": ""}, "leaves the zip"),
    "a drive": ({"a": "C:/x"}, {}, "leaves the zip"),
    "nothing there": ({"a": "b"}, {}, "'b', which is not in the zip"),
    "nothing": ({"a": ""}, {}, "a link to nothing"),
    "itself": ({"a": "a"}, {}, "in a circle"),
    "a circle": ({"a": "b", "b": "a"}, {}, "in a circle"),
    "the directory it is in": ({"d/a": "."}, {"d/f": ""}, "which has no end"),
    "everything": ({"a": "."}, {}, "which has no end"),
    "each other's directories": ({"d/a": "../e", "e/b": "../d"}, {"d/f": "", "e/f": ""}, "which has no end"),
    "a file as a directory": ({"a": "run.sh/x"}, {}, "not in the zip"),
    "with files inside": ({"a": "d"}, {"d/f": "", "a/f": ""}, "lies inside a link"),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_links_that_leave_or_end_nowhere_are_refused(what: str, tmp_path: Path) -> None:
    links, files, words = OUTSIDE[what]
    with pytest.raises(InvalidInput) as refused:
        unpacked(linked(links, files), tmp_path)
    assert words in refused.value.message
    assert list(tmp_path.iterdir()) == []


def test_links_that_multiply_are_refused(tmp_path: Path) -> None:
    """Ten links in each of six directories to the one below: a million files."""
    links = {f"{level}/{number}": f"../{level + 1}" for level in range(6) for number in range(10)}
    with pytest.raises(InvalidInput, match="with its links followed"):
        unpacked(linked(links, {f"6/{number}": "" for number in range(10)}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_links_that_lead_a_long_way_round_are_refused_soon(tmp_path: Path) -> None:
    """Each of four thousand by 35 others, with detours of half a kilobyte."""
    detour = "d/../" * 100
    chain = {f"c{number}": f"{detour}c{number + 1}" for number in range(35)} | {"c35": "run.sh"}
    data = linked(chain | {f"l{number}": f"{detour}c0" for number in range(4000)}, {"d/f": ""})
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="too long a way round"):
        archives.inspect(data, "run.sh")
    assert time.monotonic() - began < 20


PARTS = st.sampled_from(["..", ".", "", "a", "b", "run.sh", "/", "\\"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map("/".join).filter(bool)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=300, deadline=None)
@given(links=st.dictionaries(PATHS, PATHS, max_size=5), files=st.sets(PATHS, max_size=4))
def test_no_links_at_all_get_out(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, str], files: set[str]
) -> None:
    parent = tmp_path_factory.mktemp("l", numbered=True)
    (parent / "in").mkdir()
    (parent / "a").write_text("outside")
    try:
        archives.unpack(linked(links, dict.fromkeys(files, "inside")), "run.sh", parent / "in")
    except InvalidInput:
        pass
    else:
        found = list((parent / "in").rglob("*"))
        assert not any(one.is_symlink() for one in found)
        assert {one.read_text() for one in found if one.is_file()} <= {"inside", "#!/bin/sh\n"}
    assert sorted(os.listdir(parent)) == ["a", "in"]


def test_copies_of_links_count_as_bytes(tmp_path: Path) -> None:
    data = linked({f"l{number}": "big" for number in range(30)}, {"big": os.urandom(50_000).hex()})
    with pytest.raises(InvalidInput, match="unpacks to 2 MB, more than 1"):
        archives.inspect(data, "run.sh", archives.Limits(total_bytes=1024 * 1024))


# -- names -------------------------------------------------------------------------------------

# Right on Linux and macOS; the words with which Windows refuses them, if it does.
ONLY_WINDOWS_REFUSES = ["x/aux.js", "con.py", "JSON::PP.3pm", "etc.", "end ", "Icon\r", "a\\b", "what?", "COM1", "a\tb"]


@pytest.mark.skipif(sys.platform == "win32", reason="refused there")
@pytest.mark.parametrize("name", ONLY_WINDOWS_REFUSES)
def test_a_name_that_only_windows_cannot_hold_is_taken_elsewhere(name: str, tmp_path: Path) -> None:
    data = make_zip({"run.sh": "#!/bin/sh\n", "d/x": "", name: "1"})
    assert name in unpacked(data, tmp_path)


def test_names_that_differ_in_case_only_are_two_files_on_linux(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("one file here")
    files = {"run.sh": "#!/bin/sh\n", "LICENSE": "1", "license": "2", "\xe9": "3", "e\u0301": "4"}
    assert unpacked(make_zip(files), tmp_path) == {name: text.encode() for name, text in files.items()}


@pytest.mark.parametrize(
    ("system", "names", "words"),
    [
        *(("win32", (name,), "no file on Windows") for name in ONLY_WINDOWS_REFUSES),
        ("win32", ("License", "LICENSE"), "are one file"),
        ("darwin", ("License", "LICENSE"), "are one file"),
        ("darwin", ("\xe9", "e\u0301"), "are one file"),
        ("win32", ("console.py", "com.txt", "auxiliary", "a.con", "lpt"), ""),
        ("darwin", tuple(ONLY_WINDOWS_REFUSES), ""),
    ],
)
def test_what_an_agent_of_each_system_refuses(system: str, names: tuple[str, ...], words: str, tmp_path: Path) -> None:
    data = make_zip({"run.sh": "#!/bin/sh\n", "d/x": "", **dict.fromkeys(names, "")})
    archives.inspect(data, "run.sh")
    if words:
        with pytest.raises(InvalidInput, match=words):
            archives.unpack(data, "run.sh", tmp_path, system=system)
        assert list(tmp_path.iterdir()) == []
    else:
        archives.unpack(data, "run.sh", tmp_path, system=system)


def test_a_small_archive_may_have_a_high_ratio(tmp_path: Path) -> None:
    data = make_zip({"run.sh": "#!/bin/sh\n", "table": bytes(60 * 1024 * 1024)})
    assert len(data) * 200 < 60 * 1024 * 1024
    assert len(unpacked(data, tmp_path)["table"]) == 60 * 1024 * 1024


@pytest.mark.parametrize(
    ("names", "handler", "words"),
    [
        (["src/run.sh"], "run.sh", "it has 'src/run.sh'"),
        (["Run.sh"], "run.sh", "it has 'Run.sh': upper and lower case differ"),
        (["u\u0308.sh"], "\xfc.sh", "the same in decomposed letters"),
    ],
)
def test_a_handler_that_is_nearly_there_is_pointed_out(names: list[str], handler: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        archives.inspect(make_zip(dict.fromkeys(names, "")), handler)
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x1f\x8b\x08" + bytes(50), "a .tar.gz"),
        (b"name" + bytes(253) + b"ustar" + bytes(300), "a tar archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive"),
        (b"#!/bin/sh\necho hello\n", "the script itself"),
        (b"\x7fELF" + bytes(100), "the program itself"),
        (b"code.zip", "put an @ before it"),
        (make_zip({"run.sh": "x" * 500})[:-20], "--data-binary"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_sent_in_place_of_a_zip_is_recognised(data: bytes, words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        archives.inspect(data, "run.sh")
    assert words in refused.value.message


def test_a_name_that_is_not_the_utf8_it_says_it_is() -> None:
    data = make_zip({"run.sh": "", "\xfc": ""}).replace(b"\xc3\xbc", b"\xfc\xfc")
    with pytest.raises(InvalidInput, match="its names are UTF-8, and one is not"):
        archives.inspect(data, "run.sh")
