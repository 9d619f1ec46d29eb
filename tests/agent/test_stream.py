"""The multiplexed stream over real sockets: batches, order, resending, vanished owners, freed slots."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fluxlib.agent.server import MAX_FOLLOWERS
from fluxlib.model import ExecutionStatus
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from tests.agent.running import Running, running
from tests.support.programs import wait_until
from tests.support.threads import none_left


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path, detach_grace_sec=1, max_tasks=40) as made:
        assert made.deploy().success
        yield made


class Stream:
    """One attached stream, its frames collected by a thread."""

    def __init__(self, agent: Running, session: str) -> None:
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._condition = threading.Condition()
        self.answers: list[Any] = []
        self.frames: list[Any] = []
        self.freed: set[str] = set()
        self.stopping = False
        self.over = False
        self.send(hello=pb.ControlHello(session=session))
        self._call = agent.stub.Attach(iter(self._out.get, None))
        self.greeting = next(self._call)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def send(self, **fields: Any) -> None:
        self._out.put(pb.ControlFrame(**fields))

    def execute(self, execution_id: str, *args: str, name: str = "hello", asynchronous: bool = False) -> None:
        request = pb.ExecutionRequest(function_name=name, args=args, execution_id=execution_id)
        setattr(request, "async", asynchronous)
        self.send(execute=[request])

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 10) -> Any:
        with self._condition:
            assert self._condition.wait_for(condition, seconds), f"{what}; so far {self.answers}"
            return condition()

    def final(self, execution_id: str) -> Any:
        found = [one for one in self.answers if one.execution_id == execution_id and one.final]
        return found[0] if found else None

    def wait_final(self, execution_id: str) -> Any:
        return self.wait(lambda: self.final(execution_id), f"no end of {execution_id}")

    def _read(self) -> None:
        try:
            for frame in self._call:
                with self._condition:
                    self.frames.append(frame)
                    self.answers.extend(frame.executed)
                    self.freed.update(frame.freed)
                    self.stopping |= frame.stopping
                    self._condition.notify_all()
        except grpc.RpcError:
            pass
        with self._condition:
            self.over = True
            self._condition.notify_all()

    def end_in_order(self) -> grpc.StatusCode:
        """As Flux does it, for another channel."""
        self._out.put(None)
        self._thread.join(10)
        return self._call.code()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._call.cancel()
        self._out.put(None)
        self._thread.join(10)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_many_executions_over_one_stream(agent: Running) -> None:
    with Stream(agent, "s") as stream:
        stream.send(
            execute=[
                pb.ExecutionRequest(function_name="hello", args=["say", str(number)], execution_id=f"e-{number}")
                for number in range(30)
            ]
        )
        stream.wait(lambda: len(stream.answers) == 30, "not all were answered", 30)
        outputs = {one.execution_id: one.response.output for one in stream.answers}
        assert outputs == {f"e-{number}": b"%d\n" % number for number in range(30)}
        assert agent.agent._executions.open_ids() == ()


def test_async_is_accepted_before_it_ends(agent: Running) -> None:
    with Stream(agent, "s") as stream:
        for number in range(20):
            stream.execute(f"a-{number}", "say", "x", asynchronous=True)
            stream.wait_final(f"a-{number}")
        for number in range(20):
            mine = [one.final for one in stream.answers if one.execution_id == f"a-{number}"]
            assert mine == [False, True]
        assert not any(one.response.output for one in stream.answers)


def test_unacknowledged_answers_come_again_and_acknowledged_ones_do_not(agent: Running) -> None:
    first = Stream(agent, "s")
    first.execute("kept", "say", "kept")
    first.execute("forgotten", "say", "forgotten")
    first.wait_final("kept")
    first.wait_final("forgotten")
    first.send(received=["forgotten"])
    first.execute("later", "sleep", "0.5")
    wait_until(lambda: agent.record("later"), "it to be taken")
    first.close()
    with Stream(agent, "s") as second:
        assert {"kept", "later"} <= set(second.greeting.known)
        assert second.wait_final("kept").response.output == b"kept\n"
        assert second.wait_final("later").response.output == b"started\n"
        assert second.final("forgotten") is None


def test_a_stream_ended_in_order_loses_nothing(agent: Running) -> None:
    agent.deploy("narrow", max_concurrency=1)
    with Stream(agent, "s") as first:
        first.execute("long", "sleep", "0.5", name="narrow")
        first.execute("refused", "say", "x", name="narrow")
        assert first.end_in_order() is grpc.StatusCode.OK
        assert first.final("refused").response.error == "function narrow at capacity"
    with Stream(agent, "s") as second:
        assert "long" in second.greeting.known
        assert second.wait_final("long").response.error == ""
        second.wait(lambda: "narrow" in second.freed, "the freed slot was not told")


def test_a_newer_stream_of_the_session_ends_the_older(agent: Running) -> None:
    with Stream(agent, "s") as older:
        older.execute("one", "sleep", "0.5")
        wait_until(lambda: agent.record("one"), "it to be taken")
        with Stream(agent, "s") as newer:
            older.wait(lambda: older.over, "the older stream goes on")
            assert newer.wait_final("one").response.error == ""


def test_what_a_vanished_flux_waited_for_is_cancelled_and_async_goes_on(agent: Running) -> None:
    stream = Stream(agent, "s")
    stream.execute("sync", "sleep", "60")
    stream.execute("async", "sleep", "2.5", asynchronous=True)
    wait_until(lambda: agent.record("sync") and agent.record("async"), "both to run")
    stream.close()
    assert agent.record("sync").status == "running", "the grace comes first"
    record = wait_until(lambda: (one := agent.record("sync")).status.ended and one, "it to be cancelled")
    assert (record.status, "vanished" in record.error) == ("cancelled", True)
    assert agent.record("async").status == "running"
    # It had only been away for long: it is told what still ran for it.
    with Stream(agent, "s") as back:
        assert "async" in back.greeting.known
        assert back.wait_final("async").response.error == ""


def test_a_freed_slot_is_told_to_who_was_refused(agent: Running) -> None:
    agent.deploy("narrow", max_concurrency=1)
    with Stream(agent, "s") as stream, Stream(agent, "other") as other:
        stream.execute("first", "sleep", "0.5", name="narrow")
        wait_until(lambda: agent.record("first"), "it to run")
        stream.execute("second", "say", "x", name="narrow")
        assert stream.wait_final("second").response.error == "function narrow at capacity"
        stream.wait(lambda: "narrow" in stream.freed, "the freed slot was not told")
        assert other.freed == set()
        stream.execute("second", "say", "x", name="narrow")
        stream.wait(lambda: [one for one in stream.answers if one.response.output == b"x\n"], "the second try")


def test_more_slots_are_told_without_anything_having_ended(agent: Running) -> None:
    agent.deploy("narrow", max_concurrency=1)
    with Stream(agent, "s") as stream:
        stream.execute("first", "sleep", "60", name="narrow")
        stream.execute("second", "say", "x", name="narrow")
        stream.wait_final("second")
        agent.deploy("narrow", max_concurrency=2)
        stream.wait(lambda: "narrow" in stream.freed, "the new slot was not told")


def test_cancels_over_the_stream(agent: Running) -> None:
    with Stream(agent, "s") as stream:
        stream.execute("one", "sleep", "60")
        wait_until(lambda: agent.record("one"), "it to run")
        for execution_id in ("one", "nobody"):
            stream.send(cancel=[pb.CancelExecutionRequest(execution_id=execution_id, reason="enough")])
        stream.wait(lambda: sum(len(frame.cancelled) for frame in stream.frames) == 2, "both answers")
        answers = {one.execution_id: one.response for frame in stream.frames for one in frame.cancelled}
        assert (answers["one"].success, answers["one"].status) == (True, "cancelled")
        assert answers["nobody"].message == "execution not found"
        assert stream.wait_final("one").response.error == "enough"


def test_a_cancel_that_fails_leaves_the_stream_to_the_others(agent: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(execution_id: str, *_: object) -> None:
        raise OSError(24, "Too many open files")

    with Stream(agent, "s") as stream:
        with monkeypatch.context() as patched:
            patched.setattr(agent.agent._executions, "cancel", cancel)
            stream.send(cancel=[pb.CancelExecutionRequest(execution_id="one")])
            stream.wait(lambda: any(frame.cancelled for frame in stream.frames), "the answer")
        answers = [one.response for frame in stream.frames for one in frame.cancelled]
        assert [(one.success, one.error_kind) for one in answers] == [(False, pb.ERROR_KIND_INTERNAL)]
        assert "Too many open files" in answers[0].message
        stream.execute("two")
        assert stream.wait_final("two").response.error == ""


def test_an_output_that_cannot_be_read_leaves_the_stream_to_the_others(agent: Running) -> None:
    with Stream(agent, "s") as stream:
        stream.execute("broken", "polite")
        stream.wait(lambda: agent.record("broken"), "begun")
        reading = agent.read("broken", follow=True)
        assert next(reading).data == b"started\n"
        reading.cancel()
        agent.agent._executions._records._open["broken"][1].append(b"x" * 100_000)
        path = agent.directory / "state/outputs/broken"
        path.rename(path.with_name("away"))
        path.mkdir()
        stream.send(cancel=[pb.CancelExecutionRequest(execution_id="broken")])
        answer = stream.wait_final("broken").response
        record = codec.record_from_json(answer.record, answer.output)
        assert (record.output, record.truncated) == (b"", True)
        assert record.warnings == ("its output cannot be read now: Is a directory",)
        stream.execute("next", "say", "hello")
        assert stream.wait_final("next").response.output == b"hello\n"
        path.rmdir()


def test_a_stream_that_no_thread_is_left_for_leaves_nothing_behind(
    agent: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Stream(agent, "s") as stream:
        stream.execute("waited-for", "sleep", "60")
        stream.wait(lambda: agent.record("waited-for"), "begun")
        with monkeypatch.context() as patched:
            none_left(patched, "attach-")
            again = agent.stub.Attach(iter([pb.ControlFrame(hello=pb.ControlHello(session="s"))]))
            with pytest.raises(grpc.RpcError):
                next(again)
    # Its Flux does not come again: after the grace, what only it waited for is cancelled all the same.
    wait_until(lambda: agent.record("waited-for").status.ended, "the end of a vanished Flux's execution", 10)
    assert agent.record("waited-for").status is ExecutionStatus.CANCELLED


def test_stopping_is_announced_and_refuses(tmp_path: Path) -> None:
    with running(tmp_path, shutdown_sec=30) as agent:
        agent.deploy()
        with Stream(agent, "s") as stream:
            stream.execute("one", "sleep", "60")
            wait_until(lambda: agent.record("one"), "it to run")
            stopping = threading.Thread(target=agent.agent.stop)
            stopping.start()
            stream.wait(lambda: stream.stopping, "it was not announced")
            stream.execute("late", "say", "x")
            assert stream.wait_final("late").response.error_kind == pb.ERROR_KIND_STOPPING
            # What ran is waited for, and its answer comes through.
            assert agent.cancel("one").success
            assert stream.wait_final("one").response.error == "cancelled"
            stream.wait(lambda: stream.over, "the stream was not ended")
            stopping.join(10)


def test_an_attach_without_a_session_is_ended(agent: Running) -> None:
    assert list(agent.stub.Attach(iter([pb.ControlFrame()]), timeout=10)) == []
    assert list(agent.stub.Attach(iter([]), timeout=10)) == []


def test_control_calls_answer_while_every_slot_and_every_reader_is_taken(agent: Running) -> None:
    calls = [
        agent.stub.ExecuteFunction.future(
            pb.ExecutionRequest(function_name="hello", args=["sleep", "60"], execution_id=f"full-{number}")
        )
        for number in range(40)
    ]
    wait_until(lambda: len(agent.agent._executions.open_ids()) == 40, "every slot to be taken")
    readers = [agent.read("full-0", follow=True) for _ in range(MAX_FOLLOWERS)]
    for reader in readers:
        assert next(reader).data == b"started\n"
    for call in (agent.stub.HealthCheck(pb.HealthCheckRequest(), timeout=3),):
        assert call.healthy
    assert agent.stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=3).active_tasks == 40
    assert agent.run("say", "x").error == "function hello at capacity"
    with pytest.raises(grpc.RpcError) as refused:
        next(agent.read("full-0", follow=True))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in calls:
        call.cancel()
    for reader in readers:
        reader.cancel()
    wait_until(lambda: agent.agent._executions.active == 0, "all to be cancelled")
    assert [piece.data for piece in agent.read("full-0")] == [b"started\n"]
