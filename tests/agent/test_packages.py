"""Functions on disk: switched at once, kept while something runs from them, whole after a crash or not at all."""

from __future__ import annotations

import os
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.agent import packages as module
from fluxlib.agent.packages import Packages
from fluxlib.errors import InvalidInput, NotFound
from fluxlib.lifecycle import Deadline
from fluxlib.model import FunctionSpec
from tests.support.programs import make_zip, wait_until

SPEC = FunctionSpec(name="hello", handler="main.sh")
ONE = make_zip({"main.sh": "#!/bin/sh\necho one\n", "data/a": "1"})
TWO = make_zip({"main.sh": "#!/bin/sh\necho two\n"})


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Packages]:
    made = Packages(tmp_path)
    yield made
    made.stop(Deadline(5))


def reopened(tmp_path: Path) -> Packages:
    made = Packages(tmp_path)
    made.stop(Deadline(5))
    return made


def deploy(packages: Packages, archive: bytes, spec: FunctionSpec = SPEC) -> Path:
    code_dir = packages.deploy(spec, spec.digest(), "", archive).code_dir
    assert code_dir is not None
    return code_dir


def versions(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "hello").iterdir() if path.is_dir())


def test_a_deploy_and_what_others_may_do_with_it(packages: Packages, tmp_path: Path) -> None:
    code = deploy(packages, ONE)
    assert (code / "main.sh").read_text() == "#!/bin/sh\necho one\n"
    assert (code / "main.sh").stat().st_mode & 0o777 == 0o555
    assert (code / "data").stat().st_mode & 0o777 == 0o555
    # Walked through, not listed: other functions' names are nobody's business.
    assert tmp_path.stat().st_mode & 0o777 == 0o711
    state = packages.states()[0]
    assert (state.name, state.spec_digest) == ("hello", SPEC.digest())
    assert state.code_digest == code.name


def test_a_restart_finds_the_same(packages: Packages, tmp_path: Path) -> None:
    deploy(packages, ONE)
    packages.register(FunctionSpec(name="bare", handler="x"), "d")
    assert reopened(tmp_path).states() == packages.states()


def test_the_old_version_goes_when_nothing_runs_from_it(packages: Packages, tmp_path: Path) -> None:
    first = deploy(packages, ONE)
    held = packages.acquire("hello")
    also = packages.acquire("hello")
    assert held is not None
    assert also is not None
    second = deploy(packages, TWO)
    assert versions(tmp_path) == sorted([first.name, second.name])
    packages.release(held)
    assert (first / "main.sh").exists()
    packages.release(also)
    wait_until(lambda: versions(tmp_path) == [second.name], "the old version to go", 5)
    assert packages.get("hello").code_dir == second  # type: ignore[union-attr]


def test_back_to_a_version_that_still_runs(packages: Packages, tmp_path: Path) -> None:
    first = deploy(packages, ONE)
    held = packages.acquire("hello")
    assert held is not None
    second = deploy(packages, TWO)
    assert deploy(packages, ONE) == first
    packages.release(held)
    wait_until(lambda: versions(tmp_path) == [first.name], f"{second.name} to go and {first.name} to stay", 5)
    assert (first / "main.sh").exists()


def test_removal_waits_for_what_runs(packages: Packages, tmp_path: Path) -> None:
    code = deploy(packages, ONE)
    held = packages.acquire("hello")
    assert held is not None
    packages.remove("hello")
    assert packages.get("hello") is None
    assert packages.acquire("hello") is None
    assert (code / "main.sh").exists()
    packages.release(held)
    wait_until(lambda: not (tmp_path / "hello").exists(), "its directory to go", 5)
    with pytest.raises(NotFound):
        packages.remove("hello")


@pytest.mark.parametrize(
    ("archive", "digest"),
    [
        (b"no zip", ""),
        (make_zip({"../out": "x"}), ""),
        (make_zip({"other.sh": "x"}), ""),
        (TWO, "0" * 64),
    ],
)
def test_a_bad_deploy_changes_nothing(packages: Packages, tmp_path: Path, archive: bytes, digest: str) -> None:
    first = deploy(packages, ONE)
    revision = packages.revision
    with pytest.raises(InvalidInput):
        packages.deploy(SPEC, SPEC.digest(), digest, archive)
    assert packages.revision == revision
    assert packages.get("hello").code_dir == first  # type: ignore[union-attr]
    assert versions(tmp_path) == [first.name]
    with pytest.raises(InvalidInput):
        packages.deploy(FunctionSpec(name="new", handler="main.sh"), "", digest, archive)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\0b", "x" * 65, "-x"])
def test_names_that_cannot_be_paths(packages: Packages, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput):
        packages.register(FunctionSpec(name=name, handler="main.sh"), "")
    with pytest.raises(InvalidInput):
        packages.deploy(FunctionSpec(name=name, handler="main.sh"), "", "", ONE)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_handler_that_the_code_lacks(packages: Packages) -> None:
    deploy(packages, ONE)
    with pytest.raises(InvalidInput, match=r"has no other\.sh"):
        packages.register(FunctionSpec(name="hello", handler="other.sh"), "")
    changed = FunctionSpec(name="hello", handler="data/a", timeout_seconds=5)
    packages.register(changed, changed.digest())
    assert packages.get("hello").spec == changed  # type: ignore[union-attr]


def test_a_disk_that_is_full_changes_nothing(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = deploy(packages, ONE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        deploy(packages, TWO)
    monkeypatch.undo()
    assert packages.get("hello").code_dir == first  # type: ignore[union-attr]
    wait_until(lambda: sorted(os.listdir(tmp_path / "hello")) == sorted([first.name, "spec.json"]), "leftovers to go")
    deploy(packages, TWO)


# -- crashes between two steps -------------------------------------------------------


def test_leftovers_of_a_crash_are_removed(packages: Packages, tmp_path: Path) -> None:
    first = deploy(packages, ONE)
    home = tmp_path / "hello"
    (home / ".new-abc").mkdir()
    (home / ".new-abc" / "main.sh").write_text("half")
    (home / ("f" * 64)).mkdir()  # renamed, but spec.json had not been replaced yet
    (home / ".spec-xyz").write_text("{")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "spec.json").write_text("{half")
    again = reopened(tmp_path)
    assert sorted(os.listdir(home)) == sorted([first.name, "spec.json"])
    assert [state.name for state in again.states()] == ["hello"]
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("damage", ["emptied", "missing file", "missing all"])
def test_code_that_a_power_cut_damaged_counts_as_not_deployed(packages: Packages, tmp_path: Path, damage: str) -> None:
    code = deploy(packages, ONE)
    if damage == "emptied":
        (code / "data" / "a").chmod(0o600)
        (code / "data" / "a").write_bytes(b"")
    elif damage == "missing file":
        (code / "data").chmod(0o755)
        (code / "data" / "a").unlink()
    else:
        os.rename(code, tmp_path / "hello" / "elsewhere")
    again = Packages(tmp_path)
    assert again.states()[0].code_digest == ""
    assert deploy(again, ONE) == code
    assert (code / "data" / "a").read_text() == "1"
    again.stop(Deadline(5))


def test_deploys_at_once_leave_one_whole_version(packages: Packages, tmp_path: Path) -> None:
    archives = [make_zip({"main.sh": f"#!/bin/sh\necho {number}\n"}) for number in range(4)]
    faults: list[Exception] = []

    def again_and_again(number: int) -> None:
        try:
            for turn in range(25):
                deploy(packages, archives[(number + turn) % 4])
                held = packages.acquire("hello")
                assert held is not None
                assert held.code_dir is not None
                assert (held.code_dir / "main.sh").is_file(), "a version was removed under a run"
                packages.release(held)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=again_and_again, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    current = packages.get("hello")
    assert current is not None
    assert current.code_dir is not None
    name = current.code_dir.name
    wait_until(lambda: versions(tmp_path) == [name], "every other version to go", 5)
    assert reopened(tmp_path).states() == packages.states()


def test_an_archive_in_a_file_is_not_read_into_memory(packages: Packages) -> None:
    size = 24 * 1024 * 1024
    with packages.spool() as spool:
        with zipfile.ZipFile(spool, "w", zipfile.ZIP_STORED) as made:
            made.writestr("main.sh", "#!/bin/sh\n")
            made.writestr("data", os.urandom(size))
        tracemalloc.start()
        try:
            installed = packages.deploy(SPEC, SPEC.digest(), "", spool)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert installed.code_dir is not None
    assert (installed.code_dir / "data").stat().st_size == size
    assert peak < size / 4


def test_code_counts_as_deployed_once_it_is_on_the_disk(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def fails(directory: Path) -> None:
        synced.extend(sorted(path.name for path in directory.iterdir()))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "sync_file_system", fails)
    with pytest.raises(OSError, match="Input/output"):
        deploy(packages, ONE)
    assert synced == ["data", "main.sh"]
    assert packages.get("hello") is None
    monkeypatch.undo()
    deploy(packages, ONE)


def test_a_start_does_not_wait_for_the_disk_of_a_change(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy(packages, ONE)
    syncing, go_on = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        syncing.set()
        assert go_on.wait(30)

    monkeypatch.setattr(module.os, "fsync", slow)
    change = threading.Thread(target=packages.register, args=(SPEC, "another"))
    change.start()
    got: list[object] = []
    start = threading.Thread(target=lambda: got.append(packages.acquire("hello")))
    try:
        assert syncing.wait(10)
        start.start()
        start.join(5)
        assert got
        assert got[0] is not None
    finally:
        go_on.set()
        change.join(10)
        start.join(10)
    changed = packages.get("hello")
    assert changed is not None
    assert changed.spec_digest == "another"
