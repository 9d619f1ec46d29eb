"""Every error Flux raises on purpose, with the statuses it travels under.

::

    FluxError                     HTTP  gRPC
    ├── InvalidInput              400   INVALID_ARGUMENT     the caller's request is wrong
    │   ├── ConfigInvalid                                    a configuration file is wrong
    │   └── TooLarge              413   INVALID_ARGUMENT
    ├── Unauthenticated           401   UNAUTHENTICATED
    ├── Forbidden                 403   PERMISSION_DENIED
    ├── NotFound                  404   NOT_FOUND
    ├── Conflict                  409   FAILED_PRECONDITION
    │   ├── LeaseLost             409                        another process leads now: stop at once
    │   └── InUse                 409                        another process of this machine has the directory
    ├── UnsupportedMedia          415   INVALID_ARGUMENT
    ├── Refused                   429   RESOURCE_EXHAUSTED   asked too often
    │   └── NoAgentFits           429                        no agent present can take the function
    ├── Unavailable               503   UNAVAILABLE          try again later
    │   ├── StoreUnavailable      503                        the store is away: never "not found"
    │   ├── AtCapacity            503   RESOURCE_EXHAUSTED   every fitting slot is taken
    │   └── Stopping              503                        this process is shutting down
    ├── AgentError                502   UNAVAILABLE          something between Flux and an agent
    │   ├── AgentUnreachable      502                        before it can have started the work
    │   ├── AgentLost             502                        after it may have started the work
    │   └── AgentRefused          502   FAILED_PRECONDITION  the agent answered no
    │       └── AgentRevoked      502                        its certificate was revoked
    ├── ProviderError             502   UNAVAILABLE          a cloud or a node's SSH said no
    │   └── StrandedNode          502                        and a machine it launched could not be ended
    ├── CannotStart               500   FAILED_PRECONDITION  a program could not be started
    ├── Unenforceable             429   FAILED_PRECONDITION  this host cannot enforce what is asked
    └── Internal                  500   INTERNAL             a fault of ours

Whoever catches an error of a library translates it once, at the module that
talks to that library, and keeps the cause (``raise … from error``).
"""

from __future__ import annotations

from collections.abc import Sequence


class FluxError(Exception):
    """Base of the tree.

    ``message`` is one sentence for people: what is wrong and what to do.
    ``retry_after`` (seconds) becomes the HTTP header of that name.
    """

    http_status = 500
    grpc_status = "INTERNAL"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class InvalidInput(FluxError):
    """The caller's request is wrong; ``faults`` lists everything found, not the first."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message if not faults else f"{message}: {'; '.join(faults)}")
        self.faults = tuple(faults)


class ConfigInvalid(InvalidInput):
    """A configuration file cannot be used as it is."""


class TooLarge(InvalidInput):
    http_status = 413


class UnsupportedMedia(FluxError):
    http_status = 415
    grpc_status = "INVALID_ARGUMENT"


class Unauthenticated(FluxError):
    http_status = 401
    grpc_status = "UNAUTHENTICATED"


class Forbidden(FluxError):
    http_status = 403
    grpc_status = "PERMISSION_DENIED"


class NotFound(FluxError):
    http_status = 404
    grpc_status = "NOT_FOUND"


class Conflict(FluxError):
    http_status = 409
    grpc_status = "FAILED_PRECONDITION"
    status = ""  # of the execution that has ended already, for who wanted to cancel it


class LeaseLost(Conflict):
    """A leader's write came too late: another process holds the lease now."""


class InUse(Conflict):
    """A directory is one process's at a time. ``holder`` says whose it is now, as far as that is known."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


class Refused(FluxError):
    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"


class NoAgentFits(Refused):
    """No agent present can take the function, whatever happens to its load."""


class Unavailable(FluxError):
    http_status = 503
    grpc_status = "UNAVAILABLE"


class StoreUnavailable(Unavailable):
    """The store cannot be reached or used; what was asked may well exist.

    ``nothing_written``: the write that failed cannot have been made (nobody was connected, or it was rolled back).
    """

    nothing_written = False


class AtCapacity(Unavailable):
    """Every slot that fits is taken; nothing was started."""

    grpc_status = "RESOURCE_EXHAUSTED"


class Stopping(Unavailable):
    """This process is shutting down and takes no further work."""

    execution_id = ""  # of the one that was ended for that


class AgentError(FluxError):
    http_status = 502
    grpc_status = "UNAVAILABLE"


class AgentUnreachable(AgentError):
    """The agent cannot have seen the request: another one may be asked."""


class AgentLost(AgentError):
    """The agent may have started the work: it must not be sent elsewhere."""

    execution_id = ""  # where the execution can be asked for, once it is known


class AgentRefused(AgentError):
    """The agent answered, and its answer was no."""

    grpc_status = "FAILED_PRECONDITION"


class AgentRevoked(AgentRefused):
    """The agent was deregistered at ``revoked_at`` (epoch milliseconds), and its certificate is not newer."""

    def __init__(self, message: str, revoked_at: int) -> None:
        super().__init__(message)
        self.revoked_at = revoked_at


class ProviderError(FluxError):
    """A cloud's API or a node's bootstrap failed; the message names the step."""

    http_status = 502
    grpc_status = "UNAVAILABLE"


class StrandedNode(ProviderError):
    """A launched machine could be neither used nor ended: it has to be ended later."""

    def __init__(self, message: str, provider_id: str) -> None:
        super().__init__(message)
        self.provider_id = provider_id


class CannotStart(FluxError):
    """A program could not be started; the message names the step that failed."""

    grpc_status = "FAILED_PRECONDITION"


class Unenforceable(FluxError):
    """This host cannot enforce what a function or a setting asks for."""

    http_status = 429
    grpc_status = "FAILED_PRECONDITION"


class Internal(FluxError):
    """A fault of ours."""
