"""Code lies where functions' users can walk to, and what is there for others' state is left alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fluxlib.agent.program_dirs import closed_parent, lock_state_dir, programs_dir
from fluxlib.errors import Conflict, FluxError
from fluxlib.model import ExecutionStatus
from tests.agent.running import running
from tests.support.need import need_root
from tests.support.nesting import nest


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    need_root()
    return tmp_path / "outside"


def state(parent: Path, name: str = "state") -> Path:
    made = parent / name
    made.mkdir(mode=0o711)
    return made


@pytest.fixture
def private(tmp_path: Path) -> Path:
    made = tmp_path / "private"
    made.mkdir(mode=0o700)
    return made


def test_a_directory_all_can_reach_is_used_itself(outside: Path) -> None:
    open_to_all = Path("/var/lib")
    assert closed_parent(open_to_all) is None
    assert programs_dir(open_to_all, outside) == open_to_all
    assert not outside.exists()


def test_under_a_private_parent_it_is_outside_and_stays_the_same(outside: Path, private: Path) -> None:
    home = state(private)
    first = programs_dir(home, outside)
    assert first.parent == outside
    assert first.stat().st_mode & 0o777 == 0o711
    assert (first / "owner").stat().st_mode & 0o777 == 0o600
    assert programs_dir(home, outside) == first
    assert programs_dir(state(private, "second"), outside) != first


def test_what_belongs_to_state_that_is_gone_is_removed(outside: Path, private: Path) -> None:
    gone, kept, made_anew = state(private, "gone"), state(private, "kept"), state(private, "anew")
    first, second, third = (programs_dir(one, outside) for one in (gone, kept, made_anew))
    for one in (first, second, third):
        (one / "functions").mkdir()
    just_begun = outside / ("0" * 16)
    just_begun.mkdir()
    (outside / "somebody's").mkdir()
    shutil.rmtree(gone)
    shutil.rmtree(made_anew)
    fresh = programs_dir(state(private, "anew"), outside)
    assert not first.exists()
    assert not third.exists()
    assert fresh not in (first, third)
    assert (second / "functions").is_dir()
    assert just_begun.is_dir()
    assert (outside / "somebody's").is_dir()


def test_what_a_function_nested_for_state_that_is_gone_keeps_no_agent_from_starting(
    outside: Path, private: Path
) -> None:
    gone, kept = state(private, "gone"), state(private, "kept")
    left = programs_dir(gone, outside)
    nest(left, 1500)
    shutil.rmtree(gone)
    programs_dir(kept, outside)
    assert not left.exists()


@pytest.mark.parametrize("trap", ["link", "writable", "not root's", "file"])
def test_what_somebody_else_put_there_is_not_used(outside: Path, private: Path, tmp_path: Path, trap: str) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o711)
    if trap == "link":
        outside.symlink_to(target)
    elif trap == "file":
        outside.write_text("")
    else:
        outside.mkdir()
        os.chmod(outside, 0o777 if trap == "writable" else 0o711)
        if trap == "not root's":
            os.chown(outside, 65534, 65534)
    with pytest.raises(FluxError, match="state_dir"):
        programs_dir(state(private), outside)
    assert list(target.iterdir()) == []


def test_a_broken_note_is_replaced(outside: Path, private: Path) -> None:
    home = state(private)
    (home / "programs").write_text("../../etc")
    made = programs_dir(home, outside)
    assert made.parent == outside


def test_half_an_owner_is_no_owner(outside: Path, private: Path) -> None:
    first = programs_dir(state(private), outside)
    being_made = outside / ("a" * 16)
    for content in (b"", b"half/a/path"):
        being_made.mkdir(exist_ok=True)
        (being_made / "owner").write_bytes(content)
        assert programs_dir(private / "state", outside) == first
        assert being_made.is_dir(), content


def test_a_living_agents_is_never_removed_even_when_its_state_is_out_of_sight(outside: Path, private: Path) -> None:
    home = state(private)
    mine = programs_dir(home, outside)
    (mine / "functions").mkdir()
    lock = lock_state_dir(mine)
    home.rename(private / "moved")
    programs_dir(state(private, "other"), outside)
    assert (mine / "functions").is_dir()
    lock.release()
    programs_dir(private / "other", outside)
    assert not mine.exists()


def test_links_lead_nowhere(outside: Path, private: Path, tmp_path: Path) -> None:
    """A link of a fitting name, and links within what is removed."""
    home = state(private)
    mine = programs_dir(home, outside)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (precious / "owner").write_text("/nowhere")
    (outside / ("b" * 16)).symlink_to(precious)
    (mine / "functions").symlink_to(precious)
    shutil.rmtree(home)
    programs_dir(state(private, "other"), outside)
    assert not mine.exists()
    assert (precious / "file").read_text() == "kept"


def test_a_second_agent_on_one_state_directory_is_refused_before_it_ends_anything(tmp_path: Path) -> None:
    with running(tmp_path) as agent:
        assert agent.deploy().success
        agent.run("sleep", "30", execution_id="e-1", asynchronous=True)
        with pytest.raises(Conflict, match=r"in use by process \d+.*state_dir"), running(tmp_path, port=1):
            pass
        assert agent.record("e-1").status is ExecutionStatus.RUNNING
        assert agent.cancel("e-1").success
    with running(tmp_path) as again:
        assert again.record("e-1").status is ExecutionStatus.CANCELLED
