"""What a store of the control plane promises, kept by every backend."""

from __future__ import annotations

import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fluxlib.archive import digest_of
from fluxlib.errors import Conflict, LeaseLost, StoreUnavailable
from fluxlib.model import AgentRecord, AgentStatus, ErrorKind, ExecutionRequest, ExecutionStatus, Phase, Platform
from fluxlib.store.base import LEASE_MEMORY, SMALL_REQUEST, ControlStore, ExecutionFilter, Lease
from tests.support.entries import end, entry, function, keep
from tests.support.memory_store import MemoryControlStore

# -- functions and code


def test_functions_come_back_as_they_were(store: ControlStore) -> None:
    made = function("b", code_bytes=7, detected_platforms=(Platform("linux", "amd64"),), updated_at=12.5)
    store.save_function(made)
    store.save_function(function("a"))
    assert store.function("b") == made
    assert [one.spec.name for one in store.functions()] == ["a", "b"]
    assert store.function("nobody") is None
    assert store.delete_function("b") is True
    assert store.delete_function("b") is False
    assert store.function("b") is None


def test_the_revision_grows_with_every_change(store: ControlStore) -> None:
    seen = [store.functions_revision()]
    store.save_function(function())
    seen.append(store.functions_revision())
    store.save_function(function(code_digest="d1"), b"zip")
    seen.append(store.functions_revision())
    store.delete_function("f")
    seen.append(store.functions_revision())
    store.delete_function("f")
    assert seen == sorted(set(seen))
    assert store.functions_revision() == seen[-1]


def test_code_lives_as_long_as_a_function_refers_to_it(store: ControlStore) -> None:
    large, small = bytes(range(256)) * 80_000, b"zip"  # 20 MB: more than one piece
    first, second = digest_of(large), digest_of(small)
    store.save_function(function("a", code_digest=first), large)
    store.save_function(function("b", code_digest=first), large)
    assert store.archive(first) == large
    assert store.archive("none") is None
    # A change of the function alone keeps its code.
    store.save_function(function("a", code_digest=first, updated_at=5.0))
    store.delete_function("b")
    assert store.archive(first) == large
    store.save_function(function("a", code_digest=second), small)
    assert store.archive(first) is None
    assert store.archive(second) == small
    store.delete_function("a")
    assert store.archive(second) is None


def test_a_function_is_written_over_what_was_read_only(store: ControlStore) -> None:
    code = digest_of(b"zip")
    assert store.function_and_revision("f") == (None, 0)
    with pytest.raises(Conflict):
        store.save_function(function(), revision=3)
    store.save_function(function(), revision=0)
    with pytest.raises(Conflict):
        store.save_function(function(updated_at=1.0), revision=0)
    found, revision = store.function_and_revision("f")
    assert (found, revision > 0) == (function(), True)
    store.save_function(function(updated_at=2.0, code_digest=code), b"zip", revision=revision)
    with pytest.raises(Conflict):
        store.save_function(function(updated_at=3.0, code_digest=digest_of(b"other")), b"other", revision=revision)
    assert store.archive(code) == b"zip"
    assert store.archive(digest_of(b"other")) is None
    found, newer = store.function_and_revision("f")
    assert (found, newer > revision) == (function(updated_at=2.0, code_digest=code), True)
    # A name that comes back is another function.
    store.delete_function("f")
    store.save_function(function())
    with pytest.raises(Conflict):
        store.save_function(function(updated_at=4.0), revision=newer)


def test_of_many_changes_made_of_one_reading_one_is_written(store: ControlStore) -> None:
    store.save_function(function())
    _, revision = store.function_and_revision("f")
    barrier = threading.Barrier(8)

    def race(number: int) -> bool:
        barrier.wait(10)
        try:
            store.save_function(function(updated_at=float(number)), revision=revision)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(1, 9)))
    found = store.function("f")
    assert found is not None
    assert [number for number, one in enumerate(won, 1) if one] == [found.updated_at]


# -- agents


def test_agents_come_back_as_they_were(store: ControlStore) -> None:
    agent = AgentRecord(
        "worker-1",
        "10.0.0.1:50052",
        registered_at=1.25,
        status=AgentStatus.DRAINING,
        platform=Platform("linux", "arm64"),
        enforces=("cpu", "memory"),
        extra={"zone": "a"},
        legacy_certificate=True,
    )
    store.save_agent(agent)
    store.save_agent(AgentRecord("alpha", "h:1"))
    assert [one.agent_id for one in store.agents()] == ["alpha", "worker-1"]
    assert store.agents()[1] == agent
    assert store.delete_agent("worker-1") is True
    assert store.delete_agent("worker-1") is False
    assert [one.agent_id for one in store.agents()] == ["alpha"]


# -- executions


def test_an_execution_is_kept_with_its_request_until_it_ends(store: ControlStore) -> None:
    made = keep(store, "e-1", owner="flux-1")
    found = store.execution("e-1")
    assert found is not None
    assert replace(found, sequence=0, rank=0, request_bytes=0) == replace(made, request=None)
    assert found.sequence > 0
    assert found.request_bytes > 0
    assert store.request("e-1") == made.request
    end(store, made, 1000.0, ok=False)
    ended = store.execution("e-1")
    assert ended is not None
    assert store.request("e-1") is None
    assert (ended.record.status, ended.record.phase) == (ExecutionStatus.FAILED, Phase.ENDED)
    assert (ended.record.error_kind, ended.record.status_at) == (ErrorKind.EXIT_CODE, 1001.5)
    assert (ended.request_bytes, ended.keep_until) == (0, pytest.approx(time.time() + 1000, abs=10))
    assert store.execution("e-2") is None
    assert store.request("e-2") is None


def test_moving_between_agents_and_the_queue(store: ControlStore) -> None:
    keep(store, "e-1", owner="flux-1")
    assert [one.execution_id for one in store.open_executions("")] == ["e-1"]
    for agent in ("worker-2", "worker-1", "worker-1"):
        store.assign_attempt("e-1", 1, agent, "flux-1").wait()
    found = store.execution("e-1")
    assert found is not None
    assert (found.record.agent_id, found.record.phase, found.owner) == ("worker-1", Phase.STARTING, "flux-1")
    assert store.open_executions("") == []
    assert store.open_executions("worker-2") == []
    assert [one.execution_id for one in store.open_executions("worker-1")] == ["e-1"]
    assert [one.execution_id for one in store.executions_of("flux-1")] == ["e-1"]
    store.return_execution("e-1", 1, "flux-1", claimed=True).wait()
    (queued,) = store.open_executions("")
    assert (queued.execution_id, queued.owner, queued.record.phase) == ("e-1", "flux-1", Phase.QUEUED)
    # It will be started from here.
    assert store.request("e-1") == entry("e-1").request


def test_the_backlog_belongs_to_nobody_until_it_is_claimed(store: ControlStore) -> None:
    for number in range(5):
        keep(store, f"e-{number}")
    keep(store, "waited-for", owner="flux-2")
    keep(store, "other", "g")
    assert [one.execution_id for one in store.claim_executions("flux-1", "f", 2)] == ["e-0", "e-1"]
    assert [one.execution_id for one in store.claim_executions("flux-2", "f", 10)] == ["e-2", "e-3", "e-4"]
    assert store.claim_executions("flux-2", "f", 10) == []
    assert store.claim_executions("flux-2", "h", 10) == []
    assert store.open_ids("flux-1") == {"e-0", "e-1"}
    assert store.open_ids("flux-2") == {"waited-for", "e-2", "e-3", "e-4"}
    assert store.open_ids("") == {"other"}


def test_many_claims_at_once_give_each_entry_to_one(store: ControlStore) -> None:
    for number in range(60):
        keep(store, f"e-{number:02}")
    barrier = threading.Barrier(6)

    def race(number: int) -> list[str]:
        barrier.wait(10)
        return [one.execution_id for _ in range(4) for one in store.claim_executions(f"flux-{number}", "f", 3)]

    with ThreadPoolExecutor(6) as pool:
        claimed = [execution_id for ids in pool.map(race, range(6)) for execution_id in ids]
    assert sorted(claimed) == [f"e-{number:02}" for number in range(60)]


def test_a_claim_brings_small_requests_and_leaves_large_ones_in_the_store(store: ControlStore) -> None:
    large = ExecutionRequest("large", "f", ("a",), bytes(SMALL_REQUEST + 1), asynchronous=True)
    keep(store, "small")
    store.create_execution(replace(entry("large"), request=large), durable=True)[1].wait()
    small, bare = store.claim_executions("flux-1", "f", 5)
    assert small.request == entry("small").request
    assert (bare.execution_id, bare.request) == ("large", None)
    assert bare.request_bytes > SMALL_REQUEST
    assert store.request("large") == large


def test_what_is_returned_keeps_its_place_in_the_backlog(store: ControlStore) -> None:
    for number in range(4):
        keep(store, f"e-{number}")
    store.claim_executions("flux-1", "f", 2)
    store.assign_attempt("e-0", 1, "w", "flux-1").wait()
    for _ in range(2):
        store.return_execution("e-0", 1, "flux-1", claimed=True).wait()
    assert [one.execution_id for one in store.claim_executions("flux-2", "f", 1)] == ["e-2"]
    store.return_execution("e-0", 1, "flux-1").wait()
    store.return_execution("e-1", 1, "flux-1").wait()
    assert [one.execution_id for one in store.claim_executions("flux-2", "f", 9)] == ["e-0", "e-1", "e-3"]
    assert store.open_ids("flux-1") == set()


def test_the_lowest_rank_is_claimed_first(store: ControlStore) -> None:
    for name, rank in (("late", 30.5), ("early", -2.0), ("middle", 7.25)):
        keep(store, name, rank=rank)
    assert [one.execution_id for one in store.claim_executions("o", "f", 9)] == ["early", "middle", "late"]


def test_a_step_of_another_attempt_or_owner_changes_nothing(store: ControlStore) -> None:
    made = keep(store, "e-1")
    store.claim_executions("flux-1", "f", 1)
    for attempt, owner in ((2, "flux-1"), (1, "flux-2"), (1, "")):
        with pytest.raises(Conflict):
            store.assign_attempt("e-1", attempt, "w", owner).wait()
        with pytest.raises(Conflict):
            store.return_execution("e-1", attempt, owner, claimed=True).wait()
    ended = made.record.ended(ExecutionStatus.SUCCESS, at=1.0)
    assert store.end_attempt(ended, 2, 1000.0).value() is False
    (found,) = store.executions_of("flux-1")
    assert (found.record.phase, found.record.agent_id) == (Phase.QUEUED, "")
    assert store.end_attempt(ended, 1, 1000.0).value() is True


def test_an_end_of_whatever_attempt_it_is(store: ControlStore) -> None:
    made = keep(store, "e-1", attempt=3)
    found = store.execution("e-1")
    assert found is not None
    assert found.record.attempt == 3
    ended = made.record.ended(ExecutionStatus.CANCELLED, at=1.0)
    assert store.end_attempt(ended, 1, 1000.0).value() is False
    assert store.end_attempt(ended, 0, 1000.0).value() is True
    assert store.end_attempt(ended, 0, 1000.0).value() is False
    found = store.execution("e-1")
    assert found is not None
    assert (found.record.status, found.record.attempt) == (ExecutionStatus.CANCELLED, 3)


def test_an_end_keeps_the_request_where_it_is_asked_to(store: ControlStore) -> None:
    made = keep(store, "dead")
    end(store, made, 0.0, ok=False, keep_request=True)
    assert store.request("dead") == made.request
    found = store.execution("dead")
    assert found is not None
    assert found.request_bytes > 0
    assert store.expire_executions() == 1
    assert store.request("dead") is None


def test_what_is_queued_is_counted_through_every_step(store: ControlStore) -> None:
    def counts() -> dict[str, tuple[int, int, int]]:
        return {name: (of.waiting, of.ready, of.request_bytes) for name, of in store.queued().items()}

    assert counts() == {}
    for number in range(4):
        keep(store, f"e-{number}")
    keep(store, "waited-for", owner="flux-1")
    keep(store, "at-agent", agent="w", phase=Phase.STARTING, owner="flux-1")
    keep(store, "e-g", "g")
    found = store.execution("e-0")
    assert found is not None
    size = found.request_bytes
    assert counts() == {"f": (5, 4, 5 * size), "g": (1, 1, size)}
    keep(store, "e-1")
    store.claim_executions("flux-1", "f", 3)
    assert counts() == {"f": (5, 1, 5 * size), "g": (1, 1, size)}
    store.assign_attempt("e-0", 1, "w", "flux-1").wait()
    store.assign_attempt("e-0", 1, "w", "flux-1").wait()
    assert counts()["f"] == (4, 1, 4 * size)
    store.return_execution("e-0", 1, "flux-1", claimed=True).wait()
    assert counts()["f"] == (5, 1, 5 * size)
    store.return_execution("e-1", 1, "flux-1").wait()
    assert counts()["f"] == (5, 2, 5 * size)
    for _ in range(2):
        end(store, entry("e-0"))
        end(store, entry("e-3"))
    assert counts()["f"] == (3, 1, 3 * size)
    store.forget_execution("waited-for", "flux-1").wait()
    assert counts()["f"] == (2, 1, 2 * size)
    store.adopt_session("flux-1", "flux-2")
    assert counts()["f"] == (2, 2, 2 * size)
    for name in ("e-1", "e-2", "e-g"):
        end(store, entry(name))
    assert counts() == {}
    assert store.expire_executions(max_records=1) == 4
    assert counts() == {}


def test_the_backlog_of_a_dead_process_is_anybodys(store: ControlStore) -> None:
    keep(store, "queued")
    keep(store, "at-agent")
    store.claim_executions("dead", "f", 2)
    store.assign_attempt("at-agent", 1, "w", "dead").wait()
    waited = entry("waited-for", owner="dead")
    waited = replace(waited, record=replace(waited.record, asynchronous=False))
    store.create_execution(waited, durable=False)[1].wait()
    assert store.adopt_session("dead", "heir") == 3
    assert store.adopt_session("dead", "heir") == 0
    assert [one.execution_id for one in store.executions_of("heir")] == ["at-agent", "waited-for"]
    assert [one.execution_id for one in store.claim_executions("other", "f", 9)] == ["queued"]
    # The dead one wakes.
    for name in ("queued", "at-agent", "waited-for"):
        with pytest.raises(Conflict):
            store.assign_attempt(name, 1, "w", "dead").wait()


def test_what_a_process_owns_is_read_a_page_at_a_time(store: ControlStore) -> None:
    for number in range(7):
        keep(store, f"e-{number}", owner="o" if number != 3 else "p")
    ids: list[str] = []
    after = 0
    while page := store.executions_of("o", after, 2):
        assert all(one.request is None for one in page)
        ids += [one.execution_id for one in page]
        after = page[-1].sequence
    assert ids == ["e-0", "e-1", "e-2", "e-4", "e-5", "e-6"]
    assert [one.execution_id for one in store.executions_of("o")] == ids


def test_what_a_restart_reads_does_not_grow_with_the_requests(store: ControlStore) -> None:
    """A backlog of large requests, as one process accepted it, is listed and taken over without reading them."""
    if isinstance(store, MemoryControlStore):
        return
    for number in range(40):
        large = ExecutionRequest(f"e-{number}", "f", (), bytes(512 * 1024), asynchronous=True)
        made = replace(entry(f"e-{number}", owner="o" if number % 2 else ""), request=large)
        store.create_execution(made, durable=False)[1].wait()
    tracemalloc.start()
    try:
        assert len(store.open_executions("")) == 40
        assert len(store.executions_of("o")) == 20
        assert len(store.open_ids("o")) == 20
        assert len(store.executions(ExecutionFilter(queued=True), "", 50).entries) == 40
        assert store.execution("e-1") is not None
        store.adopt_session("o", "p")
        assert len(store.claim_executions("p", "f", 50)) == 40
        assert store.queued()["f"].request_bytes > 40 * 512 * 1024
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024


def test_the_first_end_wins_and_nothing_moves_after_it(store: ControlStore) -> None:
    made = keep(store, "e-1", agent="worker-1", owner="flux-1")
    end(store, made, 1000.0, ok=True)
    end(store, made, 9000.0, ok=False)
    found = store.execution("e-1")
    assert found is not None
    assert (found.record.status, found.keep_until) == (
        ExecutionStatus.SUCCESS,
        pytest.approx(time.time() + 1000, abs=10),
    )
    for move in (store.assign_attempt("e-1", 1, "w", "flux-1"), store.return_execution("e-1", 1, "flux-1")):
        with pytest.raises(Conflict):
            move.wait()
    with pytest.raises(Conflict):
        store.assign_attempt("nobody", 1, "w", "o").wait()
    assert store.open_executions("worker-1") == []
    assert store.executions_of("flux-1") == []
    end(store, entry("never-made"))
    assert store.execution("never-made") is None


def test_many_ends_at_once_leave_one(store: ControlStore) -> None:
    made = keep(store, "e-1")
    barrier = threading.Barrier(8)

    def race(number: int) -> bool:
        barrier.wait(10)
        record = made.record.ended(ExecutionStatus.FAILED, at=float(number), error=str(number))
        return bool(store.end_attempt(record, number % 2, 0.0).value())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    found = store.execution("e-1")
    assert found is not None
    assert won == [str(number) == found.record.error for number in range(8)]
    assert store.expire_executions() == 1
    assert store.expire_executions() == 0


def test_an_idempotency_key_stands_for_one_execution(store: ControlStore) -> None:
    first = keep(store, "e-1", idempotency_key="key: 1")
    known, commit = store.create_execution(entry("e-2", idempotency_key="key: 1"), durable=True)
    commit.wait()
    assert known == "e-1"
    assert store.execution("e-2") is None
    found = store.execution_by_key("f", "key: 1")
    assert found is not None
    assert found.execution_id == "e-1"
    assert store.execution_by_key("f", "key") is None
    assert store.execution_by_key("g", "key: 1") is None
    # For another function it is another key.
    assert store.create_execution(entry("e-3", "g", idempotency_key="key: 1"), durable=False)[0] == "e-3"
    end(store, first, 0.0)
    assert store.create_execution(entry("e-4", idempotency_key="key: 1"), durable=False)[0] == "e-1"
    assert store.expire_executions() == 1
    assert store.create_execution(entry("e-5", idempotency_key="key: 1"), durable=False)[0] == "e-5"


def test_a_key_used_by_many_at_once_makes_one(store: ControlStore) -> None:
    barrier = threading.Barrier(8)

    def race(number: int) -> str:
        barrier.wait(10)
        known, commit = store.create_execution(entry(f"e-{number}", idempotency_key="k"), durable=True)
        commit.wait()
        return known

    with ThreadPoolExecutor(8) as pool:
        known = set(pool.map(race, range(8)))
    assert len(known) == 1
    assert [one.execution_id for one in store.executions(ExecutionFilter(), "", 10).entries] == list(known)


def test_a_known_id_is_not_written_twice(store: ControlStore) -> None:
    made = keep(store, "e-1")
    end(store, made)
    keep(store, "e-1", agent="worker-2", idempotency_key="late")
    found = store.execution("e-1")
    assert found is not None
    assert found.record.status is ExecutionStatus.SUCCESS
    assert store.open_executions("worker-2") == []
    assert store.create_execution(entry("e-2", idempotency_key="late"), durable=False)[0] == "e-2"


def test_listing_is_newest_first_a_page_at_a_time(store: ControlStore) -> None:
    for number in range(7):
        keep(store, f"e-{number}")
    ids: list[str] = []
    cursor, sizes = "", []
    while True:
        page = store.executions(ExecutionFilter(), cursor, 3)
        ids += [one.execution_id for one in page.entries]
        sizes.append(len(page.entries))
        cursor = page.next_cursor
        if not cursor:
            break
        # What arrives meanwhile does not shift the pages.
        keep(store, f"new-{len(sizes)}")
    assert ids == [f"e-{number}" for number in range(6, -1, -1)]
    assert sizes == [3, 3, 1]
    assert store.executions(ExecutionFilter(), "", 100).next_cursor == ""
    assert store.executions(ExecutionFilter(), "", 1).entries[0].request is None


def test_listing_by_function_status_and_queue(store: ControlStore) -> None:
    running = keep(store, "run", "f", "w", Phase.STARTING)
    keep(store, "queue-f", "f", owner="o")
    keep(store, "queue-g", "g")
    ended = keep(store, "end-f", "f", "w", Phase.STARTING)
    failed = keep(store, "fail-g", "g", "w", Phase.STARTING)
    end(store, ended)
    end(store, failed, ok=False)

    def ids(**where: object) -> list[str]:
        return [one.execution_id for one in store.executions(ExecutionFilter(**where), "", 50).entries]  # type: ignore[arg-type]

    assert ids(function_name="f") == ["end-f", "queue-f", "run"]
    assert ids(status=ExecutionStatus.RUNNING) == ["queue-g", "queue-f", "run"]
    assert ids(status=ExecutionStatus.FAILED) == ["fail-g"]
    assert ids(function_name="g", status=ExecutionStatus.SUCCESS) == []
    assert ids(function_name="f", status=ExecutionStatus.SUCCESS) == ["end-f"]
    assert ids(queued=True) == ["queue-g", "queue-f"]
    assert ids(queued=True, function_name="f") == ["queue-f"]
    assert ids(queued=True, function_name="f", status=ExecutionStatus.RUNNING) == ["queue-f"]
    assert ids(queued=True, status=ExecutionStatus.FAILED) == []
    assert (store.count_open("f"), store.count_open("g"), store.count_open("h")) == (2, 1, 0)
    end(store, running)
    store.assign_attempt("queue-f", 1, "w", "o").wait()
    assert ids(queued=True) == ["queue-g"]
    assert store.count_open("f") == 1


def test_queued_ones_come_in_the_order_of_acceptance(store: ControlStore) -> None:
    for name in ("c", "a", "b"):
        keep(store, name, owner="o")
    store.assign_attempt("c", 1, "w", "o").wait()
    store.return_execution("c", 1, "o").wait()
    assert [one.execution_id for one in store.open_executions("")] == ["c", "a", "b"]


def test_only_what_is_over_is_forgotten(store: ControlStore) -> None:
    for number in range(5):
        end(store, keep(store, f"e-{number}"), 0.0)
    end(store, keep(store, "kept"), 1000.0)
    keep(store, "open")
    assert store.expire_executions(limit=2) == 2
    assert store.execution("kept") is not None
    assert store.expire_executions() == 3
    assert store.expire_executions() == 0
    assert [one.execution_id for one in store.executions(ExecutionFilter(), "", 9).entries] == ["open", "kept"]
    assert [one.execution_id for one in store.executions(ExecutionFilter("f"), "", 9).entries] == ["open", "kept"]


def test_only_so_many_records_are_kept_and_the_oldest_successes_go_first(store: ControlStore) -> None:
    for number in range(6):
        end(store, keep(store, f"e-{number}"), 1000.0 - number, ok=number % 2 == 1)
    keep(store, "open")

    def kept() -> list[str]:
        return [one.execution_id for one in store.executions(ExecutionFilter(), "", 50).entries]

    assert store.expire_executions(max_records=6) == 0
    assert store.expire_executions(max_records=4) == 2
    assert kept() == ["open", "e-5", "e-4", "e-2", "e-0"]
    assert store.expire_executions(max_records=1, limit=1) == 1
    assert kept() == ["open", "e-4", "e-2", "e-0"]
    assert store.expire_executions(max_records=1) == 2
    assert len(kept()) == 2
    assert kept()[0] == "open"


def test_what_was_not_accepted_leaves_no_trace(store: ControlStore) -> None:
    for phase, agent in ((Phase.QUEUED, ""), (Phase.STARTING, "a1")):
        keep(store, "e1", agent=agent, phase=phase, idempotency_key="k", owner="s1")
        store.forget_execution("e1", "s1").wait()
        assert store.execution("e1") is None
        assert store.execution_by_key("f", "k") is None
        assert not store.open_executions(agent)
        assert not store.executions_of("s1")
        assert not store.executions(ExecutionFilter(), "", 10).entries
        assert not store.executions(ExecutionFilter(function_name="f", queued=True), "", 10).entries
        assert store.count_open("f") == 0
    made = keep(store, "e1", idempotency_key="k", owner="s1")
    end(store, made, 0.0)
    keep(store, "e2")
    store.forget_execution("e1", "s1").wait()
    store.forget_execution("nobody", "s1").wait()
    assert store.execution("e1") is None
    assert store.expire_executions() == 0
    assert [one.execution_id for one in store.executions(ExecutionFilter(), "", 10).entries] == ["e2"]
    assert keep(store, "e3", idempotency_key="k").execution_id == "e3"


def test_a_former_owner_moves_and_forgets_nothing(store: ControlStore) -> None:
    keep(store, "e-1", owner="frozen", idempotency_key="k", agent="w-1", phase=Phase.STARTING)
    store.adopt_session("frozen", "heir")
    store.assign_attempt("e-1", 1, "w-2", "heir").wait()
    for move in (store.assign_attempt("e-1", 1, "w-1", "frozen"), store.return_execution("e-1", 1, "frozen")):
        with pytest.raises(Conflict):
            move.wait()
    store.forget_execution("e-1", "frozen").wait()
    found = store.execution_by_key("f", "k")
    assert found is not None
    assert (found.owner, found.record.agent_id, found.record.phase) == ("heir", "w-2", Phase.STARTING)
    assert store.executions_of("frozen") == []
    assert [one.execution_id for one in store.open_executions("w-2")] == ["e-1"]
    store.return_execution("e-1", 1, "heir").wait()
    assert [one.execution_id for one in store.open_executions("")] == ["e-1"]


# -- leases and notes


def acquire(store: ControlStore, name: str, owner: str, seconds: float = 15.0) -> Lease | None:
    """By a clock that stands still, where it is asked for: one that lasts no time has run out at once."""
    return store.acquire_lease(name, owner, seconds, 100.0)


def test_a_lease_has_one_holder_at_a_time(store: ControlStore) -> None:
    first = acquire(store, "leader", "a")
    assert first is not None
    assert acquire(store, "leader", "b") is None
    longer = acquire(store, "leader", "a", 0.0)
    assert longer is not None
    assert (longer.token, longer.seconds_left) == (first.token, 0.0)
    taken = acquire(store, "leader", "b")
    assert taken is not None
    assert taken.token > first.token
    held = store.lease("leader", 100.0)
    assert held is not None
    assert (held.name, held.owner, held.token) == ("leader", "b", taken.token)
    assert 10 < held.seconds_left <= 15
    # A release by a former holder does not take it from the present one.
    store.release_lease(longer)
    assert acquire(store, "leader", "c") is None
    store.release_lease(taken)
    (held,) = store.leases("leader", 100.0)
    assert held.seconds_left < 0
    again = acquire(store, "leader", "a")
    assert again is not None
    assert again.token > taken.token
    assert store.lease("nobody", 100.0) is None


def test_a_holder_who_slept_gets_a_new_token(store: ControlStore) -> None:
    first = acquire(store, "leader", "a", 0.0)
    late = acquire(store, "leader", "a")
    assert first is not None
    assert late is not None
    assert late.token > first.token


def test_only_an_agent_that_is_known_is_updated(store: ControlStore) -> None:
    assert not store.update_agent(AgentRecord("w", "h:1"))
    assert store.agents() == []
    store.save_agent(AgentRecord("w", "h:1"))
    assert store.update_agent(AgentRecord("w", "h:2"))
    assert store.agents() == [AgentRecord("w", "h:2")]
    assert store.agent("w") == AgentRecord("w", "h:2")
    assert store.agent("another") is None


def test_a_late_leader_changes_nothing(store: ControlStore) -> None:
    late = acquire(store, "leader", "a", 0.0)
    now = acquire(store, "leader", "b")
    assert late is not None
    assert now is not None
    store.save_agent(AgentRecord("w", "h:1"), now)
    store.set_note("key", "new", now)
    keep(store, "e-1", owner="dead")
    with pytest.raises(LeaseLost):
        store.save_agent(AgentRecord("w", "h:2"), late)
    with pytest.raises(LeaseLost):
        store.update_agent(AgentRecord("w", "h:2"), late)
    with pytest.raises(LeaseLost):
        store.delete_agent("w", late)
    with pytest.raises(LeaseLost):
        store.set_note("key", "old", late)
    with pytest.raises(LeaseLost):
        store.delete_note("key", late)
    with pytest.raises(LeaseLost):
        store.adopt_session("dead", "a", late)
    assert store.agents() == [AgentRecord("w", "h:1")]
    assert store.note("key") == "new"
    store.delete_note("key", now)
    assert store.note("key") is None
    assert store.adopt_session("dead", "b", now) == 1
    assert store.delete_agent("w", now) is True


def test_leases_by_prefix(store: ControlStore) -> None:
    for name in ("flux/a", "flux/b", "flux-not", "leader"):
        acquire(store, name, name)
    assert [lease.name for lease in store.leases("flux/", 100.0)] == ["flux/a", "flux/b"]


def test_old_names_go_unless_something_is_left_to_adopt(store: ControlStore) -> None:
    keep(store, "e-1", owner="heir")
    for name in ("gone", "heir"):
        acquire(store, f"flux/{name}", name, -LEASE_MEMORY - 60)
    token = acquire(store, "flux/new", "new")
    assert [lease.name for lease in store.leases("flux/", 100.0)] == ["flux/heir", "flux/new"]
    # A name that comes back is no earlier holder.
    back = acquire(store, "flux/gone", "gone")
    assert token is not None
    assert back is not None
    assert back.token > token.token


def test_notes(store: ControlStore) -> None:
    assert store.note("scale") is None
    store.set_note("scale", "ö")
    store.set_note("scale", "b")
    assert store.note("scale") == "b"
    store.set_note("other", "c")
    store.delete_note("scale")
    store.delete_note("scale")
    assert (store.note("scale"), store.note("other")) == (None, "c")


# -- the store itself


def test_ping_goes_through(store: ControlStore) -> None:
    store.ping()


def test_a_closed_store_is_away_never_empty(store: ControlStore) -> None:
    keep(store, "e-1")
    store.close()
    asks = [
        store.functions,
        store.agents,
        store.functions_revision,
        store.ping,
        lambda: store.function("f"),
        lambda: store.archive("d"),
        lambda: store.execution("e-1"),
        lambda: store.executions(ExecutionFilter(), "", 5),
        lambda: store.open_executions(""),
        lambda: store.executions_of("o"),
        lambda: store.count_open("f"),
        lambda: store.lease("leader", 1.0),
        lambda: store.leases("f", 1.0),
        lambda: store.note("k"),
        lambda: store.set_note("k", "v"),
        lambda: store.delete_note("k"),
        lambda: store.save_function(function()),
        lambda: store.create_execution(entry("e-2"), durable=False),
        lambda: store.assign_attempt("e-1", 1, "w", "o").wait(),
        lambda: store.return_execution("e-1", 1, "o").wait(),
        lambda: store.end_attempt(entry("e-1").record, 1, 1.0).wait(),
        lambda: store.claim_executions("o", "f", 1),
        lambda: store.adopt_session("o", "p"),
        lambda: store.request("e-1"),
        lambda: store.open_ids("o"),
        store.queued,
        store.expire_executions,
    ]
    for ask in asks:
        with pytest.raises(StoreUnavailable):
            ask()


def test_many_threads_at_once_lose_nothing(store: ControlStore) -> None:
    def life(number: int) -> None:
        made = keep(store, f"e-{number}", owner="flux-1")
        store.assign_attempt(f"e-{number}", 1, f"w-{number % 3}", "flux-1").wait()
        if number % 2:
            end(store, made)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(life, range(200)))
    assert store.count_open("f") == 100
    assert sum(len(store.open_executions(f"w-{number}")) for number in range(3)) == 100
    page = store.executions(ExecutionFilter(), "", 500)
    sequences = [one.sequence for one in page.entries]
    assert len(sequences) == 200
    assert sequences == sorted(set(sequences), reverse=True)
