"""The pool of request threads and the budget of those that may block, without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fluxlib.control.http.budget import Bodies, Budget, Waits
from fluxlib.control.server.threads import LazyThreads
from fluxlib.errors import Unavailable
from fluxlib.lifecycle import Deadline
from tests.support.programs import wait_until


class Work:
    """A task that runs until it is let go."""

    def __init__(self, error: Exception | None = None) -> None:
        self.begun, self.go_on, self.cancelled = threading.Event(), threading.Event(), threading.Event()
        self.thread = ""
        self._error = error

    def service(self) -> None:
        self.thread = threading.current_thread().name
        self.begun.set()
        self.go_on.wait(10)
        if self._error:
            raise self._error

    def cancel(self) -> None:
        self.cancelled.set()


class TestLazyThreads:
    def test_makes_as_many_as_are_busy_and_queues_the_rest(self) -> None:
        pool = LazyThreads(2)
        first, second, third = Work(), Work(), Work()
        for work in (first, second, third):
            pool.add_task(work)
        assert first.begun.wait(5)
        assert second.begun.wait(5)
        assert pool.count == 2
        assert not third.begun.is_set()
        first.go_on.set()
        assert third.begun.wait(5)
        assert third.thread == first.thread
        for work in (second, third):
            work.go_on.set()
        pool.stop(Deadline(5))
        assert pool.count == 0

    def test_uses_an_idle_one_before_making_another(self) -> None:
        pool = LazyThreads(10)
        names = set()
        for _ in range(20):
            work = Work()
            work.go_on.set()
            pool.add_task(work)
            assert work.begun.wait(5)
            names.add(work.thread)
            wait_until(lambda: len(pool._idle) == pool.count, "the thread to be idle")
        assert len(names) == 1
        pool.stop(Deadline(5))

    def test_ends_those_idle_for_long(self) -> None:
        pool = LazyThreads(10, idle_seconds=0.01)
        works = [Work() for _ in range(5)]
        for work in works:
            pool.add_task(work)
        for work in works:
            work.go_on.set()
        wait_until(lambda: pool.count == 0, "idle threads to end")
        again = Work()
        again.go_on.set()
        pool.add_task(again)
        assert again.begun.wait(5)
        pool.stop(Deadline(5))

    def test_loses_no_task_to_a_thread_that_is_ending(self) -> None:
        pool = LazyThreads(4, idle_seconds=0.0002)
        done = threading.Semaphore(0)

        class Count:
            def service(self) -> None:
                done.release()

            def cancel(self) -> None:
                raise AssertionError("it was to be served")

        for _ in range(2000):
            pool.add_task(Count())
            assert done.acquire(timeout=5)
        pool.stop(Deadline(5))

    def test_survives_a_task_that_fails(self) -> None:
        pool = LazyThreads(1)
        failing, after = Work(RuntimeError("boom")), Work()
        failing.go_on.set()
        after.go_on.set()
        pool.add_task(failing)
        pool.add_task(after)
        assert after.begun.wait(5)
        pool.stop(Deadline(5))

    def test_waits_with_its_tasks_when_the_system_gives_no_more_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pool = LazyThreads(10)
        first, second = Work(), Work()
        pool.add_task(first)
        assert first.begun.wait(5)

        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            pool.add_task(second)
        assert pool.count == 1
        first.go_on.set()
        second.go_on.set()
        assert second.begun.wait(5)
        pool.stop(Deadline(5))

    def test_cancels_what_it_never_came_to(self) -> None:
        pool = LazyThreads(1)
        running, waiting = Work(), Work()
        pool.add_task(running)
        pool.add_task(waiting)
        assert running.begun.wait(5)
        pool.stop(Deadline(0))
        assert waiting.cancelled.is_set()
        running.go_on.set()
        wait_until(lambda: pool.count == 0, "the last thread to end")


class TestBudget:
    def take(self, budget: Budget, kind: Waits, count: int) -> list[Callable[[], None]]:
        return [budget.enter(kind) for _ in range(count)]

    def test_is_given_back(self) -> None:
        budget = Budget(2)
        first, _ = self.take(budget, Waits.CALL, 2)
        with pytest.raises(Unavailable, match="2 requests are waiting"):
            budget.enter(Waits.CALL)
        first()
        budget.enter(Waits.CALL)
        assert budget.blocking == 2

    def test_keeps_a_reserve_for_management(self) -> None:
        budget = Budget(2)
        self.take(budget, Waits.CALL, 2)
        asking = self.take(budget, Waits.ASK, 8)
        with pytest.raises(Unavailable):
            budget.enter(Waits.ASK)
        asking[0]()
        budget.enter(Waits.ASK)
        self.take(budget, Waits.NO, 100)

    def test_followers_take_a_quarter(self) -> None:
        budget = Budget(8)
        first, _ = self.take(budget, Waits.FOLLOW, 2)
        with pytest.raises(Unavailable, match="followed"):
            budget.enter(Waits.FOLLOW)
        self.take(budget, Waits.CALL, 6)
        first()
        budget.enter(Waits.FOLLOW)
        with pytest.raises(Unavailable):
            budget.enter(Waits.CALL)

    def test_one_follower_always_fits(self) -> None:
        budget = Budget(1)
        budget.enter(Waits.FOLLOW)()
        budget.enter(Waits.CALL)


class TestBodies:
    def test_are_bounded_in_bytes(self) -> None:
        bodies = Bodies(10)
        give_back = bodies.take(6)
        with pytest.raises(Unavailable, match="max_bodies_mb"):
            bodies.take(5)
        bodies.take(0)
        bodies.take(4)
        give_back()
        assert bodies.held == 4
        bodies.take(6)

    def test_one_that_is_larger_than_all_may_come_alone(self) -> None:
        bodies = Bodies(10)
        give_back = bodies.take(50)
        with pytest.raises(Unavailable):
            bodies.take(1)
        give_back()
        assert bodies.held == 0
