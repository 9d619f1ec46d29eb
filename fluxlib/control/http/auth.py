"""Authentication and authorization: API keys, roles, and a rate limit on failed attempts."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fluxlib.config.control import ControlConfig
from fluxlib.config.roles import ROLES
from fluxlib.errors import Forbidden, Refused, Unauthenticated

# A lower number may do more.
_RANK = {role: rank for rank, role in enumerate(ROLES)}

# Keys of this many characters cannot be guessed (generated ones are longer): the rate limit is for shorter ones.
_UNGUESSABLE_LENGTH = 24
_MAX_FAILURES = 10
_WINDOW_SECONDS = 60.0
# One entry is some hundred bytes; whoever comes from more addresses only pushes out the oldest.
_MAX_ADDRESSES = 10_000


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose key it is. ``functions`` empty = all of them."""

    name: str
    role: str
    functions: frozenset[str] = frozenset()

    def may(self, role: str) -> bool:
        return _RANK[self.role] <= _RANK[role]

    def may_use(self, function_name: str) -> bool:
        return not self.functions or function_name in self.functions

    def demand_function(self, function_name: str) -> None:
        """Raises Forbidden when the key is not good for this function."""
        if not self.may_use(function_name):
            raise Forbidden(
                f"the key {self.name} is good for {', '.join(sorted(self.functions))} only, not for {function_name}"
            )


class Keys:
    """The keys of flux.yaml. ``identify`` takes as long for a wrong key as for a right one."""

    def __init__(self, config: ControlConfig) -> None:
        self._keys: list[tuple[bytes, Principal]] = []
        self.take(config)

    def take(self, config: ControlConfig) -> None:
        """From now on these keys are good, and no others."""
        keys = [(hashlib.sha256(config.api_key.encode()).digest(), Principal("api_key", "admin"))]
        for key in config.api_keys:
            principal = Principal(key.name, key.role, frozenset(key.functions))
            keys.append((bytes.fromhex(key.key_hash), principal))
        self._keys = keys

    def identify(self, presented: bytes) -> Principal | None:
        digest = hashlib.sha256(presented).digest()
        found = None
        for known, principal in self._keys:
            if hmac.compare_digest(known, digest):
                found = principal
        return found


class FailedAttempts:
    """Rate limit on wrong keys: ten a minute per address, then keys from there are refused for a while.

    A right key is not refused because of somebody else's wrong ones when it is too long to be guessed, or was used
    from there within the last hour: users behind one NAT or proxy with the guesser are not locked out.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        self._trusted: OrderedDict[tuple[str, str], float] = OrderedDict()

    def wait_seconds(self, address: str) -> int:
        """How long this address must wait; 0 = it may try."""
        if address not in self._failures:
            return 0
        with self._lock:
            times = self._failures.get(address)
            if times is None:
                return 0
            now = self._clock()
            while times and times[0] <= now - _WINDOW_SECONDS:
                times.popleft()
            if not times:
                del self._failures[address]
            if len(times) < _MAX_FAILURES:
                return 0
            return int(times[0] + _WINDOW_SECONDS - now) + 1

    def failed(self, address: str) -> None:
        with self._lock:
            times = self._failures.setdefault(address, deque(maxlen=_MAX_FAILURES))
            times.append(self._clock())
            self._failures.move_to_end(address)
            if len(self._failures) > _MAX_ADDRESSES:
                self._failures.popitem(last=False)

    def succeeded(self, address: str, key_name: str) -> None:
        pair = (address, key_name)
        now = self._clock()
        # Without the lock: a stale reading only means writing once more.
        if now - self._trusted.get(pair, float("-inf")) < _WINDOW_SECONDS / 2:
            return
        with self._lock:
            self._trusted[pair] = now
            self._trusted.move_to_end(pair)
            if len(self._trusted) > _MAX_ADDRESSES:
                self._trusted.popitem(last=False)

    def is_trusted(self, address: str, key_name: str) -> bool:
        """Whether this key worked from there within the last hour."""
        return self._clock() - self._trusted.get((address, key_name), float("-inf")) < 3600


class Authenticator:
    """Turns a request's headers into a Principal, or refuses."""

    def __init__(self, keys: Keys, attempts: FailedAttempts) -> None:
        self._keys = keys
        self._attempts = attempts

    def optional(self, environ: Mapping[str, Any]) -> Principal | None:
        """Who it is, None for strangers and wrong keys: for public routes, which answer either way.

        A wrong key counts as everywhere, or these routes would be the place to guess.
        """
        key = presented(environ)
        if key is None:
            return None
        try:
            return self._identify(key, environ)
        except (Unauthenticated, Refused):
            return None

    def require(self, environ: Mapping[str, Any], role: str) -> Principal:
        """Raises Unauthenticated, Refused (too many wrong keys from there) or Forbidden (names the role)."""
        key = presented(environ)
        if key is None:
            raise Unauthenticated("send an API key as `X-API-Key: KEY` or `Authorization: Bearer KEY`")
        principal = self._identify(key, environ)
        if not principal.may(role):
            raise Forbidden(f"the key {principal.name} has the role {principal.role}; this needs {role}")
        return principal

    def _identify(self, key: bytes, environ: Mapping[str, Any]) -> Principal:
        address = address_of(environ)
        wait = self._attempts.wait_seconds(address)
        principal = self._keys.identify(key)
        certain = len(key) >= _UNGUESSABLE_LENGTH or (
            principal is not None and self._attempts.is_trusted(address, principal.name)
        )
        if wait and not (principal and certain):
            raise Refused("too many wrong API keys came from your address; try again later", retry_after=wait)
        if principal is None:
            self._attempts.failed(address)
            raise Unauthenticated("the API key is wrong")
        self._attempts.succeeded(address, principal.name)
        return principal


def presented(environ: Mapping[str, Any]) -> bytes | None:
    """The key a request shows, right or wrong."""
    # WSGI hands header bytes over as latin-1 text.
    key = environ.get("HTTP_X_API_KEY")
    if key:
        return str(key).encode("latin-1", "replace")
    scheme, _, key = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip().encode("latin-1", "replace")
    return None


def address_of(environ: Mapping[str, Any]) -> str:
    """Whom to hold an attempt against; of IPv6 the /64, all of which one host may have."""
    text = str(environ.get("REMOTE_ADDR", ""))
    if ":" not in text:
        return text
    try:
        address = ipaddress.IPv6Address(text.partition("%")[0])
    except ValueError:
        return text
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False).network_address)
