"""gRPC's errors as ours, and ours as gRPC's: the one place that reads them."""

from __future__ import annotations

from typing import NoReturn

import grpc

from fluxlib.errors import AgentError, AgentLost, AgentRefused, AgentUnreachable, FluxError

_SPENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)


class NotImplementedByPeer(AgentError):
    """The other side is an original: it has no such call."""


class AnswerTooLarge(AgentLost):
    """The agent's answer does not fit into a message: an original puts the whole output of an execution into one."""


# Go's server, and our own side of the connection.
_TOO_LARGE_TO_SEND = ("trying to send message larger than max", "CLIENT: Received message larger than max")


def from_rpc_error(error: grpc.RpcError, *, sent: bool, agent_id: str = "") -> FluxError:
    """The error of a call to an agent.

    ``sent`` says whether the request may have reached the agent: AgentLost if so, else AgentUnreachable.
    An answer that is itself an error is AgentRefused, an unknown call NotImplementedByPeer.
    """
    code = error.code() if isinstance(error, grpc.Call) else None
    details = reason_of(error)
    who = f"agent {agent_id}" if agent_id else "the agent"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NotImplementedByPeer(f"{who} has no such call")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and any(text in details for text in _TOO_LARGE_TO_SEND):
        return AnswerTooLarge(f"{who} cannot answer: its answer, with the whole output, is larger than 50 MB")
    if code in _SPENT or code is None:
        if sent:
            return AgentLost(f"{who} was lost: {details}")
        return AgentUnreachable(f"{who} cannot be reached: {details}")
    return AgentRefused(f"{who} answered {code.name}: {details}")


def surely_not_sent(error: grpc.RpcError) -> bool:
    """Whether the request of a unary call cannot have reached a server's handler.

    C-core says so only for connections that never came about; a broken stream may have carried it.
    """
    if not isinstance(error, grpc.Call) or error.code() is not grpc.StatusCode.UNAVAILABLE:
        return False
    details = error.details() or ""
    return details.startswith(("failed to connect to all addresses", "DNS resolution failed", "connections to all"))


def nobody_listens(error: grpc.RpcError) -> bool:
    """Whether the other host itself said that no process has the port."""
    details = (error.details() or "") if isinstance(error, grpc.Call) else ""
    return surely_not_sent(error) and ("Connection refused" in details or "WSA Error" in details)


def abort(context: grpc.ServicerContext, error: FluxError) -> NoReturn:
    """End a call with the error's own gRPC status."""
    context.abort(getattr(grpc.StatusCode, error.grpc_status), error.message)
    raise AssertionError("abort returns only by raising")


def reason_of(error: grpc.RpcError) -> str:
    """What gRPC says of it, without the frame it puts around what the operating system said."""
    details = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
    details = details.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")
    return details if len(details) <= 300 else details[:300] + "…"
