"""The stream to a real agent over mutual TLS: every answer once, whatever happens to the connection."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fluxlib.errors import AgentLost, AgentRefused, AgentUnreachable, Conflict, NotFound
from fluxlib.lifecycle import Deadline
from fluxlib.model import ErrorKind, ExecutionStatus
from tests.support.clients import Client, Side, running_timers
from tests.support.programs import Agent, Flux, make_zip, wait_until
from tests.support.proxy import Proxy


class Place:
    """A directory functions can walk to, Flux's certificates, and an agent."""

    def __init__(self, directory: Path, side: Side, agent: Agent, flux: Flux) -> None:
        self.directory, self.side, self.agent, self.flux = directory, side, agent, flux

    @contextmanager
    def watcher(self) -> Iterator[Client]:
        """Another Flux that looks at the same agent: a session of its own."""
        with running_timers() as timers, Side(self.flux.certs, timers, "watcher").connected(self.agent.address) as one:
            yield one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("stream")
    flux = Flux(directory)  # for its certificates only: it is never started
    with running_timers() as timers, Agent(directory, flux, "worker-1", detach_grace_sec=1) as agent:
        side = Side(flux.certs, timers)
        with side.connected(agent.address) as client:
            client.deploy()
            client.deploy(name="narrow", max_concurrency=1)
        yield Place(directory, side, agent, flux)


@pytest.fixture
def client(place: Place) -> Iterator[Client]:
    with place.side.connected(place.agent.address) as client:
        yield client


def test_output_is_bytes_and_the_record_is_whole(client: Client) -> None:
    record = client.run("s-bytes", "bytes")
    assert record.output == b"\xff\x00\xfe"
    assert (record.status, record.exit_code, record.agent_id) == (ExecutionStatus.SUCCESS, 0, "worker-1")
    assert client.run("s-args", "echo", "a b", "", "é").output == "[a b]\n[]\n[é]\n".encode()
    failed = client.run("s-exit", "exit", "7")
    assert (failed.error_kind, failed.exit_code) == (ErrorKind.EXIT_CODE, 7)


def test_standard_input_of_megabytes_arrives_and_large_output_comes_back_whole(client: Client) -> None:
    data = bytes(range(256)) * 4 * 4096  # 4 MiB: more than travels on the stream
    record = client.run("s-large", "cat", stdin=data + b"end")
    assert record.output == data + b"end"
    assert (record.truncated, record.output_bytes) == (False, len(data) + 3)
    # Asked for again it would be held as a whole for nothing: it is left out, to be read piece by piece.
    again = client.connection.record("s-large", with_output=True)
    assert again is not None
    assert (again.output, again.output_bytes) == (None, len(data) + 3)
    assert b"".join(client.connection.output("s-large", 0, follow=False)) == data + b"end"


def test_many_at_once_are_all_answered(client: Client) -> None:
    answers = [client.start(f"s-many-{number}", "echo", str(number)) for number in range(100)]
    assert [answer.record().output for answer in answers] == [f"[{number}]\n".encode() for number in range(100)]


def test_an_asynchronous_one_is_accepted_and_ends_by_an_event(client: Client) -> None:
    accepted = client.run("s-async", "sleep", "0.2", asynchronous=True)
    assert accepted.status is ExecutionStatus.RUNNING
    ended = client.told.ended("s-async")
    assert (ended.status, ended.output, ended.output_bytes) == (ExecutionStatus.SUCCESS, None, 8)


def test_cancel_returns_when_it_is_dead(client: Client) -> None:
    answer = client.start("s-cancel", "sleep", "60")
    wait_until(lambda: client.connection.record("s-cancel", with_output=False), "the run to be known")
    assert client.connection.cancel("s-cancel", reason="enough", timeout=10) is ExecutionStatus.CANCELLED
    assert answer.record(1).status is ExecutionStatus.CANCELLED
    assert client.connection.cancel("s-cancel", reason="again", timeout=10) is ExecutionStatus.CANCELLED
    assert client.connection.cancel("s-nobody", reason="x", timeout=10) is None


def test_a_cancel_does_not_overtake_its_execution(client: Client) -> None:
    answer = client.start("s-overtake", "sleep", "60")
    assert client.connection.cancel("s-overtake", reason="at once", timeout=10) is ExecutionStatus.CANCELLED
    assert answer.record(1).status is ExecutionStatus.CANCELLED


def test_refusals_start_nothing(client: Client) -> None:
    missing = client.run("s-missing", name="nobody")
    assert missing.error_kind is ErrorKind.NOT_FOUND
    assert missing.error_kind.nothing_started
    asynchronous = client.run("s-missing-async", name="nobody", asynchronous=True)
    assert asynchronous.error_kind is ErrorKind.NOT_FOUND
    huge = client.run("s-huge", "cat", stdin=bytes(51 << 20))
    assert huge.error_kind is ErrorKind.INVALID
    assert client.run("s-after-huge", "echo", "x").output == b"[x]\n"


def test_full_is_told_before_the_refusal_and_freed_after_the_slot(client: Client) -> None:
    first = client.start("s-narrow-1", "sleep", "60", name="narrow")
    wait_until(lambda: client.connection.record("s-narrow-1", with_output=False), "the run to be known")
    refused = client.run("s-narrow-2", "echo", name="narrow")
    assert refused.error_kind is ErrorKind.AT_CAPACITY
    names = [name for name, _ in client.told.said]
    assert names.index("full") < names.index("answer")
    assert "freed" not in names
    client.connection.cancel("s-narrow-1", reason="room", timeout=10)
    assert first.record().status is ExecutionStatus.CANCELLED
    assert client.told.wait(lambda name, _: name == "freed", "a free slot") == "narrow"
    assert client.run("s-narrow-3", "echo", name="narrow").status is ExecutionStatus.SUCCESS


def test_an_id_under_way_is_not_taken_twice(client: Client) -> None:
    first = client.start("s-twice", "sleep", "0.5")
    assert isinstance(client.start("s-twice", "sleep", "0.5").get(), Conflict)
    assert first.record().status is ExecutionStatus.SUCCESS


def test_output_is_followed_as_it_grows(client: Client) -> None:
    answer = client.start("s-drip", "drip")
    wait_until(lambda: client.connection.record("s-drip", with_output=False), "the run to be known")
    pieces = list(client.connection.output("s-drip", 0, follow=True))
    assert b"".join(pieces) == b"one\ntwo\nthree\n"
    assert len(pieces) == 3
    answer.record()
    for follow in (False, True):
        assert b"".join(client.connection.output("s-drip", 4, follow=follow)) == b"two\nthree\n"
    record = client.connection.record("s-drip", with_output=True)
    assert record is not None
    assert record.output == b"one\ntwo\nthree\n"
    with pytest.raises(NotFound):
        client.connection.output("s-nobody", 0, follow=True)
    assert client.connection.record("s-nobody", with_output=True) is None


def test_a_follower_that_closes_gets_no_error(client: Client) -> None:
    client.start("s-follow", "sleep", "60")
    wait_until(lambda: client.connection.record("s-follow", with_output=False), "the run to be known")
    stream = client.connection.output("s-follow", 0, follow=True)
    reader = iter(stream)
    assert next(reader) == b"started\n"
    stream.close()
    assert list(reader) == []
    client.connection.cancel("s-follow", reason="done", timeout=10)


def test_functions_come_and_go(client: Client) -> None:
    client.deploy(name="brief")
    assert "brief" in {state.name for state in client.connection.inventory().functions}  # type: ignore[union-attr]
    assert client.connection.remove_function("brief") is True
    assert "brief" not in {state.name for state in client.connection.inventory().functions}  # type: ignore[union-attr]
    with pytest.raises(AgentRefused, match="handler"):
        client.deploy(make_zip({"other.sh": "x"}), name="broken")


def test_reports_come_without_waiting(client: Client) -> None:
    box: list[object] = []
    arrived = threading.Event()
    client.connection.report_async(lambda report: (box.append(report), arrived.set()))  # type: ignore[func-returns-value]
    assert arrived.wait(10)
    assert box[0].agent_id == "worker-1"  # type: ignore[attr-defined]


def test_closing_waits_for_what_runs_then_gives_it_up(place: Place) -> None:
    with place.side.connected(place.agent.address) as client:
        quick, slow = client.start("s-close-1", "sleep", "0.3"), client.start("s-close-2", "sleep", "60")
        client.connection.close(Deadline(1.5))
        assert quick.record(0).status is ExecutionStatus.SUCCESS
        assert isinstance(slow.get(0), AgentLost)
        assert isinstance(client.start("s-close-3", "echo").get(0), AgentUnreachable)
        with pytest.raises(AgentUnreachable):
            client.connection.inventory()
    # A Flux that has vanished waits for nothing: the agent ends what only it wanted.
    with place.side.connected(place.agent.address) as client:

        def dead() -> bool:
            record = client.connection.record("s-close-2", with_output=False)
            return record is not None and record.status is ExecutionStatus.CANCELLED

        client.connection.cancel("s-close-2", reason="test over", timeout=10)
        wait_until(dead, "the abandoned run to be cancelled")


def test_giving_up_answers_everybody_once(client: Client) -> None:
    answer, later = client.start("s-fail", "sleep", "1"), client.start("s-fail-async", "sleep", "1", asynchronous=True)
    assert later.record().status is ExecutionStatus.RUNNING
    client.connection.fail_in_flight("three misses")
    lost = answer.get(1)
    assert isinstance(lost, AgentLost)
    assert "three misses" in lost.message
    # An accepted one goes on, and its end still arrives.
    assert client.told.ended("s-fail-async").status is ExecutionStatus.SUCCESS
    assert len(answer.answers) == 1


# -- connections that break ----------------------------------------------------------------


@pytest.fixture
def counted() -> Iterator[Path]:
    """A file that functions, whoever runs them, can append to."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        file = Path(directory) / "counted"
        file.touch()
        file.chmod(0o666)
        yield file


def test_a_broken_connection_loses_nothing_within_the_grace(place: Place, counted: Path) -> None:
    with Proxy(place.agent.port) as proxy, place.side.connected(proxy.address) as client:
        answers = [client.start(f"s-cut-{number}", "count", str(counted), "0.7") for number in range(5)]
        later = client.start("s-cut-async", "sleep", "0.7", asynchronous=True)
        wait_until(lambda: counted.read_text().count("run") == 5, "all to run")
        assert later.record().status is ExecutionStatus.RUNNING
        proxy.cut()
        client.told.attached(times=2)
        assert [answer.record().output for answer in answers] == [b"done\n"] * 5
        assert client.told.ended("s-cut-async").status is ExecutionStatus.SUCCESS
        assert counted.read_text().count("run") == 5
        assert all(len(answer.answers) == 1 for answer in answers)


def test_answers_that_came_while_the_connection_was_away_are_delivered(place: Place) -> None:
    with (
        place.watcher() as watcher,
        Proxy(place.agent.port) as proxy,
        place.side.connected(proxy.address) as client,
    ):
        answer = client.start("s-away", "sleep", "0.3")
        wait_until(lambda: watcher.connection.record("s-away", with_output=False), "the run to be known")
        proxy.away()

        def ended() -> bool:
            record = watcher.connection.record("s-away", with_output=False)
            return record is not None and record.status.ended

        wait_until(ended, "the run to end")
        assert not answer.arrived
        proxy.back()
        assert answer.record().output == b"started\n"


def test_beyond_the_grace_sync_runs_are_lost_and_async_ones_go_on(place: Place) -> None:
    with (
        place.watcher() as watcher,
        Proxy(place.agent.port) as proxy,
        place.side.connected(proxy.address) as client,
    ):
        sync = client.start("s-grace-sync", "sleep", "60")
        long = client.start("s-grace-long", "sleep", "3", asynchronous=True)
        short = client.start("s-grace-short", "sleep", "0.3", asynchronous=True)
        assert long.record().status is short.record().status is ExecutionStatus.RUNNING
        proxy.away()
        client.told.detached()

        def cancelled() -> bool:
            record = watcher.connection.record("s-grace-sync", with_output=False)
            return record is not None and record.status.ended

        wait_until(cancelled, "the agent to give the session up")
        proxy.back()
        client.told.attached(times=2)
        assert isinstance(sync.get(), AgentLost)
        # What ended while nobody listened has to be asked for; what still runs (on a quick machine) is told.
        client.told.missing("s-grace-short")
        client.told.ended_or_missing("s-grace-long")
        for execution_id in ("s-grace-short", "s-grace-long"):
            record = client.connection.record(execution_id, with_output=False)
            assert record is not None
            assert record.status is ExecutionStatus.SUCCESS


def test_while_away_nothing_is_taken(place: Place) -> None:
    with Proxy(place.agent.port) as proxy, place.side.connected(proxy.address) as client:
        proxy.away()
        client.told.detached()
        assert isinstance(client.start("s-never", "echo").get(0), AgentUnreachable)

        def unreachable() -> bool:
            try:
                client.connection.cancel("s-never", reason="x", timeout=1)
            except AgentLost:  # the channel has yet to notice: a call on a socket that just closed may have been sent
                return False
            except AgentUnreachable:
                return True
            raise AssertionError("somebody took it")

        wait_until(unreachable, "the channel to notice")
        proxy.back()
        client.told.attached(times=2)
        assert client.connection.record("s-never", with_output=False) is None


def test_a_new_channel_disturbs_nothing(place: Place) -> None:
    # An agent of its own, with the usual grace: on a busy machine a handshake may take longer than the others' second.
    with (
        Agent(place.directory, place.flux, "reopened") as agent,
        place.side.connected(agent.address) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        client.deploy()
        slow = client.start("s-reopen-slow", "sleep", "1")
        stop = threading.Event()

        def keep_running(thread: int) -> int:
            count = 0
            while not stop.is_set():
                assert client.run(f"s-reopen-{thread}-{count}", "echo", "x").output == b"[x]\n"
                count += 1
            return count

        def keep_asking() -> int:
            count = 0
            while not stop.is_set():
                client.connection.inventory()
                count += 1
            return count

        runs = [pool.submit(keep_running, thread) for thread in range(6)] + [pool.submit(keep_asking)]
        for _ in range(6):
            client.connection.reopen()
        assert slow.record().status is ExecutionStatus.SUCCESS
        stop.set()
        assert all(run.result(20) > 0 for run in runs)
        assert ("attached", False) not in client.told.said


# -- an agent that dies --------------------------------------------------------------------


def test_an_agent_killed_and_started_again(place: Place) -> None:
    agent = Agent(place.directory, place.flux, "mortal")
    with agent, place.side.connected(agent.address) as client:
        client.deploy()
        sync = client.start("s-killed", "sleep", "60")
        later = client.start("s-killed-async", "sleep", "60", asynchronous=True)
        assert later.record().status is ExecutionStatus.RUNNING
        agent.kill()
        assert isinstance(sync.get(10), AgentLost)
        client.told.detached()
        box: list[object] = []
        arrived = threading.Event()
        client.connection.report_async(lambda report: (box.append(report), arrived.set()))  # type: ignore[func-returns-value]
        assert arrived.wait(10)
        assert isinstance(box[0], AgentUnreachable)
        agent.start()
        client.told.attached(times=2)
        client.told.missing("s-killed-async")
        ended = client.connection.record("s-killed-async", with_output=False)
        # The kill may have come before its record reached the agent's disk.
        assert ended is None or ended.error_kind is ErrorKind.AGENT_STOPPED
        assert client.run("s-alive", "echo", "again").output == b"[again]\n"


def test_an_agent_that_stops_says_so_and_answers_first(place: Place) -> None:
    with Agent(place.directory, place.flux, "leaving") as agent, place.side.connected(agent.address) as client:
        client.deploy()
        answer = client.start("s-leaving", "sleep", "1")
        wait_until(lambda: client.connection.record("s-leaving", with_output=False), "the run to be known")
        assert agent.stop() == 0
        assert answer.record(1).status is ExecutionStatus.SUCCESS
        assert ("stopping", None) in client.told.said


def test_renewing_an_agents_certificate(place: Place) -> None:
    assert place.side.authority is not None
    with Agent(place.directory, place.flux, "renewed") as agent, place.side.connected(agent.address) as client:
        request, now = client.connection.create_certificate_request()
        assert now == pytest.approx(time.time(), abs=60)
        certificate, not_after = place.side.authority.sign_agent_csr(request, "renewed")
        client.connection.install_certificate(certificate, place.side.authority.ca_pem)
        client.connection.reopen()
        told = client.connection.inventory()
        assert told is not None
        assert told.certificate_not_after == pytest.approx(not_after, abs=1)
        stranger, _ = place.side.authority.sign_agent_csr(request, "somebody-else")
        with pytest.raises(AgentRefused):
            client.connection.install_certificate(stranger, place.side.authority.ca_pem)
