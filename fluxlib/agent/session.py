"""What one Flux is owed over its multiplexed stream: answers, batched into frames, kept until acknowledged."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fluxlib.agent.outcomes import sendable
from fluxlib.lifecycle import Timer
from fluxlib.model import ExecutionRecord
from fluxlib.rpc import codec
from fluxlib.rpc.gen import flux_pb2 as pb
from fluxlib.rpc.pace import Pace

# Answers that travel in one frame at most; a large output travels alone.
_BATCH = 64
_BATCH_BYTES = 1024 * 1024
# Outputs held in memory for a Flux that does not fetch them; more work is refused until it does.
_OWED_BYTES = 64 * 1024 * 1024
_OWED_ANSWERS = 20_000


@dataclass(frozen=True, slots=True)
class Owed:
    """One answer, not yet encoded: that is done by the stream's thread, not by the one that ends executions."""

    record: ExecutionRecord
    final: bool
    with_output: bool = False

    @property
    def size(self) -> int:
        return len(self.record.output or b"") if self.with_output else 0


class Session:
    """One life of one Flux. Pushed to from any thread, drained by the stream that is attached.

    ``fetch`` completes a record whose output lies in a file; only while its frame is made, so that large
    outputs do not wait in memory. ``running`` tells how many runs there are now.
    """

    def __init__(
        self, name: str, fetch: Callable[[ExecutionRecord], ExecutionRecord], running: Callable[[], int]
    ) -> None:
        self.name = name
        self.condition = threading.Condition()
        self.generation = 0  # of the stream attached last; an older one must end
        self.grace: Timer | None = None
        self.refused: set[str] = set()  # functions refused at capacity since they last had room
        self._fetch = fetch
        self._running = running
        self._gathering = False  # the stream has something to bring, and waits for more
        self._pace = Pace()
        self._answers: deque[Owed] = deque()
        self._cancelled: deque[pb.CancelAnswer] = deque()
        self._freed: set[str] = set()
        self._stopping = False
        self._finishing = False
        self._last_of = 0  # the generation whose stream brings what waits, and ends
        self._unacknowledged: dict[str, Owed] = {}
        self._owed_bytes = 0

    def answer(self, owed: Owed) -> None:
        with self.condition:
            if owed.final:
                self._forget(owed.record.execution_id)
                self._unacknowledged[owed.record.execution_id] = owed
                self._owed_bytes += owed.size
            self._answers.append(owed)
            if not self._gathering:
                self.condition.notify()

    def cancel_answered(self, answer: pb.CancelAnswer) -> None:
        with self.condition:
            self._cancelled.append(answer)
            self.condition.notify()

    def freed(self, names: Iterable[str]) -> None:
        with self.condition:
            self.refused.difference_update(names)
            self._freed.update(names)
            self.condition.notify()

    def say_stopping(self) -> None:
        with self.condition:
            self._stopping = True
            self.condition.notify()

    def acknowledge(self, execution_ids: Iterable[str]) -> None:
        with self.condition:
            for execution_id in execution_ids:
                self._forget(execution_id)

    @property
    def overdue(self) -> bool:
        """Whether this Flux leaves too many answers unfetched to be given more work."""
        return self._owed_bytes > _OWED_BYTES or len(self._unacknowledged) > _OWED_ANSWERS

    def resume(self) -> list[str]:
        """A new stream: what the last one may not have brought is sent again; a second time does no harm.

        Answers the IDs of what is owed. Call it with the condition held.
        """
        waiting = {owed.record.execution_id for owed in self._answers if owed.final}
        self._answers.extend(owed for one, owed in self._unacknowledged.items() if one not in waiting)
        return list(self._unacknowledged)

    def next_frame(self, generation: int) -> pb.AgentFrame | None:
        """Everything that waits, as one frame; None when this stream's time is over."""
        with self.condition:
            while self.generation == generation:
                if self._answers or self._cancelled or self._freed or self._stopping:
                    if self._gather():
                        continue
                    batch = self._batch()
                    break
                if self._finishing or self._last_of == generation:
                    return None
                self.condition.wait()
            else:
                return None
            frame = pb.AgentFrame(stopping=self._stopping, cancelled=self._cancelled, freed=self._freed)
            self._cancelled.clear()
            self._freed.clear()
            self._stopping = False
        frame.executed.extend(self._encoded(owed) for owed in batch)
        return frame

    def _gather(self) -> bool:
        """Whether it has waited for more to bring, and must look again. With the condition held."""
        now = time.monotonic()
        left = self._pace.left(self._running(), now)
        if left <= 0 or self._cancelled or self._freed or self._stopping or self._finishing:
            self._pace.went(now)
            return False
        self._gathering = True
        self.condition.wait(left)
        self._gathering = False
        return True

    def finish(self) -> None:
        """The stream attached now brings what waits, and ends. Call it with the condition held."""
        self._finishing = True
        self.condition.notify_all()

    def finish_stream(self, generation: int) -> None:
        """As ``finish``, for this stream alone: another may follow."""
        with self.condition:
            self._last_of = generation
            self.condition.notify_all()

    def end_streams(self) -> None:
        """The stream attached now ends. Call it with the condition held."""
        self.generation += 1
        self.condition.notify_all()

    def _batch(self) -> list[Owed]:
        batch: list[Owed] = []
        size = 0
        while self._answers and len(batch) < _BATCH:
            size += self._answers[0].record.output_bytes if self._answers[0].with_output else 0
            if batch and size > _BATCH_BYTES:
                break
            batch.append(self._answers.popleft())
        return batch

    def _encoded(self, owed: Owed) -> pb.ExecutionAnswer:
        record = owed.record
        if not owed.final:
            return pb.ExecutionAnswer(execution_id=record.execution_id, response=pb.ExecutionResponse())
        if owed.with_output:
            record = sendable(self._fetch(record))
        response = codec.response_from_record(record, with_output=owed.with_output)
        return pb.ExecutionAnswer(execution_id=record.execution_id, final=True, response=response)

    def _forget(self, execution_id: str) -> None:
        owed = self._unacknowledged.pop(execution_id, None)
        if owed is not None:
            self._owed_bytes -= owed.size
