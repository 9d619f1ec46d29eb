"""Loops, timers, the order of stopping and signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fluxlib import lifecycle
from fluxlib.errors import StoreUnavailable
from fluxlib.lifecycle import Deadline, Loop, Parts, Timers
from fluxlib.pool import KeyedPool, Pool
from tests.support.programs import wait_until


@pytest.fixture
def timers() -> Iterator[Timers]:
    made = Timers("test-timers").start()
    yield made
    made.stop(Deadline(5))


class Body:
    """A loop's body that counts, and can be waited for."""

    def __init__(self, failing: int = 0, error: Callable[[str], Exception] = RuntimeError) -> None:
        self.calls: list[float] = []
        self._failing = failing
        self._error = error
        self._condition = threading.Condition()

    def __call__(self, now: float) -> None:
        with self._condition:
            self.calls.append(now)
            self._condition.notify_all()
            if len(self.calls) <= self._failing:
                raise self._error(f"crash {len(self.calls)}")

    def wait(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.calls) >= count, 10), self.calls


# -- loops ---------------------------------------------------------------------------


def test_a_loop_runs_at_once_and_when_woken() -> None:
    body = Body()
    loop = Loop("test", body, 3600).start()
    body.wait(1)
    assert abs(body.calls[0] - time.time()) < 10
    loop.wake()
    body.wait(2)
    loop.stop(Deadline(5))
    report = loop.report()
    assert (report.name, report.alive, report.crashes) == ("test", False, 0)
    loop.wake()
    assert len(body.calls) == 2


def test_a_crashed_loop_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_RESTART_PAUSE", 0.01)
    body = Body(failing=2)
    loop = Loop("test", body, 0.01).start()
    body.wait(4)
    report = loop.report()
    assert (report.alive, report.crashes, report.last_error) == (True, 2, "RuntimeError: crash 2")
    loop.stop(Deadline(5))


def test_an_expected_failure_is_one_line_in_the_log_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that is away for an hour must not fill the log with tracebacks."""
    monkeypatch.setattr(lifecycle, "_RESTART_PAUSE", 0.01)
    body = Body(failing=3, error=lambda text: StoreUnavailable("the store is away"))
    loop = Loop("test", body, 0.01).start()
    body.wait(5)
    report = loop.report()
    loop.stop(Deadline(5))
    assert (report.alive, report.crashes, report.last_error) == (True, 0, "the store is away")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.records[0].exc_info is None


def test_a_loop_may_stop_itself() -> None:
    done = threading.Event()

    def body(now: float) -> None:
        loop.stop(Deadline(5))
        done.set()

    loop = Loop("test", body, 0.01)
    loop.start()
    assert done.wait(5)
    loop.stop(Deadline(5))


def test_a_loop_that_hangs_holds_up_a_stop_only_until_the_deadline() -> None:
    go = threading.Event()
    loop = Loop("test", lambda now: go.wait(30), 1).start()
    began = time.monotonic()
    loop.stop(Deadline(0.05))
    assert time.monotonic() - began < 5
    go.set()


# -- timers --------------------------------------------------------------------------


def test_timers_fire_in_the_order_of_their_times(timers: Timers) -> None:
    order: list[str] = []
    done = threading.Event()
    timers.after(0.06, done.set)
    timers.after(0.04, lambda: order.append("second"))
    timers.after(0.02, lambda: order.append("first"))
    timers.after(0.03, lambda: order.append("cancelled")).cancel()
    assert done.wait(10)
    assert order == ["first", "second"]


def test_a_failing_timer_does_not_stop_the_others(timers: Timers) -> None:
    done = threading.Event()
    timers.after(0, lambda: 1 / 0)
    timers.after(0.01, done.set)
    assert done.wait(10)


def test_cancelling_late_and_twice_is_nothing(timers: Timers) -> None:
    done = threading.Event()
    timer = timers.after(0, done.set)
    assert done.wait(10)
    timer.cancel()
    timer.cancel()
    assert timer.cancelled


@pytest.mark.parametrize("longest", [threading.TIMEOUT_MAX * 2, float("inf")])
def test_a_timer_further_off_than_a_wait_may_be_does_not_stop_the_others(timers: Timers, longest: float) -> None:
    timers.after(longest, lambda: None)
    waiting = timers._condition._waiters  # type: ignore[attr-defined]
    wait_until(lambda: bool(waiting) or not timers._thread.is_alive(), "it waits for the first")
    done = threading.Event()
    timers.after(0.01, done.set)
    assert done.wait(10)


def test_cancelled_long_timeouts_do_not_pile_up(timers: Timers) -> None:
    kept = [timers.after(3600, lambda: None) for _ in range(10)]
    for _ in range(20_000):
        timers.after(3600, lambda: None).cancel()
    assert len(timers._heap) < 3_000
    assert not any(timer.cancelled for timer in kept)
    assert len([entry for entry in timers._heap if not entry[2].cancelled]) == 10


# -- stopping ------------------------------------------------------------------------


def test_parts_stop_in_reverse_and_one_failure_skips_nothing() -> None:
    order: list[str] = []
    parts = Parts()
    parts.add("store", lambda deadline: order.append("store"))
    parts.add("broken", lambda deadline: 1 / 0)
    parts.add("server", lambda deadline: order.append("server"))
    parts.stop(Deadline(5))
    assert order == ["server", "store"]
    parts.stop(Deadline(5))
    assert order == ["server", "store"]


def test_a_deadline_is_shared_and_never_negative() -> None:
    deadline = Deadline(0.01)
    assert 0 < deadline.remaining() <= 0.01
    lifecycle.pause(0.02)
    assert deadline.remaining() == 0


def test_a_signal_in_the_middle_of_waiting_is_not_lost() -> None:
    """The handler runs in the thread that waits, between any two of its instructions: also where a lock is held."""
    program = """
import os, random, signal, sys, threading
from fluxlib.lifecycle import StopSignal
sys.setswitchinterval(1e-5)
def send(turns):
    for _ in range(turns):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
for turn in range(2000):
    stop = StopSignal().install()
    sender = threading.Thread(target=send, args=(random.randrange(3000),))
    sender.start()
    stop.wait()
    sender.join()
print("all")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "all\n", done.stderr


# SIGHUP as a terminal has it: where nohup started the tests, their children would ignore it.
PROGRAM = """
import signal, sys, threading
signal.signal(signal.SIGHUP, HANGUP)
from fluxlib.lifecycle import StopSignal
stop = StopSignal().install()
print("up", flush=True)
stop.wait()
print("stopping", flush=True)
if sys.argv[1] == "quick":
    sys.exit(0)
threading.Event().wait()
"""


def _program(hangup: str) -> str:
    return PROGRAM.replace("HANGUP", f"signal.{hangup}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_one_signal_stops_in_order(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", _program("SIG_DFL"), "quick"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"stopping\n"
        assert process.wait(10) == 0


def test_a_closed_terminal_stops_nothing_that_nohup_started() -> None:
    process = subprocess.Popen([sys.executable, "-c", _program("SIG_IGN"), "quick"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGHUP)
        # Handled first if at all: a lower number comes before it.
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"stopping\n"
        assert process.wait(10) == 0


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", _program("SIG_DFL"), "slow"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(first)
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(second)
        assert process.wait(10) == -second


def test_a_pool_does_things_on_a_few_threads_and_outlives_failures() -> None:
    pool = Pool("crew", 2)
    together, done = threading.Barrier(2), threading.Semaphore(0)
    names: set[str] = set()

    def work(number: int) -> None:
        if number < 2:
            together.wait(10)
        names.add(threading.current_thread().name)
        done.release()
        if number == 2:
            raise ValueError("of no matter to the others")

    for number in range(6):
        assert pool.submit(work, number)
    for _ in range(6):
        assert done.acquire(timeout=10)
    assert names == {"crew-0", "crew-1"}
    assert pool.stop(Deadline(10)) == []
    assert not pool.submit(work, 7)


def test_a_pool_stops_by_its_deadline_and_gives_back_what_was_not_begun() -> None:
    pool = Pool("crew", 1)
    begun, end = threading.Event(), threading.Event()

    def work(what: str) -> None:
        begun.set()
        end.wait(10)

    pool.submit(work, "first")
    begun.wait(10)
    pool.submit(work, "second")
    pool.submit(work, "third")
    assert pool.stop(Deadline(0.01)) == [("second",), ("third",)]
    end.set()
    assert pool.stop(Deadline(10)) == []


def test_a_pool_makes_do_with_the_threads_that_are_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool("crew", 3)
    begun, end, done = threading.Event(), threading.Event(), threading.Semaphore(0)
    start, left = threading.Thread.start, [False, True, False]

    def start_if_one_is_left(thread: threading.Thread) -> None:
        if not left.pop(0):
            raise RuntimeError("can't start new thread")
        start(thread)

    worked: list[int] = []

    def work(number: int) -> None:
        worked.append(number)
        begun.set()
        end.wait(10)
        done.release()

    monkeypatch.setattr(threading.Thread, "start", start_if_one_is_left)
    with pytest.raises(RuntimeError, match="can't start"):
        pool.submit(work, 0)
    assert pool.submit(work, 1)
    assert begun.wait(10)
    assert pool.submit(work, 2)
    end.set()
    for _ in range(2):
        assert done.acquire(timeout=10)
    assert pool.stop(Deadline(10)) == []
    assert worked == [1, 2]


def test_a_pool_answers_what_became_of_each_in_their_order() -> None:
    pool = Pool("crew", 2)
    together = threading.Barrier(2)

    def double(number: int) -> int:
        if number < 2:
            together.wait(10)
        return 2 * number

    def divide(number: int) -> float:
        return 1 / number

    assert pool.map(double, range(5)) == [0, 2, 4, 6, 8]
    with pytest.raises(ZeroDivisionError):
        pool.map(divide, [1, 0])
    pool.stop(Deadline(10))
    assert pool.map(double, [3]) == [None]


def test_whoever_waits_for_what_a_stopped_pool_did_not_begin_is_told() -> None:
    pool = Pool("crew", 1)
    begun, end, answers = threading.Event(), threading.Event(), []

    def work(number: int) -> int:
        begun.set()
        end.wait(10)
        return number

    caller = threading.Thread(target=lambda: answers.extend(pool.map(work, [1, 2, 3])))
    caller.start()
    begun.wait(10)
    wait_until(lambda: len(pool._queue) == 2, "the others to be queued")
    pool.stop(Deadline(0))
    end.set()
    caller.join(10)
    assert answers == [1, None, None]
    pool.stop(Deadline(10))


def test_a_keyed_pool_does_one_job_at_a_time_for_each_key() -> None:
    pool = KeyedPool("jobs", 4)
    begun, end, last = threading.Event(), threading.Event(), threading.Event()
    assert pool.submit("a", lambda: (begun.set(), end.wait(10)))
    assert begun.wait(10)
    assert not pool.submit("a", lambda: None)
    assert pool.busy("a")
    assert not pool.wait(["a"], 0.01)
    pool.submit_after("a", lambda: pytest.fail("a later one counts"))
    pool.submit_after("a", last.set)
    other = threading.Event()
    assert pool.submit("b", other.set)
    assert other.wait(10)
    end.set()
    assert last.wait(10)
    assert pool.wait(["a", "b"], 10)
    pool.stop(Deadline(5))
    assert not pool.submit("a", lambda: None)


def test_a_keyed_pool_loses_no_place_when_a_thread_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = KeyedPool("jobs", 1)
    real = threading.Thread.start

    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(RuntimeError):
        pool.submit("a", lambda: None)
    assert not pool.busy("a")
    monkeypatch.setattr(threading.Thread, "start", real)
    done = threading.Event()
    assert pool.submit("a", done.set)
    assert done.wait(10)
    pool.stop(Deadline(5))
