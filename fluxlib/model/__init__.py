"""What Flux and its agents talk about: frozen records, enums, and which state may follow which.

No clock, thread or I/O here: times are epoch seconds handed in by the caller.
"""

from fluxlib.model.agents import (
    AGENT_ID,
    RESERVED_AGENT_IDS,
    AgentRecord,
    AgentStatus,
    Enforcement,
    FunctionState,
    Inventory,
    NodeFigures,
)
from fluxlib.model.executions import (
    EXECUTION_ID,
    ErrorKind,
    ExecutionRecord,
    ExecutionRequest,
    ExecutionStatus,
    Phase,
    kind_of,
)
from fluxlib.model.functions import (
    ANYWHERE,
    FUNCTION_NAME,
    Behavior,
    Function,
    FunctionSpec,
    Network,
    Platform,
    WorkingDirectory,
    handler_path,
)
from fluxlib.model.times import epoch, rfc3339

__all__ = [
    "AGENT_ID",
    "ANYWHERE",
    "EXECUTION_ID",
    "FUNCTION_NAME",
    "RESERVED_AGENT_IDS",
    "AgentRecord",
    "AgentStatus",
    "Behavior",
    "Enforcement",
    "ErrorKind",
    "ExecutionRecord",
    "ExecutionRequest",
    "ExecutionStatus",
    "Function",
    "FunctionSpec",
    "FunctionState",
    "Inventory",
    "Network",
    "NodeFigures",
    "Phase",
    "Platform",
    "WorkingDirectory",
    "epoch",
    "handler_path",
    "kind_of",
    "rfc3339",
]
