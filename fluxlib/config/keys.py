"""The ``api_keys`` section of flux.yaml: named keys with a role, stored as hashes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fluxlib.config.reader import Faults, one_of, setting, take
from fluxlib.config.roles import ROLES
from fluxlib.model import FUNCTION_NAME

ADMIN_OF_ALL = "cannot limit an admin, who adds agents, and each agent holds every function: choose another role"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_HASH = re.compile(r"[0-9a-f]{64}")


def name_problem(value: Any) -> str | None:
    """What is wrong with a key's name, or None."""
    return None if _NAME.fullmatch(value) else "must be 1 to 64 letters, digits, dots, hyphens and underscores"


def _hash_problem(value: Any) -> str | None:
    return None if _HASH.fullmatch(value) else "must be the key's SHA-256, 64 lower-case hexadecimal digits"


def function_problem(value: Any) -> str | None:
    """What is wrong with a function's name in a key, or None."""
    return None if FUNCTION_NAME.fullmatch(value) else "is no function's name"


@dataclass(frozen=True)
class ApiKey:
    """One named key. The key itself is long and random, so that a plain hash cannot be searched."""

    name: str = setting("name", "string", why="who uses it; appears in the audit log", check=name_problem)
    role: str = setting(
        "role",
        "string",
        why="admin (everything), deploy (functions and code, and invoke), invoke (run and read executions), read",
        check=one_of(*ROLES),
    )
    key_hash: str = setting(
        "key_hash", "string", why="SHA-256 of the key in hexadecimal; `flux keys add` makes both", check=_hash_problem
    )
    functions: tuple[str, ...] = setting(
        "functions", "strings", (), why="the only functions it is good for; absent = all", each=function_problem
    )


def read_api_keys(section: Any, faults: Faults) -> tuple[ApiKey, ...]:
    """The keys of the section, faults collected; a name or key may appear once."""
    if section is None:
        return ()
    if not isinstance(section, list):
        faults.add("api_keys", "must be a list of keys, each with name, role and key_hash")
        return ()
    keys: list[ApiKey] = []
    for number, entry in enumerate(section):
        path = f"api_keys[{number}]"
        if not isinstance(entry, dict):
            faults.add(path, "must be a mapping with name, role and key_hash")
            continue
        before = len(faults.found)
        values = take(ApiKey, entry, f"{path}.", faults)
        if len(faults.found) > before:
            continue
        key = ApiKey(**values)
        if key.functions and key.role == "admin":
            faults.add(f"{path}.functions", ADMIN_OF_ALL)
        if entry.get("functions") == []:
            faults.add(f"{path}.functions", "is empty: leave it out for all functions, or name some")
        if any(other.name == key.name for other in keys):
            faults.add(f"{path}.name", f"{key.name} appears twice")
        if any(other.key_hash == key.key_hash for other in keys):
            faults.add(f"{path}.key_hash", "is another key's too")
        keys.append(key)
    return tuple(keys)
