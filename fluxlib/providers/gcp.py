"""Google Compute Engine through google-cloud-compute.

Facts of the API (Compute Engine v1 reference): ``requestId`` must be a UUID and
makes instances.insert idempotent; label keys and values are lower-case letters,
digits, ``-`` and ``_``, 63 characters at most; the SSH key of one user travels
in the metadata item ``ssh-keys`` as ``user:key``; an operation's errors are in
``operation.error.errors``, not in an exception of the insert itself.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from fluxlib.config.control import GcpConfig
from fluxlib.errors import ProviderError, StrandedNode
from fluxlib.lifecycle import pause
from fluxlib.providers.base import Launch, Node, NodeState

log = logging.getLogger(__name__)

ROLE, AGENT_ID, INSTALLATION = "flux-role", "flux-agent-id", "flux-installation"
_STATES = {
    "PROVISIONING": NodeState.PENDING,
    "STAGING": NodeState.PENDING,
    "RUNNING": NodeState.RUNNING,
    "STOPPING": NodeState.ENDING,
    "SUSPENDING": NodeState.STOPPED,
    "SUSPENDED": NodeState.STOPPED,
    "TERMINATED": NodeState.STOPPED,  # halted; a deleted one is not there any more
}
_CALL_TIMEOUT = 60.0
_DELETE_TIMEOUT = 180.0
_RETRY_FIRST = 1.0
_RETRY_LONGEST = 20.0
_STATE_POLL = 2.0
_RATE_LIMITS = ("rateLimitExceeded", "userRateLimitExceeded", "RATE_LIMIT_EXCEEDED")


class Gcp:
    """One zone of one project. The SDK (1.3 s and 140 MB) is imported here and nowhere else."""

    name = "gcp"

    def __init__(self, config: GcpConfig, installation_id: str) -> None:
        try:
            from google.api_core.retry import Retry
            from google.cloud import compute_v1
        except ImportError as error:
            raise ProviderError(f"gcp: google-cloud-compute is missing ({error}): pip install 'flux[cloud]'") from error

        self._compute = compute_v1
        # By itself the SDK repeats only reading calls. Ours may all be: inserts and deletes carry a requestId.
        self._again: dict[str, Any] = {
            "timeout": _CALL_TIMEOUT,
            "retry": Retry(
                predicate=_passing, initial=_RETRY_FIRST, maximum=_RETRY_LONGEST, multiplier=2.0, timeout=_CALL_TIMEOUT
            ),
        }
        self._config = config
        self._installation_id = installation_id
        self.ssh_user = config.ssh_user
        credentials = _credentials(config)
        transport = _transport(config)
        self._instances = compute_v1.InstancesClient(credentials=credentials, **transport)
        self._operations = compute_v1.ZoneOperationsClient(credentials=credentials, **transport)

    def prepare(self, ssh_public_key: str) -> None:
        """Nothing is shared between nodes: the key travels in each one's metadata."""

    def launch(self, wanted: Launch, deadline: float) -> Node:
        name = wanted.agent_id
        unanswered: list[Exception] = []
        try:
            operation = self._insert(wanted, unanswered)
        except Exception as error:
            failed = _translated(f"inserting {name}", error)
            # Of what was asked before, a no to the last attempt says nothing.
            if 400 <= _status(error) < 500 and not unanswered:
                raise failed from error
            raise StrandedNode(f"{failed.message}: it may have been made all the same", name) from error
        try:
            if operation:
                self._wait(operation, f"inserting {name}", deadline)
            node = self._wait_running(name, deadline)
            if not node.public_ip and not self._config.use_private_ip:
                raise ProviderError(
                    f"gcp: {name} has no public address: give its network an external access configuration,"
                    " or set `use_private_ip: true` when Flux reaches the network"
                )
            return node
        except ProviderError as error:
            self._undo(name, error)
            raise
        except Exception as error:
            unexpected = _translated(f"waiting for {name}", error)
            self._undo(name, unexpected)
            raise unexpected from error

    def terminate(self, provider_id: str) -> None:
        """Returns once the deletion is done: an accepted one may still fail."""
        doing = f"deleting {provider_id}"
        try:
            operation = self._instances.delete(
                request=self._compute.DeleteInstanceRequest(
                    project=self._config.project_id,
                    zone=self._config.zone,
                    instance=provider_id,
                    request_id=str(uuid.uuid4()),
                ),
                **self._again,
            )
        except Exception as error:
            if _status(error) == 404:
                return
            raise _translated(doing, error) from error
        self._wait(operation.name, doing, time.monotonic() + _DELETE_TIMEOUT)

    def nodes(self) -> list[Node]:
        request = self._compute.ListInstancesRequest(
            project=self._config.project_id,
            zone=self._config.zone,
            filter=f"labels.{INSTALLATION}={_label(self._installation_id)}",
        )
        found = self._ask("listing instances", lambda: list(self._instances.list(request=request, **self._again)))
        return [self._node(instance) for instance in found]

    # -- the steps -------------------------------------------------------------

    def _insert(self, wanted: Launch, unanswered: list[Exception]) -> str:
        """The operation's name; empty when the machine is there already (its requestId is forgotten after an hour).

        ``unanswered`` gets what made it ask once more.
        """

        def again(error: Exception) -> bool:
            passing = _passing(error)
            if passing:
                unanswered.append(error)
            return passing

        retried = {**self._again, "retry": self._again["retry"].with_predicate(again)}
        request = self._compute.InsertInstanceRequest(
            project=self._config.project_id,
            zone=self._config.zone,
            # The same agent ID always asks with the same UUID: asked twice, there is one machine.
            request_id=str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{self._installation_id}.{wanted.agent_id}")),
            instance_resource=self._resource(wanted),
        )
        try:
            return str(self._instances.insert(request=request, **retried).name)
        except Exception as error:
            if _status(error) != 409:
                raise
            if self._get(wanted.agent_id).labels.get(INSTALLATION) != _label(self._installation_id):
                raise
            return ""

    def _resource(self, wanted: Launch) -> Any:
        compute, config = self._compute, self._config
        network = compute.NetworkInterface()
        if config.network:
            network.network = config.network
        if config.subnetwork:
            network.subnetwork = config.subnetwork
        if not config.use_private_ip:
            network.access_configs = [compute.AccessConfig(name="External NAT", type_="ONE_TO_ONE_NAT")]
        disk = compute.AttachedDisk(
            boot=True,
            auto_delete=True,
            initialize_params=compute.AttachedDiskInitializeParams(source_image=config.image),
        )
        if config.volume_size_gb:
            disk.initialize_params.disk_size_gb = config.volume_size_gb
        labels = {_label(key): _label(value) for key, value in config.labels.items()}
        labels |= {ROLE: "agent", AGENT_ID: wanted.agent_id, INSTALLATION: _label(self._installation_id)}
        key = f"{config.ssh_user}:{wanted.ssh_public_key} {config.ssh_user}"
        instance = compute.Instance(
            name=wanted.agent_id,
            machine_type=f"zones/{config.zone}/machineTypes/{wanted.instance_type}",
            disks=[disk],
            network_interfaces=[network],
            labels=labels,
            metadata=compute.Metadata(
                items=[
                    compute.Items(key="ssh-keys", value=key),
                    # OS Login would ignore ssh-keys.
                    compute.Items(key="enable-oslogin", value="FALSE"),
                    compute.Items(key="block-project-ssh-keys", value="TRUE"),
                ]
            ),
        )
        if config.service_account_email:
            # Without this a node has no scopes, and a function that asks the metadata server gets no token.
            instance.service_accounts = [
                compute.ServiceAccount(
                    email=config.service_account_email, scopes=["https://www.googleapis.com/auth/cloud-platform"]
                )
            ]
        if config.spot:
            instance.scheduling = compute.Scheduling(
                provisioning_model="SPOT", instance_termination_action="DELETE", automatic_restart=False
            )
        return instance

    def _wait(self, operation: str, doing: str, deadline: float) -> None:
        """zoneOperations.wait holds the request up to two minutes, so this is no tight poll."""
        faults = 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ProviderError(f"gcp: {doing} did not end in time")
            try:
                answer = self._operations.wait(
                    project=self._config.project_id,
                    zone=self._config.zone,
                    operation=operation,
                    timeout=min(left, 130.0),
                )
            except Exception as error:
                if not _passing(error):
                    raise _translated(doing, error) from error
                faults += 1
                pause(max(0.0, min(_RETRY_FIRST * 2**faults, _RETRY_LONGEST, deadline - time.monotonic())))
                continue
            errors = [f"{fault.code}: {fault.message}" for fault in answer.error.errors]
            if errors:
                raise ProviderError(f"gcp: {doing} failed: {'; '.join(errors)}")
            if answer.status == self._compute.Operation.Status.DONE:
                return

    def _wait_running(self, name: str, deadline: float) -> Node:
        """It runs when its insert is done; one that was there already may not yet."""
        while True:
            node = self._node(self._ask(f"reading {name}", lambda: self._get(name)))
            if node.state is NodeState.RUNNING:
                return node
            if node.state is not NodeState.PENDING or time.monotonic() + _STATE_POLL > deadline:
                raise ProviderError(f"gcp: {name} does not run: it is {node.state.value}")
            pause(_STATE_POLL)

    def _get(self, name: str) -> Any:
        request = self._compute.GetInstanceRequest(
            project=self._config.project_id, zone=self._config.zone, instance=name
        )
        return self._instances.get(request=request, **self._again)

    def _undo(self, name: str, cause: ProviderError) -> None:
        try:
            self.terminate(name)
        except ProviderError as error:
            raise StrandedNode(f"{cause.message}; and {error.message}: it may still run", name) from error

    def _node(self, instance: Any) -> Node:
        interfaces = list(instance.network_interfaces)
        first = interfaces[0] if interfaces else None
        access = list(first.access_configs) if first is not None else []
        created = instance.creation_timestamp
        labels = dict(instance.labels)
        return Node(
            provider=self.name,
            provider_id=instance.name,
            agent_id=labels.get(AGENT_ID, ""),
            instance_type=instance.machine_type.rsplit("/", 1)[-1],
            state=_STATES.get(instance.status, NodeState.PENDING),
            public_ip=access[0].nat_i_p if access else "",
            private_ip=first.network_i_p if first is not None else "",
            launched_at=datetime.fromisoformat(created).timestamp() if created else 0.0,
            labels=labels,
        )

    def _ask(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ProviderError:
            raise
        except Exception as error:
            raise _translated(doing, error) from error


def _credentials(config: GcpConfig) -> Any:
    """The service account's file, or None for the SDK's own search."""
    if config.endpoint_url and not config.credentials_file:
        from google.auth.credentials import AnonymousCredentials

        return AnonymousCredentials()
    if not config.credentials_file:
        return None
    from google.oauth2 import service_account

    try:
        return service_account.Credentials.from_service_account_file(config.credentials_file)
    except (OSError, ValueError) as error:
        raise ProviderError(f"gcp: credentials_file {config.credentials_file} cannot be used: {error}") from error


def _transport(config: GcpConfig) -> dict[str, Any]:
    if not config.endpoint_url:
        return {}
    return {"client_options": {"api_endpoint": config.endpoint_url}}


def _status(error: Exception) -> int:
    """The HTTP status of an answer of the API; 0 when there was none."""
    return int(getattr(error, "code", 0) or 0)


def _passing(error: Exception) -> bool:
    """Whether the same call may go through in a moment: throttled, a fault of the service, a broken connection."""
    status = _status(error)
    if status == 403:
        reasons = [str(fault.get("reason", "")) for fault in getattr(error, "errors", ()) if isinstance(fault, dict)]
        return any(reason in _RATE_LIMITS for reason in reasons)
    if status:
        return status == 429 or status >= 500
    import requests.exceptions

    return isinstance(error, requests.exceptions.ConnectionError | requests.exceptions.Timeout)


def _translated(doing: str, error: Exception) -> ProviderError:
    return ProviderError(f"gcp: {doing} failed: {error}")


def _label(text: str) -> str:
    """Text as a label may be: what the cloud would refuse becomes ``-``."""
    cleaned = "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in text.lower())
    return cleaned[:63]
