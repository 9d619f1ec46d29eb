"""Mutated zips and messages at an agent: it answers or refuses, it never crashes, no file lands anywhere else.

``FUZZ`` scales it: 1 (the default) is a minute, 25 are 200 000 zips and 200 000 messages. ``FUZZ_SEED`` makes
other ones.
"""

from __future__ import annotations

import io
import os
import random
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from fluxlib import archive as archives
from fluxlib.archive import Limits
from fluxlib.errors import InvalidInput
from fluxlib.model import ErrorKind
from fluxlib.rpc import tls
from fluxlib.rpc.gen import flux_pb2 as pb
from tests.agent.running import CODE, running

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(3600)]

SCALE = float(os.environ.get("FUZZ", "1"))
ZIPS = int(8_000 * SCALE)
MESSAGES = int(8_000 * SCALE)
SEED = int(os.environ.get("FUZZ_SEED", "20240607"))
SMALL = Limits(entries=50, total_bytes=4 * 1024 * 1024, ratio=100)

WORTHWHILE = [
    *(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08", b"\x01\x00\x08\x00"),
    *(
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"\xff\xff",
        b"\0\0",
        b"\x7f",
        b"\x80",
        b"../",
        b"/",
        b"\\",
        b"\0",
        b"..",
        b":",
    ),
]


def seeds() -> list[bytes]:
    """Zips of every kind there is: stored, deflated, with extra fields, comments, directories, links, zip64."""
    made = [CODE, b"", b"PK\x05\x06" + bytes(18)]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.comment = b"a comment"
            for name in ("main.sh", "a/", "a/b", "link", "d/e/f", "ü"):
                info = zipfile.ZipInfo(name)
                info.compress_type = method
                info.external_attr = (0o120777 if name == "link" else 0o100755) << 16
                info.extra = b"\x01\x00\x04\x00abcd"
                archive.writestr(info, b"#!/bin/sh\necho\n" * 20)
            with archive.open("large", "w", force_zip64=True) as entry:
                entry.write(b"x" * 3000)
        made.append(buffer.getvalue())
        made.append(made[-1].replace(b"link", b"xxxx"))
    corpus = sorted((Path(__file__).parents[1] / "archive" / "corpus").glob("*.zip"))
    made += [path.read_bytes() for path in corpus]
    return made


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to six small harms."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << chance.randrange(8)
            case 1:
                piece = chance.choice(WORTHWHILE)
                changed[at : at + len(piece)] = piece
            case 2:
                changed[at:at] = chance.choice(WORTHWHILE)
            case 3:
                del changed[at : at + chance.randint(1, 40)]
            case 4:
                changed[at:at] = changed[at : at + chance.randint(1, 200)]
            case 5:
                del changed[at:]
            case _:
                # Where the structures of a zip begin, so that more than the data is hit.
                found = changed.find(chance.choice(WORTHWHILE[:4]))
                if found >= 0:
                    offset = found + chance.randrange(46)
                    if offset < len(changed):
                        changed[offset] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return bytes(changed)


def generated(chance: random.Random) -> bytes:
    """A zip that is none the worse as a zip: its names, kinds and sizes are what may be wrong."""
    words = ["a", "b", "A", "main.sh", "con", "a.", " ", "..", ".", "", "é", "e\u0301", "x\0y", "C:", "\\", "n" * 300]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(chance.randint(1, 6)):
            depth = chance.randint(1, 3)
            mild = chance.random() < 0.8
            name = "/".join(f"{chance.choice('abcd')}{number}" if mild else chance.choice(words) for _ in range(depth))
            info = zipfile.ZipInfo("main.sh" if number == 0 else name + chance.choice(["", "", "", "/"]))
            info.compress_type = chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            kind = chance.choice([0o100755] * 12 + [0o120777] * 3 + [0o120777, 0o040755, 0o020666, 0o104755, 0])
            info.external_attr = kind << 16
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = chance.randbytes(20) if chance.random() < 0.9 else bytes(200_000)
                if kind == 0o120777:
                    data = "/".join(chance.choices(["..", ".", "main.sh", "a1", "b2", "", "/etc"], k=3)).encode()
                archive.writestr(info, data)
    return buffer.getvalue()


def tree(top: Path) -> dict[str, tuple[int, int]]:
    """Every path with its kind and size."""
    found = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(top))] = (stat.S_IFMT(status.st_mode), status.st_size if path.is_file() else 0)
    return found


def test_mutated_zips(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    originals = seeds()
    ground = tmp_path / "ground"
    ground.mkdir()
    (ground / "beside").write_text("untouched")
    outcomes: Counter[str] = Counter()
    for number in range(ZIPS):
        data = generated(chance) if number % 2 else mutated(chance.choice(originals), chance)
        target = ground / "in"
        target.mkdir()
        try:
            archives.unpack(data, "run.sh" if b"run.sh" in data else "main.sh", target, SMALL)
            outcomes["taken"] += 1
            kinds = {kind for kind, _ in tree(target).values()}
            assert kinds <= {stat.S_IFREG, stat.S_IFDIR}, f"case {number} of seed {SEED}: {kinds}"
        except InvalidInput:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {SEED} broke it: {error!r}") from error
        size = sum(size for _, size in tree(target).values())
        assert size <= SMALL.total_bytes, f"case {number} of seed {SEED}: {size} bytes"
        assert sorted(os.listdir(ground)) == ["beside", "in"], f"case {number} of seed {SEED}"
        _remove(target)
    assert (ground / "beside").read_text() == "untouched"
    # Both ways are really walked.
    assert min(outcomes["taken"], outcomes["refused"]) > ZIPS // 50, outcomes


def _remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()


CALLS = {
    "RegisterFunction": pb.FunctionConfig(name="hello", handler="main.sh", env={"A": "b"}, max_concurrency=3),
    "DeployFunction": pb.DeploymentPackage(
        function_name="hello", code_archive=CODE, config=pb.FunctionConfig(name="hello", handler="main.sh")
    ),
    "ExecuteFunction": pb.ExecutionRequest(function_name="hello", args=["say", "x"], execution_id="e-1", stdin=b"in"),
    "CancelExecution": pb.CancelExecutionRequest(execution_id="e-1", reason="why", no_wait=True),
    "GetExecution": pb.GetExecutionRequest(execution_id="e-1"),
    "HealthCheck": pb.HealthCheckRequest(),
    "ReportNodeStatus": pb.NodeStatusRequest(),
    "GetInventory": pb.InventoryRequest(),
    "RemoveFunction": pb.RemoveFunctionRequest(function_name="hello"),
    "CreateCertificateRequest": pb.CertificateRequestRequest(),
    "InstallCertificate": pb.InstallCertificateRequest(certificate_pem=b"x", ca_pem=b"y"),
}
STREAMS = {
    "ReadOutput": ("unary_stream", [pb.ReadOutputRequest(execution_id="e-1", offset=3, max_bytes=10)]),
    "DeployStream": (
        "stream_unary",
        [
            pb.DeployChunk(header=pb.DeploymentPackage(function_name="hello"), total_bytes=len(CODE)),
            pb.DeployChunk(data=CODE),
        ],
    ),
    "Attach": (
        "stream_stream",
        [
            pb.ControlFrame(hello=pb.ControlHello(session="s")),
            pb.ControlFrame(execute=[CALLS["ExecuteFunction"]], cancel=[CALLS["CancelExecution"]], received=["e-1"]),
        ],
    ),
}
# What an agent may answer to bytes it cannot read or will not do. INTERNAL or UNKNOWN would be a crash of a handler,
# except INTERNAL for a message that is none, which is gRPC's own answer.
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
}


def changed(message: Any, chance: random.Random) -> Any:
    """A message that can be read, with one to three of its fields as nobody would fill them."""
    made = type(message)()
    made.CopyFrom(message)
    for _ in range(chance.randint(1, 3)):
        if not made.DESCRIPTOR.fields:
            return made
        field = chance.choice(made.DESCRIPTOR.fields)
        if field.message_type is not None:
            continue
        if field.cpp_type == field.CPPTYPE_STRING and field.type == field.TYPE_BYTES:
            value: Any = chance.choice([b"", chance.randbytes(50), mutated(CODE, chance)])
        elif field.cpp_type == field.CPPTYPE_STRING:
            value = chance.choice(TEXTS)
        elif field.cpp_type == field.CPPTYPE_BOOL:
            value = chance.random() < 0.5
        elif field.cpp_type == field.CPPTYPE_DOUBLE:
            value = chance.choice([0.0, -1.0, 0.01, 1e300, float("nan"), float("inf")])
        elif field.cpp_type == field.CPPTYPE_ENUM:
            continue
        else:
            bits = 31 if "32" in _TYPE_NAMES[field.cpp_type] else 63
            low = 0 if _TYPE_NAMES[field.cpp_type].startswith("u") else -(2**bits)
            value = chance.choice([low, 0, 1, 5, 2**bits - 1])
        if field.is_repeated:
            getattr(made, field.name).append(value)
        else:
            setattr(made, field.name, value)
    return made


TEXTS = [
    "",
    "hello",
    "main.sh",
    "../x",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "e-1",
    "ü\u202e",
    "a b",
    ".",
    "-",
    "\n",
    "none",
]
_TYPE_NAMES = {1: "int32", 2: "int64", 3: "uint32", 4: "uint64"}


def _parses(kind: type, data: bytes) -> bool:
    try:
        kind.FromString(data)  # type: ignore[attr-defined]
    except Exception:
        return False
    return True


def _as_it_is(data: bytes) -> bytes:
    return data


class Wire:
    """Calls with raw bytes."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary(self, call: str, data: bytes) -> tuple[grpc.StatusCode, bytes]:
        method = self._channel.unary_unary(f"/flux.AgentService/{call}", _as_it_is, _as_it_is)
        return self._status(lambda: method(data, timeout=20))

    def stream(self, call: str, shape: str, messages: list[bytes]) -> grpc.StatusCode:
        method = getattr(self._channel, shape)(f"/flux.AgentService/{call}", _as_it_is, _as_it_is)
        asked = iter(messages) if shape.startswith("stream") else messages[0]
        answer = lambda: method(asked, timeout=20)  # noqa: E731
        if shape.endswith("unary"):
            return self._status(answer)[0]
        return self._status(lambda: b"".join(answer()))[0]

    @staticmethod
    def _status(ask: Callable[[], bytes]) -> tuple[grpc.StatusCode, bytes]:
        try:
            return grpc.StatusCode.OK, ask()
        except grpc.RpcError as error:
            return error.code(), b""  # type: ignore[attr-defined]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """Where the agent lives, with neighbours it must not touch."""
    (tmp_path / "neighbour").mkdir()
    (tmp_path / "neighbour" / "file").write_text("untouched")
    before = tree(tmp_path)
    yield tmp_path
    after = {path: what for path, what in tree(tmp_path).items() if path.split("/")[0] != "agent"}
    assert {path: what for path, what in before.items() if path != "agent"} == after


@pytest.mark.leaks("gRPC's threads of an ended channel take their time")
def test_mutated_messages(outside: Path, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(SEED)
    home = outside / "agent"
    home.mkdir()
    statuses: Counter[str] = Counter()
    own = set(os.listdir("/proc/self/fd"))
    with running(home, max_tasks=8, execution_ttl=1) as agent:
        assert agent.deploy().success
        with grpc.insecure_channel(f"127.0.0.1:{agent.agent.port}", tls.SIZE_OPTIONS) as channel:
            wire = Wire(channel)
            for number in range(MESSAGES):
                where = f"case {number} of seed {SEED}"
                if number % 10:
                    call = chance.choice(list(CALLS))
                    seed = CALLS[call]
                    sound = chance.random() < 0.6
                    data = changed(seed, chance).SerializeToString()
                    data = data if sound else mutated(data, chance)
                    readable = _parses(type(seed), data)
                    status, _ = wire.unary(call, data)
                else:
                    call = chance.choice(list(STREAMS))
                    shape, messages = STREAMS[call]
                    raw = [changed(one, chance).SerializeToString() for one in messages]
                    raw = [mutated(one, chance) if chance.random() < 0.3 else one for one in raw]
                    readable = all(_parses(type(messages[0]), one) for one in raw)
                    status = wire.stream(call, shape, raw)
                statuses[status.name] += 1
                assert status in EXPECTED or not readable, f"{where}: {call} was answered {status.name}"
                if number % 500 == 0:
                    assert agent.deploy().success, where
            assert agent.deploy().success
            for execution_id in agent.agent._executions.open_ids():
                agent.cancel(execution_id)
            assert agent.run("say", "still here").output == b"still here\n"
            report = agent.stub.ReportNodeStatus(pb.NodeStatusRequest(), timeout=5)
            assert report.active_tasks == 0
        # What cannot be read gRPC logs itself; anything else is a handler that broke.
        broken = [record for record in caplog.records if record.exc_info and record.name != "grpc._common"]
        assert not broken, broken
        assert "the spawner died" not in caplog.text
        assert psutil.Process().num_threads() < 300
    assert statuses["OK"] > MESSAGES // 4, statuses
    assert len(set(os.listdir("/proc/self/fd")) - own) < 20
    _only_known_places(home)


def _only_known_places(home: Path) -> None:
    for path in tree(home):
        parts = path.split("/")
        assert parts[0] == "state", path
        if len(parts) > 1:
            assert parts[1] in (
                "agent.lock",
                "agent.db",
                "agent.db-wal",
                "agent.db-shm",
                "outputs",
                "programs",
                "functions",
                "work",
            ), path


def test_a_refusal_is_never_a_start() -> None:
    """The kinds a Flux may offer to another agent are those nothing was started for."""
    assert not any(kind.nothing_started for kind in (ErrorKind.CANNOT_START, ErrorKind.INTERNAL, ErrorKind.TIMEOUT))
