"""What one Flux is pending: frames of bearable size, nothing lost, memory bounded when it does not fetch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fluxlib.agent.health import StallDetector
from fluxlib.agent.sessions import _PENDING_BYTES, PendingReply, Session, Sessions
from fluxlib.lifecycle import Timer, Timers
from fluxlib.model import ExecutionRecord, ExecutionStatus
from fluxlib.rpc.gen import flux_pb2 as pb
from tests.agent.fakes import Ends, asked, rooms

Fetch = Callable[[ExecutionRecord], ExecutionRecord]


def final(name: str, output: bytes | None = b"x", size: int | None = None) -> PendingReply:
    record = ExecutionRecord(name, "hello", status=ExecutionStatus.SUCCESS, output=output, exit_code=0)
    return PendingReply(
        replace(record, output_bytes=len(output or b"") if size is None else size), True, with_output=True
    )


def session(fetch: Fetch = lambda record: record) -> Session:
    made = Session("s", fetch, lambda: 0)
    made.generation = 1
    return made


def frame(one: Session) -> pb.AgentFrame:
    made = one.next_frame(1)
    assert made is not None
    return made


def test_frames_batch_and_large_outputs_travel_alone() -> None:
    one = session()
    for number in range(100):
        one.answer(final(f"small-{number}"))
    one.answer(final("large", b"y" * 3_000_000))
    one.answer(final("after"))
    sizes = [[answer.execution_id for answer in frame(one).executed] for _ in range(4)]
    assert [len(names) for names in sizes] == [64, 36, 1, 1]
    assert sizes[2:] == [["large"], ["after"]]


def test_an_output_in_a_file_is_fetched_only_for_its_frame() -> None:
    fetched: list[str] = []

    def fetch(record: ExecutionRecord) -> ExecutionRecord:
        fetched.append(record.execution_id)
        return replace(record, output=b"z" * record.output_bytes)

    one = session(fetch)
    for number in range(3):
        one.answer(final(str(number), None, size=2_000_000))
    assert fetched == []
    assert not one.backlog_full
    assert len(frame(one).executed[0].response.output) == 2_000_000
    assert fetched == ["0"]


def test_what_is_not_fetched_is_bounded() -> None:
    one = session()
    number = 0
    while not one.backlog_full:
        one.answer(final(str(number), b"x" * 60_000))
        number += 1
    assert number <= _PENDING_BYTES // 60_000 + 1
    one.acknowledge([str(known) for known in range(number)])
    assert not one.backlog_full
    assert one._pending_bytes == 0


def test_resuming_sends_again_what_was_not_acknowledged_and_nothing_twice() -> None:
    one = session()
    for name in ("sent", "acknowledged"):
        one.answer(final(name))
    frame(one)
    one.acknowledge(["acknowledged", "unheard of"])
    one.answer(final("waiting"))
    with one.condition:
        assert sorted(one.resume()) == ["sent", "waiting"]
    assert sorted(answer.execution_id for answer in frame(one).executed) == ["sent", "waiting"]


def test_a_stream_whose_time_is_over_gets_none() -> None:
    one = session()
    with one.condition:
        one.end_streams()
    one.answer(final("x"))
    assert one.next_frame(1) is None
    assert one.next_frame(2) is not None


def test_a_stream_that_flux_ends_brings_what_waits_first() -> None:
    one = session()
    one.freed(["a"])
    one.answer(final("x"))
    one.finish_stream(1)
    last = frame(one)
    assert (list(last.freed), [answer.execution_id for answer in last.executed]) == (["a"], ["x"])
    assert one.next_frame(1) is None
    with one.condition:
        one.end_streams()
    one.answer(final("y"))
    assert one.next_frame(2) is not None


def test_freed_and_stopping_ride_along_once() -> None:
    one = session()
    one.refused = {"a", "b"}
    one.freed(["a"])
    one.announce_stopping()
    first = frame(one)
    assert (list(first.freed), first.stopping) == (["a"], True)
    assert one.refused == {"b"}
    one.answer(final("x"))
    second = frame(one)
    assert (list(second.freed), second.stopping, len(second.executed)) == ([], False, 1)


class Recorded(Timers):
    """Timers that fire when the test says so."""

    def __init__(self) -> None:
        super().__init__("recorded")
        self.calls: list[Callable[[], object]] = []

    def after(self, seconds: float, call: Callable[[], object]) -> Timer:
        self.calls.append(call)
        return Timer(0.0, call, self)


def test_a_grace_that_ends_while_its_flux_is_back_takes_nothing_from_the_next(tmp_path: Path) -> None:
    timers = Recorded()
    with rooms(tmp_path) as place:
        place.deploy()
        sessions = Sessions(place.runs, timers, StallDetector(), "life", 1)

        def come_and_go() -> None:
            stream = sessions.serve(
                iter([pb.ControlFrame(hello=pb.ControlHello(session="s"))]), lambda: True, lambda: None
            )
            next(stream)
            stream.close()

        come_and_go()
        place.runs.start(asked(), Ends(), "s")
        come_and_go()
        first, second = timers.calls
        first()  # it was due when the Flux came back, and had to wait for that
        assert place.executor.jobs[0].told == []
        second()
        assert place.executor.jobs[0].told == ["terminate"]


def test_who_stood_still_starts_nothing_that_a_caller_waited_for_before(tmp_path: Path) -> None:
    now = 0.0
    with rooms(tmp_path) as place:
        place.deploy()
        sessions = Sessions(place.runs, Recorded(), StallDetector(lambda: now), "life", 1)
        name = asked().function_name
        calls = [
            pb.ExecutionRequest(function_name=name, execution_id="waited-for"),
            pb.ExecutionRequest(function_name=name, execution_id="accepted", **{"async": True}),
        ]
        frames = [pb.ControlFrame(hello=pb.ControlHello(session="s")), pb.ControlFrame(execute=calls)]
        now = 30.0
        stream = sessions.serve(iter(frames), lambda: True, lambda: None)
        next(stream)
        answers: dict[str, pb.ExecutionAnswer] = {}
        while len(answers) < 2:
            answers |= {one.execution_id: one for one in next(stream).executed}
        stream.close()
        assert answers["waited-for"].response.error_kind == pb.ERROR_KIND_STOPPING
        assert not answers["accepted"].response.error
        assert [job.job.execution_id for job in place.executor.jobs] == ["accepted"]
