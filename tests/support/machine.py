"""A Debian machine with systemd and cgroup v2 under qemu, driven over SSH.

    with Machine(debian(), tmp_path) as machine:                     # boots a throw-away snapshot
        machine.run("systemctl is-system-running --wait")
    with Machine(debian(), tmp_path, keeps=True, address="127.0.0.5", forwards={50052: 50052}) as machine:
        machine.put(package, "/root/flux.deb")
        machine.run("dpkg -i /root/flux.deb")
        machine.reboot()                                             # what was written is still there

Forwards are host port to guest port on ``address``, so a fleet is several machines
on several loopback addresses with the same ports. The guest reaches the host's
127.0.0.1 as 10.0.2.2. A boot takes 20 to 60 s: share one machine among tests.
"""

from __future__ import annotations

import io
import shlex
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.lab import GUEST_PYTHON, TOP, Image

GUEST_TREE = "/opt/flux-tree"
HOST_FROM_GUEST = "10.0.2.2"
_BOOT_SECONDS = 240.0
_COMPILED = f".cpython-{GUEST_PYTHON.replace('.', '')}.pyc"


class CommandFailed(AssertionError):
    """A command in the guest ended with another status than 0; the message holds what it said."""


class Machine:
    """One virtual machine. ``keeps`` gives it a disk of its own that outlives reboots, until ``close``.

    ``one_clock`` counts instructions instead of host time (one processor): what is
    measured inside is then repeatable within about 2 %, however busy the host is.
    """

    def __init__(
        self,
        image: Image,
        directory: Path,
        *,
        name: str = "machine",
        address: str = "127.0.0.1",
        forwards: Mapping[int, int] | None = None,
        keeps: bool = False,
        memory_mb: int = 1024,
        processors: int = 2,
        one_clock: bool = False,
    ) -> None:
        self._image = image
        self._directory = directory
        self.name = name
        self.address = address
        self.forwards = dict(forwards or {})  # host port to guest port
        self._keeps = keeps
        self._memory_mb = memory_mb
        self._processors = 1 if one_clock else processors
        self._one_clock = one_clock
        self.console = directory / f"{name}.console"
        self._control = directory / f"{name}.ssh"
        self._disk = directory / f"{name}.qcow2"
        self.ssh_port = self._forward_to(22)
        self._qemu: subprocess.Popen[bytes] | None = None
        self._master: subprocess.Popen[bytes] | None = None

    # -- life --------------------------------------------------------------------------

    def boot(self) -> Self:
        """Start it and wait until SSH answers."""
        if self._keeps and not self._disk.exists():
            backing = ["-b", str(self._image.disk), "-F", "raw"]
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, self._disk], check=True)
        self._qemu = subprocess.Popen(
            self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log()
        )
        try:
            self._wait_for_ssh()
        except BaseException:
            print(self.console.read_text(errors="replace")[-4000:] if self.console.exists() else "no console output")
            self.close()
            raise
        return self

    def reboot(self) -> None:
        """An orderly restart of a machine that keeps its disk; returns when it answers again."""
        assert self._keeps, "a snapshot forgets at reboot what it should show"
        before = self.run("cat /proc/sys/kernel/random/boot_id")
        self.run("systemctl reboot", check=False)
        self._end_master()
        deadline = time.monotonic() + _BOOT_SECONDS
        while True:
            self._wait_for_ssh()
            with suppress(CommandFailed, subprocess.TimeoutExpired):
                if self.run("cat /proc/sys/kernel/random/boot_id", timeout=20) != before:
                    return
            self._end_master()
            assert time.monotonic() < deadline, f"{self.name} did not restart"
            threading.Event().wait(0.5)

    def power_off(self) -> None:
        """As if its plug were pulled. ``boot`` starts it again, with its disk when it keeps one."""
        self._end_master()
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait(30)
            self._qemu = None

    def close(self) -> None:
        """Gone, its own disk included."""
        self.power_off()
        self._disk.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.boot()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def is_on(self) -> bool:
        return self._qemu is not None

    # -- use ---------------------------------------------------------------------------

    def run(self, command: str, *, stdin: bytes = b"", check: bool = True, timeout: float = 120) -> str:
        """A shell command as root; its output, standard error included."""
        done = subprocess.run(
            [*self._ssh(), command], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout
        )
        output = done.stdout.decode(errors="replace")
        if check and done.returncode:
            raise CommandFailed(f"{self.name}: {command!r} ended with {done.returncode}:\n{output[-6000:]}")
        return output

    def status(self, command: str, timeout: float = 120) -> int:
        """The exit status of a command."""
        return subprocess.run([*self._ssh(), command], capture_output=True, timeout=timeout).returncode

    def write(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        data = content.encode() if isinstance(content, str) else content
        quoted = shlex.quote(path)
        self.run(f"mkdir -p $(dirname {quoted}) && cat >{quoted} && chmod {mode:o} {quoted}", stdin=data)

    def read(self, path: str) -> bytes:
        return subprocess.run([*self._ssh(), f"cat {shlex.quote(path)}"], check=True, capture_output=True).stdout

    def put(self, local: Path, remote: str) -> None:
        """One file, with its mode."""
        self.write(remote, local.read_bytes(), local.stat().st_mode & 0o777)

    def put_tree(self, paths: Iterable[str] = ("flux.py", "fluxlib", "tests", "benchmarks", "debian")) -> None:
        """This source tree as GUEST_TREE; the guest runs it with ``python``."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
            for name in paths:
                if (TOP / name).exists():
                    archive.add(TOP / name, name, filter=_useful)
        self.run(f"mkdir -p {GUEST_TREE} && tar -C {GUEST_TREE} -xzf -", stdin=buffer.getvalue())

    @property
    def python(self) -> str:
        """The guest's Python with this tree and its packages: put this before a script or ``-m module``."""
        return f"env PYTHONPATH={GUEST_TREE}:/opt/site PYTHONDONTWRITEBYTECODE=1 python3"

    # -- inside ------------------------------------------------------------------------

    def _command(self) -> list[str]:
        image = self._image
        disk = f"file={self._disk},format=qcow2" if self._keeps else f"file={image.disk},format=raw,snapshot=on"
        forwards = ",".join(
            f"hostfwd=tcp:{self.address}:{ours}-:{theirs}" for ours, theirs in sorted(self.forwards.items())
        )
        clock = ["-icount", "shift=0"] if self._one_clock else []
        accel = "tcg" if self._one_clock else "tcg,thread=multi"
        return [
            *("qemu-system-x86_64", "-accel", accel, "-cpu", "max", "-m", str(self._memory_mb)),
            *("-smp", str(self._processors), *clock, "-display", "none", "-monitor", "none"),
            *("-serial", f"file:{self.console}", "-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 quiet"),
            *("-drive", f"{disk},if=virtio", "-drive", f"file={image.site},format=raw,if=virtio,readonly=on"),
            *("-netdev", f"user,id=n,{forwards}", "-device", "virtio-net-pci,netdev=n"),
            *("-device", "virtio-rng-pci", *([] if self._keeps else ["-no-reboot"])),
        ]

    def _log(self) -> io.BufferedWriter:
        return (self._directory / f"{self.name}.qemu.log").open("ab")

    def _forward_to(self, guest_port: int) -> int:
        for ours, theirs in self.forwards.items():
            if theirs == guest_port:
                return ours
        with closing(socket.socket()) as probe:
            probe.bind((self.address, 0))
            port = int(probe.getsockname()[1])
        self.forwards[port] = guest_port
        return port

    def _options(self) -> list[str]:
        return [
            *("-i", str(self._image.key), "-p", str(self.ssh_port), "-o", f"ControlPath={self._control}"),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "IdentitiesOnly=yes"),
        ]

    def _ssh(self) -> list[str]:
        return ["ssh", *self._options(), f"root@{self.address}"]

    def _wait_for_ssh(self) -> None:
        """Opens the one connection every command shares: a handshake costs an emulated processor a second."""
        deadline = time.monotonic() + _BOOT_SECONDS
        pause = threading.Event()
        while True:
            assert self._qemu is not None
            assert self._qemu.poll() is None, f"{self.name}: qemu ended, see {self.name}.qemu.log"
            assert time.monotonic() < deadline, f"{self.name} does not answer on SSH"
            if self._greets() and self._open_master():
                return
            pause.wait(0.3)

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.address, self.ssh_port), 2) as probe:
                probe.settimeout(5)
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def _open_master(self) -> bool:
        self._end_master()
        self._control.unlink(missing_ok=True)
        self._master = subprocess.Popen(
            ["ssh", "-M", "-N", *self._options(), f"root@{self.address}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        pause = threading.Event()
        while self._master.poll() is None:
            if self._control.exists():
                return True
            pause.wait(0.05)
        return False

    def _end_master(self) -> None:
        if self._master is not None:
            self._master.kill()
            self._master.wait(10)
            self._master = None


def _useful(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Compiled modules go along when the guest's Python can use them: compiling takes an emulated processor long."""
    return entry if "__pycache__/" not in entry.name or _COMPILED in entry.name else None
