"""An agent that says only what a test tells it to: the other end of the stream, frame by frame, over a real socket."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc

from fluxlib.model import ErrorKind, ExecutionRecord, ExecutionStatus
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.gen import flux_pb2_grpc


class Attachment:
    """One life of the stream, as the agent sees it."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.frames: list[pb.ControlFrame] = []
        self._arrived = threading.Condition()
        self._outgoing: queue.SimpleQueue[pb.AgentFrame | None] = queue.SimpleQueue()

    def send(self, **fields: Any) -> None:
        self._outgoing.put(pb.AgentFrame(**fields))

    def end(self) -> None:
        self._outgoing.put(None)

    def executions(self, count: int) -> list[str]:
        """IDs of the first ``count`` executions that were sent."""

        def ids() -> list[str]:
            return [one.execution_id for frame in self.frames for one in frame.execute]

        self._wait(lambda: len(ids()) >= count)
        return ids()[:count]

    def cancels(self, count: int) -> list[str]:
        def ids() -> list[str]:
            return [one.execution_id for frame in self.frames for one in frame.cancel]

        self._wait(lambda: len(ids()) >= count)
        return ids()[:count]

    def acknowledged(self, execution_id: str) -> None:
        """Wait until the answer's arrival was confirmed."""
        self._wait(lambda: any(execution_id in frame.received for frame in self.frames))

    def _wait(self, condition: Any) -> None:
        with self._arrived:
            assert self._arrived.wait_for(condition, 10), self.frames

    def _take(self, frame: pb.ControlFrame) -> None:
        with self._arrived:
            self.frames.append(frame)
            self._arrived.notify_all()

    def _frames(self) -> Iterator[pb.AgentFrame]:
        while (frame := self._outgoing.get()) is not None:
            yield frame


class ScriptedAgent(flux_pb2_grpc.AgentServiceServicer):
    """``with ScriptedAgent() as agent``: ``agent.attachment()`` waits for the next stream."""

    def __init__(self, agent_id: str = "scripted") -> None:
        self._agent_id = agent_id
        self.instance_id = "first-life"
        self.records: dict[str, ExecutionRecord] = {}
        self.cancelled: list[pb.CancelExecutionRequest] = []
        self._attached: queue.SimpleQueue[Attachment] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool)
        flux_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._all: list[Attachment] = []

    def attachment(self, *known: str) -> Attachment:
        """The next stream, greeted."""
        one = self.silent_attachment()
        one.send(instance_id=self.instance_id, known=known)
        return one

    def silent_attachment(self) -> Attachment:
        """The next stream, which waits for its greeting."""
        return self._attached.get(timeout=10)

    def Attach(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[pb.AgentFrame]:  # noqa: N802
        first = next(request_iterator)
        attachment = Attachment(first.hello.session)

        def read() -> None:
            try:
                for frame in request_iterator:
                    attachment._take(frame)
            except grpc.RpcError:
                pass
            except Exception:  # how gRPC ends a broken request stream
                pass
            finally:
                attachment.end()

        threading.Thread(target=read, name="Thread-scripted", daemon=True).start()
        self._all.append(attachment)
        self._attached.put(attachment)
        return attachment._frames()

    def GetInventory(self, request: Any, context: grpc.ServicerContext) -> pb.InventoryResponse:  # noqa: N802
        features = ["attach", "read_output"]
        return pb.InventoryResponse(agent_id=self._agent_id, instance_id=self.instance_id, features=features)

    def ReportNodeStatus(self, request: Any, context: grpc.ServicerContext) -> pb.NodeStatusResponse:  # noqa: N802
        return pb.NodeStatusResponse(agent_id=self._agent_id, instance_id=self.instance_id)

    def GetExecution(self, request: Any, context: grpc.ServicerContext) -> pb.GetExecutionResponse:  # noqa: N802
        record = self.records.get(request.execution_id)
        if record is None:
            return pb.GetExecutionResponse()
        return pb.GetExecutionResponse(found=True, data=codec.record_to_json(record, with_output=False))

    def CancelExecution(self, request: Any, context: grpc.ServicerContext) -> pb.CancelExecutionResponse:  # noqa: N802
        self.cancelled.append(request)
        status = ExecutionStatus.RUNNING if request.no_wait else ExecutionStatus.CANCELLED
        return pb.CancelExecutionResponse(success=True, status=status.value)

    def ReadOutput(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.OutputChunk]:  # noqa: N802
        output = self.records[request.execution_id].output or b""
        for start in range(0, len(output), 3):
            yield pb.OutputChunk(found=True, offset=start, data=output[start : start + 3])
        yield pb.OutputChunk(found=True, offset=len(output), ended=True)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for attachment in self._all:
            attachment.end()
        self._server.stop(0).wait()
        self._pool.shutdown()


def ended(
    execution_id: str, *, asynchronous: bool = False, output: bytes = b"out", output_bytes: int = 0
) -> pb.ExecutionAnswer:
    """The final answer of one that went well. ``output_bytes``: how much there is, if that is more."""
    record = ExecutionRecord(execution_id, "f", "scripted", asynchronous=asynchronous, started_at=1.0)
    record = replace(record.ended(ExecutionStatus.SUCCESS, at=2.0), output_bytes=output_bytes or len(output))
    response = codec.response_from_record(record)
    response.output = output
    return pb.ExecutionAnswer(execution_id=execution_id, final=True, response=response)


def refused(execution_id: str, kind: ErrorKind) -> pb.ExecutionAnswer:
    response = pb.ExecutionResponse(error="no", error_kind=int(kind))  # type: ignore[arg-type]
    return pb.ExecutionAnswer(execution_id=execution_id, final=True, response=response)


def accepted(execution_id: str) -> pb.ExecutionAnswer:
    return pb.ExecutionAnswer(execution_id=execution_id, response=pb.ExecutionResponse())
