"""What lies about on a machine for a function to find: a socket, a segment, a set-user-ID program, somebody's files."""

from __future__ import annotations

import json

from tests.support.machine import Machine
from tests.vm.rig import STATE, GuestAgent

_KEEPER = """
import ctypes, os, socket, threading
os.makedirs("/var/lib/lab", 0o755, exist_ok=True)
if not os.path.exists("/var/lib/lab/fifo"):
    os.mkfifo("/var/lib/lab/fifo")
os.chmod("/var/lib/lab/fifo", 0o666)
for path in ("/run/lab.sock", "/var/lib/lab/socket", "\\0lab"):
    if path[0] == "/" and os.path.exists(path):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(100)
    globals()["kept" + str(len(path))] = server
os.chmod("/run/lab.sock", 0o666)
os.chmod("/var/lib/lab/socket", 0o777)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.shmget(0x1AB, 4096, 0o1000 | 0o666) >= 0
open("/run/lab.ready", "w").close()
threading.Event().wait()
"""


def lay(machine: Machine) -> None:
    """Once per machine."""
    machine.write("/srv/public-secret.txt", "everybody may read this")
    machine.run("cp /usr/bin/id /usr/local/bin/lab-suid && chmod 4755 /usr/local/bin/lab-suid")
    machine.write("/root/keeper.py", _KEEPER)
    machine.run("echo '|/bin/true' > /proc/sys/kernel/core_pattern")
    machine.run(
        "systemd-run -q --unit lab-keeper python3 /root/keeper.py && until [ -e /run/lab.ready ]; do sleep 0.1; done"
    )


class Victim:
    """Another function that runs, with a secret in its environment, its code and its work directory."""

    def __init__(self, agent: GuestAgent) -> None:
        self._agent = agent
        agent.deploy("victim", "hog.py", env={"SECRET": "topsecret"})
        self.execution = agent.start("victim", "sleep")
        self.pid, self.home, self.tmp, self.cwd, self.uid = agent.said(self.execution, "\n").split()

    def described(self) -> str:
        """The argument of functions/probe.py. Paths as they are for the machine."""
        machine = self._agent.machine
        code = machine.run(f"ls -d {STATE}/functions/victim/*/").split()[0]
        real_work = f"{self.home}/secret"
        # Memory of its own in most profiles: there is no path to it but through its process.
        work = real_work if machine.status(f"test -e {real_work}") == 0 else f"/proc/{self.pid}/root{self.home}/secret"
        return json.dumps(
            {
                "victim": int(self.pid),
                "victim_execution": self.execution,
                "victim_code": f"{code}secret.txt",
                "victim_work": work,
                "agent": int(machine.run("systemctl show -P MainPID flux-agent")),
                "store": machine.run(f"ls {STATE}/*.db").split()[0],
            }
        )

    def end(self) -> None:
        self._agent.cancel(self.execution)
