"""Over real sockets: what clients do to a server, good ones and bad ones."""

from __future__ import annotations

import json
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace

import pytest
from waitress.channel import HTTPChannel

from fluxlib.control.http import Api
from fluxlib.control.server import WebServer, channel
from fluxlib.control.services import Call, Caller
from fluxlib.errors import AgentLost, FluxError
from fluxlib.lifecycle import Deadline
from fluxlib.model import ExecutionRecord, ExecutionStatus
from tests.http.conftest import Client
from tests.http.fakes import ADMIN, FakeOutput, Fakes, config, ended
from tests.http.sockets import Wire, head
from tests.support.programs import wait_until

Serve = Callable[..., WebServer]


class Gate:
    """Calls that wait until they are let go, as functions that run."""

    def __init__(self, fakes: Fakes) -> None:
        self.open = threading.Event()
        self.waiting = threading.Semaphore(0)
        self.count = 0
        self.gone: list[str] = []
        self.gone_event = threading.Event()
        fakes.executions.run = self._run

    def _run(self, call: Call, caller: Caller, number: int) -> ExecutionRecord:
        cancelled = threading.Event()

        def gone() -> None:
            self.gone.append(call.function_name)
            cancelled.set()
            self.gone_event.set()

        caller.on_gone(gone)
        self.count += 1
        self.waiting.release()
        while not self.open.wait(0.01):
            if cancelled.is_set():
                return ended(call, number, status=ExecutionStatus.CANCELLED, error="cancelled")
        return ended(call, number)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.waiting.acquire(timeout=20)


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def gate(fakes: Fakes) -> Iterator[Gate]:
    gate = Gate(fakes)
    yield gate
    gate.open.set()


@pytest.mark.parametrize("fast", [True, False])
def test_a_call_and_its_answer(fakes: Fakes, serve: Serve, fast: bool) -> None:
    with Wire(serve(fakes, fast=fast).port) as wire:
        for word in ("one", "two"):  # on one connection
            wire.send("POST", "/execute/hello", json.dumps({"args": [word]}).encode())
            status, headers, body = wire.answer()
            assert (status, json.loads(body)["output"]) == (200, word)
            assert headers["server"] == "Flux"


@pytest.mark.parametrize("fast", [True, False])
def test_others_are_answered_while_every_place_is_taken(serve: Serve, fast: bool) -> None:
    fakes = Fakes(max_blocking=200)
    gate = Gate(fakes)
    server = serve(fakes, fast=fast)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.port)) for _ in range(200)]
        for wire in wires:
            wire.send("POST", "/execute/hello")
        gate.wait_for(200)
        begun = time.monotonic()
        with Wire(server.port) as other:
            status, headers, body = other.send("POST", "/execute/hello").answer()
            assert status == 503
            assert headers["retry-after"] == "1"
            assert "200 requests are waiting" in json.loads(body)["error"]
            for method, path, expected in [
                ("GET", "/health", 200),
                ("GET", "/agents", 200),
                ("GET", "/executions", 200),
                ("GET", "/executions/absent", 404),
                ("DELETE", "/executions/absent", 404),
                ("DELETE", "/functions/absent", 404),
            ]:
                assert other.send(method, path).answer()[0] == expected, path
            body = b"name: greet\nhandler: x"
            assert other.send("PUT", "/functions", body).answer()[0] == 201
        assert time.monotonic() - begun < 5
        gate.open.set()
        assert all(wire.answer()[0] == 200 for wire in wires)
    assert gate.count == 200


def test_threads_are_made_as_they_are_needed(fakes: Fakes, serve: Serve, gate: Gate) -> None:
    server = serve(fakes)
    assert server.threads == 0
    gate.open.set()
    with Wire(server.port) as wire:
        for _ in range(100):
            wire.send("GET", "/health").answer()
    # Some: the next request may come before the last one's thread is free again. Not a thousand.
    assert 1 <= server.threads <= 40


class TestAbandoned:
    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_a_client_that_goes_away_is_noticed(self, fakes: Fakes, serve: Serve, gate: Gate, how: str) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.send("POST", "/execute/hello")
            gate.wait_for(1)
            if how == "reset":
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            wire.close()
            assert gate.gone_event.wait(5)
        assert gate.gone == ["hello"]

    def test_one_that_stays_is_not_taken_for_gone(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.send("POST", "/execute/hello")
            gate.wait_for(1)
            gate.open.set()
            assert wire.answer()[0] == 200
        assert gate.gone == []

    def test_going_away_after_the_answer_tells_nobody(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        gate.open.set()
        server = serve(fakes)
        with Wire(server.port) as wire:
            assert wire.send("POST", "/execute/hello").answer()[0] == 200
        with Wire(server.port) as other:  # the loop has seen the first one close by now
            assert other.send("GET", "/health").answer()[0] == 200
        assert gate.gone == []

    def test_one_who_is_gone_already_is_told_at_once(self, fakes: Fakes, serve: Serve) -> None:
        entered, go_on, told = threading.Event(), threading.Event(), threading.Event()

        def run(call: Call, caller: Caller, number: int) -> ExecutionRecord:
            entered.set()
            assert go_on.wait(10)
            caller.on_gone(told.set)
            return ended(call, number)

        fakes.executions.run = run
        server = serve(fakes)
        with Wire(server.port) as wire:
            wire.send("POST", "/execute/hello")
            assert entered.wait(5)
        # The close has been read once a later connection is served.
        wait_until(lambda: _no_channel(server), "the server to see the client go")
        go_on.set()
        assert told.wait(5)

    def test_nor_is_it_missed_while_the_request_before_ends(
        self, fakes: Fakes, serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        serve_one = HTTPChannel.service
        second_waits = threading.Event()

        def ends_late(channel: HTTPChannel) -> None:
            first = not channel.requests[0].body_rcv
            serve_one(channel)
            if first:
                assert second_waits.wait(10)

        monkeypatch.setattr(HTTPChannel, "service", ends_late)
        server = serve(fakes)
        with Wire(server.port) as wire:
            wire.raw(head("GET", "/health")).send("POST", "/execute/hello", b"{}")
            gate.wait_for(1)
            second_waits.set()
            wait_until(lambda: len(server._pool._idle) == 1, "the first one's end")
        assert gate.gone_event.wait(5)


def _no_channel(server: WebServer) -> bool:
    return not server._channels()


class TestHalfClosed:
    """Clients that close their sending side behind the request (nc -N, socat), beside those that have gone."""

    def test_gets_a_quick_answer_as_it_is(self, fakes: Fakes, serve: Serve) -> None:
        server = serve(fakes)
        for _ in range(20):
            with Wire(server.port) as wire:
                wire.send("GET", "/health").end()
                assert wire.answer()[0] == 200
                assert wire.closed()
        wait_until(lambda: _no_channel(server), "its connections to be closed")

    def test_gets_the_answers_of_all_it_has_asked(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.raw(head("GET", "/health")).send("POST", "/execute/hello", b"{}").end()
            gate.wait_for(1)
            gate.open.set()
            assert [wire.final_answer()[0] for _ in range(2)] == [200, 200]
            assert wire.closed()

    def test_is_asked_whether_it_is_there_and_gets_a_slow_answer(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.send("POST", "/execute/hello").end()
            gate.wait_for(1)
            assert wire.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            gate.open.set()
            assert wire.answer()[0] == 200
            assert wire.closed()
        assert gate.gone == []

    def test_of_http_1_0_is_not_asked(
        self, fakes: Fakes, serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(channel, "_ASK_ENDED_AFTER", 0.0)
        server = serve(fakes)
        with Wire(server.port) as wire:
            wire.raw(head("POST", "/execute/hello").replace(b"HTTP/1.1", b"HTTP/1.0")).end()
            gate.wait_for(1)
            wait_until(lambda: all(one.asked for one in server._channels()), "the time to ask")
            gate.open.set()
            assert wire.read_until(b"\r\n").startswith(b"HTTP/1.0 200 ")
        assert gate.gone == []

    def test_of_http_1_0_has_gone_when_its_end_comes_later(
        self, fakes: Fakes, serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a proxy's that closes its connection here when its own client has gone: nginx, as it comes."""
        monkeypatch.setattr(channel, "_HABIT_SECONDS", 0.0)
        with Wire(serve(fakes).port) as wire:
            wire.raw(head("POST", "/execute/hello").replace(b"HTTP/1.1", b"HTTP/1.0"))
            gate.wait_for(1)
            wire.end()
            assert gate.gone_event.wait(5)

    def test_follows_an_output_to_its_end(self, fakes: Fakes, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel, "_ASK_ENDED_AFTER", 0.0)
        server = serve(fakes)
        stream = TestFollowing._stream(fakes)
        with Wire(server.port) as wire:
            stream.feed(b"first")
            wire.send("GET", "/executions/execution-1/output?follow=1").read_until(b"\r\n\r\n")
            assert wire.chunk() == b"first"
            wire.end()
            wait_until(lambda: all(one.asked for one in server._channels()), "the question")
            stream.feed(b"0123456789abcdef")
            assert wire.chunk() == b"0123456789abcdef"
            assert not stream.closed.is_set()
            stream.finish()
            assert wire.chunk() == b""
            assert wire.closed()

    def test_gets_all_of_a_large_answer(self, fakes: Fakes, serve: Serve) -> None:
        size = 20_000_000
        fakes.executions.run = lambda call, caller, number: ended(call, number, output=b"x" * size, output_bytes=size)
        server = serve(fakes)
        with Wire(server.port) as wire:
            wire.send("POST", "/execute/hello").end()
            wait_until(lambda: any(one.total_outbufs_len for one in server._channels()), "an answer that waits")
            assert len(wire.answer()[2]) > size

    def test_runs_what_it_has_submitted_and_hears_of_it(self, fakes: Fakes, serve: Serve) -> None:
        server = serve(fakes)
        for _ in range(20):
            with Wire(server.port) as wire:
                wire.send("POST", "/execute/hello/async", b"{}").end()
                assert wire.answer()[0] == 202

    def test_is_dropped_with_what_it_has_not_sent_in_whole(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.raw(head("POST", "/execute/hello", 10) + b"{").end()
            assert wire.closed()

    def test_does_not_make_the_loop_spin(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        server = serve(fakes)
        with Wire(server.port) as wire:
            wire.send("POST", "/execute/hello").end()
            gate.wait_for(1)
            wire.read_until(b"\r\n\r\n")
            before, pause = server.turns, threading.Event()
            pause.wait(1)
            assert server.turns - before <= 6
            gate.open.set()
            assert wire.answer()[0] == 200


class TestFollowing:
    def test_shows_output_as_it_is_written(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            stream = self._stream(fakes)
            stream.feed(b"first")
            wire.send("GET", "/executions/execution-1/output?follow=1")
            assert b"chunked" in wire.read_until(b"\r\n\r\n")
            assert wire.chunk() == b"first"
            stream.feed(b"\xff\x00second")
            assert wire.chunk() == b"\xff\x00second"
            stream.finish()
            assert wire.chunk() == b""
        assert stream.closed.wait(5)

    def test_tells_at_once_that_it_is_there_and_is_not_to_be_kept(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            stream = self._stream(fakes)
            wire.send("GET", "/executions/execution-1/output?follow=1")
            headers = wire.read_until(b"\r\n\r\n").split(b"\r\n")
            assert {b"X-Accel-Buffering: no", b"Cache-Control: no-store"} <= set(headers)
            stream.finish()
            assert wire.chunk() == b""

    def test_ends_when_the_follower_goes_away_though_nothing_is_written(self, fakes: Fakes, serve: Serve) -> None:
        server = serve(fakes)
        stream = self._stream(fakes)
        with Wire(server.port) as wire:
            wire.send("GET", "/executions/execution-1/output?follow=1")
            wait_until(lambda: server.threads == 1, "the follower to be served")
        assert stream.closed.wait(5)

    def test_that_breaks_is_seen_to_be_broken(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            stream = self._stream(fakes)
            stream.feed(b"some")
            wire.send("GET", "/executions/execution-1/output?follow=1")
            wire.read_until(b"\r\n\r\n")
            assert wire.chunk() == b"some"
            stream.finish(AgentLost("worker-1 was lost"))
            with pytest.raises(ConnectionError):
                wire.chunk()
        assert stream.closed.is_set()

    def test_one_who_stops_reading_is_left_and_one_who_waits_is_not(self, fakes: Fakes, serve: Serve) -> None:
        server = serve(fakes)
        listener = server._listeners[0]
        budget = server._listeners[0].application.pipeline.budget
        quiet = self._stream(fakes, "execution-1")
        quiet.feed(b"x")
        unread = self._stream(fakes, "execution-2")
        for _ in range(300):
            unread.feed(bytes(100_000))
        with Wire(server.port) as follower, Wire(server.port) as stuck:
            follower.send("GET", "/executions/execution-1/output?follow=1").read_until(b"\r\n\r\n")
            stuck.send("GET", "/executions/execution-2/output?follow=1").read_until(b"\r\n\r\n")
            high = listener.adj.outbuf_high_watermark
            wait_until(lambda: any(channel.total_outbufs_len > high for channel in server._channels()), "a full buffer")
            listener.tidy(time.time() + 70)
            assert len(server._channels()) == budget.blocking == 2
            listener.tidy(time.time() + 76)
            assert unread.closed.wait(5)
            wait_until(lambda: budget.blocking == 1, "its place to be free")
            assert stuck.closed()
            listener.tidy(time.time() + 1000)
            quiet.finish()
            assert follower.chunk() == b"x"
            assert follower.chunk() == b""

    def test_takes_a_quarter_of_the_places_at_most(self, serve: Serve) -> None:
        fakes = Fakes(max_blocking=8)
        server = serve(fakes)
        with ExitStack() as stack:
            for number in range(2):
                stream = self._stream(fakes, f"execution-{number}")
                stream.feed(b"x")
                wire = stack.enter_context(Wire(server.port))
                wire.send("GET", f"/executions/execution-{number}/output?follow=1")
                wire.read_until(b"\r\n\r\n")
            self._stream(fakes, "execution-9")
            with Wire(server.port) as third:
                status, data = third.send("GET", "/executions/execution-9/output?follow=1").json()
                assert status == 503
                assert "followed" in data["error"]
                assert third.send("POST", "/execute/hello").answer()[0] == 200
        # Their places come back as they go away.
        self._stream(fakes, "execution-9").finish()
        wait_until(lambda: _follow(server, "execution-9") == 200, "a place")

    @staticmethod
    def _stream(fakes: Fakes, execution_id: str = "execution-1") -> FakeOutput:
        fakes.executions.records[execution_id] = replace(ended(Call("hello"), 1), execution_id=execution_id)
        stream = FakeOutput(complete=False)
        fakes.executions.outputs[execution_id] = stream
        return stream


def _follow(server: WebServer, execution_id: str) -> int:
    with Wire(server.port) as wire:
        return wire.send("GET", f"/executions/{execution_id}/output?follow=1").answer()[0]


def test_connections_are_probed(fakes: Fakes, serve: Serve) -> None:
    """A follower that vanished without a word is noticed by nothing else."""
    server = serve(fakes)
    with Wire(server.port) as wire:
        wire.send("GET", "/health").answer()
        (channel,) = server._channels()
        assert channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert channel.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


class TestProtocol:
    def test_pipelined_requests_are_answered_in_order(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            requests = b""
            for number in range(20):
                body = json.dumps({"args": [str(number)]}).encode()
                requests += head("POST", "/execute/hello", len(body)) + body
            wire.raw(requests)
            assert [wire.json()[1]["output"] for _ in range(20)] == [str(number) for number in range(20)]

    def test_100_continue(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.raw(head("POST", "/execute/hello", 5, Expect="100-continue", Content_Type="text/plain"))
            assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            wire.raw(b"input")
            assert wire.json()[1]["output"] == "input"

    @pytest.mark.parametrize(("method", "path"), [("POST", "/execute/hello"), ("GET", "/health")])
    def test_without_a_body_nobody_is_asked_to_send_one(
        self, fakes: Fakes, serve: Serve, method: str, path: str
    ) -> None:
        with Wire(serve(fakes).port) as wire:
            for _ in range(2):
                wire.raw(head(method, path, Expect="100-continue"))
                assert wire.answer()[0] == 200

    def test_chunked_bodies(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            request = head("GET", "/execute/hello", Transfer_Encoding="chunked", Content_Type="text/plain")
            wire.raw(request.replace(b"GET", b"POST", 1) + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
            assert wire.json()[1]["output"] == "abcde"

    @pytest.mark.parametrize("version", [b"1.0", b"2.0"])
    def test_chunks_of_another_version_are_not_taken_for_no_body(
        self, fakes: Fakes, serve: Serve, version: bytes
    ) -> None:
        with Wire(serve(fakes).port) as wire:
            request = head("GET", "/execute/hello", Transfer_Encoding="chunked", Content_Type="text/plain")
            request = request.replace(b"GET", b"POST", 1).replace(b"HTTP/1.1", b"HTTP/" + version, 1)
            wire.raw(request + b"3\r\nabc\r\n0\r\n\r\n")
            status, data = wire.json()
            assert status == 400
            assert "HTTP/1.1" in data["error"]
            assert wire.closed()
        assert not fakes.executions.calls

    def test_nothing_comes_behind_a_head(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.send("POST", "/execute/hello").json()
            wire.send("HEAD", "/executions/execution-1/output")
            status, *headers = wire.read_until(b"\r\n\r\n").decode().split("\r\n")
            assert status == "HTTP/1.1 200 OK"
            assert not [line for line in headers if line.startswith(("Content-Length", "Transfer-Encoding"))]
            assert not wire.rest
            assert wire.socket.recv(100) == b""

    def test_a_large_body_in_small_pieces(self, fakes: Fakes, serve: Serve) -> None:
        archive = bytes(range(256)) * 8192
        with Wire(serve(fakes).port) as wire:
            wire.raw(head("PUT", "/deploy/hello", len(archive)))
            for start in range(0, len(archive), 50_000):
                wire.raw(archive[start : start + 50_000])
            assert wire.answer()[0] == 201
        assert fakes.functions.archives["hello"] == archive

    def test_large_output_to_a_slow_reader_holds_no_thread(self, fakes: Fakes, serve: Serve) -> None:
        output = b"0123456789" * 2_000_000
        fakes.executions.run = lambda call, caller, number: ended(call, number, output=output)
        server = serve(fakes)
        with Wire(server.port, timeout=20) as slow, Wire(server.port) as other:
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            slow.send("POST", "/execute/hello")
            slow.read_until(b"\r\n\r\n")
            # One thread serves the others while most of it is still unread.
            for _ in range(3):
                assert other.send("GET", "/health").answer()[0] == 200
            wait_until(lambda: len(server._pool._idle) == server.threads, "the thread to be free")
            received = len(slow.rest)
            while received < len(output):
                received += len(slow.socket.recv(1_000_000))
        assert received >= len(output)

    def test_a_slow_reader_of_an_output_keeps_no_stream_of_the_agents_open(self, fakes: Fakes, serve: Serve) -> None:
        stream = FakeOutput()
        for _ in range(300):
            stream.feed(b"0123456789" * 10_000)
        fakes.executions.output = lambda *args, **how: stream  # type: ignore[method-assign]
        server = serve(fakes)
        with Wire(server.port, timeout=20) as slow:
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            slow.send("GET", "/executions/execution-1/output")
            # What is asked of an agent has an end: a client slower than that would lose the rest.
            assert stream.closed.wait(10)
            wait_until(lambda: len(server._pool._idle) == server.threads, "the thread to be free")
            status, headers, body = slow.answer()
        assert (status, headers["content-length"]) == (200, "30000000")
        assert body == b"0123456789" * 3_000_000

    def test_output_that_cannot_be_read_is_an_answer(self, fakes: Fakes, serve: Serve) -> None:
        stream = FakeOutput(b"some")
        stream.finish(AgentLost("worker-1 was lost"))
        fakes.executions.output = lambda *args, **how: stream  # type: ignore[method-assign]
        with Wire(serve(fakes).port) as wire:
            status, data = wire.send("GET", "/executions/execution-1/output").json()
            assert (status, data["error"]) == (502, "worker-1 was lost")
        assert stream.closed.is_set()

    @pytest.mark.parametrize(
        ("request_bytes", "status"),
        [
            (b"nonsense\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: x\r\n\r\n", 400),
            (b"POST /execute/hello HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            (b"POST /execute/hello HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
            (head("GET", "/execute/hello", Transfer_Encoding="chunked").replace(b"GET", b"POST") + b"zz\r\n", 400),
            (b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
            (b"GET /functions/%00 HTTP/1.1\r\n\r\n", 400),
            (b"GET /functions/%2e%2e/health HTTP/1.1\r\n\r\n", 400),
            (b"GET http://evil.example/nothing HTTP/1.1\r\n\r\n", 404),
            (b"GET //health HTTP/1.1\r\n\r\n", 400),
            (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", 400),
            (b"BREW /health HTTP/1.1\r\n\r\n", 405),
            (b"GET http://[::1 HTTP/1.1\r\n\r\n", 400),
            (b"GET /health HTTP/1.1\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n", 400),
        ],
        ids=range(14),
    )
    def test_what_is_no_request_is_refused_in_json(
        self, fakes: Fakes, serve: Serve, request_bytes: bytes, status: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.raw(request_bytes)
            seen, headers, body = wire.answer()
            assert seen == status
            assert headers["content-type"] == "application/json"
            assert json.loads(body)["error"]
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


class TestLargeBodies:
    """Whether one is taken is settled before it is sent."""

    SIZE = 5 * 2**20

    @pytest.mark.parametrize(
        ("method", "path", "key", "status"),
        [
            ("PUT", "/deploy/hello", ADMIN, 413),
            ("PUT", "/deploy/hello", "wrong", 401),
            ("PUT", "/functions", ADMIN, 413),
            ("POST", "/initialize", ADMIN, 413),
            ("POST", "/nothing", ADMIN, 404),
            ("GET", "/health", ADMIN, 413),
        ],
    )
    @pytest.mark.parametrize("how", ["waits", "sends"])
    def test_is_refused(self, serve: Serve, method: str, path: str, key: str, status: int, how: str) -> None:
        server = serve(Fakes(max_archive_mb=1))
        with Wire(server.port) as wire:
            request = head(method, path, self.SIZE).replace(ADMIN.encode(), key.encode())
            if how == "waits":
                wire.raw(request.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            else:
                wire.raw(request + bytes(self.SIZE))  # all of it, before reading a byte
            seen, headers, body = wire.answer()
            assert seen == status
            assert headers["connection"] == "close"
            assert json.loads(body)["error"]
            assert wire.closed()

    def test_without_a_length_needs_a_key_too(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            request = head("GET", "/deploy/hello", Transfer_Encoding="chunked").replace(b"GET", b"PUT", 1)
            wire.raw(request.replace(ADMIN.encode(), b"wrong"))
            assert wire.answer()[0] == 401
        assert fakes.functions.archives == {}

    @pytest.mark.parametrize(
        ("path", "key", "limit"),
        [("/health", "", 64), ("/health", ADMIN, 64), ("/functions", ADMIN, 256), ("/deploy/hello", ADMIN, 1024)],
    )
    def test_without_a_length_is_ended_where_its_route_ends(
        self, serve: Serve, path: str, key: str, limit: int
    ) -> None:
        server = serve(Fakes(max_archive_mb=1))
        method = "GET" if path == "/health" else "PUT"
        with Wire(server.port) as wire:
            wire.raw(chunked(method, path, key))
            piece = b"8000\r\n" + bytes(0x8000) + b"\r\n"
            for _ in range(limit // 32):
                wire.raw(piece)
            # The next chunk is too much as soon as it is announced.
            wire.raw(b"1\r\n")
            status, headers, body = wire.answer()
            assert (status, headers["connection"]) == (413, "close")
            size = "1 MB" if limit == 1024 else f"{limit} KB"
            assert f"larger than {size}" in json.loads(body)["error"]
            wire.raw(piece * 10)  # what is on its way is read, so that the answer is seen
            wire.socket.shutdown(socket.SHUT_WR)
            assert wire.closed()

    @pytest.mark.parametrize("between", [b"1;", b"0\r\nX: "])
    def test_nor_can_it_be_put_between_the_chunks(self, fakes: Fakes, serve: Serve, between: bytes) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.raw(chunked("GET", "/health", "") + between)
            for _ in range(5):
                wire.raw(b"x" * 4096)
            assert wire.answer()[0] == 400

    def test_what_follows_a_refusal_is_never_served(self, fakes: Fakes, serve: Serve) -> None:
        """A body that was not read must not be taken for a request."""
        with Wire(serve(fakes).port) as wire:
            hidden = head("POST", "/execute/hello")
            wire.raw(head("PUT", "/functions", self.SIZE) + hidden)
            assert wire.answer()[0] == 413
            wire.raw(hidden)
            wire.socket.shutdown(socket.SHUT_WR)
            assert wire.closed()
        assert fakes.executions.calls == []

    def test_that_is_wanted_is_taken(self, fakes: Fakes, serve: Serve) -> None:
        with Wire(serve(fakes).port) as wire:
            wire.raw(head("PUT", "/deploy/hello", self.SIZE, Expect="100-continue"))
            assert wire.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            wire.raw(bytes(self.SIZE))
            assert wire.answer()[0] == 201
        assert len(fakes.functions.archives["hello"]) == self.SIZE


def chunked(method: str, path: str, key: str) -> bytes:
    request = head("GET", path, Transfer_Encoding="chunked").replace(b"GET", method.encode(), 1)
    return request.replace(ADMIN.encode(), key.encode()) if key else request.replace(b"X-API-Key", b"X-Nothing")


def test_the_loop_does_not_spin_while_calls_wait(fakes: Fakes, serve: Serve, gate: Gate) -> None:
    server = serve(fakes)
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(Wire(server.port)).send("POST", "/execute/hello")
        gate.wait_for(20)
        turns = _turns(server)
        # A writable socket with nothing to write must not wake the loop.
        select.select([], [], [], 0.3)
        assert _turns(server) - turns <= 2


def _turns(server: WebServer) -> int:
    return server.turns


class TestStopping:
    def test_lets_running_calls_finish_and_takes_nothing_new(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        server = serve(fakes)
        with Wire(server.port) as busy, Wire(server.port) as idle:
            idle.send("GET", "/health").answer()
            busy.send("POST", "/execute/hello")
            gate.wait_for(1)
            stopping = threading.Thread(target=server.stop, args=(Deadline(20),), name="test-stop")
            stopping.start()
            assert idle.closed()
            wait_until(lambda: _refused(server.port), "the port to be closed")
            gate.open.set()
            status, headers, _ = busy.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert busy.closed()
            stopping.join(10)
            assert not stopping.is_alive()
        assert server.threads == 0
        assert gate.gone == []

    def test_ends_at_the_deadline_whatever_runs(self, fakes: Fakes, serve: Serve, gate: Gate) -> None:
        server = serve(fakes)
        with Wire(server.port) as wire:
            wire.send("POST", "/execute/hello")
            gate.wait_for(1)
            begun = time.monotonic()
            server.stop(Deadline(0.3))
            assert time.monotonic() - begun < 5
            assert wire.closed()
        assert gate.gone == ["hello"]

    def test_may_be_told_twice_and_before_the_start(self, fakes: Fakes, serve: Serve) -> None:
        server = serve(fakes)
        server.stop(Deadline(1))
        server.stop(Deadline(1))
        unstarted = WebServer(lambda environ, start: [], replace(config(), port=0))
        unstarted.stop(Deadline(1))
        assert _refused(unstarted.port)


def _refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


class TestListening:
    def test_a_taken_port_says_what_to_do(self, fakes: Fakes, serve: Serve) -> None:
        port = serve(fakes).port
        with pytest.raises(FluxError, match=r"in use by .* \(process \d+\)\..*set another `port` in flux\.yaml"):
            WebServer(lambda environ, start: [], replace(config(), port=port))

    def test_an_address_of_another_machine_too(self) -> None:
        with pytest.raises(FluxError, match="listen_host"):
            WebServer(lambda environ, start: [], config(listen_host="192.0.2.1", port=0))

    def test_and_a_name_nobody_knows(self) -> None:
        with pytest.raises(FluxError, match=r"name is not known here .*listen_host"):
            WebServer(lambda environ, start: [], config(listen_host="nobody.invalid", port=0))

    @pytest.mark.parametrize("host", ["::1", "localhost"])
    def test_other_addresses_of_this_machine(self, host: str) -> None:
        if host == "::1" and not _has_ipv6():
            pytest.skip("no IPv6 here")
        if host == "localhost" and not _is_known(host):
            pytest.skip("this machine has no localhost, as one without /etc/hosts")
        server = WebServer(lambda environ, start: [], config(listen_host=host, port=0))
        server.stop(Deadline(1))

    def test_open_files_are_not_what_limits_it(self, fakes: Fakes, serve: Serve) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
        try:
            serve(fakes)
            raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        # Connections have a limit of their own; agents' channels get the rest.
        assert raised == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))

    def test_the_loop_does_not_spin_while_there_are_none_left(self, fakes: Fakes, serve: Serve) -> None:
        server = serve(fakes)
        client = socket.socket()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        last = os.dup(client.fileno())
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, before[1]))
        taken = [last]
        try:
            with suppress(OSError):
                while True:
                    taken.append(os.dup(client.fileno()))
            client.connect(("127.0.0.1", server.port))
            client.sendall(head("GET", "/health"))
            turns = server.turns
            select.select([client], [], [], 0.3)
            assert server.turns - turns <= 3
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for number in taken:
                os.close(number)
        with client:
            client.settimeout(10)
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def _is_known(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 80))
    except OSError:
        return False


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_more_descriptors_than_select_takes(serve: Serve) -> None:
    """Past descriptor 1023 a server on select ends."""
    fakes = Fakes()
    server = serve(fakes)
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(server.port)) for _ in range(600)]
        wait_until(lambda: len(server._channels()) == 600, "all to be accepted")
        # Client and server ends share this process: the later ones lie beyond 1024.
        assert max(channel.socket.fileno() for channel in server._channels()) > 1024
        assert wires[-1].send("GET", "/health").answer()[0] == 200
        assert wires[0].send("POST", "/execute/hello").answer()[0] == 200


def test_bodies_of_waiting_calls_are_bounded_in_bytes(serve: Serve) -> None:
    fakes = Fakes(max_bodies_mb=1)
    gate = Gate(fakes)
    server = serve(fakes)
    body = b"x" * 600_000
    kind = {"Content-Type": "application/octet-stream"}
    with Wire(server.port) as first, Wire(server.port) as second, Wire(server.port) as third:
        first.send("POST", "/execute/hello", body, **kind)
        gate.wait_for(1)
        status, headers, answer = second.send("POST", "/execute/hello", body, **kind).answer()
        assert status == 503
        assert headers["retry-after"] == "1"
        assert b"max_bodies_mb" in answer
        third.send("POST", "/execute/hello", b"small", **kind)  # there is room for small ones
        gate.wait_for(1)
        gate.open.set()
        assert first.answer()[0] == third.answer()[0] == 200
    with Wire(server.port) as again:
        assert again.send("POST", "/execute/hello", body, **kind).answer()[0] == 200


def test_who_speaks_tls_is_told_so_at_once(fakes: Fakes, serve: Serve) -> None:
    with Wire(serve(fakes).port) as wire:
        # The beginning of a ClientHello, which has no line to wait for the end of.
        wire.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        status, headers, body = wire.answer()
    assert status == 400
    assert headers["connection"] == "close"
    assert b"not TLS: use http://" in body


def test_the_client_of_the_other_tests_sees_the_same(fakes: Fakes, serve: Serve) -> None:
    """What the in-process client takes for granted: the document holds over the wire too."""
    with Wire(serve(fakes).port) as wire:
        status, document = wire.send("GET", "/openapi.json").json()
    assert status == 200
    assert document == Client(Api(fakes.services())).document.document
