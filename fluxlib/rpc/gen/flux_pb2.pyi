from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_KIND_UNSPECIFIED: _ClassVar[ErrorKind]
    ERROR_KIND_EXIT_CODE: _ClassVar[ErrorKind]
    ERROR_KIND_SIGNAL: _ClassVar[ErrorKind]
    ERROR_KIND_TIMEOUT: _ClassVar[ErrorKind]
    ERROR_KIND_OUT_OF_MEMORY: _ClassVar[ErrorKind]
    ERROR_KIND_CANCELLED: _ClassVar[ErrorKind]
    ERROR_KIND_AT_CAPACITY: _ClassVar[ErrorKind]
    ERROR_KIND_NOT_FOUND: _ClassVar[ErrorKind]
    ERROR_KIND_NO_CODE: _ClassVar[ErrorKind]
    ERROR_KIND_UNENFORCEABLE: _ClassVar[ErrorKind]
    ERROR_KIND_INVALID: _ClassVar[ErrorKind]
    ERROR_KIND_CANNOT_START: _ClassVar[ErrorKind]
    ERROR_KIND_AGENT_STOPPED: _ClassVar[ErrorKind]
    ERROR_KIND_AGENT_LOST: _ClassVar[ErrorKind]
    ERROR_KIND_STOPPING: _ClassVar[ErrorKind]
    ERROR_KIND_INTERNAL: _ClassVar[ErrorKind]
    ERROR_KIND_MACHINE_FAULT: _ClassVar[ErrorKind]
ERROR_KIND_UNSPECIFIED: ErrorKind
ERROR_KIND_EXIT_CODE: ErrorKind
ERROR_KIND_SIGNAL: ErrorKind
ERROR_KIND_TIMEOUT: ErrorKind
ERROR_KIND_OUT_OF_MEMORY: ErrorKind
ERROR_KIND_CANCELLED: ErrorKind
ERROR_KIND_AT_CAPACITY: ErrorKind
ERROR_KIND_NOT_FOUND: ErrorKind
ERROR_KIND_NO_CODE: ErrorKind
ERROR_KIND_UNENFORCEABLE: ErrorKind
ERROR_KIND_INVALID: ErrorKind
ERROR_KIND_CANNOT_START: ErrorKind
ERROR_KIND_AGENT_STOPPED: ErrorKind
ERROR_KIND_AGENT_LOST: ErrorKind
ERROR_KIND_STOPPING: ErrorKind
ERROR_KIND_INTERNAL: ErrorKind
ERROR_KIND_MACHINE_FAULT: ErrorKind

class FunctionConfig(_message.Message):
    __slots__ = ("name", "handler", "cpu_millicores", "memory_mb", "timeout_seconds", "env", "max_concurrency", "max_concurrency_behavior", "spec_digest", "network", "max_processes", "max_open_files", "max_file_size_mb", "tmp_size_mb", "working_directory", "platforms")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    HANDLER_FIELD_NUMBER: _ClassVar[int]
    CPU_MILLICORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENCY_BEHAVIOR_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    MAX_PROCESSES_FIELD_NUMBER: _ClassVar[int]
    MAX_OPEN_FILES_FIELD_NUMBER: _ClassVar[int]
    MAX_FILE_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    TMP_SIZE_MB_FIELD_NUMBER: _ClassVar[int]
    WORKING_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    PLATFORMS_FIELD_NUMBER: _ClassVar[int]
    name: str
    handler: str
    cpu_millicores: int
    memory_mb: int
    timeout_seconds: int
    env: _containers.ScalarMap[str, str]
    max_concurrency: int
    max_concurrency_behavior: str
    spec_digest: str
    network: str
    max_processes: int
    max_open_files: int
    max_file_size_mb: int
    tmp_size_mb: int
    working_directory: str
    platforms: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., handler: _Optional[str] = ..., cpu_millicores: _Optional[int] = ..., memory_mb: _Optional[int] = ..., timeout_seconds: _Optional[int] = ..., env: _Optional[_Mapping[str, str]] = ..., max_concurrency: _Optional[int] = ..., max_concurrency_behavior: _Optional[str] = ..., spec_digest: _Optional[str] = ..., network: _Optional[str] = ..., max_processes: _Optional[int] = ..., max_open_files: _Optional[int] = ..., max_file_size_mb: _Optional[int] = ..., tmp_size_mb: _Optional[int] = ..., working_directory: _Optional[str] = ..., platforms: _Optional[_Iterable[str]] = ...) -> None: ...

class FunctionAck(_message.Message):
    __slots__ = ("success", "message", "warnings", "error_kind", "cannot_start")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    CANNOT_START_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    error_kind: ErrorKind
    cannot_start: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., error_kind: _Optional[_Union[ErrorKind, str]] = ..., cannot_start: _Optional[str] = ...) -> None: ...

class DeploymentPackage(_message.Message):
    __slots__ = ("function_name", "code_archive", "config", "code_digest")
    FUNCTION_NAME_FIELD_NUMBER: _ClassVar[int]
    CODE_ARCHIVE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    CODE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    function_name: str
    code_archive: bytes
    config: FunctionConfig
    code_digest: str
    def __init__(self, function_name: _Optional[str] = ..., code_archive: _Optional[bytes] = ..., config: _Optional[_Union[FunctionConfig, _Mapping]] = ..., code_digest: _Optional[str] = ...) -> None: ...

class DeploymentAck(_message.Message):
    __slots__ = ("success", "message", "warnings", "error_kind", "cannot_start")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    CANNOT_START_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    error_kind: ErrorKind
    cannot_start: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., error_kind: _Optional[_Union[ErrorKind, str]] = ..., cannot_start: _Optional[str] = ...) -> None: ...

class DeployChunk(_message.Message):
    __slots__ = ("header", "total_bytes", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: DeploymentPackage
    total_bytes: int
    data: bytes
    def __init__(self, header: _Optional[_Union[DeploymentPackage, _Mapping]] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class RemoveFunctionRequest(_message.Message):
    __slots__ = ("function_name",)
    FUNCTION_NAME_FIELD_NUMBER: _ClassVar[int]
    function_name: str
    def __init__(self, function_name: _Optional[str] = ...) -> None: ...

class ExecutionRequest(_message.Message):
    __slots__ = ("function_name", "args", "execution_id", "stdin", "timeout_seconds")
    FUNCTION_NAME_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    ASYNC_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    function_name: str
    args: _containers.RepeatedScalarFieldContainer[str]
    execution_id: str
    stdin: bytes
    timeout_seconds: float
    def __init__(self, function_name: _Optional[str] = ..., args: _Optional[_Iterable[str]] = ..., execution_id: _Optional[str] = ..., stdin: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ..., **kwargs) -> None: ...

class ExecutionResponse(_message.Message):
    __slots__ = ("output", "error", "duration_ms", "error_kind", "record", "ended_record")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    ENDED_RECORD_FIELD_NUMBER: _ClassVar[int]
    output: bytes
    error: str
    duration_ms: int
    error_kind: ErrorKind
    record: bytes
    ended_record: ExecutionRecord
    def __init__(self, output: _Optional[bytes] = ..., error: _Optional[str] = ..., duration_ms: _Optional[int] = ..., error_kind: _Optional[_Union[ErrorKind, str]] = ..., record: _Optional[bytes] = ..., ended_record: _Optional[_Union[ExecutionRecord, _Mapping]] = ...) -> None: ...

class ExecutionRecord(_message.Message):
    __slots__ = ("execution_id", "function_name", "agent_id", "status", "phase", "asynchronous", "output_bytes", "truncated", "error", "error_kind", "exit_code", "signal", "duration_ms", "queue_ms", "started_at", "run_started_at", "status_at", "peak_memory_bytes", "cpu_seconds", "warnings", "attempt")
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_NAME_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ASYNCHRONOUS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    RUN_STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    STATUS_AT_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    execution_id: str
    function_name: str
    agent_id: str
    status: str
    phase: str
    asynchronous: bool
    output_bytes: int
    truncated: bool
    error: str
    error_kind: ErrorKind
    exit_code: int
    signal: int
    duration_ms: int
    queue_ms: int
    started_at: float
    run_started_at: float
    status_at: float
    peak_memory_bytes: int
    cpu_seconds: float
    warnings: _containers.RepeatedScalarFieldContainer[str]
    attempt: int
    def __init__(self, execution_id: _Optional[str] = ..., function_name: _Optional[str] = ..., agent_id: _Optional[str] = ..., status: _Optional[str] = ..., phase: _Optional[str] = ..., asynchronous: _Optional[bool] = ..., output_bytes: _Optional[int] = ..., truncated: _Optional[bool] = ..., error: _Optional[str] = ..., error_kind: _Optional[_Union[ErrorKind, str]] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., duration_ms: _Optional[int] = ..., queue_ms: _Optional[int] = ..., started_at: _Optional[float] = ..., run_started_at: _Optional[float] = ..., status_at: _Optional[float] = ..., peak_memory_bytes: _Optional[int] = ..., cpu_seconds: _Optional[float] = ..., warnings: _Optional[_Iterable[str]] = ..., attempt: _Optional[int] = ...) -> None: ...

class CancelExecutionRequest(_message.Message):
    __slots__ = ("execution_id", "no_wait", "reason")
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    NO_WAIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    execution_id: str
    no_wait: bool
    reason: str
    def __init__(self, execution_id: _Optional[str] = ..., no_wait: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class CancelExecutionResponse(_message.Message):
    __slots__ = ("success", "message", "error_kind", "status")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_KIND_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    success: bool
    message: str
    error_kind: ErrorKind
    status: str
    def __init__(self, success: _Optional[bool] = ..., message: _Optional[str] = ..., error_kind: _Optional[_Union[ErrorKind, str]] = ..., status: _Optional[str] = ...) -> None: ...

class GetExecutionRequest(_message.Message):
    __slots__ = ("execution_id", "without_output")
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    execution_id: str
    without_output: bool
    def __init__(self, execution_id: _Optional[str] = ..., without_output: _Optional[bool] = ...) -> None: ...

class GetExecutionResponse(_message.Message):
    __slots__ = ("found", "data")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    found: bool
    data: bytes
    def __init__(self, found: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class GetExecutionsRequest(_message.Message):
    __slots__ = ("execution_ids",)
    EXECUTION_IDS_FIELD_NUMBER: _ClassVar[int]
    execution_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, execution_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class GetExecutionsResponse(_message.Message):
    __slots__ = ("executions",)
    EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    executions: _containers.RepeatedCompositeFieldContainer[ExecutionRecord]
    def __init__(self, executions: _Optional[_Iterable[_Union[ExecutionRecord, _Mapping]]] = ...) -> None: ...

class HealthCheckRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthCheckResponse(_message.Message):
    __slots__ = ("healthy", "version")
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    healthy: bool
    version: str
    def __init__(self, healthy: _Optional[bool] = ..., version: _Optional[str] = ...) -> None: ...

class NodeStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatusResponse(_message.Message):
    __slots__ = ("agent_id", "cpu_percent", "memory_percent", "memory_total_mb", "memory_used_mb", "active_tasks", "max_tasks", "uptime_seconds", "instance_id", "os", "architecture", "isolation", "disk_free_mb", "inventory_revision", "problem", "warnings")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_MB_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_MB_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_TASKS_FIELD_NUMBER: _ClassVar[int]
    MAX_TASKS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    OS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_MB_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_REVISION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    cpu_percent: float
    memory_percent: float
    memory_total_mb: int
    memory_used_mb: int
    active_tasks: int
    max_tasks: int
    uptime_seconds: int
    instance_id: str
    os: str
    architecture: str
    isolation: str
    disk_free_mb: int
    inventory_revision: int
    problem: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent_id: _Optional[str] = ..., cpu_percent: _Optional[float] = ..., memory_percent: _Optional[float] = ..., memory_total_mb: _Optional[int] = ..., memory_used_mb: _Optional[int] = ..., active_tasks: _Optional[int] = ..., max_tasks: _Optional[int] = ..., uptime_seconds: _Optional[int] = ..., instance_id: _Optional[str] = ..., os: _Optional[str] = ..., architecture: _Optional[str] = ..., isolation: _Optional[str] = ..., disk_free_mb: _Optional[int] = ..., inventory_revision: _Optional[int] = ..., problem: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class FunctionState(_message.Message):
    __slots__ = ("name", "spec_digest", "code_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CODE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    spec_digest: str
    code_digest: str
    def __init__(self, name: _Optional[str] = ..., spec_digest: _Optional[str] = ..., code_digest: _Optional[str] = ...) -> None: ...

class InventoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InventoryResponse(_message.Message):
    __slots__ = ("agent_id", "instance_id", "version", "os", "architecture", "max_tasks", "isolation", "isolation_notes", "enforces", "functions", "inventory_revision", "features", "certificate_not_after", "open_executions")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    MAX_TASKS_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_NOTES_FIELD_NUMBER: _ClassVar[int]
    ENFORCES_FIELD_NUMBER: _ClassVar[int]
    FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    INVENTORY_REVISION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    OPEN_EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    instance_id: str
    version: str
    os: str
    architecture: str
    max_tasks: int
    isolation: str
    isolation_notes: _containers.RepeatedScalarFieldContainer[str]
    enforces: _containers.RepeatedScalarFieldContainer[str]
    functions: _containers.RepeatedCompositeFieldContainer[FunctionState]
    inventory_revision: int
    features: _containers.RepeatedScalarFieldContainer[str]
    certificate_not_after: str
    open_executions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, agent_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., version: _Optional[str] = ..., os: _Optional[str] = ..., architecture: _Optional[str] = ..., max_tasks: _Optional[int] = ..., isolation: _Optional[str] = ..., isolation_notes: _Optional[_Iterable[str]] = ..., enforces: _Optional[_Iterable[str]] = ..., functions: _Optional[_Iterable[_Union[FunctionState, _Mapping]]] = ..., inventory_revision: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., certificate_not_after: _Optional[str] = ..., open_executions: _Optional[_Iterable[str]] = ...) -> None: ...

class ReadOutputRequest(_message.Message):
    __slots__ = ("execution_id", "offset", "follow", "max_bytes")
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    execution_id: str
    offset: int
    follow: bool
    max_bytes: int
    def __init__(self, execution_id: _Optional[str] = ..., offset: _Optional[int] = ..., follow: _Optional[bool] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class OutputChunk(_message.Message):
    __slots__ = ("data", "offset", "found", "ended")
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    offset: int
    found: bool
    ended: bool
    def __init__(self, data: _Optional[bytes] = ..., offset: _Optional[int] = ..., found: _Optional[bool] = ..., ended: _Optional[bool] = ...) -> None: ...

class ControlHello(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: str
    def __init__(self, session: _Optional[str] = ...) -> None: ...

class ControlFrame(_message.Message):
    __slots__ = ("hello", "execute", "cancel", "received")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    hello: ControlHello
    execute: _containers.RepeatedCompositeFieldContainer[ExecutionRequest]
    cancel: _containers.RepeatedCompositeFieldContainer[CancelExecutionRequest]
    received: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, hello: _Optional[_Union[ControlHello, _Mapping]] = ..., execute: _Optional[_Iterable[_Union[ExecutionRequest, _Mapping]]] = ..., cancel: _Optional[_Iterable[_Union[CancelExecutionRequest, _Mapping]]] = ..., received: _Optional[_Iterable[str]] = ...) -> None: ...

class ExecutionAnswer(_message.Message):
    __slots__ = ("execution_id", "final", "response")
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    execution_id: str
    final: bool
    response: ExecutionResponse
    def __init__(self, execution_id: _Optional[str] = ..., final: _Optional[bool] = ..., response: _Optional[_Union[ExecutionResponse, _Mapping]] = ...) -> None: ...

class CancelAnswer(_message.Message):
    __slots__ = ("execution_id", "response")
    EXECUTION_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    execution_id: str
    response: CancelExecutionResponse
    def __init__(self, execution_id: _Optional[str] = ..., response: _Optional[_Union[CancelExecutionResponse, _Mapping]] = ...) -> None: ...

class AgentFrame(_message.Message):
    __slots__ = ("instance_id", "executed", "cancelled", "freed", "known", "stopping")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    EXECUTED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    FREED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    executed: _containers.RepeatedCompositeFieldContainer[ExecutionAnswer]
    cancelled: _containers.RepeatedCompositeFieldContainer[CancelAnswer]
    freed: _containers.RepeatedScalarFieldContainer[str]
    known: _containers.RepeatedScalarFieldContainer[str]
    stopping: bool
    def __init__(self, instance_id: _Optional[str] = ..., executed: _Optional[_Iterable[_Union[ExecutionAnswer, _Mapping]]] = ..., cancelled: _Optional[_Iterable[_Union[CancelAnswer, _Mapping]]] = ..., freed: _Optional[_Iterable[str]] = ..., known: _Optional[_Iterable[str]] = ..., stopping: _Optional[bool] = ...) -> None: ...

class CertificateRequestRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CertificateRequestResponse(_message.Message):
    __slots__ = ("csr_pem", "now")
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    NOW_FIELD_NUMBER: _ClassVar[int]
    csr_pem: bytes
    now: float
    def __init__(self, csr_pem: _Optional[bytes] = ..., now: _Optional[float] = ...) -> None: ...

class InstallCertificateRequest(_message.Message):
    __slots__ = ("certificate_pem", "ca_pem")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    ca_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ..., ca_pem: _Optional[bytes] = ...) -> None: ...

class RegisterAgentRequest(_message.Message):
    __slots__ = ("agent_id", "address", "max_concurrent")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    address: str
    max_concurrent: int
    def __init__(self, agent_id: _Optional[str] = ..., address: _Optional[str] = ..., max_concurrent: _Optional[int] = ...) -> None: ...

class RegisterAgentResponse(_message.Message):
    __slots__ = ("success",)
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    success: bool
    def __init__(self, success: _Optional[bool] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("agent_id", "active_count")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_COUNT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    active_count: int
    def __init__(self, agent_id: _Optional[str] = ..., active_count: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("ok",)
    OK_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    def __init__(self, ok: _Optional[bool] = ...) -> None: ...
