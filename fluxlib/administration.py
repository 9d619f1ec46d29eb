"""Commands for operators: enrolling agents, managing keys. They talk to no server."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fluxlib.config.control import ControlConfig
from fluxlib.config.first_start import random_key
from fluxlib.config.key_file import with_key, without_key
from fluxlib.config.keys import ADMIN_OF_ALL, ApiKey, function_problem, name_problem
from fluxlib.errors import ConfigInvalid, Conflict, FluxError, InvalidInput
from fluxlib.pki.authority import Authority, enrolment_files
from fluxlib.pki.files import as_owner_of
from fluxlib.pki.identity import check_agent_id


class CannotWrite(FluxError):
    """A file that a command should write cannot be written."""


def enroll(config: ControlConfig, agent_id: str, into: Path) -> int:
    """Write a ready directory for an agent: agent.yaml and three PEM files. Raises FluxError, nothing written then."""
    if config.disable_grpc_tls:
        raise InvalidInput("disable_grpc_tls is set in flux.yaml: agents need no certificates, and are not enrolled")
    check_agent_id(agent_id)
    directory = into / agent_id
    if os.path.lexists(directory):
        raise Conflict(f"{directory} is there already: move it away, or name another place with --output")
    from fluxlib.pki.signer import import_all

    import_all()
    with as_owner_of(config.certs_dir):
        identity = Authority.open(config.certs_dir).issue_agent(agent_id)
    try:
        _write_whole(directory, enrolment_files(identity, agent_id, config.agent_port))
    except OSError as error:
        raise CannotWrite(f"{directory} cannot be written: {error.strerror or error}") from error
    print("\n".join(_next_steps(config, directory)))
    return 0


def _next_steps(config: ControlConfig, directory: Path) -> list[str]:
    register = f"{config.own_url}/agents/register"
    address = f'{{"address": "MACHINE:{config.agent_port}"}}'
    if sys.platform == "win32":
        return [
            f"{directory} holds agent.yaml and the certificates of an agent, signed by the CA of {config.path}.",
            r"Copy its files to C:\ProgramData\flux-agent on the agent's machine (Linux: /etc/flux-agent), and there:",
            "  flux-agent.exe service install",
            f"Then register it here, with api_key of {config.path} as $key:",
            f"  irm {register} -Method Post -Headers @{{'X-API-Key' = $key}} -Body '{address}'",
        ]
    # By a shell of root's: the user's own may not look into the directory.
    install = f"install -m 600 {shlex.quote(str(directory))}/* /etc/flux-agent/"
    return [
        f"{directory} holds agent.yaml and the certificates of an agent, signed by the CA of {config.path}.",
        "Copy it to the agent's machine, install flux-agent there, and then:",
        f"  sudo sh -c {shlex.quote(install)}",
        "  sudo systemctl start flux-agent",
        "Register it here (MACHINE is its address; 127.0.0.1 if it is this one):",
        f"  KEY=$(sudo sed -n 's/^api_key: *//p' {shlex.quote(str(config.path))})",
        f"  curl -H \"X-API-Key: $KEY\" -d '{address}' {register}",
    ]


def _write_whole(directory: Path, files: Mapping[str, bytes]) -> None:
    """A private directory with these files, or none: half of one would look like an enrolled agent's."""
    directory.mkdir(mode=0o700, parents=True)
    try:
        for name, content in files.items():
            with open(os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def add_key(path: Path, name: str, role: str, functions: tuple[str, ...]) -> int:
    """Make a key, keep its hash in flux.yaml, print the key: nobody can see it again."""
    if functions and role == "admin":
        raise InvalidInput(f"--function {ADMIN_OF_ALL}")
    faults = [f"{name!r} {problem}"] if (problem := name_problem(name)) is not None else []
    faults += [f"--function {one!r} {problem}" for one in functions if (problem := function_problem(one)) is not None]
    if faults:
        raise InvalidInput("the key cannot be made", faults)
    made = random_key()
    entry = ApiKey(name=name, role=role, key_hash=hashlib.sha256(made.encode()).hexdigest(), functions=functions)
    _rewrite(path, with_key(_read(path), entry, path))
    print(made)
    about = f"This is the key of {name} ({role}); only its hash is in {path}."
    print(f"{about} A running Flux takes it within seconds.", file=sys.stderr)
    return 0


def remove_key(path: Path, name: str) -> int:
    _rewrite(path, without_key(_read(path), name, path))
    print(f"The key of {name} is gone from {path}. A running Flux refuses it within seconds.", file=sys.stderr)
    return 0


def list_keys(config: ControlConfig) -> int:
    print("api_key (the administrator's)")
    for key in config.api_keys:
        print(f"{key.name}: {key.role}" + (f", only {', '.join(key.functions)}" if key.functions else ""))
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} cannot be read: {error}") from error


def _rewrite(path: Path, text: str) -> None:
    """All of it or nothing, with the mode and the owner it had: the service must still be able to read it."""
    try:
        # The file itself: a link to it, as configuration managers make, stays one.
        path = path.resolve(strict=True)
        known = path.stat()
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                if sys.platform != "win32":
                    # By the descriptor: the directory's owner could put a link in the file's place.
                    if os.geteuid() == 0:
                        os.fchown(file.fileno(), known.st_uid, known.st_gid)
                    os.fchmod(file.fileno(), known.st_mode & 0o777)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written: {error.strerror or error}") from error
