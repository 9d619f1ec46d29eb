"""An execution's output as it grows, from an agent of ours or from an original one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc

from fluxlib.control.agents.client.channels import Lines
from fluxlib.model import ExecutionRecord
from fluxlib.rpc.gen import flux_pb2 as pb

# An original is asked again and again: soon at first, for short executions, then rarely.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


class AgentOutput:
    """ReadOutput of an agent of ours. Raises AgentUnreachable; iterating, AgentLost when the connection breaks."""

    def __init__(self, lines: Lines, execution_id: str, offset: int, *, follow: bool, timeout: float | None) -> None:
        self._line = lines.begin()
        self._lock = threading.Lock()
        self._open = True
        request = pb.ReadOutputRequest(execution_id=execution_id, offset=offset, follow=follow)
        try:
            self._call = self._line.stub.ReadOutput(request, timeout=timeout)
        except ValueError as error:
            self._line.end()
            raise self._line.closed() from error

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._call:
                if chunk.data:
                    yield chunk.data
                if chunk.ended:
                    return
        except grpc.RpcError as error:
            if self._open:
                raise self._line.translate(error) from error
        finally:
            self.close()

    def close(self) -> None:
        with self._lock:
            if not self._open:
                return
            self._open = False
        self._call.cancel()
        self._line.end()


class PolledOutput:
    """An original's output: its record, asked for until it has ended; only what is new is passed on."""

    def __init__(self, first: ExecutionRecord, ask: Callable[[], ExecutionRecord | None], offset: int, *, follow: bool):
        self._record = first
        self._ask = ask
        self._offset = offset
        self._follow = follow
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[bytes]:
        pause = _FIRST_PAUSE
        while not self._closed.is_set():
            output = self._record.output or b""
            if len(output) > self._offset:
                yield output[self._offset :]
                self._offset = len(output)
            if self._record.status.ended or not self._follow or self._closed.wait(pause):
                return
            pause = min(pause * 1.5, _LONGEST_PAUSE)
            record = self._ask()
            if record is None:
                return
            self._record = record

    def close(self) -> None:
        self._closed.set()
