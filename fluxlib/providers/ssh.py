"""One SSH connection to a node, with its host key pinned.

Nothing from a variable reaches the remote shell unquoted: commands are lists of
words, and file contents travel over SFTP, so that no secret is ever in a
command line or a process list.
"""

from __future__ import annotations

import contextlib
import io
import logging
import posixpath
import secrets
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fluxlib.errors import ProviderError

if TYPE_CHECKING:
    import paramiko

log = logging.getLogger(__name__)
# paramiko tells every attempt at a machine that still boots with a traceback.
_WIRE_LOG = f"{__name__}.wire"
logging.getLogger(_WIRE_LOG).setLevel(logging.CRITICAL)

# Every attempt that sshd answers with a refusal counts against this address: OpenSSH 9.8 and later drop connections
# of a source whose refused logins come faster than its penalties expire (PerSourcePenalties, 5 s each).
_FIRST_PAUSE, _LONGEST_PAUSE = 3.0, 12.0
_CONNECT_TIMEOUT = 15.0
_KEEPALIVE = 15
_TAIL = 2000


class HostKeyChanged(ProviderError):
    """The node shows another host key than at first sight."""


class RemoteFailed(ProviderError):
    """A remote command ended with a non-zero status; the message carries its last output."""

    def __init__(self, message: str, status: int, output: str) -> None:
        super().__init__(message)
        self.status = status
        self.output = output


class Shell:
    """A connected node. ``host_key`` is the key it showed, as ``type base64``: keep it and demand it ever after."""

    def __init__(self, client: paramiko.SSHClient, host_key: str, sudo: bool) -> None:
        self._client = client
        self._sudo = sudo
        self.host_key = host_key

    @classmethod
    def connect(
        cls,
        host: str,
        user: str,
        private_key: str,
        deadline: float,
        *,
        port: int = 22,
        expected_host_key: str = "",
        stopped: threading.Event | None = None,
    ) -> Shell:
        """Keep trying until sshd accepts the key: a booting machine accepts neither connections nor keys for a while.

        While nothing listens it tries every 3 s; after refusals by sshd it waits 3, 6, then 12 s.

        ``private_key`` is OpenSSH text; ``deadline`` is time.monotonic; ``stopped`` ends the trying early.
        Raises HostKeyChanged at once, ProviderError with the last reason at the deadline.
        """
        key = _load_key(private_key)
        policy = _pinned(expected_host_key)
        stopped = stopped or threading.Event()
        refusals = 0
        while True:
            client, reason, answered = _attempt(
                host, port, user, key, policy, min(_CONNECT_TIMEOUT, deadline - time.monotonic())
            )
            if client is not None:
                transport = client.get_transport()
                if transport is not None:
                    transport.set_keepalive(_KEEPALIVE)
                    return cls(client, policy.seen, sudo=user != "root")
            pause = _FIRST_PAUSE
            if answered:
                pause = min(_FIRST_PAUSE * 2**refusals, _LONGEST_PAUSE)
                refusals += 1
            if time.monotonic() + pause > deadline:
                raise ProviderError(f"{user}@{host}:{port} could not be reached over SSH: {reason}")
            if stopped.wait(pause):
                raise ProviderError(f"{user}@{host}:{port} was given up while waiting for SSH ({reason})")

    def run(self, words: Sequence[str], timeout: float, *, root: bool = True) -> str:
        """The output (both streams, merged) of one command. Raises RemoteFailed, ProviderError."""
        return self._execute(shlex.join(["sudo", "-n", "--", *words] if root and self._sudo else list(words)), timeout)

    def run_script(self, script: str, timeout: float) -> str:
        """Lines the operator wrote for a shell, run by one as root. Raises RemoteFailed, ProviderError.

        They travel as a file: on a command line every user of the node could read them.
        """
        path = f"/run/flux-setup-{secrets.token_hex(8)}"
        self.upload(script.encode() + b"\n", path, 0o600)
        try:
            return self.run(["sh", "-e", path], timeout)
        finally:
            with contextlib.suppress(ProviderError):
                self.run(["rm", "-f", "--", path], 60)

    def upload(self, content: bytes, path: str, mode: int, owner: str = "root:root", timeout: float = 600) -> None:
        """A file in place with its mode from the first byte on, replaced atomically. Raises ProviderError."""
        staged = f"/tmp/.flux-{secrets.token_hex(8)}"
        beside = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.new")
        user, _, group = owner.partition(":")
        try:
            self._send(content, staged, timeout)
            self.run(["install", "-D", "-m", f"{mode:04o}", "-o", user, "-g", group, "--", staged, beside], 60)
            self.run(["mv", "-f", "--", beside, path], 60)
        finally:
            # Also when it failed half-way: it may be a key.
            with contextlib.suppress(ProviderError):
                self.run(["rm", "-f", "--", staged], 60, root=False)

    def _send(self, content: bytes, path: str, timeout: float) -> None:
        try:
            with self._at_most(timeout), contextlib.closing(self._client.open_sftp()) as sftp:
                channel = sftp.get_channel()
                if channel is not None:
                    channel.settimeout(timeout)
                # Exclusive and private before there is anything in it: /tmp is everybody's.
                with sftp.open(path, "wbx") as remote:
                    remote.chmod(0o600)
                    remote.set_pipelined(True)
                    remote.write(content)
        except (OSError, EOFError, _ssh_exception()) as error:
            raise ProviderError(f"uploading a file failed: {error or type(error).__name__}") from error

    @contextlib.contextmanager
    def _at_most(self, seconds: float) -> Iterator[None]:
        """paramiko waits an hour, or for ever, for an sshd that hangs: that ends with the connection."""
        timer = threading.Timer(seconds, self._client.close)
        timer.name, timer.daemon = "ssh-limit", True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _execute(self, command: str, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        output = bytearray()
        try:
            transport = self._client.get_transport()
            if transport is None or not transport.is_active():
                raise ProviderError("the SSH connection is gone")
            channel = transport.open_session(timeout=min(timeout, _CONNECT_TIMEOUT))
            with self._at_most(timeout + _CONNECT_TIMEOUT), contextlib.closing(channel):
                channel.set_combine_stderr(True)
                channel.exec_command(command)
                channel.shutdown_write()
                while True:
                    channel.settimeout(max(0.1, deadline - time.monotonic()))
                    data = channel.recv(65536)
                    if not data:
                        break
                    output += data
                    del output[: -16 * _TAIL]
                # recv_exit_status would wait for ever for a command that only closed its output.
                if not channel.status_event.wait(max(0.1, deadline - time.monotonic())):
                    raise TimeoutError
                status = channel.recv_exit_status()
        except TimeoutError as error:
            raise ProviderError(f"no end within {timeout:.0f} s; its output so far: {_tail(output)}") from error
        except (OSError, EOFError, _ssh_exception()) as error:
            raise ProviderError(f"the SSH connection broke: {error or type(error).__name__}") from error
        if status != 0:
            text = output.decode("utf-8", "replace")
            raise RemoteFailed(f"exit status {status}: {_tail(output)}", status, text)
        return output.decode("utf-8", "replace")


def _tail(output: bytearray) -> str:
    return output.decode("utf-8", "replace").strip()[-_TAIL:] or "(none)"


def _attempt(
    host: str, port: int, user: str, key: paramiko.PKey, policy: Any, timeout: float
) -> tuple[paramiko.SSHClient | None, str, bool]:
    """A connected client, or None, the reason, and whether something answered at all. Raises HostKeyChanged."""
    import paramiko

    client = paramiko.SSHClient()
    client.set_log_channel(_WIRE_LOG)
    client.set_missing_host_key_policy(policy)
    timeout = max(0.5, timeout)
    try:
        client.connect(
            host,
            port=port,
            username=user,
            pkey=key,
            timeout=timeout,
            banner_timeout=timeout,
            auth_timeout=timeout,
            allow_agent=False,
            look_for_keys=False,
        )
    except HostKeyChanged:
        client.close()
        raise
    except (OSError, EOFError, paramiko.SSHException) as error:
        client.close()
        return None, str(error) or type(error).__name__, not isinstance(error, OSError)
    return client, "", True


def _load_key(private_key: str) -> paramiko.PKey:
    """ED25519, or the ECDSA key of an original. Raises ProviderError."""
    import paramiko

    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey):
        with contextlib.suppress(paramiko.SSHException, ValueError):
            return kind.from_private_key(io.StringIO(private_key))
    raise ProviderError("the nodes' SSH key is neither ED25519 nor ECDSA")


def _ssh_exception() -> type[Exception]:
    import paramiko

    return paramiko.SSHException


def _pinned(expected: str) -> Any:
    """Takes the first host key it sees when none is expected, and only the expected one otherwise.

    Without known_hosts every key is a missing one to paramiko, so that this is always asked.
    """
    import paramiko

    class Policy(paramiko.MissingHostKeyPolicy):
        def __init__(self) -> None:
            self.expected, self.seen = expected, ""

        def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
            self.seen = f"{key.get_name()} {key.get_base64()}"
            if self.expected and self.seen != self.expected:
                raise HostKeyChanged(
                    f"{hostname} shows another SSH host key than when it was made:"
                    " someone may be in between; end the node if you cannot explain it"
                )
            if not self.expected:
                # What answered once is demanded of every further attempt.
                self.expected = self.seen
                log.info("first sight of %s: host key %s", hostname, self.seen[:60])

    return Policy()
