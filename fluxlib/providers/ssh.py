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
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fluxlib.errors import ProviderError
from fluxlib.lifecycle import pause

if TYPE_CHECKING:
    import paramiko

log = logging.getLogger(__name__)

_RETRY_EVERY = 3.0
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
        cls, host: str, user: str, private_key: str, deadline: float, *, port: int = 22, expected_host_key: str = ""
    ) -> Shell:
        """Keep trying until sshd answers and takes the key: a booting machine refuses both for a while.

        ``private_key`` is OpenSSH text; ``deadline`` is time.monotonic.
        Raises HostKeyChanged at once, ProviderError with the last reason at the deadline.
        """
        import paramiko

        key = paramiko.Ed25519Key.from_private_key(io.StringIO(private_key)) if "OPENSSH" in private_key else None
        if key is None:
            key = paramiko.ECDSAKey.from_private_key(io.StringIO(private_key))
        while True:
            client = paramiko.SSHClient()
            policy = _Pinned(expected_host_key)
            client.set_missing_host_key_policy(policy)
            try:
                client.connect(
                    host,
                    port=port,
                    username=user,
                    pkey=key,
                    timeout=_CONNECT_TIMEOUT,
                    banner_timeout=_CONNECT_TIMEOUT,
                    auth_timeout=_CONNECT_TIMEOUT,
                    allow_agent=False,
                    look_for_keys=False,
                )
            except HostKeyChanged:
                client.close()
                raise
            except (OSError, EOFError, paramiko.SSHException) as error:
                client.close()
                if time.monotonic() + _RETRY_EVERY > deadline:
                    reason = str(error) or type(error).__name__
                    raise ProviderError(f"{user}@{host}:{port} could not be reached over SSH: {reason}") from error
                pause(_RETRY_EVERY)
                continue
            transport = client.get_transport()
            assert transport is not None
            transport.set_keepalive(_KEEPALIVE)
            return cls(client, policy.seen, sudo=user != "root")

    def run(self, words: Sequence[str], timeout: float, *, root: bool = True) -> str:
        """The output (both streams, merged) of one command. Raises RemoteFailed, ProviderError."""
        return self._execute(shlex.join(["sudo", "-n", "--", *words] if root and self._sudo else list(words)), timeout)

    def run_script(self, script: str, timeout: float) -> str:
        """A line the operator wrote for a shell, run by one as root. Raises RemoteFailed, ProviderError."""
        return self.run(["sh", "-e", "-c", script], timeout)

    def upload(self, content: bytes, path: str, mode: int, owner: str = "root:root", timeout: float = 600) -> None:
        """A file in place with its mode from the first byte on, replaced atomically. Raises ProviderError."""
        staged = f"/tmp/.flux-{secrets.token_hex(8)}"
        beside = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.new")
        try:
            with contextlib.closing(self._client.open_sftp()) as sftp:
                channel = sftp.get_channel()
                if channel is not None:
                    channel.settimeout(timeout)
                # Exclusive and private before there is anything in it: /tmp is everybody's.
                with sftp.open(staged, "wbx") as remote:
                    remote.chmod(0o600)
                    remote.set_pipelined(True)
                    remote.write(content)
        except (OSError, EOFError, _ssh_exception()) as error:
            raise ProviderError(f"uploading {path} failed: {error or type(error).__name__}") from error
        user, _, group = owner.partition(":")
        self.run(["install", "-D", "-m", f"{mode:04o}", "-o", user, "-g", group, "--", staged, beside], 60)
        self.run(["mv", "-f", "--", beside, path], 60)
        self.run(["rm", "-f", "--", staged], 60, root=False)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _execute(self, command: str, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        try:
            transport = self._client.get_transport()
            if transport is None or not transport.is_active():
                raise ProviderError("the SSH connection is gone")
            channel = transport.open_session(timeout=min(timeout, _CONNECT_TIMEOUT))
            with contextlib.closing(channel):
                channel.set_combine_stderr(True)
                channel.exec_command(command)
                channel.shutdown_write()
                output = bytearray()
                while True:
                    channel.settimeout(max(0.1, deadline - time.monotonic()))
                    data = channel.recv(65536)
                    if not data:
                        break
                    output += data
                    del output[: -16 * _TAIL]
                status = channel.recv_exit_status()
        except TimeoutError as error:
            raise ProviderError(f"no end within {timeout:.0f} s") from error
        except (OSError, EOFError, _ssh_exception()) as error:
            raise ProviderError(f"the SSH connection broke: {error or type(error).__name__}") from error
        text = output.decode("utf-8", "replace")
        if status != 0:
            raise RemoteFailed(f"exit status {status}: {text.strip()[-_TAIL:] or '(no output)'}", status, text)
        return text


def _ssh_exception() -> type[Exception]:
    import paramiko

    return paramiko.SSHException


class _Pinned:
    """Takes the first host key it sees when none is expected, and only the expected one otherwise."""

    def __init__(self, expected: str) -> None:
        self._expected = expected
        self.seen = ""

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        self.seen = f"{key.get_name()} {key.get_base64()}"
        if self._expected and self.seen != self._expected:
            raise HostKeyChanged(
                f"{hostname} shows another SSH host key than when it was made:"
                " someone may be in between; end the node if you cannot explain it"
            )
        if not self._expected:
            log.info("first sight of %s: host key %s", hostname, self.seen[:60])
