"""The address of a Redis: ``host:port``, or a redis://, rediss:// or unix:// URL, read as people write them.

Passwords are often pasted as they are, with ``/``, ``#``, ``?`` or ``@`` inside, which a URL wants percent-encoded.
No message here repeats any part of the address: it may belong to the password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

REDIS_PORT = 6379
_FORMS = "must be host:port, or a redis://, rediss:// or unix:///PATH URL"
_WORD = re.compile(r"\S+")
_NUMBER = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?")
_PLACE = r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[\w.-]+)(?::(?P<port>[0-9]{1,5}))?"
_REST = r"(?:/(?P<database>[0-9]{0,5}))?(?:\?(?P<query>[^#]*))?"
_BARE = re.compile(_PLACE)
# In this order: what a URL means by the book, then with everything before the last @ taken for the password.
_URLS = tuple(re.compile(rf"(?:(?P<login>{login})@)?{_PLACE}{_REST}", re.DOTALL) for login in ("[^/?#]*", ".*"))
_SOCKET = re.compile(r"(?:(?P<login>.*)@)?(?P<path>/[^?#]*)(?:\?(?P<query>[^#]*))?", re.DOTALL)
# What may stand behind the ?, and what it must be.
_OPTIONS = {
    "db": _NUMBER,
    "client_name": _WORD,
    "protocol": re.compile("[23]"),
    "socket_timeout": _NUMBER,
    "socket_connect_timeout": _NUMBER,
    "ssl_ca_certs": _WORD,
    "ssl_certfile": _WORD,
    "ssl_keyfile": _WORD,
    "ssl_cert_reqs": re.compile("none|optional|required"),
    "ssl_check_hostname": re.compile("(?i:true|false|yes|no|1|0)"),
}


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """``str`` of it is where it is, without what is secret."""

    scheme: str  # redis, rediss or unix
    host: str = ""
    port: int = REDIS_PORT
    path: str = ""  # of the socket, with unix
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.scheme == "unix":
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def redis_problem(value: Any) -> str | None:
    """What is wrong with the address of a Redis, or None."""
    try:
        parse_redis_address(value)
    except ValueError as error:
        return str(error)
    return None


def parse_redis_address(text: str) -> RedisAddress:
    """Raises ValueError, whose message says what an address must be."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        match = _BARE.fullmatch(text)
        if match is None or match["port"] is None:
            raise ValueError(
                _FORMS + (", with the password inside: redis://:PASSWORD@HOST:PORT" if "@" in text else "")
            )
        return _address("redis", match)
    if any(char.isspace() for char in text):
        raise ValueError("must not contain spaces (in a password: %20)")
    scheme = scheme.lower()
    if scheme not in ("redis", "rediss", "unix"):
        raise ValueError(_FORMS)
    problem = _FORMS
    for pattern in (_SOCKET,) if scheme == "unix" else _URLS:
        match = pattern.fullmatch(rest)
        if match is None:
            continue
        try:
            return _address(scheme, match)
        except ValueError as error:
            problem = str(error)
    raise ValueError(problem)


def _address(scheme: str, match: re.Match[str]) -> RedisAddress:
    """Raises ValueError for what has the form of an address and is none."""
    found = match.groupdict()
    options = _options(found.get("query") or "")
    database = options.pop("db", "") or found.get("database") or "0"
    port = int(found.get("port") or REDIS_PORT)
    if not 1 <= port <= 65535:
        raise ValueError(f"{_FORMS}; a port is between 1 and 65535")
    if not database.isdigit():
        raise ValueError(f"{_FORMS}; a database is a number")
    login = found.get("login") or ""
    username, colon, password = login.partition(":")
    if login and not colon:
        raise ValueError("has a user without a password: write USER:PASSWORD@, or :PASSWORD@ for a password alone")
    return RedisAddress(
        scheme,
        (found.get("host") or "").strip("[]"),
        port,
        unquote(found.get("path") or ""),
        int(database),
        unquote(username),
        unquote(password),
        options,
    )


def _options(query: str) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    if query and not all(_takes(name, value) for name, value in pairs):
        known = ", ".join(_OPTIONS)
        raise ValueError(f"has an option behind the ? that is not known or has no usable value; known are {known}")
    return dict(pairs)


def _takes(name: str, value: str) -> bool:
    return name in _OPTIONS and _OPTIONS[name].fullmatch(value) is not None
