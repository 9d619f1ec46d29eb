"""What this host can hold functions to, found out when the agent starts.

Nothing is ignored silently: what a profile needs and the host lacks is an error
that names it and the setting to choose. Facts are read first, all faults told at
once; then one run that goes through every step but the program itself shows what
facts cannot (``explain`` puts its failure into words).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxlib.errors import Unenforceable
from fluxlib.model import Enforcement
from fluxlib.spawner import linux
from fluxlib.spawner.sandbox import DEFAULT, MINIMAL, STRICT
from fluxlib.spawner.seccomp import AUDIT_ARCHITECTURES

# Numbers: Linux's include/uapi/linux/capability.h. Setting SYS_ADMIN aside, a systemd unit has them by default.
_CHOWN, _DAC_OVERRIDE, _KILL, _SETGID, _SETUID, _SETPCAP, _SYS_ADMIN = 0, 1, 5, 6, 7, 8, 21
_NEEDED = {
    "CAP_CHOWN": _CHOWN,
    "CAP_DAC_OVERRIDE": _DAC_OVERRIDE,
    "CAP_KILL": _KILL,
    "CAP_SETGID": _SETGID,
    "CAP_SETUID": _SETUID,
    "CAP_SETPCAP": _SETPCAP,
}
_OFF = "`isolation: off` runs functions without any of this, for development"


@dataclass(frozen=True, slots=True)
class Host:
    """The facts that decide. ``capabilities`` is the effective set as a bit mask."""

    root: bool
    machine: str
    capabilities: int
    landlock: int  # the ABI, 0 = none

    @classmethod
    def here(cls, status: Path = Path("/proc/self/status")) -> Host:
        capabilities = 0
        for line in status.read_text().splitlines():
            if line.startswith("CapEff:"):
                capabilities = int(line.split()[1], 16)
        return cls(os.geteuid() == 0, linux.MACHINE, capabilities, linux.landlock_version())


def faults(profile: str, host: Host) -> list[str]:
    """What stands against ``profile`` here, each with what to do."""
    found = []
    if not host.root:
        found.append("the agent is not root: start it as root, or choose `isolation: off`")
    if host.machine not in AUDIT_ARCHITECTURES:
        found.append(f"no system call filter is known for {host.machine}: only `isolation: off` runs here")
    missing = [name for name, number in _NEEDED.items() if not host.capabilities >> number & 1]
    if host.root and missing:
        found.append(f"{', '.join(missing)} missing: add to CapabilityBoundingSet= of the agent's unit")
    if host.root and profile != MINIMAL and not host.capabilities >> _SYS_ADMIN & 1:
        found.append("CAP_SYS_ADMIN is missing, so there are no namespaces: grant it, or choose `isolation: minimal`")
    if profile != DEFAULT and not host.landlock:
        other = "`isolation: default`" if profile == STRICT else "`isolation: default` with CAP_SYS_ADMIN"
        found.append(f"the kernel has no Landlock: add landlock to its lsm= parameter, or choose {other}")
    return found


def require(profile: str, host: Host) -> None:
    """Raises Unenforceable with every fault."""
    found = faults(profile, host)
    if found:
        raise Unenforceable(
            f"isolation profile {profile} is not available on this machine: {'; '.join(found)} ({_OFF})"
        )


def explain(profile: str, step: str, number: int) -> Unenforceable:
    """The error for a step that this host refused."""
    advice = "see docs/isolation.md for what the profile needs"
    if "clone3" in step:
        advice = "take RestrictNamespaces= out of the agent's unit, which hides that call"
    elif profile != MINIMAL and number in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
        advice = "choose `isolation: minimal`, which needs no namespaces, or let the agent have them"
    reason = os.strerror(number) if number else "no reason given"
    return Unenforceable(
        f"isolation profile {profile} is not available on this machine: {step}: {reason}: {advice} ({_OFF})"
    )


def enforces(profile: str, network_none: bool) -> frozenset[Enforcement]:
    """What a profile that was set up holds functions to."""
    held = set(Enforcement)
    if profile == MINIMAL:
        # /tmp is not the function's own there; it cannot write to it.
        held.discard(Enforcement.TMP_SIZE)
    if not network_none:
        held.discard(Enforcement.NETWORK_NONE)
    return frozenset(held)


def degraded(has_file: Callable[[str], bool]) -> list[str]:
    """What is done in a worse way on this kernel. ``has_file`` answers for files of a run's cgroup."""
    notes = []
    if not has_file("memory.peak"):
        notes.append("this kernel (before 5.19) does not tell a run's peak memory")
    return notes
