"""Renewal's judgement under invented times; over real agents it is tested with the membership."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fluxlib.control.agents.renewal import OwnIdentity, Renewal
from fluxlib.errors import AgentRefused
from fluxlib.pki import Authority
from fluxlib.pki import certificates as certs
from tests.support.fleet import Fleet, Machine

DAY = 86400.0


@dataclass
class Place:
    fleet: Fleet
    machine: Machine
    authority: Authority
    own: OwnIdentity
    renewal: Renewal
    directory: Path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    authority = Authority.open(tmp_path)
    own = OwnIdentity(authority)
    start = certs.utc_now().timestamp()
    fleet = Fleet(now=start)
    machine = fleet.wire.add("w1", not_after=start + 30 * DAY)
    fleet.membership.register("w1:50052", legacy=False)
    renewal = Renewal(authority, own, fleet.agents, fleet.leadership, clock=fleet.clock)
    yield Place(fleet, machine, authority, own, renewal, tmp_path)
    fleet.close()


def able(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Let the agent take part; the certificates it was given."""
    key = certs.new_key()
    given: list[bytes] = []
    connection = place.fleet.connection("w1")
    monkeypatch.setattr(connection, "create_certificate_request", lambda: (certs.make_csr(key, "anything"), 0.0))
    monkeypatch.setattr(connection, "install_certificate", lambda pem, ca: given.append(pem))
    return given


def later(place: Place, days: float) -> float:
    place.fleet.time[0] += days * DAY
    place.fleet.leadership.tick(place.fleet.now)
    return place.fleet.now


def test_an_agents_certificate_is_renewed_at_two_thirds_of_its_thirty_days(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = able(place, monkeypatch)
    place.renewal.tick(later(place, 19))
    assert given == []
    assert place.renewal.warnings() == []
    monkeypatch.setattr("fluxlib.pki.signer.utc_now", lambda: datetime.fromtimestamp(place.fleet.now, UTC))
    place.renewal.tick(later(place, 2))
    assert len(given) == 1
    assert place.renewal.warnings() == []
    place.renewal.tick(later(place, 8))
    assert len(given) == 1


def test_an_agent_that_is_away_is_warned_of_seven_days_before_its_certificate_ends(place: Place) -> None:
    place.machine.up = False
    later(place, 22)
    assert place.renewal.warnings() == []
    later(place, 2)
    (warning,) = place.renewal.warnings()
    assert warning.startswith("the certificate of agent w1 ends on ")


def test_a_certificate_of_an_earlier_version_that_lasts_a_year_is_replaced_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = able(place, monkeypatch)
    place.fleet.agents.set_certificate_end(place.fleet.state("w1"), place.fleet.now + 300 * DAY)
    place.renewal.tick(later(place, 0))
    assert len(given) == 1
    place.renewal.tick(later(place, 1))
    assert len(given) == 1


def test_certificates_that_cannot_be_read_any_more_are_a_warning(place: Place) -> None:
    path = place.authority._directory / "flux" / "flux.pem"
    path.unlink(missing_ok=True)
    path.mkdir()
    assert place.renewal.warnings() == [f"{path} cannot be read: Is a directory"]


def test_a_failure_is_told_with_its_reason_and_tried_again_after_a_while(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    connection = place.fleet.connection("w1")

    def refuse() -> bytes:
        asked.append(place.fleet.now)
        raise AgentRefused("the disk is full")

    monkeypatch.setattr(connection, "create_certificate_request", refuse)
    place.renewal.tick(later(place, 21))
    (warning,) = place.renewal.warnings()
    assert "w1" in warning
    assert "the disk is full" in warning
    place.renewal.tick(later(place, 1 / 1440))
    assert len(asked) == 1
    place.renewal.tick(later(place, 0.1))
    assert len(asked) == 2
    # A clock that was set back does not stretch the pause.
    place.renewal.tick(place.fleet.now - 4 * 3600)
    assert len(asked) == 3
    given = able(place, monkeypatch)
    place.renewal.tick(later(place, 0.1))
    assert len(given) == 1
    assert place.renewal.warnings() == []


def test_only_the_leader_renews_agents_and_nobody_renews_an_original(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = able(place, monkeypatch)
    place.fleet.time[0] += 21 * DAY  # and the lease with it
    place.renewal.tick(place.fleet.now)
    assert given == []
    place.fleet.leadership.tick(place.fleet.now)
    place.renewal.tick(place.fleet.now)
    assert len(given) == 1


def test_every_connection_is_reopened_under_a_new_certificate_of_flux(place: Place) -> None:
    place.renewal.tick(place.fleet.now)
    assert place.fleet.connection("w1").reopened == 0
    old = place.own.current()
    key = certs.new_key()
    authority = place.authority
    short = certs.sign(
        authority._signer._ca,
        authority._signer._ca_key,
        key.public_key(),
        "flux",
        ["flux"],
        timedelta(days=20),
        certs.utc_now(),
        certs.FLUX_USES,
    )
    (place.directory / "flux" / "flux-key.pem").write_bytes(certs.key_pem(key))
    (place.directory / "flux" / "flux.pem").write_bytes(certs.cert_pem(short))
    assert any("Flux's certificate" in warning for warning in place.renewal.warnings())
    place.renewal.tick(place.fleet.now)
    assert place.fleet.connection("w1").reopened == 1
    assert place.own.current().cert_pem not in (old.cert_pem, certs.cert_pem(short))
    assert place.renewal.warnings() == []


def test_the_authoritys_own_end_is_told(place: Place) -> None:
    place.fleet.time[0] += 3630 * DAY
    assert any("CA's certificate" in warning for warning in place.renewal.warnings())


@pytest.mark.parametrize(
    ("days", "said"), [(400, "400.0 days ahead of the agent's"), (-3, "3.0 days behind the agent's")]
)
def test_a_flux_whose_clock_is_wrong_renews_nothing_and_says_so(
    place: Place, monkeypatch: pytest.MonkeyPatch, days: float, said: str
) -> None:
    given = able(place, monkeypatch)
    connection = place.fleet.connection("w1")
    place.fleet.agents.set_certificate_end(place.fleet.state("w1"), place.fleet.now + 5 * DAY)
    right = place.fleet.now
    request, _ = connection.create_certificate_request()
    monkeypatch.setattr(connection, "create_certificate_request", lambda: (request, right))
    place.renewal.tick(later(place, days))
    assert given == []
    right_again = later(place, -days)
    assert any(said in warning for warning in place.renewal.warnings())
    place.fleet.leadership.tick(right_again + 20)
    place.renewal.tick(right_again)
    assert len(given) == 1


def test_what_is_renewed_under_a_wrong_clock_is_good_once_it_is_right(place: Place) -> None:
    """Also for an agent that does not say what its clock shows."""
    now = certs.utc_now()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluxlib.pki.signer.utc_now", lambda: now + timedelta(days=400))
        pem, _ = place.authority.sign_agent_csr(certs.make_csr(certs.new_key(), "w1"), "w1")
    certificate = x509.load_pem_x509_certificate(pem)
    assert certificate.not_valid_before_utc < now - timedelta(hours=12)
    assert certificate.not_valid_after_utc > now + timedelta(days=428)
