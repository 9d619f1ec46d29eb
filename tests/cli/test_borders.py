"""Starts that cannot be: one sentence of the program's own, never a traceback, whichever library found it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from fluxlib.pki import Authority
from fluxlib.pki import certificates as certs
from fluxlib.pki.files import CertificatesUnusable
from fluxlib.pki.identity import utc_now
from tests.support.programs import free_port

ROOT = Path(__file__).parents[2]
EXPIRED, FUTURE = -timedelta(days=3660), timedelta(days=2)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "flux.yaml").write_text(
        f"api_key: a-key-of-more-than-sixteen-characters\nlisten_host: 127.0.0.1\nport: {free_port()}\n"
        "state_dir: state\ncerts_dir: certs\n"
    )
    (tmp_path / "flux.yaml").chmod(0o600)
    return tmp_path


def flux(home: Path, *arguments: str) -> tuple[int, list[str]]:
    """The exit code, and what it says that is no line of the log."""
    ended = subprocess.run(
        [sys.executable, str(ROOT / "flux.py"), *arguments],
        cwd=home,
        env={**os.environ, "FLUX_CONFIG": str(home / "flux.yaml")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if " INFO " not in line]
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, said


def make_authority(certs_dir: Path, begun: timedelta) -> None:
    """As a first start makes it while the clock is off by so much."""
    (certs_dir / "ca").mkdir(parents=True)
    key = certs.new_key()
    (certs_dir / "ca" / "ca-key.pem").write_bytes(certs.key_pem(key))
    (certs_dir / "ca" / "ca.pem").write_bytes(certs.cert_pem(certs.make_ca(key, utc_now() + begun)))


@pytest.mark.parametrize(("begun", "words"), [(EXPIRED, "ended on "), (FUTURE, "begins on ")])
@pytest.mark.parametrize(
    "command", [(), ("enroll", "worker-1"), ("run", "--state", "."), ("check-config",)], ids=lambda c: " ".join(c)
)
def test_an_authority_outside_of_its_time(home: Path, command: tuple[str, ...], begun: timedelta, words: str) -> None:
    make_authority(home / "certs", begun)
    before = {path: path.read_bytes() for path in home.rglob("*.pem")}
    code, said = flux(home, *command)
    assert code != 0
    (line,) = said
    assert f"the certificate authority in {home / 'certs' / 'ca'} {words}" in line
    assert ("move" in line and "enrol the agents again" in line) if begun is EXPIRED else "set the clock" in line
    assert {path: path.read_bytes() for path in home.rglob("*.pem")} == before


def test_what_is_said_of_an_ended_authority_helps(home: Path) -> None:
    make_authority(home / "certs", EXPIRED)
    (home / "certs" / "installation").write_text("abc\n")
    os.rename(home / "certs" / "ca", home / "old-ca")
    authority = Authority.open(home / "certs")
    assert authority.flux_identity().not_after > utc_now().timestamp()
    assert authority.installation_id() == "abc"  # the cloud's nodes are still this installation's


def test_an_authority_that_ends_while_flux_runs_signs_nothing_more(home: Path) -> None:
    authority = Authority.open(home / "certs")
    with pytest.raises(CertificatesUnusable, match="ended on "):
        authority._signer.flux_identity(home / "a.pem", home / "b.pem", utc_now() + timedelta(days=3700))


def _directory(*parts: str) -> Callable[[Path], None]:
    return lambda home: home.joinpath(*parts).mkdir(parents=True)


def _file(content: bytes, *parts: str) -> Callable[[Path], None]:
    def write(home: Path) -> None:
        path = home.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_file(b"", "state"), "the store {home}/state/flux.db cannot be opened: File exists"),
        (_directory("state", "flux.db"), "the store {home}/state/flux.db cannot be opened: Is a directory"),
        (
            _file(b"no database" * 1000, "state", "flux.db"),
            "the store {home}/state/flux.db cannot be opened: file is not a database: bring it back from a backup, or"
            " move it away to begin with an empty one",
        ),
        (_file(b"", "certs"), "{home}/certs cannot be made: File exists: set `certs_dir`"),
        (_directory("certs", "ca", "ca.pem"), "{home}/certs/ca/ca.pem cannot be read: Is a directory"),
    ],
)
def test_files_that_are_not_what_they_should_be(home: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(home)
    assert flux(home) == (1, [f"flux: {words.format(home=home)}"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"api_key: a\0b", "is not valid YAML: control characters are not allowed"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"api_key: \xe4\xf6", "is not UTF-8 text"),
        (b"api_key: [", "is not valid YAML"),
        (b"- api_key", "must be a mapping of keys to values, is a list"),
        (b"&a [*a]", "cannot be used: the alias 'a' has no value before it"),
    ],
)
def test_a_configuration_that_is_no_yaml_of_ours(home: Path, content: bytes, words: str) -> None:
    (home / "flux.yaml").write_bytes(content)
    code, said = flux(home)
    assert code != 0
    (line,) = said
    assert line.startswith(f"flux: {home}/flux.yaml ")
    assert words in line
