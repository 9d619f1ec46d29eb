"""The running table: slots, IDs that run once, and everything that can happen between two of its steps."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxlib.agent.executor.base import Exit
from fluxlib.errors import CannotStart, InvalidInput, Stopping, StoreUnavailable
from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus, FunctionSpec
from fluxlib.store.records_sqlite import SqliteRecordStore
from tests.agent.fakes import OK, Ends, FakeJob, Rooms, asked, rooms
from tests.support.memory_records import MemoryRecordStore


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Rooms]:
    with rooms(tmp_path) as made:
        made.deploy(max_concurrency=2)
        yield made


def test_a_run_from_its_start_to_its_record(agent: Rooms) -> None:
    ends = Ends()
    record, accepted = agent.runs.start(asked(args=("a", "b")), ends)
    assert (accepted, record.status) == (True, ExecutionStatus.RUNNING)
    job = agent.executor.jobs[0]
    assert job.job.argv[0].endswith("/main.sh")
    assert job.job.argv[1:] == ("a", "b")
    assert job.job.env["FLUX_EXECUTION_ID"] == "one"
    assert job.job.env["FLUX_FUNCTION_NAME"] == "hello"
    job.write(b"so far")
    running = agent.records.get("one")
    assert running is not None
    assert (running.output, running.status) == (b"so far", ExecutionStatus.RUNNING)
    job.end(Exit(exit_code=3, cpu_seconds=0.5))
    ended = ends.wait()
    assert (ended.status, ended.error, ended.exit_code, ended.output) == ("failed", "exit code 3", 3, b"so far")
    assert ended.cpu_seconds == 0.5
    assert ended.run_started_at >= ended.started_at > 0
    assert agent.runs.active == 0
    assert agent.records.get("one") == ended


def test_an_end_before_start_returns(agent: Rooms) -> None:
    agent.executor.during_start = lambda job: job.end(OK)
    ends = Ends()
    _, accepted = agent.runs.start(asked(), ends)
    assert accepted
    assert [record.status for record in ends.records] == ["success"]
    assert agent.runs.active == 0
    assert agent.runs.open_ids() == ()


def test_an_answer_on_its_way_is_still_to_be_expected(agent: Rooms) -> None:
    # Else a stream that attaches at this moment would be told that nobody knows the execution.
    seen: list[tuple[bool, bool, bool]] = []

    def ended(record: ExecutionRecord) -> None:
        runs = agent.runs
        seen.append((record.execution_id in runs.expected_by("a"), bool(runs.expected_by("b")), bool(runs.open_ids())))

    agent.runs.start(asked(), ended, "a")
    assert agent.runs.expected_by("b") == ("one",)
    agent.executor.jobs[0].end()
    assert seen == [(True, False, False)]
    assert agent.runs.expected_by("a") == ()


def test_the_same_id_twice_at_once_runs_once(agent: Rooms) -> None:
    first, second = Ends(), Ends()
    agent.runs.start(asked(), first)
    record, accepted = agent.runs.start(asked(), second)
    assert accepted
    assert not record.status.ended
    assert len(agent.executor.jobs) == 1
    agent.executor.jobs[0].end()
    assert first.wait() == second.wait()


def test_the_same_id_is_answered_even_when_all_slots_are_taken(agent: Rooms) -> None:
    # "At capacity" would make Flux offer it to another agent: a second run.
    agent.runs.start(asked("one"), Ends())
    agent.runs.start(asked("two"), Ends())
    assert agent.runs.start(asked("one"), Ends())[1]


def test_the_same_id_after_its_end_is_answered_from_the_record(agent: Rooms) -> None:
    agent.runs.start(asked(), Ends())
    agent.executor.jobs[0].write(b"said")
    agent.executor.jobs[0].end()
    again = Ends()
    record, accepted = agent.runs.start(asked(), again)
    assert accepted
    assert record.status is ExecutionStatus.SUCCESS
    assert again.wait().output == b"said"
    assert len(agent.executor.jobs) == 1


def test_the_same_id_after_a_restart_of_the_agent_is_not_run_again(tmp_path: Path) -> None:
    with rooms(tmp_path, SqliteRecordStore(tmp_path / "agent.db")) as first:
        first.deploy()
        first.runs.start(asked("ended"), Ends())
        first.executor.jobs[0].end()
        first.runs.start(asked("running"), Ends())
        first.records.flush()
        crashed = SqliteRecordStore(tmp_path / "agent.db")
        with rooms(tmp_path, crashed) as second:
            assert second.records.unfinished() == ["running"]
            assert second.records.end_previous_run(time.time(), "restarted") == 1
            for execution_id, status, kind in (
                ("ended", "success", ErrorKind.NONE),
                ("running", "failed", ErrorKind.AGENT_STOPPED),
            ):
                ends = Ends()
                _, accepted = second.runs.start(asked(execution_id), ends)
                assert accepted
                assert (ends.wait().status, ends.wait().error_kind) == (status, kind)
            assert second.executor.jobs == []


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Stopping("going"), ErrorKind.STOPPING),
        (InvalidInput("too large"), ErrorKind.INVALID),
        (OSError(24, "Too many open files"), ErrorKind.MACHINE_FAULT),
        (CannotStart("cgroup: No space left on device"), ErrorKind.MACHINE_FAULT),
        (RuntimeError("a fault of ours"), ErrorKind.INTERNAL),
    ],
)
def test_a_refusal_after_the_record_was_begun_leaves_nothing(agent: Rooms, error: Exception, kind: ErrorKind) -> None:
    def refuse(job: FakeJob) -> None:
        raise error

    agent.executor.during_start = refuse
    ends = Ends()
    record, accepted = agent.runs.start(asked(), ends)
    assert (accepted, record.status, record.error_kind) == (False, ExecutionStatus.FAILED, kind)
    assert ends.records == []
    assert agent.runs.active == 0
    assert agent.runs.open_ids() == ()
    assert agent.store.unfinished() == []
    if kind.nothing_started:
        # It may be asked for again, here too, and then it runs.
        agent.executor.during_start = lambda job: None
        assert agent.records.get("one") is None
        assert agent.runs.start(asked(), ends)[1]
        agent.executor.jobs[0].end()
        assert ends.wait().status is ExecutionStatus.SUCCESS


def test_refusals_name_their_kind(agent: Rooms, tmp_path: Path) -> None:
    agent.packages.register(FunctionSpec(name="bare", handler="x"), "digest")
    cases = {
        ErrorKind.NOT_FOUND: asked(name="nobody"),
        ErrorKind.NO_CODE: asked(name="bare"),
        ErrorKind.INVALID: asked("../../outside"),
    }
    for kind, request in cases.items():
        record, accepted = agent.runs.start(request, Ends())
        assert (accepted, record.error_kind) == (False, kind)
        assert kind.nothing_started
    assert agent.runs.start(asked(name="nobody"), Ends())[0].error == "function not found"


def test_capacity_of_a_function_and_of_the_agent(tmp_path: Path) -> None:
    with rooms(tmp_path, max_tasks=3) as agent:
        agent.deploy("narrow", max_concurrency=1)
        agent.deploy("wide", max_concurrency=10)
        freed: list[str] = []
        agent.runs.on_freed(freed.append)
        assert agent.runs.start(asked("a", "narrow"), Ends())[1]
        record, accepted = agent.runs.start(asked("b", "narrow"), Ends())
        assert (accepted, record.error_kind) == (False, ErrorKind.AT_CAPACITY)
        assert record.error == "function narrow at capacity"
        assert agent.runs.start(asked("c", "wide"), Ends())[1]
        assert agent.runs.start(asked("d", "wide"), Ends())[1]
        assert not agent.runs.has_capacity("wide")
        assert agent.runs.start(asked("e", "wide"), Ends())[0].error_kind is ErrorKind.AT_CAPACITY
        agent.executor.jobs[0].end()
        assert freed == ["narrow"]
        assert agent.runs.has_capacity("wide")
        assert agent.runs.start(asked("b", "narrow"), Ends())[1]


def test_a_slot_is_free_when_the_end_is_told(agent: Rooms) -> None:
    seen: list[int] = []
    agent.runs.start(asked(), lambda record: seen.append(agent.runs.active))
    agent.executor.jobs[0].end()
    assert seen == [0]


# -- cancelling --------------------------------------------------------------------


def test_cancel_asks_then_kills_and_tells_the_end(agent: Rooms) -> None:
    agent.runs.start(asked(), Ends())
    job = agent.executor.jobs[0]
    job.dies_of = "kill"
    dead = Ends()
    now = agent.runs.cancel("one", "enough", dead)
    assert now is not None
    assert not now.status.ended
    ended = dead.wait()
    assert job.told == ["terminate", "kill"]
    assert (ended.status, ended.error) == (ExecutionStatus.CANCELLED, "enough")


def test_a_cancel_between_acceptance_and_launch_is_not_lost(agent: Rooms) -> None:
    dead = Ends()

    def cancel(spec: FunctionSpec) -> None:
        now = agent.runs.cancel("one", "changed my mind", dead)
        assert now is not None
        assert not now.status.ended

    agent.executor.during_check = cancel
    ends = Ends()
    agent.executor.during_start = lambda job: setattr(job, "dies_of", "terminate")
    agent.runs.start(asked(), ends)
    assert ends.wait().status is ExecutionStatus.CANCELLED
    assert dead.wait() == ends.wait()


def test_a_cancel_of_one_that_is_refused_after_all_is_answered(agent: Rooms) -> None:
    dead = Ends()
    agent.executor.during_check = lambda spec: agent.runs.cancel("one", "x", dead) and None

    def refuse(job: FakeJob) -> None:
        raise Stopping("going")

    agent.executor.during_start = refuse
    agent.runs.start(asked(), Ends())
    assert dead.wait().error_kind is ErrorKind.STOPPING


def test_a_cancel_while_the_end_is_written_is_answered(tmp_path: Path) -> None:
    dead = Ends()

    with rooms(tmp_path) as made:
        made.deploy()
        made.runs.start(asked(), Ends())
        end = made.records.end

        def cancelled_meanwhile(record: ExecutionRecord) -> ExecutionRecord:
            made.runs.cancel("one", "too late", dead)
            return end(record)

        made.records.end = cancelled_meanwhile  # type: ignore[method-assign]
        made.executor.jobs[0].end()
        assert dead.wait().status is ExecutionStatus.SUCCESS


def test_cancel_of_the_unknown_and_of_the_ended(agent: Rooms) -> None:
    assert agent.runs.cancel("nobody", "x") is None
    agent.runs.start(asked(), Ends())
    agent.executor.jobs[0].end()
    ended, dead = agent.runs.cancel("one", "x", lambda record: pytest.fail("nothing was cancelled")), Ends()
    assert ended is not None
    assert ended.status is ExecutionStatus.SUCCESS
    assert dead.records == []


def test_a_timeout_of_the_call_below_the_functions(tmp_path: Path) -> None:
    with rooms(tmp_path) as agent:
        agent.deploy(timeout_seconds=3600)
        agent.executor.during_start = lambda job: setattr(job, "dies_of", "terminate")
        ends = Ends()
        agent.runs.start(asked(timeout_seconds=0.05), ends)
        assert ends.wait().error_kind is ErrorKind.TIMEOUT
        assert ends.wait().error == "execution timed out after 0.05s"


# -- owners ------------------------------------------------------------------------


def test_a_vanished_owner_takes_its_sync_runs_with_it(agent: Rooms) -> None:
    sync, async_, other = Ends(), Ends(), Ends()
    agent.deploy(max_concurrency=5)
    agent.executor.during_start = lambda job: setattr(job, "dies_of", "terminate")
    agent.runs.start(asked("sync"), sync, "flux-a")
    agent.runs.start(asked("async", asynchronous=True), async_, "flux-a")
    agent.runs.start(asked("other"), other, "flux-b")
    assert agent.runs.cancel_owned("flux-a", "vanished") == 1
    assert sync.wait().status is ExecutionStatus.CANCELLED
    assert set(agent.runs.open_ids()) == {"async", "other"}
    agent.runs.detach_owner("flux-a")
    back = Ends()
    agent.runs.reattach_owner("flux-a", lambda asynchronous: back)
    agent.runs.reattach_owner("flux-a", lambda asynchronous: pytest.fail("twice"))
    for job in agent.executor.jobs:
        job.end()
    assert async_.records == []
    assert back.wait().execution_id == "async"
    assert other.wait().status is ExecutionStatus.SUCCESS


# -- when something breaks -----------------------------------------------------------


def test_one_failing_listener_holds_up_nobody(agent: Rooms) -> None:
    def fail(anything: object) -> None:
        raise RuntimeError("a bug")

    ends = Ends()
    agent.runs.on_freed(fail)
    agent.runs.start(asked(), fail)
    agent.runs.start(asked(), ends)
    agent.executor.jobs[0].end()
    assert ends.wait().status is ExecutionStatus.SUCCESS
    assert agent.runs.active == 0


class Away(MemoryRecordStore):
    """Goes away for writes when told so."""

    away = False

    def begin(self, record: ExecutionRecord) -> None:
        self._check()
        super().begin(record)

    def end(self, record: ExecutionRecord, output: bytes | None, keep_until: float) -> None:
        self._check()
        super().end(record, output, keep_until)

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("away")


def test_a_store_that_goes_away_loses_no_answer(tmp_path: Path) -> None:
    store = Away()
    with rooms(tmp_path, store) as agent:
        agent.deploy()
        ends = Ends()
        agent.runs.start(asked(), ends)
        agent.executor.jobs[0].write(b"said")
        store.away = True
        agent.executor.jobs[0].end()
        assert (ends.wait().status, ends.wait().output) == (ExecutionStatus.SUCCESS, b"said")
        # Still known, although the store never heard of its end: not run again either.
        assert agent.records.get("one") == ends.wait()
        again = Ends()
        assert agent.runs.start(asked(), again)[1]
        assert again.wait().output == b"said"
        agent.records.flush()
        assert agent.records.get("one") == ends.wait()
        assert agent.runs.start(asked("two"), Ends())[1]
        agent.executor.jobs[1].end()
        assert agent.runs.active == 0


def test_an_id_that_cannot_be_looked_up_is_not_run(tmp_path: Path) -> None:
    class Gone(MemoryRecordStore):
        def record(self, execution_id: str) -> ExecutionRecord | None:
            raise StoreUnavailable("away")

    with rooms(tmp_path, Gone()) as agent:
        agent.deploy()
        record, accepted = agent.runs.start(asked(), Ends())
        assert (accepted, record.error_kind) == (False, ErrorKind.MACHINE_FAULT)
        assert agent.executor.jobs == []
        assert agent.runs.open_ids() == ()


# -- stopping ----------------------------------------------------------------------


def test_stop_waits_then_kills_and_refuses_meanwhile(agent: Rooms) -> None:
    ends = Ends()
    agent.executor.during_start = lambda job: setattr(job, "dies_of", "kill")
    agent.runs.start(asked(), ends)
    now = time.monotonic()
    agent.runs.stop(now + 0.05, now + 10)
    assert (ends.wait().error_kind, ends.wait().error) == (ErrorKind.AGENT_STOPPED, "agent stopped")
    assert agent.executor.jobs[0].told == ["kill"]
    assert agent.runs.start(asked("late"), Ends())[0].error_kind is ErrorKind.STOPPING


def test_stop_returns_as_soon_as_nothing_runs(agent: Rooms) -> None:
    agent.runs.start(asked(), Ends())
    stopping = threading.Thread(target=agent.runs.stop, args=(time.monotonic() + 60, time.monotonic() + 60))
    stopping.start()
    agent.executor.jobs[0].end()
    stopping.join(5)
    assert not stopping.is_alive()


def test_stop_reaches_one_that_is_just_being_launched(agent: Rooms) -> None:
    launched, go = threading.Event(), threading.Event()
    ends = Ends()

    def hold(job: FakeJob) -> None:
        # It is given no grace: an agent that stops has waited before.
        job.dies_of = "kill"
        launched.set()
        assert go.wait(5)

    agent.executor.during_start = hold
    starting = threading.Thread(target=agent.runs.start, args=(asked(), ends))
    starting.start()
    assert launched.wait(5)
    stopping = threading.Thread(target=agent.runs.stop, args=(time.monotonic(), time.monotonic() + 10))
    stopping.start()
    go.set()
    assert ends.wait().error_kind is ErrorKind.AGENT_STOPPED
    for thread in (starting, stopping):
        thread.join(5)


# -- all of it at once ---------------------------------------------------------------


def test_many_threads_never_exceed_a_limit_and_are_all_answered_once(tmp_path: Path) -> None:
    with rooms(tmp_path, max_tasks=5) as agent:
        agent.deploy(max_concurrency=3)
        agent.deploy("other", max_concurrency=4)
        running: Counter[str] = Counter()
        most: Counter[str] = Counter()
        lock = threading.Lock()

        def count(job: FakeJob) -> None:
            name = job.job.env["FLUX_FUNCTION_NAME"]
            with lock:
                running[name] += 1
                running["all"] += 1
                for key in (name, "all"):
                    most[key] = max(most[key], running[key])

        agent.executor.during_start = count
        answers: Counter[str] = Counter()

        def work(number: int) -> None:
            for turn in range(150):
                name = "hello" if (turn + number) % 2 else "other"
                execution_id = f"{turn}-{number // 2}"  # two threads ask for each
                ends = Ends()
                _, accepted = agent.runs.start(asked(execution_id, name), ends)
                with lock:
                    mine = [job for job in agent.executor.jobs if job.job.execution_id == execution_id]
                for job in mine:
                    with lock:
                        if not job.told:
                            job.told.append("ended")
                            running[job.job.env["FLUX_FUNCTION_NAME"]] -= 1
                            running["all"] -= 1
                    job.end()
                if accepted:
                    ends.wait()
                    with lock:
                        answers[execution_id] += len(ends.records)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert most["hello"] <= 3
        assert most["other"] <= 4
        assert most["all"] <= 5
        ran = Counter(job.job.execution_id for job in agent.executor.jobs)
        assert max(ran.values()) == 1
        assert set(answers.values()) <= {1, 2}
        assert agent.runs.active == 0
        assert agent.runs.open_ids() == ()
