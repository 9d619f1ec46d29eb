"""Two versions on one store and over the wire: neither trips over what only the other one knows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from fluxlib.errors import StoreUnavailable
from fluxlib.model import (
    AgentRecord,
    AgentStatus,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    Network,
    NodeFigures,
    Phase,
)
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.store.base import ControlStore, ExecutionFilter
from fluxlib.store.records_redis import RedisRecordStore
from fluxlib.store.records_sqlite import SqliteRecordStore
from fluxlib.store.redis import RedisControlStore
from fluxlib.store.redis_migration import bring_up_to_date
from fluxlib.store.sqlite import SqliteControlStore
from tests.support.entries import end, entry, function, keep
from tests.support.newer_version import NewerVersion
from tests.support.redis_server import RedisServer

_NEWER_WRITES = """
import json, sys
from dataclasses import asdict, replace
from fluxlib.model import *
from fluxlib.store.base import ExecutionEntry
from fluxlib.store.redis import RedisControlStore
store = RedisControlStore(sys.argv[1])
store.save_agent(AgentRecord("new", "h:1", status=AgentStatus.ASLEEP, zone="eu"))
spec = FunctionSpec("new", "main.sh", gpus=2, network=Network.EGRESS)
store.save_function(Function(spec, spec.digest()))
for name, phase in (("ended", Phase.STARTING), ("thawing", Phase.THAWING)):
    record = ExecutionRecord(name, "new", "w", phase=phase, joules=3.0)
    store.create_execution(ExecutionEntry(record, None, "flux-new"), durable=True)[1].wait()
record = ExecutionRecord("ended", "new", "w").ended(ExecutionStatus.SKIPPED, at=5.0, kind=ErrorKind.TOO_HOT)
store.end_attempt(record, 1, 1000.0).wait()
store.set_note("figures", json.dumps(asdict(NodeFigures(gpu_percent=7.0, max_tasks=3))))
print(json.dumps(spec.digest()))
"""
_NEWER_READS = """
import json, sys
from fluxlib.store.redis import RedisControlStore
from fluxlib.store.base import ExecutionFilter
from fluxlib.model import NodeFigures
store = RedisControlStore(sys.argv[1])
(agent,) = store.agents()
(function,) = store.functions()
(record,) = [entry.record for entry in store.executions(ExecutionFilter(), "", 9).entries]
(claimed,) = store.claim_executions("flux-new", "f", 9) or [None]
figures = NodeFigures.from_fields(json.loads(store.note("figures")))
print(json.dumps([agent.zone, agent.address, function.spec.gpus, record.joules, record.status.value, record.exit_code,
    figures.gpu_percent, figures.max_tasks]))
"""
_NEWER_AGENT = """
import sys
from fluxlib.model import *
from fluxlib.rpc import codec
record = ExecutionRecord("e", "f", "w", joules=3.0, exit_code=0, cpu_seconds=1.5)
kind = ErrorKind.TOO_HOT if sys.argv[1] == "hot" else ErrorKind.NONE
record = record.ended(ExecutionStatus.FAILED if kind else ExecutionStatus.SUCCESS, at=5.0, kind=kind)
figures = codec.report_to_message(codec.NodeReport("w", NodeFigures(max_tasks=4, gpu_percent=9.0)))
import json
print(json.dumps([codec.response_from_record(record).SerializeToString().hex(), figures.SerializeToString().hex()]))
"""
_NEWER_FLUX = """
import json, sys
from fluxlib.model import *
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
message = pb.ExecutionResponse.FromString(bytes.fromhex(sys.argv[1]))
record = codec.record_from_response(message, ExecutionRequest("e", "f"), "w", 9.0)
report = codec.report_from_message(pb.NodeStatusResponse.FromString(bytes.fromhex(sys.argv[2])), 9.0)
print(json.dumps([record.status.value, record.joules, record.peak_memory_bytes, report.figures.max_tasks]))
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> NewerVersion:
    return NewerVersion(tmp_path_factory.mktemp("newer"))


@pytest.fixture
def redis_store(redis_server: RedisServer) -> Iterator[RedisControlStore]:
    redis_server.empty()
    store = RedisControlStore(redis_server.address)
    yield store
    store.close()


def test_a_store_that_a_newer_version_writes_to_is_read(
    newer: NewerVersion, redis_server: RedisServer, redis_store: RedisControlStore
) -> None:
    digest = newer.run(_NEWER_WRITES, redis_server.address)
    (agent,) = redis_store.agents()
    assert (agent.agent_id, agent.address, agent.status) == ("new", "h:1", AgentStatus.UNKNOWN)
    assert not agent.status.takes_work
    (found,) = redis_store.functions()
    # A network that is not known is none, never the host's.
    assert (found.spec.name, found.spec.network, found.spec_digest) == ("new", Network.NONE, digest)
    thawing, ended = redis_store.executions(ExecutionFilter(), "", 9).entries
    assert (thawing.record.status, thawing.record.phase) == (ExecutionStatus.RUNNING, Phase.UNKNOWN)
    assert (ended.record.status, ended.record.error_kind) == (ExecutionStatus.UNKNOWN, ErrorKind.UNKNOWN)
    assert ended.record.status.ended
    assert ended.record.to_json()["error_kind"] == "unknown"
    figures = NodeFigures.from_fields(json.loads(redis_store.note("figures") or ""))
    assert figures.max_tasks == 3
    # What it left open goes on here.
    redis_store.assign_attempt("thawing", 1, "w", "flux-new").wait()


def test_a_newer_version_reads_what_this_one_writes(
    newer: NewerVersion, redis_server: RedisServer, redis_store: RedisControlStore
) -> None:
    redis_store.save_agent(AgentRecord("old", "h:1"))
    redis_store.save_function(function())
    end(redis_store, keep(redis_store, "e-1", agent="w", phase=Phase.STARTING))
    redis_store.set_note("figures", json.dumps(asdict(NodeFigures(max_tasks=3))))
    read = newer.run(_NEWER_READS, redis_server.address)
    assert read == ["nowhere", "h:1", 0, 0.5, "success", None, 0.0, 3]


@pytest.mark.parametrize("how", ["well", "hot"])
def test_a_newer_agent_is_understood(newer: NewerVersion, how: str) -> None:
    answer, report = (bytes.fromhex(text) for text in newer.run(_NEWER_AGENT, how))
    message = pb.ExecutionResponse.FromString(answer)
    record = codec.record_from_response(message, ExecutionRequest("e", "f"), "w", 9.0)
    assert record.status is (ExecutionStatus.SUCCESS if how == "well" else ExecutionStatus.FAILED)
    assert record.error_kind is (ErrorKind.NONE if how == "well" else ErrorKind.UNKNOWN)
    assert (record.exit_code, record.cpu_seconds) == (0, 1.5)
    assert codec.report_from_message(pb.NodeStatusResponse.FromString(report), 1.0).figures.max_tasks == 4


def test_a_newer_flux_understands_this_agent(newer: NewerVersion) -> None:
    record = ExecutionRecord("e", "f", "w", peak_memory_bytes=77).ended(ExecutionStatus.SUCCESS, at=5.0)
    report = codec.NodeReport("w", NodeFigures(max_tasks=4))
    sent = (codec.response_from_record(record), codec.report_to_message(report))
    assert newer.run(_NEWER_FLUX, *(one.SerializeToString().hex() for one in sent)) == ["success", 0.5, 77, 4]


# -- the version before records had names

_OLD_ROW = (
    '["e-1","f","w","failed","ended",true,5,false,"exit code 3",1,3,null,12,4,1000.125,1000.5,1001.5,4096,0.25,["w1"]]'
)
_OLD_REQUEST = b'[["a","\\u00f6"],2.5]\n\x00\xffin\n'


def test_an_agent_of_the_version_before_is_understood() -> None:
    message = pb.ExecutionResponse(output=b"hello", record=_OLD_ROW.encode())
    record = codec.record_from_response(message, ExecutionRequest("e-1", "f"), "w", 9.0)
    assert (record.status, record.error_kind, record.exit_code) == (ExecutionStatus.FAILED, ErrorKind.EXIT_CODE, 3)
    assert (record.output, record.warnings, record.attempt) == (b"hello", ("w1",), 1)


def test_a_flux_of_the_version_before_is_answered_as_it_reads() -> None:
    record = codec.record_from_response(
        pb.ExecutionResponse(output=b"hello", record=_OLD_ROW.encode()), ExecutionRequest("e-1", "f"), "w", 9.0
    )
    # It takes exactly these twenty, by their order.
    assert json.loads(codec.response_from_record(record).record) == json.loads(_OLD_ROW)


def test_a_flux_of_the_version_before_is_told_no_kind_that_it_does_not_know() -> None:
    for kind in ErrorKind:
        ended = ExecutionRecord("e-1", "f", "w").ended(ExecutionStatus.FAILED, at=1.0, error="odd", kind=kind)
        if not kind.nothing_started:
            assert json.loads(codec.response_from_record(ended).record)[9] in range(16)


def old_flux_db(path: Path) -> None:
    """As the version before left it: one that is queued, one at an agent, one that has ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    script = (Path(__file__).parent / "schema_1.sql").read_text("utf-8")
    with sqlite3.connect(path) as database:
        database.executescript(script)
        insert = (
            "INSERT INTO executions (id, function, agent, status, phase, asynchronous, started_at, owner,"
            " idempotency_key, keep_until, request, record) VALUES (?, 'f', ?, ?, ?, 1, 1000.125, 'old', ?, ?, ?, ?)"
        )
        database.execute(insert, ("queued", "", "running", "queued", "k", None, _OLD_REQUEST, None))
        database.execute(insert, ("at-agent", "w", "running", "starting", None, None, _OLD_REQUEST, None))
        database.execute(insert, ("e-1", "w", "failed", "ended", None, 9e9, None, _OLD_ROW))
    database.close()


def check_migrated(store: ControlStore) -> None:
    found = store.execution("e-1")
    assert found is not None
    assert (found.record.error_kind, found.record.exit_code, found.record.attempt) == (ErrorKind.EXIT_CODE, 3, 1)
    assert store.queued()["f"].waiting == 1
    assert store.adopt_session("old", "new") == 2
    (claimed,) = store.claim_executions("new", "f", 5)
    made = entry("queued")
    assert (claimed.execution_id, claimed.idempotency_key, claimed.request) == ("queued", "k", made.request)
    store.assign_attempt("queued", 1, "w", "new").wait()
    assert store.queued() == {}
    assert store.open_ids("new") == {"queued", "at-agent"}
    keep(store, "later")
    page = store.executions(ExecutionFilter(), "", 9)
    assert [one.execution_id for one in page.entries] == ["later", "e-1", "at-agent", "queued"]
    assert store.expire_executions(max_records=1) == 0


def test_a_file_of_the_version_before_is_brought_up_to_date_once(state_dir: Path) -> None:
    old_flux_db(state_dir / "flux.db")
    store = SqliteControlStore(state_dir / "flux.db")
    try:
        check_migrated(store)
    finally:
        store.close()
    again = SqliteControlStore(state_dir / "flux.db")
    assert again.open_ids("new") == {"queued", "at-agent"}
    again.close()


def test_the_records_of_an_agent_of_the_version_before_are_read(state_dir: Path) -> None:
    state_dir.mkdir(exist_ok=True)
    with sqlite3.connect(state_dir / "agent.db") as database:
        database.executescript(
            "CREATE TABLE records (id TEXT PRIMARY KEY, running INTEGER NOT NULL, keep_until REAL,"
            " record TEXT NOT NULL, output BLOB); CREATE INDEX records_running ON records (id) WHERE running;"
            " CREATE INDEX records_expiring ON records (keep_until) WHERE keep_until IS NOT NULL; PRAGMA user_version=1"
        )
        database.execute("INSERT INTO records VALUES ('e-1', 0, 9e9, ?, X'6869')", (_OLD_ROW,))
    database.close()
    records = SqliteRecordStore(state_dir / "agent.db")
    try:
        found = records.record("e-1")
    finally:
        records.close()
    assert found is not None
    assert (found.exit_code, found.output) == (3, b"hi")


def test_the_records_of_an_agent_of_the_version_before_in_redis_are_read(redis_server: RedisServer) -> None:
    running = _OLD_ROW.replace('"failed","ended"', '"running","running"').replace("e-1", "e-2")
    with redis_server.client() as client:
        client.flushall()
        client.hset("fluxpy-agent:w:record:e-1", mapping={"record": _OLD_ROW, "output": b"hi"})
        client.zadd("fluxpy-agent:w:expiring", {"e-1": 9e9})
        client.hset("fluxpy-agent:w:record:e-2", mapping={"record": running})
        client.sadd("fluxpy-agent:w:running", "e-2")
    records = RedisRecordStore(redis_server.address, "w")
    try:
        found = records.record("e-1")
        assert found is not None
        assert (found.exit_code, found.output) == (3, b"hi")
        assert [record.execution_id for record in records.unfinished()] == ["e-2"]
    finally:
        records.close()


def old_redis(server: RedisServer, *, lease_left: float) -> None:
    """What the version before kept of the same three, and the lease of its session."""
    common = {"function": "f", "async": "1", "started": "1000.125", "owner": "old", "key": ""}
    ids = {
        "queued": {"agent": "", "status": "running", "phase": "queued", "key": "k", "request": _OLD_REQUEST},
        "at-agent": {"agent": "w", "status": "running", "phase": "starting", "request": _OLD_REQUEST},
        "e-1": {"agent": "w", "status": "failed", "phase": "ended", "keep": "9000000000", "record": _OLD_ROW},
    }
    with server.client() as client:
        client.flushall()
        client.set("fluxpy:schema", 1)
        client.set("fluxpy:imported", 1)
        client.set("fluxpy:idempotent:f:k", "queued")
        client.set("fluxpy:sequence", 3)
        for sequence, (execution_id, fields) in enumerate(ids.items(), 1):
            values = {"id": execution_id, "seq": sequence, **common, **fields}
            client.hset(f"fluxpy:execution:{execution_id}", mapping=values)
            for index in ("executions", "executions:f:f"):
                client.zadd(f"fluxpy:{index}", {execution_id: sequence})
            for index in (f"executions:s:{fields['status']}", f"executions:fs:f:{fields['status']}"):
                client.zadd(f"fluxpy:{index}", {execution_id: sequence})
            if fields["status"] == "running":
                client.zadd("fluxpy:open:owner:old", {execution_id: sequence})
                client.zadd(f"fluxpy:open:agent:{fields['agent']}", {execution_id: sequence})
        client.zadd("fluxpy:queued", {"queued": 1})
        client.zadd("fluxpy:queued:f:f", {"queued": 1})
        client.zadd("fluxpy:expiring", {"e-1": 9e9})
        now, _ = client.time()
        client.hset("fluxpy:lease:flux/old", mapping={"owner": "old", "token": "1", "expires": str(now + lease_left)})
        client.zadd("fluxpy:leases", {"flux/old": now + lease_left})


def test_a_redis_of_the_version_before_is_brought_up_to_date_once(redis_server: RedisServer) -> None:
    # Its last process was killed a moment ago: its lease is waited for.
    old_redis(redis_server, lease_left=1.5)
    store = RedisControlStore(redis_server.address)
    try:
        check_migrated(store)
        bring_up_to_date(store._link)
        assert store.open_ids("new") == {"queued", "at-agent"}
        with redis_server.client() as client:
            assert client.get("fluxpy:schema") == b"2"
    finally:
        store.close()


def test_a_redis_that_the_version_before_still_uses_is_left_alone(redis_server: RedisServer) -> None:
    store = RedisControlStore(redis_server.address)
    try:
        old_redis(redis_server, lease_left=60)
        with pytest.raises(StoreUnavailable, match=r"1 Flux of an older version still use this Redis \(old\): stop"):
            bring_up_to_date(store._link, patience=0.2)
        with redis_server.client() as client:
            assert client.get("fluxpy:schema") == b"1"
            assert client.hget("fluxpy:execution:e-1", "record") == _OLD_ROW.encode()
    finally:
        store.close()
