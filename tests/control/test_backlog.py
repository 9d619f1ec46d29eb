"""First come, first served, without a poll and without a lost wake-up."""

from __future__ import annotations

import threading
from collections import Counter
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxlib.control.agents.fleet import Fleet, Reservation
from fluxlib.control.executions.backlog import Backlog
from fluxlib.control.executions.execution import Execution, new_execution_id
from fluxlib.errors import AtCapacity
from fluxlib.model import NodeFigures
from tests.support.fake_agents import join


class Room:
    """A room over a fleet whose agents have ``slots`` per function."""

    def __init__(self, slots: int = 1, agents: int = 1, max_waiting: int = 10_000, max_tasks: int = 0) -> None:
        self.fleet = Fleet()
        self.slots = slots
        self.accepted = 0.0
        self.started: list[tuple[Execution, Reservation]] = []
        self.room = Backlog(
            self.place,
            self.is_full,
            lambda one, slot: self.started.append((one, slot)),
            lambda name: 500,
            max_waiting,
            2**40,
        )
        self.fleet.on_capacity(self.room.capacity)
        for number in range(agents):
            join(self.fleet, f"a{number}", figures=NodeFigures(0, 0, 1000, 0, 0, max_tasks))

    def place(self, name: str, agent_id: str = "") -> Reservation | None:
        return self.fleet.place(name, lambda agents: next(agents, None), slots=self.slots, only=agent_id)

    def is_full(self, agent_id: str) -> bool:
        agent = self.fleet.get(agent_id)
        return agent is None or "" in agent.full

    def wait(self, name: str = "f", *, resources: bool = False) -> Execution:
        self.accepted += 1.0
        execution = Execution(name, None, new_execution_id(), self.accepted, lambda reply: None)
        self.room.admit(execution)
        self.room.add([execution], waits_for_resources=resources)
        return execution

    @property
    def order(self) -> list[Execution]:
        return [one for one, _ in self.started]

    def end(self, index: int) -> None:
        self.fleet.release(self.started[index][1])


def test_a_free_slot_is_taken_at_once() -> None:
    room = Room()
    first = room.wait()
    assert room.order == [first]
    assert not room.room.has("f")


def test_the_order_is_that_of_arrival() -> None:
    room = Room()
    waiting = [room.wait() for _ in range(5)]
    assert room.room.counts(unclaimed=False) == {"f": 4}
    for index in range(4):
        room.end(index)
    assert room.order == waiting


def test_one_that_leaves_is_passed_over_and_leaves_only_once() -> None:
    room = Room()
    first, second, third = room.wait(), room.wait(), room.wait()
    assert room.room.remove(second)
    assert not room.room.remove(second)
    assert not room.room.remove(first)
    room.end(0)
    assert room.order == [first, third]
    assert room.room.counts(unclaimed=False) == {}


def test_one_turned_down_comes_back_to_where_it_was() -> None:
    room = Room()
    waiting = [room.wait() for _ in range(3)]
    room.end(0)
    assert room.order == waiting[:2]
    # Its agent refused it: the slot is full for others' sake, then frees.
    room.fleet.mark_full("a0", "f")
    room.room.admit(waiting[1])
    room.room.add([waiting[1]], waits_for_resources=False)
    room.fleet.freed("a0", "f")
    room.end(1)
    assert room.order[2] is waiting[1]


def test_a_slot_of_the_whole_agent_goes_to_whoever_waited_longest() -> None:
    room = Room(slots=10, max_tasks=1)
    held = room.wait("a")
    later = [room.wait("b"), room.wait("a"), room.wait("b")]
    for index in range(3):
        room.end(index)
    assert room.order == [held, *later]


def test_a_new_agent_serves_the_queues_in_turn() -> None:
    room = Room(slots=10, agents=0)
    waiting = [room.wait(name) for name in ("a", "b", "a", "b")]
    join(room.fleet, "a1", figures=NodeFigures(0, 0, 1000, 0, 0, 3))
    assert room.order == waiting[:3]


def test_too_many_are_turned_away_but_not_those_accepted_before() -> None:
    room = Room(agents=0, max_waiting=2)
    room.wait("a")
    room.wait("b")
    with pytest.raises(AtCapacity, match="2 executions wait"):
        room.wait("a")
    accepted = Execution("a", None, "known", 0.0)
    room.room.admit(accepted)
    room.room.add([accepted], waits_for_resources=False)
    assert room.room.counts(unclaimed=False) == {"a": 2, "b": 1}
    assert len(room.room.remove_all("a")) == 2
    assert len(room.room.remove_all()) == 1
    room.wait("a")


def test_a_queue_that_waits_for_resources_hears_of_everybodys_slots() -> None:
    room = Room()
    other = room.place("other")
    assert other is not None
    blocked = True
    real = room.room._place
    room.room._place = lambda name, agent_id: None if name == "f" and blocked else real(name, agent_id)
    waiting = room.wait(resources=True)
    assert not room.order
    blocked = False
    room.fleet.release(other)
    assert room.order == [waiting]


def test_only_where_something_changed_is_looked_at() -> None:
    room = Room(agents=3)
    for _ in range(4):
        room.wait()
    looked: list[str] = []
    real = room.room._place

    def place(name: str, agent_id: str) -> Reservation | None:
        looked.append(agent_id)
        return real(name, agent_id)

    room.room._place = place
    room.end(0)
    assert looked == [room.started[0][1].agent_id]
    assert len(room.order) == 4


def test_the_hand_over_takes_far_less_than_20_ms() -> None:
    room = Room(agents=50, slots=2)
    for _ in range(1000):
        room.wait(f"f{_ % 20}")
    took = []
    for index in range(200):
        before, began = len(room.started), monotonic()
        room.end(index)
        took.append(monotonic() - began)
        assert len(room.started) >= before
    assert sorted(took)[len(took) // 2] < 0.005


def test_nobody_is_forgotten_and_no_slot_is_given_twice_under_many_threads() -> None:
    """Slots free and executions arrive on many threads at once: everyone starts, never two in one slot."""
    room = Room(slots=2, agents=2)
    done = threading.Event()
    total, running, most = 8 * 200, Counter[str](), Counter[str]()
    lock = threading.Lock()
    begun: list[Execution] = []

    def on_slot(execution: Execution, reservation: Reservation) -> None:
        with lock:
            running[reservation.agent_id] += 1
            most[reservation.agent_id] = max(most[reservation.agent_id], running[reservation.agent_id])
            begun.append(execution)
        ready.append((execution, reservation))
        work.release()

    ready: list[tuple[Execution, Reservation]] = []
    work = threading.Semaphore(0)
    room.room._on_slot = on_slot

    def run() -> None:
        while True:
            work.acquire()
            if done.is_set():
                return
            _, reservation = ready.pop()
            with lock:
                running[reservation.agent_id] -= 1
            room.fleet.release(reservation)
            with lock:
                if len(begun) == total:
                    done.set()
                    for _ in runners:
                        work.release()

    def arrive() -> None:
        for _ in range(200):
            room.wait()

    runners = [threading.Thread(target=run, name=f"run-{n}") for n in range(3)]
    arrivals = [threading.Thread(target=arrive, name=f"arrive-{n}") for n in range(8)]
    for thread in (*runners, *arrivals):
        thread.start()
    for thread in (*arrivals, *runners):
        thread.join(30)
        assert not thread.is_alive()
    assert len({one.execution_id for one in begun}) == total
    assert max(most.values()) <= 2


steps = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from("abc")),
        st.tuples(st.just("leave"), st.integers(0, 30)),
        st.tuples(st.just("end"), st.integers(0, 30)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps)
def test_whatever_happens_each_queue_is_in_order_and_no_slot_idles(steps: list[tuple[str, object]]) -> None:
    room = Room(slots=2, max_tasks=3)
    everyone: list[Execution] = []
    left: set[str] = set()
    running: list[int] = []
    for kind, value in steps:
        if kind == "join":
            everyone.append(room.wait(str(value)))
        elif kind == "leave" and everyone:
            execution = everyone[int(value) % len(everyone)]  # type: ignore[call-overload]
            if room.room.remove(execution):
                left.add(execution.execution_id)
        elif kind == "end" and running:
            room.end(running.pop(int(value) % len(running)))  # type: ignore[call-overload]
        ended = {index for index, (_, slot) in enumerate(room.started) if slot.released}
        running = [index for index in range(len(room.started)) if index not in ended]
        waiting = room.room.counts(unclaimed=False)
        assert sum(waiting.values()) == len(everyone) - len(left) - len(room.started)
        by_function = Counter(room.started[index][0].function_name for index in running)
        for name in waiting:
            assert len(running) == 3 or by_function[name] == 2
    for name in "abc":
        mine = [one for one in everyone if one.function_name == name and one.execution_id not in left]
        begun = [one for one in room.order if one.function_name == name]
        assert begun == mine[: len(begun)]
