"""What the host lacks for a profile: each fault with the setting to choose."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from fluxlib.agent.executor import build_executor, probe
from fluxlib.agent.executor.probe import Host
from fluxlib.config.agent import read_agent
from fluxlib.errors import Unenforceable
from fluxlib.model import Enforcement

EVERYTHING = Host(root=True, machine="x86_64", capabilities=(1 << 41) - 1, landlock=3)
SYS_ADMIN = 1 << 21
SETUID = 1 << 7


@pytest.mark.parametrize("profile", [probe.DEFAULT, probe.STRICT, probe.MINIMAL])
def test_a_host_with_everything_has_no_fault(profile: str) -> None:
    probe.require(profile, EVERYTHING)


@pytest.mark.parametrize(
    ("profile", "host", "words"),
    [
        ("default", replace(EVERYTHING, root=False), "not root: start it as root, or choose `isolation: off`"),
        ("default", replace(EVERYTHING, machine="riscv64"), "no system call filter is known for riscv64"),
        ("default", replace(EVERYTHING, capabilities=SYS_ADMIN), "CAP_SETUID, CAP_SETPCAP missing: add to Capability"),
        (
            "strict",
            replace(EVERYTHING, capabilities=EVERYTHING.capabilities & ~SYS_ADMIN),
            "CAP_SYS_ADMIN is missing, so there are no namespaces: grant it, or choose `isolation: minimal`",
        ),
        (
            "strict",
            replace(EVERYTHING, landlock=0),
            "no Landlock: add landlock to its lsm= parameter, or choose `isolation: default`",
        ),
        ("minimal", replace(EVERYTHING, landlock=0), "`isolation: default` with CAP_SYS_ADMIN"),
    ],
)
def test_what_is_missing_and_what_to_choose(profile: str, host: Host, words: str) -> None:
    with pytest.raises(Unenforceable) as refusal:
        probe.require(profile, host)
    assert words in refusal.value.message
    assert "`isolation: off`" in refusal.value.message


def test_minimal_needs_no_sys_admin_and_default_no_landlock() -> None:
    probe.require("minimal", replace(EVERYTHING, capabilities=EVERYTHING.capabilities & ~SYS_ADMIN))
    probe.require("default", replace(EVERYTHING, landlock=0))


def test_all_faults_are_told_at_once() -> None:
    poor = Host(root=True, machine="sparc", capabilities=0, landlock=0)
    assert len(probe.faults("strict", poor)) == 4
    assert len(probe.faults("strict", replace(EVERYTHING, capabilities=EVERYTHING.capabilities & ~SETUID))) == 1


def test_the_facts_are_read_from_the_kernel(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython3\nCapPrm:\t0000000000000000\nCapEff:\t00000000012001eb\n")
    assert Host.here(status).capabilities == 0x12001EB


@pytest.mark.parametrize(
    ("profile", "number", "advice"),
    [("default", errno.EPERM, "choose `isolation: minimal`"), ("minimal", errno.EPERM, "docs/isolation.md")],
)
def test_a_step_that_was_refused_is_named(profile: str, number: int, advice: str) -> None:
    error = probe.explain(profile, "mounts", number)
    assert "mounts: Operation not permitted" in error.message
    assert advice in error.message


def test_what_profiles_hold_functions_to() -> None:
    assert probe.enforces("default", network_none=True) == frozenset(Enforcement)
    assert Enforcement.NETWORK_NONE not in probe.enforces("strict", network_none=False)
    held = probe.enforces("minimal", network_none=False)
    assert held == frozenset(Enforcement) - {Enforcement.NETWORK_NONE, Enforcement.TMP_SIZE}


def test_older_kernels_are_told_in_notes() -> None:
    assert probe.degraded(lambda name: True) == []
    assert "peak memory" in probe.degraded(lambda name: name != "memory.peak")[0]


def test_an_agent_on_macos_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_agent("agent_id: a\ntls: {enabled: false}\ninsecure: true\n", tmp_path / "agent.yaml")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(Unenforceable, match="an agent runs on Linux or Windows, and this is darwin"):
        build_executor(config, tmp_path)
