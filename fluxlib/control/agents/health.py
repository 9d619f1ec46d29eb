"""Health checks: every round asks every agent how it is, without a thread that waits for any of them.

Answers come on the connections' threads and are judged on this loop's own, so that nothing about an agent is decided
in two places at once. It measures, tells the fleet (``seen``, ``missed``) and leaves the rest to the reconciler: it
never waits for the store, and goes on while the store is away.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from fluxlib.clock import steady_time
from fluxlib.control.agents.agent import Agent
from fluxlib.control.agents.fleet import Fleet
from fluxlib.control.agents.leadership import Leadership
from fluxlib.control.agents.reconciler import AgentReconciler
from fluxlib.errors import FluxError
from fluxlib.lifecycle import Deadline, Loop
from fluxlib.model import AgentStatus
from fluxlib.rpc.codec import NodeReport

log = logging.getLogger(__name__)

# The deadline of one question: younger than this, a question without an answer is not a miss.
_ANSWER_SECONDS = 5.0
_LONGEST_PAUSE = 1.0

Answer = tuple[Agent, int, NodeReport | FluxError]


class Health:
    """``start`` runs it; ``tick(now)`` is one step, cheap when there is nothing to do.

    In a fleet with several Flux only the leader judges; while the store is away, and nobody can know who leads, each
    judges for itself.
    """

    def __init__(
        self,
        fleet: Fleet,
        reconciler: AgentReconciler,
        leadership: Leadership,
        *,
        interval: float,
        clock: Callable[[], float] = steady_time,
    ) -> None:
        self._fleet = fleet
        self._reconciler = reconciler
        self._leadership = leadership
        self._interval = interval
        self._answers: deque[Answer] = deque()
        self._next_round = 0.0
        self._term: int | None = None
        self.loop = Loop("health", self.tick, min(interval / 2, _LONGEST_PAUSE), clock)
        leadership.on_change(lambda leads: self.loop.wake())

    def start(self) -> None:
        self.loop.start()

    def stop(self, deadline: Deadline) -> None:
        self.loop.stop(deadline)

    def tick(self, now: float) -> None:
        """Judge the answers that came; begin a round when it is time. ``now`` is epoch seconds."""
        while self._answers:
            self._judge(*self._answers.popleft(), now)
        # By the term: between two ticks the lease may have been lost, held by another and taken again.
        term = self._leadership.term
        if now < self._next_round and term == self._term:
            return
        self._next_round = now + self._interval
        begins, self._term = term != self._term, term
        for agent in self._fleet.agents():
            try:
                self._check(agent, now, begins)
            except Exception:
                # A fault at one agent must not hide the deaths of all others.
                log.exception("the health check of agent %s failed", agent.agent_id)

    def _check(self, agent: Agent, now: float, begins: bool) -> None:
        if begins:
            # What was counted by whoever led before, or by us long ago, says nothing about now.
            agent.misses, agent.asked_at = 0, 0.0
        if agent.record.status is AgentStatus.PROVISIONING:
            return
        if self._reconciler.due(agent, now, answered=False):
            self._reconciler.reconcile(agent)
        if agent.connection is not None and self._term is not None:
            self._ask(agent, now)

    def _ask(self, agent: Agent, now: float) -> None:
        connection = agent.connection
        if connection is None:
            return
        if agent.asked_at:
            if now - agent.asked_at < max(self._interval, _ANSWER_SECONDS):
                return
            self._fleet.missed(agent, "it did not answer", now)
        agent.question += 1
        agent.asked_at = now
        question = agent.question
        connection.report_async(lambda answer: self._answered((agent, question, answer)))

    def _answered(self, answer: Answer) -> None:
        """From the connections' threads."""
        self._answers.append(answer)
        self.loop.wake()

    def _judge(self, agent: Agent, question: int, answer: NodeReport | FluxError, now: float) -> None:
        if agent.removed or question != agent.question:
            return
        asked_at, agent.asked_at = agent.asked_at, 0.0
        if self._leadership.term is None or not asked_at:
            return
        if isinstance(answer, FluxError):
            self._fleet.missed(agent, answer.message, now)
        elif answer.agent_id != agent.agent_id:
            reason = f"another agent, {answer.agent_id}, answers at {agent.record.address}"
            self._fleet.missed(agent, reason, now)
        else:
            self._seen(agent, answer, now)

    def _seen(self, agent: Agent, report: NodeReport, now: float) -> None:
        self._fleet.seen(agent, report, now)
        if not report.instance_id:
            # Not what the connection was made for: upgraded to this system's own agent, or replaced by a legacy one.
            self._fleet.must_connect(agent)
        if self._reconciler.due(agent, now, answered=True):
            self._reconciler.reconcile(agent)
