"""Redis as a store: away, restarted, slow to grow, and with an original's keys in it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from fluxlib.archive import digest_of
from fluxlib.control.agents.leadership import Leadership
from fluxlib.errors import StoreUnavailable
from fluxlib.model import AgentRecord, Behavior, ExecutionStatus
from fluxlib.store import open_control_store, open_record_store
from fluxlib.store.base import ExecutionFilter
from fluxlib.store.redis import RedisControlStore
from tests.support.entries import end, entry, function, keep
from tests.support.programs import make_zip
from tests.support.redis_server import RedisServer


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    redis_server.empty()
    return redis_server


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisControlStore]:
    store = RedisControlStore(server.address)
    yield store
    store.close()


def test_what_an_execution_costs_does_not_grow_with_those_retained(
    server: RedisServer, store: RedisControlStore
) -> None:
    def cost() -> dict[str, int]:
        number = len(costs)
        server_before = server.calls()
        made = keep(store, f"costed-{number}", agent="w", owner="flux-1", idempotency_key=f"k-{number}")
        store.return_execution(made.execution_id, 1, "flux-1").wait()
        store.claim_executions("flux-1", "f", 5)
        store.request(made.execution_id)
        store.open_ids("flux-1")
        store.assign_attempt(made.execution_id, 1, "w", "flux-1").wait()
        store.execution(made.execution_id)
        store.open_executions("w")
        store.executions_of("flux-1")
        store.count_open("f")
        end(store, made, 5000.0)
        store.executions(ExecutionFilter(function_name="f"), "", 10)
        store.expire_executions(max_records=10_000)
        spent = {name: count - server_before.get(name, 0) for name, count in server.calls().items()}
        return {name: count for name, count in spent.items() if count and name != "info"}

    costs: list[dict[str, int]] = []
    for _ in range(12):
        end(store, keep(store, f"old-{len(costs)}-{_}"), 5000.0)
    costs.append(cost())
    for number in range(300):
        end(store, keep(store, f"e-{number}"), 5000.0)
    costs.append(cost())
    assert costs[0] == costs[1]
    assert not {"keys", "scan", "sscan", "hscan", "zscan", "hgetall", "smembers"} & set(costs[1])


def test_writes_of_many_threads_share_round_trips(server: RedisServer, store: RedisControlStore) -> None:
    sent: list[int] = []
    pipeline = store._link._pipeline
    go = threading.Event()

    def counted(batch: list[object]) -> list[object]:
        if not sent:
            # While the first is on its way, all others gather.
            go.wait(10)
        sent.append(len(batch))
        return pipeline(batch)  # type: ignore[arg-type]

    store._link._pipeline = counted  # type: ignore[method-assign, assignment]
    commits = [store.create_execution(entry(f"e-{number}"), durable=True)[1] for number in range(100)]
    go.set()
    for commit in commits:
        commit.wait()
    assert sum(sent) == 100
    assert len(sent) <= 3


def test_two_processes_share_one_state(server: RedisServer, store: RedisControlStore) -> None:
    other = RedisControlStore(server.address)
    try:
        store.save_function(function(code_digest=digest_of(b"zip")), b"zip")
        assert other.archive(digest_of(b"zip")) == b"zip"
        assert other.functions_revision() == store.functions_revision()
        made = keep(store, "e-1", owner="flux-1", idempotency_key="k")
        assert other.create_execution(entry("e-2", idempotency_key="k"), durable=True)[0] == "e-1"
        end(other, made)
        found = store.execution("e-1")
        assert found is not None
        assert found.record.status is ExecutionStatus.SUCCESS
    finally:
        other.close()


def test_code_is_whole_though_the_connection_breaks_before_an_answer(
    store: RedisControlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, breaks = redis.connection.AbstractConnection.read_response, [True]

    def broken(self: redis.connection.AbstractConnection, *arguments: object, **more: object) -> object:
        answer = read(self, *arguments, **more)  # type: ignore[arg-type]
        if breaks:
            breaks.clear()
            raise redis.ConnectionError("broken")
        return answer

    code = bytes(range(256)) * 80_000
    monkeypatch.setattr(redis.connection.AbstractConnection, "read_response", broken)
    store.save_function(function(code_digest=digest_of(code)), code)
    assert not breaks
    assert store.archive(digest_of(code)) == code


def test_pieces_that_are_lost_meanwhile_are_no_deployment(
    server: RedisServer, store: RedisControlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store._link.run

    def losing(*arguments: object) -> object:
        server.empty()
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store._link, "run", losing)
    with pytest.raises(StoreUnavailable, match="lost a part"):
        store.save_function(function(code_digest="d"), bytes(20_000_000))
    assert store.function("f") is None


def test_damaged_code_is_not_handed_out(server: RedisServer, store: RedisControlStore) -> None:
    digest = digest_of(b"zip")
    store.save_function(function(code_digest=digest), b"zip")
    with server.client() as client:
        client.rpush(f"fluxpy:archive:{digest}", b"zip")
    with pytest.raises(StoreUnavailable, match="is damaged"):
        store.archive(digest)
    store.save_function(function(code_digest=digest), b"zip")
    assert store.archive(digest) == b"zip"


def test_the_clocks_of_two_machines_do_not_matter(server: RedisServer, store: RedisControlStore) -> None:
    other = RedisControlStore(server.address)
    try:
        first = Leadership(store, "a", shared=True, clock=lambda: 5000.0)
        for name, hours in (("behind", -1), ("ahead", 1)):
            second = Leadership(other, name, shared=True, clock=lambda hours=hours: 5000.0 + hours * 3600)  # type: ignore[misc]
            for one in (first, second, first):
                one.tick(0.0)
            assert (first.leads, second.leads) == (True, False)
            assert "a" in second.others
            assert name in first.others
            assert not first.gone | second.gone
        first.resign()
        second.tick(0.0)
        assert second.leads
        assert second.gone == {"a"}
    finally:
        other.close()


def test_a_redis_that_is_away_is_said_to_be_and_its_return_is_noticed(tmp_path: Path) -> None:
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with RedisServer(tmp_path, *options) as server:
        store = open_control_store(server.address, tmp_path)
        records = open_record_store("redis", server.address, tmp_path, "worker-1")
        try:
            assert store.persistence() == ()
            made = keep(store, "e-1", idempotency_key="k")
            server.kill()
            for ask in (
                store.ping,
                store.functions,
                lambda: store.execution("e-1"),
                lambda: store.execution("nobody"),
                lambda: store.executions(ExecutionFilter(), "", 5),
                lambda: store.create_execution(entry("e-2"), durable=True)[1].wait(),
                lambda: store.create_execution(entry("e-3", idempotency_key="x"), durable=True),
                lambda: store.end_attempt(made.record, 1, 1.0).wait(),
                lambda: store.acquire_lease("leader", "a", 15, 1.0),
                lambda: records.record("r-1"),
                records.flush,
            ):
                with pytest.raises(StoreUnavailable, match=r"Redis at 127\.0\.0\.1"):
                    ask()
            server.start()
            # Its scripts are gone and its state is not.
            end(store, made)
            found = store.execution("e-1")
            assert found is not None
            assert found.record.status is ExecutionStatus.SUCCESS
            assert store.execution("e-2") is None
            store.ping()
        finally:
            store.close()
            records.close()


def test_a_write_that_nobody_could_be_sent_is_told_from_one_that_may_have_been_made(
    server: RedisServer, store: RedisControlStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep(store, "e-1")
    pipeline = store._link._pipeline

    def broken(batch: list[Any]) -> list[Any]:
        pipeline(batch)
        raise redis.ConnectionError("Error 111 connecting to 127.0.0.1. Connection refused.")

    # It was made before its connection broke, whatever the error of the second attempt says.
    with monkeypatch.context() as patch:
        patch.setattr(store._link, "_pipeline", broken)
        commit = store.create_execution(entry("e-2"), durable=True)[1]
        with pytest.raises(StoreUnavailable) as unknown:
            commit.wait()
    assert not unknown.value.nothing_written
    assert store.execution("e-2") is not None

    with RedisServer(tmp_path) as other:
        away = RedisControlStore(other.address)
        try:
            keep(away, "e-1")
            other.kill()
            with pytest.raises(StoreUnavailable, match="cannot be reached") as refused:
                away.create_execution(entry("e-2"), durable=True)[1].wait()
            assert refused.value.nothing_written
        finally:
            away.close()


def test_an_agents_records_wait_for_a_redis_that_is_away(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        records = open_record_store("redis", server.address, tmp_path, "worker-1")
        try:
            running = entry("r-1", agent="worker-1").record
            records.begin(running)
            records.flush()
            server.kill()
            records.begin(entry("r-2", agent="worker-1").record)
            for name in ("r-1", "r-2"):
                ended = entry(name, agent="worker-1").record.ended(ExecutionStatus.SUCCESS, at=1001.0)
                records.end(ended, b"out", 5000.0)
            with pytest.raises(StoreUnavailable):
                records.flush()
            server.start()
            assert records.expire(1.0) == []
            records.flush()
            for name in ("r-1", "r-2"):
                found = records.record(name)
                assert found is not None
                assert (found.status, found.output) == (ExecutionStatus.SUCCESS, b"out")
            assert records.unfinished() == []
        finally:
            records.close()


def test_nobody_there_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"Redis at 127\.0\.0\.1:1 cannot be reached: Connection refused"):
        open_control_store("127.0.0.1:1", tmp_path)


def test_secrets_of_the_url_stay_out_of_messages(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable) as caught:
        open_control_store("redis://user:hunter2@127.0.0.1:1/0", tmp_path)
    assert "hunter2" not in caught.value.message


def test_lost_scripts_are_loaded_again_in_order(server: RedisServer, store: RedisControlStore) -> None:
    with server.client() as client:
        client.script_flush()
    made = entry("e-1")
    # One batch, or several: the end must not be tried before the creation.
    store.create_execution(made, durable=True)
    end(store, made)
    found = store.execution("e-1")
    assert found is not None
    assert found.record.status is ExecutionStatus.SUCCESS
    with server.client() as client:
        client.script_flush()
    assert len(store.executions(ExecutionFilter(), "", 5).entries) == 1


def test_a_connection_that_redis_closed_costs_nobody_a_write(server: RedisServer, store: RedisControlStore) -> None:
    for number in range(5):
        with server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        keep(store, f"e-{number}")
        assert store.execution(f"e-{number}") is not None


def test_a_store_of_a_newer_flux_is_left_alone(server: RedisServer) -> None:
    with server.client() as client:
        client.set("fluxpy:schema", 99)
    with pytest.raises(StoreUnavailable, match="newer Flux"):
        RedisControlStore(server.address)


def test_what_a_crash_could_lose_is_said(server: RedisServer, store: RedisControlStore) -> None:
    assert any("append-only" in warning for warning in store.persistence())
    with server.client() as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            assert any("maxmemory-policy noeviction" in warning for warning in store.persistence())
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")


def test_a_full_redis_lets_leaders_lead_and_records_end_and_expire(
    server: RedisServer, store: RedisControlStore
) -> None:
    """Only so can it become less full: the leader is who lets records expire."""
    running = keep(store, "running")
    for number in range(1500):
        store.create_execution(entry(f"e-{number}"), durable=False)
        ended = entry(f"e-{number}").record.ended(ExecutionStatus.SUCCESS, at=1.0)
        last = store.end_attempt(ended, 1, 0.0)
    last.wait()
    leader = store.acquire_lease("leader", "a", 15, 0.0)
    assert leader is not None
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"]) - 64 * 1024)  # type: ignore[index, arg-type]
        try:
            with pytest.raises(StoreUnavailable, match="is full"):
                keep(store, "more")
            with pytest.raises(StoreUnavailable, match="is full"):
                store.ping()
            assert store.acquire_lease("leader", "a", 15, 0.0) is not None
            assert store.acquire_lease("flux/b", "b", 15, 0.0) is not None
            # What a leader reads before it comes to the records that expire.
            assert store.queued()["f"].waiting == 1
            assert (store.functions(), store.function("f"), store.agents(), store.note("n")) == ([], None, [], None)
            assert store.end_attempt(running.record.ended(ExecutionStatus.FAILED, at=1.0), 1, 1000.0).value() is True
            assert store.adopt_session("dead", "a", leader) == 0
            store.release_lease(leader)
            while store.expire_executions():
                pass
            keep(store, "more")
            store.ping()
        finally:
            client.config_set("maxmemory", "0")


def test_expiry_goes_by_the_clock_of_redis(
    server: RedisServer, store: RedisControlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two Flux whose clocks are apart: what one has ended the other does not forget."""
    other = RedisControlStore(server.address)
    try:
        for ahead in (7200.0, -7200.0):
            monkeypatch.setattr(time, "time", lambda ahead=ahead, now=time.time: now() + ahead)  # type: ignore[misc]
            end(store, keep(store, f"kept-{ahead}"), 60.0)
            end(store, keep(store, f"over-{ahead}"), 0.0)
            assert other.expire_executions() == 1
            monkeypatch.undo()
        assert {one.execution_id for one in other.executions(ExecutionFilter(), "", 9).entries} == {
            "kept-7200.0",
            "kept--7200.0",
        }
    finally:
        other.close()


def test_a_redis_that_is_emptied_or_new_says_so(
    server: RedisServer, store: RedisControlStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert not any("emptied" in warning for warning in store.persistence())
    server.empty()
    for _ in range(2):
        assert any("was emptied while Flux used it" in warning for warning in store.persistence())
    server.empty()
    caplog.clear()
    RedisControlStore(server.address).close()
    assert "a new, empty store was made" in caplog.text
    caplog.clear()
    again = RedisControlStore(server.address)
    assert "new, empty" not in caplog.text
    assert not any("emptied" in warning for warning in again.persistence())
    again.close()


def test_records_of_agents_on_one_redis_do_not_mix(server: RedisServer, tmp_path: Path) -> None:
    one, two = (open_record_store("redis", server.address, tmp_path, name) for name in ("worker-1", "worker-2"))
    try:
        one.begin(entry("r-1").record)
        one.flush()
        assert two.record("r-1") is None
        assert two.unfinished() == []
        assert len(one.unfinished()) == 1
    finally:
        one.close()
        two.close()


def test_an_originals_state_is_taken_over_once(server: RedisServer) -> None:
    code = make_zip({"run.sh": "#!/bin/sh\necho hi"})
    with server.client() as client:
        old = {
            "name": "old",
            "handler": "run.sh",
            "resources": {"cpu": 250, "memory": 128},
            "timeout": 30,
            "max_concurrency": 7,
            "max_concurrency_behavior": "wait",
            "env": {"A": "b"},
        }
        client.set("function:old", json.dumps(old))
        client.set("code:old", code)
        # Go without tags, amounts with units, and no code.
        client.set("function:bare", json.dumps({"Name": "bare", "Handler": "./x", "Resources": {"CPU": "500m"}}))
        # As the original program writes it.
        go = {"Name": "go", "Handler": "x", "CPUMillicores": 100, "MemoryMB": 64, "TimeoutSec": 2, "MaxConcurrency": 3}
        client.set("function:go", json.dumps(go | {"MaxConcurrencyBehavior": "wait", "CodePath": "", "Env": None}))
        client.set("function:broken", "not JSON")
        client.set("function:empty", "{}")
        agent = {"id": "worker-1", "address": "10.0.0.5:50052", "status": "online", "provider": "aws"}
        client.set("flux:agents:worker-1", json.dumps(agent | {"last_heartbeat": "2024-05-01T10:00:00.123456789Z"}))
        client.set("flux:agents:bad", json.dumps({"id": "Bad ID", "address": ""}))
        before = {key: client.dump(key) for key in client.keys("*")}  # type: ignore[union-attr]
    store = RedisControlStore(server.address)
    try:
        assert [one.spec.name for one in store.functions()] == ["bare", "go", "old"]
        taken = store.function("old")
        assert taken is not None
        spec = taken.spec
        assert (spec.cpu_millicores, spec.memory_mb, spec.timeout_seconds, spec.max_concurrency) == (250, 128, 30, 7)
        assert (spec.max_concurrency_behavior, dict(spec.env)) == (Behavior.WAIT, {"A": "b"})
        assert store.archive(taken.code_digest) == code
        assert taken.code_bytes == len(code)
        written = store.function("go")
        assert written is not None
        spec = written.spec
        assert (spec.cpu_millicores, spec.memory_mb, spec.timeout_seconds, spec.max_concurrency) == (100, 64, 2, 3)
        assert (spec.max_concurrency_behavior, dict(spec.env)) == (Behavior.WAIT, {})
        bare = store.function("bare")
        assert bare is not None
        assert (bare.spec.handler, bare.spec.cpu_millicores, bare.code_digest) == ("x", 500, "")
        (worker,) = store.agents()
        assert (worker.agent_id, worker.address, worker.provider) == ("worker-1", "10.0.0.5:50052", "aws")
        assert worker.legacy_certificate
        assert worker.last_heartbeat == pytest.approx(1714557600.123, abs=0.01)
        store.delete_function("old")
        store.save_agent(AgentRecord("worker-1", "moved:1"))
    finally:
        store.close()
    again = RedisControlStore(server.address)
    try:
        # Not a second time, and nothing of theirs was written.
        assert [one.spec.name for one in again.functions()] == ["bare", "go"]
        assert again.agents()[0].address == "moved:1"
        with server.client() as client:
            assert {key: client.dump(key) for key in before} == before
    finally:
        again.close()


def test_a_full_house_of_readers_waits_its_turn(store: RedisControlStore) -> None:
    keep(store, "e-1")
    with ThreadPoolExecutor(100) as pool:
        assert all(found is not None for found in pool.map(lambda _: store.execution("e-1"), range(500)))
