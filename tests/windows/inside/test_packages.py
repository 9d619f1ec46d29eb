"""Functions on a file system that takes names of other letters for the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.agent.packages import Packages
from fluxlib.errors import InvalidInput
from fluxlib.lifecycle import Deadline
from fluxlib.model import FunctionSpec
from tests.support.programs import make_zip, wait_until

pytestmark = pytest.mark.windows

CODE = make_zip({"main.bat": "@exit /b 0\r\n"})


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Packages]:
    made = Packages(tmp_path)
    yield made
    made.stop(Deadline(5))


def deploy(packages: Packages, name: str) -> Path:
    code_dir = packages.deploy(FunctionSpec(name, "main.bat"), name, "", CODE).code_dir
    assert code_dir is not None
    return code_dir


def test_a_name_in_other_letters_takes_nothing_of_the_first_one(packages: Packages, tmp_path: Path) -> None:
    code = deploy(packages, "Hello")
    with pytest.raises(InvalidInput, match="hello and Hello"):
        packages.register(FunctionSpec("hello", "main.bat"), "d")
    with pytest.raises(InvalidInput, match="hello and Hello"):
        deploy(packages, "hello")
    assert deploy(packages, "Hello") == code
    again = Packages(tmp_path)
    again.stop(Deadline(5))
    assert [(state.name, state.code_digest) for state in again.states()] == [("Hello", code.name)]
    packages.remove("Hello")
    wait_until(lambda: not list(tmp_path.iterdir()), "the other directory to go")
    assert deploy(packages, "hello").is_dir()


@pytest.mark.parametrize("name", ["nul", "CON", "aux.v2", "com1"])
def test_a_devices_name_is_the_functions_fault_not_the_disks(packages: Packages, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput, match="a device on Windows"):
        deploy(packages, name)
    with pytest.raises(InvalidInput, match="a device on Windows"):
        packages.register(FunctionSpec(name, "main.bat"), "d")
    assert (packages.states(), list(tmp_path.iterdir())) == ((), [])


@pytest.mark.parametrize("name", ["a?b", "data/x|y.txt", 'q"', "a<b/c", "ConIn$", "lib/CONOUT$/x"])
def test_a_file_that_windows_cannot_hold_is_the_zips_fault_not_the_disks(packages: Packages, name: str) -> None:
    code = make_zip({"main.bat": "@exit /b 0\r\n", "conin$.txt": "", name: ""})
    with pytest.raises(InvalidInput) as caught:
        packages.deploy(FunctionSpec("f", "main.bat"), "f", "", code)
    assert f"no file on Windows can have the name of {name!a}: rename it" in caught.value.message
